"""95 % intervals of benchmarks' figures, and of differences between methods on the same samples.

What is a mean of scores has Wilson's interval (answers right or wrong, one a unit) or the normal
one of clusters. Any other figure is computed anew with groups of units left out: the delete-a-group
jackknife (Kott, 2001; Efron & Tibshirani, 1993, ch. 11). It never repeats a sample, as a bootstrap
would: figures that group samples (MME's two questions of an image, MMBench's rotations) would take
the copies for one.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from focus_jax.evaluate.benchmark import Benchmark, Protocol, Rating, Sample
from focus_jax.evaluate.metrics import Z_95, paired_difference, wilson

GROUPS = 200
Figure = Callable[[Sequence[int]], Float[np.ndarray, " K"]]


class Interval(NamedTuple):
    """A figure, or a difference of two, with its 95 % interval; None where there is none."""

    value: float
    low: float | None
    high: float | None


def units_of(samples: Sequence[Sample]) -> Int[np.ndarray, " N"]:
    """The number of each sample's unit; one without a unit is its own."""
    numbers: dict[Hashable, int] = {}
    keys = [(True, s.unit) if s.unit is not None else (False, i) for i, s in enumerate(samples)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def headline(
    benchmark: Benchmark, samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol
) -> Interval:
    """The benchmark's main figure with its interval, within 0 and the figure's scale."""
    units, scores = units_of(samples), scores_of(ratings)
    figure = figure_of(benchmark, samples, [ratings], protocol)
    value = float(figure(range(len(samples)))[0])
    if len(units) < 2 or units.max() < 1:
        return Interval(value, None, None)
    if not benchmark.is_mean:
        found = around(value, float(jackknife(figure, units)[0]))
        if found.low is None or found.high is None:
            return found
        return Interval(value, max(found.low, 0.0), min(found.high, benchmark.scale))
    return Interval(value, *(100 * end for end in of_mean(scores, units)))


def of_mean(scores: Float[np.ndarray, " N"], units: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """The interval of a mean of scores in [0, 1], (low, high) within it.

    Wilson's where every unit is right or wrong as a whole, counted by units; else the normal one.
    """
    count = int(units.max()) + 1
    size = np.bincount(units)
    of_unit = np.bincount(units, weights=scores) / size
    alike = (size == size[0]).all() or (of_unit == of_unit[0]).all()
    if alike and np.isin(of_unit, (0, 1)).all():
        return wilson(int(of_unit.sum()), count)
    _, low, high = paired_difference(scores, np.zeros_like(scores), units)
    return max(low, 0.0), min(high, 1.0)


def difference(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    ratings: Sequence[Rating],
    others: Sequence[Rating],
    protocol: Protocol,
) -> Interval:
    """The main figure of `ratings` minus that of `others`, answers to the same samples."""
    units = units_of(samples)
    figure = figure_of(benchmark, samples, [ratings, others], protocol)

    def gap(places: Sequence[int]) -> Float[np.ndarray, " 1"]:
        ours, theirs = figure(places)
        return np.array([ours - theirs])

    value = float(gap(range(len(samples)))[0])
    if units.max() < 1:
        return Interval(value, None, None)
    if not benchmark.is_mean:
        return around(value, float(jackknife(gap, units)[0]))
    _, low, high = paired_difference(scores_of(ratings), scores_of(others), units)
    return Interval(value, 100 * low, 100 * high)


def figure_of(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    answered: Sequence[Sequence[Rating]],
    protocol: Protocol,
) -> Figure:
    """The main figure of some of the samples, for each of several sets of ratings."""

    def figure(places: Sequence[int]) -> Float[np.ndarray, " K"]:
        part = [samples[i] for i in places]
        sets = ([ratings[i] for i in places] for ratings in answered)
        return np.array([benchmark.summarise(part, r, protocol)[benchmark.headline] for r in sets])

    return figure


def jackknife(
    figure: Figure, units: Int[np.ndarray, " N"], groups: int = GROUPS, seed: int = 0
) -> Float[np.ndarray, " K"]:
    """Standard errors of figures by leaving out groups of units, drawn once and of equal size.

    Up to `groups` of them; units that are left over always stay.
    ValueError: fewer than two units.
    """
    count = int(units.max()) + 1
    if count < 2:
        raise ValueError(f"{count} units; a standard error needs at least two")
    size = -(-count // groups)
    group_of = np.full(count, -1)
    order = np.random.default_rng(seed).permutation(count)
    number = count // size
    group_of[order[: number * size]] = np.repeat(np.arange(number), size)
    own = group_of[units]
    values = np.stack([figure(np.flatnonzero(own != g).tolist()) for g in range(number)])
    spread = ((values - values.mean(0)) ** 2).sum(0)
    return np.sqrt(spread * (number - 1) / number)


def around(value: float, error: float) -> Interval:
    """The normal interval."""
    if not math.isfinite(error):
        return Interval(value, None, None)
    return Interval(value, value - Z_95 * error, value + Z_95 * error)


def scores_of(ratings: Sequence[Rating]) -> Float[np.ndarray, " N"]:
    return np.array([float(rating.score) for rating in ratings])
