"""Exact match and the intervals that belong beside every score."""

import math
import re
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool

Z_95 = 1.96  # two-sided 95 % of the normal distribution


def normalise(text: str) -> str:
    """Lower case, one trailing period removed, white space folded, and none between digits.

    "The  cat. " -> "the cat"; "1 2 3." -> "123". Nothing else is touched ("3.5", "no, sir").
    """
    folded = " ".join(text.lower().split()).removesuffix(".").rstrip()
    return re.sub(r"(?<=\d) (?=\d)", "", folded)


def exact_match(prediction: str, gold: str) -> bool:
    """Whether both texts are the same after `normalise`."""
    return normalise(prediction) == normalise(gold)


def wilson(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share: (low, high) within [0, 1].

    ValueError: n < 1, or correct outside [0, n].
    """
    if n < 1:
        raise ValueError(f"n is {n}; an interval needs at least one answer")
    if not 0 <= correct <= n:
        raise ValueError(f"correct is {correct} of n = {n}; give a count between 0 and n")
    share = correct / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The exact ends at 0 and n are 0 and 1; rounding would leave them a hair outside.
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == n else (centre + half) / scale
    return low, high


def paired_difference(
    a: Bool[np.ndarray, " N"],
    b: Bool[np.ndarray, " N"],
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    z: float = Z_95,
) -> tuple[float, float, float]:
    """Mean of a - b over the same questions with its normal interval: (mean, low, high).

    Questions on one image are not independent: with `clusters` (an image id per question) the
    standard error is that of the mean over clusters, sqrt(G / (G - 1) * sum_g (sum of residuals in
    g)^2) / N, which for clusters of one is the plain one.
    ValueError: lengths that differ, or fewer than two questions or clusters.
    """
    labels = np.arange(np.size(a)) if clusters is None else _cluster_numbers(clusters)
    if not np.shape(a) == np.shape(b) == labels.shape:
        raise ValueError(
            f"a {np.shape(a)}, b {np.shape(b)} and clusters {labels.shape} must be flat and of one "
            f"length: one entry per question"
        )
    difference = np.asarray(a, float) - np.asarray(b, float)
    groups = len(np.unique(labels))
    if groups < 2:
        what = "questions" if clusters is None else "clusters"
        raise ValueError(f"found {groups} {what}; a standard error needs at least two")
    mean = float(difference.mean())
    residual = np.bincount(labels, weights=difference - mean)
    error = math.sqrt(groups / (groups - 1) * float((residual**2).sum())) / difference.size
    return mean, mean - z * error, mean + z * error


def by_kind(
    kinds: Sequence[str], correct: Sequence[bool] | np.ndarray
) -> dict[str, dict[str, float]]:
    """Accuracy with Wilson's 95 % interval under "all" and under each kind of question, sorted.

    Each entry holds `accuracy`, `low`, `high` (shares of 1) and `n`. ValueError: lengths that
    differ, no answer, a kind called "all", or `correct` with values other than true and false.
    """
    hits = np.asarray(correct)
    if hits.shape != (len(kinds),) or not len(kinds):
        raise ValueError(f"{len(kinds)} kinds and correct {hits.shape}: give one of each, not none")
    if not np.isin(hits, (0, 1)).all():
        raise ValueError(f"correct holds {hits[~np.isin(hits, (0, 1))][0]}; give true or false")
    if "all" in kinds:
        raise ValueError('a kind is called "all", the name of the total; rename it')
    names = np.asarray(kinds)
    groups = {"all": hits} | {kind: hits[names == kind] for kind in sorted(set(kinds))}
    return {kind: _summary(group) for kind, group in groups.items()}


def _summary(hits: np.ndarray) -> dict[str, float]:
    count, n = int(hits.sum()), len(hits)
    low, high = wilson(count, n)
    return {"accuracy": count / n, "low": low, "high": high, "n": n}


def _cluster_numbers(clusters: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    number: dict[Hashable, int] = {}
    return np.asarray([number.setdefault(c, len(number)) for c in clusters], int)
