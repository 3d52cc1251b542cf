"""What the processes of a launched job print themselves."""

import re

# Gloo's threads write `[Gloo] Rank 0 is connected to 1 peer ranks. ...` and its line break piece by
# piece: sentences run into each other, and empty lines follow them.
GLOO = re.compile(
    r"\[Gloo\] Rank |\d* is connected to \d*| ?peer ranks\. ?"
    r"|Expected number of connected peer ranks is : ?\d*"
)


def own_lines(printed: str) -> list[str]:
    """The lines `[process] text` of a launched job, without what Gloo put in between."""
    lines = [GLOO.sub("", line).rstrip() for line in printed.splitlines()]
    return [line for line in lines if not re.fullmatch(r"\[\d+\][\s\d]*", line)]
