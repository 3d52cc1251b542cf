"""What a run shows of itself: metrics one step late, their rates, signs of life, traces."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from focus_jax.heartbeat import Heartbeat
from focus_jax.throughput import Load, Pace, memory_of
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

    Every `every` steps they are logged, with what the clock and the memory of `devices` say.
    Raises NonFiniteLoss naming the step and its images.
    """

    def __init__(
        self,
        out: Outlets,
        stage: str,
        every: int,
        load: Load,
        devices: Any = (),
        pace: Pace | None = None,
    ):
        self.out, self.stage, self.every = out, stage, every
        self.load, self.devices = load, devices
        self.pace = Pace() if pace is None else pace
        self.pending: tuple[int, Mapping[str, Array], np.ndarray] | None = None

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

    def see(self, number: int, metrics: Mapping[str, Array], index: np.ndarray) -> None:
        """Take in a step's metrics and the numbers of its images."""
        self.flush()
        self.pending = (number, metrics, index)

    def flush(self) -> None:
        """Check and log the pending step."""
        if self.pending is None:
            return
        number, metrics, index = self.pending
        self.pending = None
        values = {name: float(value) for name, value in metrics.items()}
        self.pace.tick()
        memory = memory_of(self.devices)
        self.beat(number, values["loss"], memory)
        self.check(number, values, index)
        if number % self.every == 0:
            clocked = {"seconds_per_step": self.pace.median, **self.pace.take(self.load)}
            self.out.tracker.log(number, {**values, **clocked, **memory})

    def beat(self, number: int, loss: float, memory: Mapping[str, float]) -> None:
        """Hand a step on to the heartbeat, which tells it in its own time."""
        seconds = self.pace.lately
        rates = self.load.rates(seconds) if seconds else {}
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
