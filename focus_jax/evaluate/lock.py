"""A folder of answers for one evaluation at a time."""

import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

LOCK = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this job alone; process 0 holds it, all call this.

    The system lets go of what a killed process held: its file stays, and bars nobody.
    ValueError, on every process: another job is at work there, by host and process.
    """
    with ExitStack() as stack:
        error: ValueError | OSError | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(held(folder))
            except (ValueError, OSError) as found:
                error = found
        if multihost_utils.broadcast_one_to_all(np.int32(error is not None)):
            raise error or ValueError(f"{folder} cannot be used (process 0 tells why)")
        yield


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone. ValueError: another one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another evaluation writes to {folder} ({holder(folder)}): wait for it, or give "
                "another folder (--out)"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{folder} lies where files cannot be locked ({error}): see to it that no other "
                "evaluation writes to it",
                stacklevel=4,
            )
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()
        yield


def holder(folder: Path) -> str:
    """Who holds a folder, in words."""
    try:
        told = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"process {told['process']} on {told['host']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "it does not say which"
