"""Metrics against hand-computed values and brute force."""

import itertools
import math

import numpy as np
import pytest

from focus_jax.evaluate import metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Cat.\n", "the cat"),
        ("1 2 3.", "123"),
        ("7 1 red 4\t2", "71 red 42"),
        ("3.5", "3.5"),
        ("Yes .", "yes"),
        ("etc..", "etc."),
        ("A4 5B", "a45b"),
        (".", ""),
    ],
)
def test_normalise(text, expected):
    assert metrics.normalise(text) == expected
    assert metrics.exact_match(text, expected + ".")


def test_exact_match_is_not_containment():
    assert metrics.exact_match("4 2", "42.")
    assert not metrics.exact_match("420", "42")
    assert not metrics.exact_match("", "no")


def test_wilson_matches_published_and_limiting_values():
    # 81 of 263 is Newcombe's (1998) example: 0.2553 to 0.3662 for the score method.
    low, high = metrics.wilson(81, 263, z=1.959964)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = metrics.wilson(0, 10)
    assert low == 0 and high == pytest.approx(1.96**2 / (10 + 1.96**2))
    assert metrics.wilson(10, 10) == (pytest.approx(1 - high), 1.0)


@pytest.mark.parametrize(("correct", "n"), [(1, 3), (7, 9), (50, 100)])
def test_wilson_ends_are_where_the_score_test_turns(correct, n):
    for p in metrics.wilson(correct, n):
        assert abs(correct / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))


def test_paired_difference_by_hand():
    a, b = np.array([1, 1, 1, 0], bool), np.array([0, 1, 0, 1], bool)
    # differences 1, 0, 1, -1: mean 1/4, variance (0.5625 * 2 + 0.0625 + 1.5625) / 3 = 11/12
    mean, low, high = metrics.paired_difference(a, b)
    half = 1.96 * math.sqrt(11 / 12 / 4)
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert metrics.paired_difference(a, b, clusters=["w", "x", "y", "z"]) == (mean, low, high)


def test_paired_difference_repeats_bring_no_certainty():
    a, b = np.array([1, 1, 0, 1], bool), np.array([0, 1, 1, 0], bool)
    single = metrics.paired_difference(a, b)
    repeated = metrics.paired_difference(
        np.repeat(a, 5), np.repeat(b, 5), clusters=np.repeat(["i", "j", "k", "l"], 5)
    )
    assert repeated == pytest.approx(single)


def test_cluster_error_matches_every_possible_resample():
    # With two clusters of two, the bootstrap over clusters has 4 outcomes; its variance is the
    # cluster variance without the G / (G - 1) correction.
    difference = np.array([1, 1, 0, -1])
    pairs = difference.reshape(2, 2)
    means = [pairs[list(draw)].mean() for draw in itertools.product(range(2), repeat=2)]
    mean, low, high = metrics.paired_difference(
        difference > 0, difference < 0, clusters=np.array([7, 7, 3, 3])
    )
    assert mean == pytest.approx(np.mean(means))
    assert ((high - low) / (2 * 1.96)) ** 2 == pytest.approx(2 * np.var(means))


def test_by_kind_counts_each_kind_and_all():
    scores = metrics.by_kind(["text", "count", "text", "text"], [True, False, True, False])
    assert list(scores) == ["all", "count", "text"]
    assert [scores[kind]["n"] for kind in scores] == [4, 1, 3]
    assert [scores[kind]["accuracy"] for kind in scores] == pytest.approx([0.5, 0, 2 / 3])
    assert (scores["text"]["low"], scores["text"]["high"]) == metrics.wilson(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.wilson(0, 0), "n is 0"),
        (lambda: metrics.wilson(4, 3), "correct is 4"),
        (lambda: metrics.paired_difference(np.ones(3, bool), np.ones(2, bool)), "flat"),
        (lambda: metrics.paired_difference(np.ones(2, bool), np.ones(2, bool), [1, 1]), "1 clus"),
        (lambda: metrics.paired_difference(np.ones(2, bool), np.ones(2, bool), [1]), "one length"),
        (lambda: metrics.by_kind([], []), "not none"),
        (lambda: metrics.by_kind(["a"], [True, False]), "one of each"),
        (lambda: metrics.by_kind(["all"], [True]), "rename"),
        (lambda: metrics.by_kind(["a", "b"], [0.5, 1]), "0.5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
