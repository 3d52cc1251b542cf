"""`python -m focus_jax golden`: our code on recorded outputs of other implementations."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from focus_jax.cli.arguments import Parser, argv_or
from focus_jax.cli.common import friendly
from focus_jax.compilation import keep_compiled
from focus_jax.evaluate.study import write_json
from focus_jax.golden.case import find
from focus_jax.golden.replay import METHODS, check, summary


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each case and a JSON line behind them. Exit 0 when all that ran agree."""
    flags = parser().parse_args(argv_or(argv))
    cases = find(flags.directories)
    keep_compiled()
    verdicts = {}
    for name, directory in cases.items():
        verdicts[name] = check(directory, flags.only)
        print(verdicts[name].line(name), flush=True)
    found = summary(verdicts)
    if flags.json:
        write_json(flags.json, found)
    print(json.dumps(found))
    if found["skipped"] == found["cases"]:
        raise ValueError(f"nothing was compared: no case is of {', '.join(flags.only)}")
    return 1 if found["failed"] else 0


def parser() -> Parser:
    """The flags of this command."""
    out = Parser(
        "python -m focus_jax golden",
        description=(
            "Run our code on recorded cases (case.json, arrays.npz, perhaps a small network) and "
            "compare every array that they recorded: whole numbers must be equal, others within "
            "the tolerances that the case states."
        ),
        epilog=(
            f"Methods: {', '.join(METHODS)}. A case that cannot be run, or has an array that "
            "nothing here computes, has failed. The last line is a JSON summary. Exit 0 when every "
            "case that ran agrees, else 1."
        ),
    )
    out.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="all cases below it are run"
    )
    out.add_argument(
        "--only", type=methods, default=(), metavar="METHOD[,METHOD]", help="skip the others"
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write the summary here as well")
    return out


def methods(text: str) -> tuple[str, ...]:
    """Names of methods, each known."""
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(
            f"unknown {', '.join(map(repr, unknown))}: choose {', '.join(METHODS)}"
        )
    return names


if __name__ == "__main__":
    sys.exit(main())
