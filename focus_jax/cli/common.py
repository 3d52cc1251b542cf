"""What every command shares: errors without a traceback, own flags before an experiment's."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence

Main = Callable[..., int]
EXPECTED = (ValueError, FileNotFoundError, FileExistsError, FloatingPointError, NotADirectoryError)


def friendly(main: Main) -> Main:
    """Print an expected error as one message, exit 1; `FOCUS_JAX_TRACEBACK=1` shows it whole."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except EXPECTED as error:
            if os.environ.get("FOCUS_JAX_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1

    return wrapped


def split_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The program's own flags, and the rest for `experiment.override`."""
    return parser.parse_known_args(list(argv))
