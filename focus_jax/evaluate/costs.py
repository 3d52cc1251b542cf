"""What an answer of a benchmark costs: visual tokens by the plan, and seconds by the clock."""

from collections.abc import Mapping, Sequence

import numpy as np

from focus_jax.compress.plan import plan
from focus_jax.evaluate.batching import STATE, UNREADABLE, Known, Shape
from focus_jax.evaluate.benchmark import Sample
from focus_jax.models.vlm import VLM, dims_of, sizes_of


def visual_tokens(vlm: VLM, samples: Sequence[Sample], known: Known) -> tuple[float, float]:
    """Visual slots of a sample, the mean over layers, and their share of all patches'.

    Samples whose image cannot be read are left out.
    """
    slots, full = [], []
    read = known[:, STATE] != UNREADABLE
    pictured = read & np.array([bool(sample.images) for sample in samples])
    kinds, counts = np.unique(known[pictured][:, :STATE], axis=0, return_counts=True)
    for (images, tiles, text), count in zip(kinds, counts, strict=True):
        cost = plan(
            vlm.method, dims_of(vlm.cfg, int(tiles)), sizes_of(vlm.cfg), int(text), head_tokens=1
        )
        slots.append(int(count) * int(images) * cost.mean_slots)
        full.append(int(count) * int(images) * cost.full)
    return sum(slots) / max(read.sum(), 1), sum(slots) / sum(full) if full else 0.0


def seconds_per_sample(known: Known, seconds: Mapping[Shape, float]) -> float | None:
    """Each shape by its share of the samples whose shape was timed; None where none was."""
    shapes = [Shape(*map(int, row[:STATE])) for row in known]
    timed = [seconds[shape] for shape in shapes if shape in seconds]
    return float(np.mean(timed)) if timed else None
