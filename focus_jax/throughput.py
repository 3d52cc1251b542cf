"""How fast training goes: what a step amounts to, how long it takes, how full devices are."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from focus_jax.compress.method import Method
from focus_jax.experiment import Experiment, TrainStage
from focus_jax.objectives import WORD_SLOTS
from focus_jax.pods.chips import peak_of
from focus_jax.pods.counts import Request, entering_rows, train_flops
from focus_jax.sharding import Layout

Clock = Callable[[], float]

# Metrics that depend on the clock and the machine; all others are equal when a run is repeated.
CLOCKED = (
    "seconds_per_step", "step_seconds", "tokens_per_second", "images_per_second",
    "flops_per_second", "mfu", "data_wait", "checkpoint_seconds", "compile_seconds",
    "memory/in_use", "memory/peak", "memory/limit",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """One optimiser step of the whole job, and the devices that share it.

    `tokens`: rows that enter the decoder, text and visual slots, padding included. `flops`: model
    FLOPs by the convention of `pods.counts.TRAIN_CONVENTION`, whatever the program recomputes or
    pads; None where it is not known. `peak`: dense bf16 FLOP/s of one device, None where it is not
    known.
    """

    images: float
    tokens: float
    flops: float | None
    devices: int
    peak: float | None

    def rates(self, seconds: float) -> dict[str, float]:
        """Images, tokens and FLOPs a second of the job, and MFU, for a step of so many seconds.

        MFU is model FLOPs / (seconds x devices x peak); it is left out where one is not known.
        """
        out = {
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
        }
        if self.flops is not None:
            out["flops_per_second"] = self.flops / seconds
            if self.peak is not None:
                out["mfu"] = self.flops / (seconds * self.devices * self.peak)
        return out


def load_of(
    cfg: Experiment,
    stage: TrainStage,
    method: Method,
    layout: Layout,
    request: Request | None = None,
) -> Load:
    """What a step of a stage amounts to; `method` is the stage's own, `request` that of a sample.

    Without a request: the views and the text of the embedded data, padded. Scenes told in words
    pass no tower: their tokens are counted, their operations are not.
    """
    samples = stage.batch * stage.accumulate
    devices = layout.mesh.devices.flatten()
    if request is None:
        request = Request(cfg.tiles, cfg.data.text_length, cfg.data.prefix_length, stage.questions)
    flops: float | None = None
    if stage.objective == "words":
        tokens = request.prefix + WORD_SLOTS + request.questions * request.text
    else:
        tokens = entering_rows(cfg.model, method, request, train=True)
        flops = samples * train_flops(cfg.model, method, request, stage)
    peak = peak_of(devices[0].device_kind)
    return Load(samples * request.images, samples * tokens, flops, len(devices), peak)


class Loads:
    """What steps of a stage amount to, by the shapes of their batches; each is worked out once."""

    def __init__(self, cfg: Experiment, stage: TrainStage, method: Method, layout: Layout):
        self._of_request = lambda request: load_of(cfg, stage, method, layout, request)
        self._found: dict[Request, Load] = {}

    def __call__(self, batches: Mapping[str, np.ndarray]) -> Load:
        """The load of one step's batches, arrays [A B ...]."""
        request = request_of(batches)
        if request not in self._found:
            self._found[request] = self._of_request(request)
        return self._found[request]


def request_of(batches: Mapping[str, np.ndarray]) -> Request:
    """What one sample has, from the shapes of a loader's arrays [A B ...]."""
    views, (questions, text) = batches["pixels"].shape[2], batches["tokens"].shape[2:]
    images = batches["image_at"].shape[2] if "image_at" in batches else 1
    tiles = views // images if images else 1
    return Request(tiles, text, batches["prefix"].shape[2], questions, images)


def mean_load(loads: Sequence[Load]) -> Load:
    """The mean of the loads of some steps, on the same devices."""
    flops = [load.flops for load in loads if load.flops is not None]
    return replace(
        loads[0],
        images=float(np.mean([load.images for load in loads])),
        tokens=float(np.mean([load.tokens for load in loads])),
        flops=float(np.mean(flops)) if len(flops) == len(loads) else None,
    )


def memory_of(devices: Iterable[Any]) -> dict[str, float]:
    """Bytes on the fullest of these devices, now, at most so far, and what it has.

    Empty where the backend does not tell, as on CPU.
    """
    told = [stats for device in devices if (stats := device.memory_stats())]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    found = {short: [s[name] for s in told if name in s] for short, name in names.items()}
    return {f"memory/{short}": float(max(values)) for short, values in found.items() if values}


class Pace:
    """The clock of a stage's steps; the first step, which compiles, is not in it.

    `tick` marks the end of a step; what stands in `waiting`, `aside` and `compiling` belongs to the
    step that is under way; the latter two are not counted as its time.
    """

    def __init__(self, clock: Clock = time.perf_counter):
        self.clock = clock
        self.times: list[float] = []
        self.last: float | None = None
        self.waited = self.apart = self.compiled = 0.0
        # Since the last call of `take`.
        self.recent: list[float] = []
        self.recent_waited = self.recent_apart = self.recent_compiled = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent on getting a batch and handing it to the devices."""
        start = self.clock()
        yield
        self.waited += self.clock() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that belongs to no step: a checkpoint."""
        start = self.clock()
        yield
        self.apart += self.clock() - start

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Time in which a step of a new shape is compiled and handed over."""
        start = self.clock()
        yield
        self.compiled += self.clock() - start

    def tick(self) -> None:
        """Mark the end of a step."""
        now = self.clock()
        if self.last is not None:
            seconds = now - self.last - self.apart - self.compiled
            self.times.append(seconds)
            self.recent.append(seconds)
            self.recent_waited += self.waited
        self.recent_apart += self.apart
        self.recent_compiled += self.compiled
        self.last, self.waited, self.apart, self.compiled = now, 0.0, 0.0, 0.0

    def take(self, load: Load) -> dict[str, float]:
        """What the clock says of the steps since the last call; nothing before the second step.

        `data_wait`: the share of the steps that was spent in `waiting`.
        """
        out: dict[str, float] = {}
        total = sum(self.recent)
        if total > 0:
            mean = total / len(self.recent)
            out = {
                "step_seconds": mean,
                **load.rates(mean),
                "data_wait": self.recent_waited / total,
            }
        if self.recent_apart:
            out["checkpoint_seconds"] = self.recent_apart
        if self.recent_compiled:
            out["compile_seconds"] = self.recent_compiled
        self.recent, self.recent_waited = [], 0.0
        self.recent_apart = self.recent_compiled = 0.0
        return out

    @property
    def lately(self) -> float | None:
        """Mean seconds of the last steps, ten at most; None before the second step of the stage.

        A single one says little: the first look behind a checkpoint comes two batches late.
        """
        last = self.times[-10:]
        return sum(last) / len(last) if last else None

    @property
    def median(self) -> float:
        """Median seconds of a step so far; 0 before the second."""
        return float(np.median(self.times)) if self.times else 0.0
