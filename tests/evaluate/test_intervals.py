"""Intervals of benchmarks' figures against known values and simulations."""

import math

import numpy as np
import pytest

from focus_jax.evaluate.benchmark import Benchmark, Rating, Sample, mean
from focus_jax.evaluate.intervals import (
    difference,
    headline,
    jackknife,
    units_of,
)
from focus_jax.evaluate.metrics import wilson

RNG = np.random.default_rng(5)


def benchmark(summarise=mean, **more) -> Benchmark:
    return Benchmark("toy", "Toy", "m", lambda *_: [], lambda *_: Rating(0), summarise, **more)


def samples_of(units) -> list[Sample]:
    return [Sample(str(i), (), "?", {}, unit) for i, unit in enumerate(units)]


def rated(scores) -> list[Rating]:
    return [Rating(float(score)) for score in scores]


def test_units_are_numbered_and_a_sample_without_one_stands_alone():
    assert units_of(samples_of(["a", "b", None, "a", None, 4])).tolist() == [0, 1, 2, 0, 3, 4]


def test_right_and_wrong_answers_have_wilsons_interval():
    """81 of 263 is Newcombe's (1998) example."""
    scores = np.arange(263) < 81
    found = headline(benchmark(), samples_of([None] * 263), rated(scores), "llava")
    assert found.value == pytest.approx(100 * 81 / 263)
    assert (found.low, found.high) == pytest.approx((25.53, 36.62), abs=0.005)
    # The same with every question asked three times: copies bring no certainty.
    thrice = headline(
        benchmark(), samples_of(np.repeat(np.arange(263), 3)), rated(np.repeat(scores, 3)), "llava"
    )
    assert thrice == pytest.approx(found)
    none = headline(benchmark(), samples_of([0, 0, 1]), rated([0, 0, 0]), "llava")
    assert (none.low, none.high) == pytest.approx((0, 100 * wilson(0, 2)[1]))


def test_partial_scores_have_the_normal_interval_of_their_units():
    scores = [0.3, 0.6, 1.0, 0.0, 0.9, 0.6]
    found = headline(benchmark(), samples_of("aabbcc"), rated(scores), "llava")
    centre = np.mean(scores)
    sums = np.array([0.9, 1.0, 1.5]) - 2 * centre
    half = 1.96 * math.sqrt(3 / 2 * (sums**2).sum()) / 6
    assert found == pytest.approx((100 * centre, 100 * (centre - half), 100 * (centre + half)))
    assert headline(benchmark(), samples_of("aa"), rated([0, 1]), "llava") == (50, None, None)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """One unit at a time it is exact; in groups it comes near."""
    values = RNG.normal(size=120)
    figure = lambda at: np.array([values[at].mean()])  # noqa: E731
    exact = values.std(ddof=1) / math.sqrt(120)
    assert jackknife(figure, np.arange(120))[0] == pytest.approx(exact)
    many = RNG.normal(size=4001)
    figure = lambda at: np.array([many[at].mean()])  # noqa: E731
    assert jackknife(figure, np.arange(4001))[0] == pytest.approx(1 / math.sqrt(4001), rel=0.2)
    with pytest.raises(ValueError, match="1 units; a standard error needs at least two"):
        jackknife(figure, np.zeros(3, int))


def both_right(samples, ratings, protocol):
    """As MME's accuracy+: an image counts where both of its questions are right."""
    images: dict = {}
    for sample, rating in zip(samples, ratings, strict=True):
        images.setdefault(sample.unit, []).append(rating.score)
    return {"accuracy": 100 * float(np.mean([min(scores) for scores in images.values()]))}


def test_no_figure_leaves_its_scale():
    """Three of four groups right: the normal interval reaches beyond all four."""
    scores, samples = [1.0, 1.0, 1.0, 0.0], samples_of("abcd")
    grouped = benchmark(both_right, is_mean=False)
    assert headline(grouped, samples, rated(scores), "llava").high == 100
    wide = headline(
        benchmark(both_right, is_mean=False, scale=1000), samples, rated(scores), "llava"
    )
    assert 100 < wide.high < 1000
    assert headline(grouped, samples, rated([0.0, 0.0, 0.0, 1.0]), "llava").low == 0


def test_a_figure_of_groups_has_the_spread_of_repeated_experiments():
    """The interval's width against figures of fresh samples; coverage of the truth, 0.6^2 + ..."""
    grouped, images = benchmark(both_right, is_mean=False), 150

    def draw() -> np.ndarray:
        easy = RNG.random(images) < 0.5  # the questions of an image are right together, or apart
        both = RNG.random(images) < 0.6
        apart = RNG.random((images, 2)) < 0.6
        return np.where(easy[:, None], both[:, None], apart).ravel().astype(float)

    units, truth = np.repeat(np.arange(images), 2), 100 * (0.5 * 0.6 + 0.5 * 0.36)
    found = [headline(grouped, samples_of(units), rated(draw()), "llava") for _ in range(40)]
    spread = np.std([interval.value for interval in found], ddof=1)
    half = np.mean([(interval.high - interval.low) / 2 for interval in found])
    assert half == pytest.approx(1.96 * spread, rel=0.25)
    assert np.mean([low <= truth <= high for _, low, high in found]) >= 0.85


def test_a_difference_is_paired():
    """Two methods that err on the same hard samples differ far less than either is uncertain."""
    hard = RNG.random(400) < 0.5
    a = np.where(hard, 0, RNG.random(400) < 0.98).astype(float)
    b = np.where(hard, 0, RNG.random(400) < 0.90).astype(float)
    samples = samples_of([None] * 400)
    gap = difference(benchmark(), samples, rated(a), rated(b), "llava")
    each = a - b
    half = 196 * each.std(ddof=1) / math.sqrt(400)
    assert gap == pytest.approx((100 * each.mean(), 100 * each.mean() - half, gap.high), abs=1e-9)
    alone = headline(benchmark(), samples, rated(a), "llava")
    assert gap.high - gap.low < (alone.high - alone.low) / 2
    # The same figure by the jackknife, two samples left out at a time.
    other = difference(benchmark(is_mean=False), samples, rated(a), rated(b), "llava")
    assert other.value == pytest.approx(gap.value)
    assert other.high - other.low == pytest.approx(gap.high - gap.low, rel=0.2)
    same = difference(benchmark(is_mean=False), samples, rated(a), rated(a), "llava")
    assert same == (0, 0, 0)
