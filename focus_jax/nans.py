"""The operation that makes the first number that is none, named with its line."""

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

PACKAGE = str(Path(__file__).parent)


@contextmanager
def naming_nans() -> Iterator[None]:
    """Check every program's results for NaN; the first one ends the block.

    Raises FloatingPointError naming the operation and the line of this package that asked for it:
    jax runs the program again, an operation at a time. Slow, and nothing is donated: for a search.
    """
    with jax.debug_nans(True):
        try:
            yield
        except FloatingPointError as error:
            if type(error) is not FloatingPointError:
                raise  # our own, which says enough
            place = innermost(error)
            raise FloatingPointError(f"{error} ({place})" if place else str(error)) from error


def innermost(error: BaseException) -> str:
    """The innermost line of this package in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(PACKAGE)]
    if not own:
        return ""
    last = own[-1]
    return f"{Path(last.filename).relative_to(Path(PACKAGE).parent)}:{last.lineno} in {last.name}"


def unrolled(function: Callable) -> Callable:
    """`function`, whose loops are operations of their own when jax runs it again without `jit`.

    Otherwise a NaN inside a stack of layers would be that of `scan`.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            return function(*args)
        with jax.disable_jit():
            return function(*args)

    return run
