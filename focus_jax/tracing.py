"""A trace of some steps for TensorBoard's profiler or Perfetto."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

Steps = tuple[int, int]


def parse_steps(text: str) -> Steps:
    """`10:15` as (10, 15), both included. ValueError for what is no range of steps from 1."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} is no range of steps: give FIRST:LAST, as in 10:15")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last:
        raise ValueError(
            f"{text!r} holds no step: they count from 1 and LAST, which is included, is at least "
            "FIRST"
        )
    return first, last


def check_steps(steps: Steps | None, total: int) -> None:
    """ValueError where a run of `total` steps has none of these."""
    if steps is not None and steps[0] > total:
        raise ValueError(
            f"--profile {steps[0]}:{steps[1]} lies behind the last step, {total}: choose "
            "earlier steps"
        )


class Profile:
    """Traces the steps `steps`, both included, into `folder`, from process 0, inside a `with`.

    Those behind the end of the run are left out, and those that a resumed run has behind it.
    `tracer` has `start_trace(folder)`, `stop_trace()` and `StepTraceAnnotation`.
    """

    def __init__(self, folder: Path, steps: Steps | None, start: int = 0, tracer: Any = None):
        self.folder, self.tracer = folder, jax.profiler if tracer is None else tracer
        self.steps = steps if jax.process_index() == 0 else None
        self.running = False
        if self.steps is not None and self.steps[1] <= start:
            print(
                f"--profile {self.steps[0]}:{self.steps[1]}: the run goes on behind step {start}, "
                "nothing is left to trace",
                file=sys.stderr,
            )

    @contextmanager
    def step(self, number: int, settle: Callable[[], None]) -> Iterator[None]:
        """Run one step; `settle` waits until the devices have done all steps handed to them."""
        if self.running and not self.holds(number):
            self.close()
        if self.holds(number) and not self.running:
            settle()
            self.tracer.start_trace(str(self.folder))
            self.running = True
        with self.tracer.StepTraceAnnotation("train", step_num=number):
            yield
        if self.running and not self.holds(number + 1):
            settle()
            self.close()

    def holds(self, number: int) -> bool:
        """Whether a step is to be traced."""
        return self.steps is not None and self.steps[0] <= number <= self.steps[1]

    def close(self) -> None:
        """Write the trace that is under way, if one is."""
        if self.running:
            self.running = False
            self.tracer.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
