"""What a run shows of itself: metrics one step late, their rates, signs of life, traces."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from focus_jax.heartbeat import Heartbeat
from focus_jax.throughput import Load, Pace, mean_load, memory_of
from focus_jax.tracing import Profile, Steps
from focus_jax.tracker import Tracker


class NonFiniteLoss(FloatingPointError):
    """A step's loss or gradient was not finite."""


@dataclass(frozen=True)
class Watching:
    """What is shown beside the metrics: `heartbeat` every so many seconds (0: never), `profile`,
    the first and last step of a trace.
    """

    heartbeat: float = 30.0
    profile: Steps | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.heartbeat < math.inf:
            raise ValueError(f"--heartbeat {self.heartbeat}: give seconds, 0 for none")


class Outlets(NamedTuple):
    """Where a run is seen: metrics, signs of life, a trace of some steps."""

    tracker: Tracker
    heartbeat: Heartbeat
    profile: Profile


@contextmanager
def outlets(
    watching: Watching, workdir: Path, total: int, name: str, start: int = 0, quiet: bool = False
) -> Iterator[Outlets]:
    """The outlets of a run of `total` steps that begins behind step `start`."""
    with (
        Tracker(workdir, total, name, start, quiet) as tracker,
        Heartbeat(workdir, watching.heartbeat, total, start, quiet) as heartbeat,
        Profile(workdir / "profile", watching.profile, start) as profile,
    ):
        yield Outlets(tracker, heartbeat, profile)


class Watch:
    """Looks at a step's metrics one step late, so that the device never waits for the host.

    Every `every` steps they are logged, with what the clock and the memory of `devices` say; steps
    may differ in what they report and in their load.
    Raises NonFiniteLoss naming the step and its images.
    """

    def __init__(
        self,
        out: Outlets,
        stage: str,
        every: int,
        devices: Any = (),
        pace: Pace | None = None,
    ):
        self.out, self.stage, self.every = out, stage, every
        self.devices = devices
        self.pace = Pace() if pace is None else pace
        self.pending: tuple[int, Mapping[str, Array], np.ndarray, Load] | None = None
        self.loads: list[Load] = []  # of the steps since the last line, ten at least
        self.compiled: set[Load] = set()

    def step(self, number: int) -> AbstractContextManager[None]:
        """All that belongs to one step; traced where a profile asks for it."""
        return self.out.profile.step(number, self.flush)

    def waiting(self) -> AbstractContextManager[None]:
        """Getting a batch and handing it to the devices."""
        return self.pace.waiting()

    def aside(self) -> AbstractContextManager[None]:
        """What belongs to no step, such as a checkpoint; waits for the steps before it."""
        self.flush()
        return self.pace.aside()

    def running(self, load: Load) -> AbstractContextManager[None]:
        """Handing a step to the devices; the first one of its kind is compiled here."""
        if load in self.compiled:
            return nullcontext()
        self.compiled.add(load)
        return self.pace.compiling()

    def see(
        self,
        number: int,
        metrics: Mapping[str, Array],
        index: np.ndarray,
        load: Load,
    ) -> None:
        """Take in a step's metrics, the numbers of its images, and its load."""
        self.flush()
        self.pending = (number, metrics, index, load)

    def flush(self) -> None:
        """Check and log the pending step."""
        if self.pending is None:
            return
        number, metrics, index, load = self.pending
        self.pending = None
        self.loads.append(load)
        values = {name: float(value) for name, value in metrics.items()}
        self.pace.tick()
        memory = memory_of(self.devices)
        self.beat(number, values["loss"], memory)
        self.check(number, values, index)
        if number % self.every == 0:
            since = mean_load(self.loads[-max(len(self.pace.recent), 1) :])
            clocked = {"seconds_per_step": self.pace.median, **self.pace.take(since)}
            self.out.tracker.log(number, {**values, **clocked, **memory})
            self.loads = self.loads[-10:]

    def beat(self, number: int, loss: float, memory: Mapping[str, float]) -> None:
        """Hand a step on to the heartbeat, which tells it in its own time."""
        seconds = self.pace.lately
        lately = mean_load(self.loads[-min(len(self.pace.times), 10) :])
        rates = lately.rates(seconds) if seconds else {}
        self.out.heartbeat.update(
            number, stage=self.stage, loss=loss, step_seconds=seconds,
            tokens_per_second=rates.get("tokens_per_second"), mfu=rates.get("mfu"),
            **{name.replace("/", "_"): int(value) for name, value in memory.items()},
        )  # fmt: skip

    def check(self, number: int, values: Mapping[str, float], index: np.ndarray) -> None:
        """NonFiniteLoss unless a step's loss and gradient are finite."""
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        raise NonFiniteLoss(
            f"step {number} (stage {self.stage!r}): loss {values['loss']}, gradient norm "
            f"{values['gradient_norm']}; images {index.ravel().tolist()}. The last checkpoint is "
            "from before it: lower the learning rate or look at these images, then start again"
        )

    @property
    def seconds_per_step(self) -> float:
        """Median time of a step so far, the first (compilation) left out."""
        return self.pace.median
