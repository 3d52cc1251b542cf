"""What every command shares: errors without a traceback, own flags first, several processes."""

import argparse
import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

Main = Callable[..., int]
# OSError: files and folders that are absent, in the way or cannot be written, and lost connections.
EXPECTED = (ValueError, OSError, FloatingPointError)
# Seconds that process 0 of several lives on after an error.
LINGER = 2.0
CODES = (
    "Exit codes: 0 done, 1 error, 2 wrong flags, 75 stopped by SIGTERM behind a checkpoint (start "
    "again to go on). Where one process of several is lost, the others end with 1 or by SIGABRT."
)


def friendly(main: Main) -> Main:
    """Print an expected error as one message, exit 1; `FOCUS_JAX_TRACEBACK=1` shows it whole.

    A run that was asked to stop says so and exits with 75.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except Exception as error:
            code = tell(error)
            if code is None:
                raise
            return code

    return wrapped


def tell(error: BaseException) -> int | None:
    """Print an expected error as one message; its exit code, None for one that is not expected."""
    if isinstance(error, EXPECTED):
        if os.environ.get("FOCUS_JAX_TRACEBACK"):
            return None
        print(f"error: {error}", file=sys.stderr)
        return 1
    import jax

    from focus_jax.preemption import PREEMPTED, Preempted

    if not isinstance(error, Preempted):
        return None
    if jax.process_index() == 0:
        print(error, file=sys.stderr)
    return PREEMPTED


def split_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The program's own flags, and the rest for `experiment.override`."""
    return parser.parse_known_args(list(argv))


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The flags by which a process finds the others of its job (see `joined`)."""
    of = parser.add_argument_group(
        "several processes", "all three, or none on a TPU pod, under SLURM's srun and Open MPI 4"
    )
    of.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    of.add_argument("--processes", type=int, metavar="N", help="how many there are")
    of.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


@contextlib.contextmanager
def joined(flags: argparse.Namespace, preemptible: bool) -> Iterator[None]:
    """One of several processes while the block runs, where flags or a cluster say so.

    `preemptible`: the block is a training run, which SIGTERM stops behind a checkpoint.
    They leave together. One that fails ends at once, for the others cannot go on without it: an
    expected error as one message, any other with its traceback.
    """
    from focus_jax import distributed

    place = distributed.make_place(flags.coordinator, flags.processes, flags.process_id)
    number = distributed.join(place, preemptible)
    if number is None:
        yield
        return
    from focus_jax.preemption import Preempted

    try:
        yield
    except Preempted:
        distributed.part()
        raise
    except BaseException as error:
        # The others end as soon as process 0 has; most errors are theirs too, and they tell them.
        distributed.abandon(last_words(error), linger=0 if number else LINGER)
    distributed.part()


def last_words(error: BaseException) -> int:
    """Tell what ends a process of several; its exit code."""
    from focus_jax import distributed

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if distributed.is_loss(error):
        print(f"error: {distributed.LOST} ({error})", file=sys.stderr)
        return 1
    code = tell(error)
    if code is None:
        traceback.print_exception(error)
    return code or 1
