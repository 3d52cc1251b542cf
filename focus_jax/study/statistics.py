"""Shares, differences and rank correlations of answers, with 95 % intervals.

Questions of an image are not independent, so errors are those of means over images. Answers are
[I Q]; several seeds, each with images of its own, stand behind one another as more images.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from focus_jax.evaluate.intervals import of_mean
from focus_jax.evaluate.metrics import paired_difference


class Estimate(NamedTuple):
    """A share, or a difference of two, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def share_right(
    correct: Bool[np.ndarray, "I Q"], where: Bool[np.ndarray, "I Q"] | None = None
) -> Estimate:
    """The share of right answers (among those in `where`), its interval within [0, 1].

    Wilson's, counted by images, where each image is right or wrong as a whole; else the normal one.
    ValueError: shapes that do not fit, no answer, or the answers of one image alone.
    """
    hits, images = by_image(correct, where)
    return Estimate(float(hits.mean()), *of_mean(hits, images))


def difference(
    ours: Bool[np.ndarray, "I Q"],
    theirs: Bool[np.ndarray, "I Q"],
    where: Bool[np.ndarray, "I Q"] | None = None,
) -> Estimate:
    """Share right of `ours` minus that of `theirs`: the same questions in the same order.

    ValueError: shapes that do not fit, no answer, or the answers of one image alone.
    """
    if np.shape(ours) != np.shape(theirs):
        raise ValueError(
            f"ours {np.shape(ours)} and theirs {np.shape(theirs)} do not answer the same questions:"
            " give both for the same split, limit and seeds"
        )
    a, images = by_image(ours, where)
    b, _ = by_image(theirs, where)
    return Estimate(*paired_difference(a, b, images))


def median(values: Sequence[float]) -> Estimate:
    """The median, and the ends of an interval that holds it with at least 95 %, whatever the noise.

    By order statistics: each value lies below the true median as often as above. Under 6 values
    even the whole range holds it less often; it is what comes back then. ValueError: no value.
    """
    found = sorted(values)
    if not found:
        raise ValueError("the median of no value: measure something first")
    n = len(found)
    outside = np.cumsum([2 * math.comb(n, k) / 2**n for k in range((n + 1) // 2)])
    at = max(int((outside <= 0.05).sum()) - 1, 0)
    return Estimate(statistics.median(found), found[at], found[-1 - at])


def by_image(
    correct: Bool[np.ndarray, "I Q"], where: Bool[np.ndarray, "I Q"] | None
) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The chosen answers as 0 and 1, and the number of the image of each, without gaps."""
    hits = np.asarray(correct, float)
    chosen = np.ones(hits.shape, bool) if where is None else np.asarray(where, bool)
    if hits.ndim != 2 or chosen.shape != hits.shape:
        raise ValueError(
            f"answers {hits.shape} and where {chosen.shape} must both be [images, questions]"
        )
    images = np.unique(np.nonzero(chosen)[0], return_inverse=True)[1]
    if not images.size or images.max() < 1:
        raise ValueError(
            f"answers to questions of {len(np.unique(images))} images: an interval needs two"
        )
    return hits[chosen], images


def spearman(x: Any, y: Any) -> float | None:
    """Spearman's rank correlation of two arrays of one shape, ties at their mean rank.

    None where either is constant. ValueError: shapes that differ, or fewer than two values.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape or x.size < 2:
        raise ValueError(f"x {x.shape} and y {y.shape}: give two or more values of each, in pairs")
    a, b = (ranks(values) - (values.size - 1) / 2 for values in (x, y))
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else None


def ranks(values: np.ndarray) -> Float[np.ndarray, " N"]:
    """The rank of each value from 0, equal ones at the mean of theirs; flattened."""
    _, group, count = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    before = np.cumsum(count) - count
    return (before + (count - 1) / 2)[group.ravel()]
