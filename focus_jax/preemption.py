"""Being asked to stop: SIGTERM on one process, agreed on by all, acted on at one step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from jax.experimental import multihost_utils

from focus_jax.distributed import several

# EX_TEMPFAIL of sysexits.h: nothing is wrong, start again.
PREEMPTED = 75


class Preempted(Exception):
    """The run was asked to stop, and has written a checkpoint."""


class Preemption:
    """Listens for SIGTERM while a run goes on: `with Preemption() as preemption: ...`.

    Alone, the first SIGTERM asks to stop and a second one ends the process, as do all outside the
    main thread. In a job of several, jax listens from `join` on and names a step to all.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def reached(self, step: int) -> bool:
        """Whether all processes are to stop behind this step; every one calls it at every step."""
        if several():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, self.before)

    def __enter__(self) -> Self:
        if not several() and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
