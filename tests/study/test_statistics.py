"""Intervals respect that questions share an image; ranks are those of a slow definition."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from focus_jax.evaluate.metrics import Z_95, wilson
from focus_jax.study.statistics import difference, median, share_right, spearman


def cluster_error(values: np.ndarray) -> float:
    """The standard error of the mean of [I Q], images drawn independently: by loops."""
    images, questions = values.shape
    mean = values.mean()
    total = 0.0
    for image in range(images):
        total += sum(values[image, q] - mean for q in range(questions)) ** 2
    return np.sqrt(images / (images - 1) * total) / (images * questions)


def answers(seed: int, images: int = 40, questions: int = 6) -> np.ndarray:
    """Right and wrong, with images that differ in difficulty."""
    rng = np.random.default_rng(seed)
    return rng.random((images, questions)) < rng.random((images, 1))


def test_a_share_and_a_difference_have_the_error_of_means_over_images():
    a, b = answers(0), answers(1)
    value, low, high = share_right(a)
    error = Z_95 * cluster_error(a.astype(float))
    assert value == a.mean()
    np.testing.assert_allclose((low, high), (value - error, value + error))
    gap = difference(a, b)
    error = Z_95 * cluster_error(a.astype(float) - b)
    np.testing.assert_allclose(gap, (a.mean() - b.mean(), gap.value - error, gap.value + error))
    low, high = wilson(int(a.sum()), a.size)
    assert share_right(a).high - share_right(a).low > high - low  # not as if all were independent


def test_equal_answers_differ_by_nothing_and_repeats_bring_no_certainty():
    a, b = answers(2), answers(3)
    assert difference(a, a) == (0, 0, 0)
    assert difference(a, b).value == -difference(b, a).value
    twice = difference(np.repeat(a, 2, axis=1), np.repeat(b, 2, axis=1))
    np.testing.assert_allclose(twice, difference(a, b))
    # Another seed has its own images, which do.
    more = difference(np.concatenate([a, a]), np.concatenate([b, b]))
    assert more.high - more.low < twice.high - twice.low


def test_whole_images_have_wilsons_interval():
    a = np.repeat(answers(4, questions=1), 3, axis=1)
    assert share_right(a) == (a.mean(), *wilson(int(a[:, 0].sum()), len(a)))
    assert share_right(np.ones((9, 2), bool))[:2] == (1, wilson(9, 9)[0])


def test_some_of_the_questions():
    a, b = answers(5), answers(6)
    where = np.zeros(a.shape, bool)
    where[::2, 1:3] = True
    np.testing.assert_allclose(share_right(a, where), share_right(a[::2, 1:3]))
    np.testing.assert_allclose(difference(a, b, where), difference(a[::2, 1:3], b[::2, 1:3]))


def test_intervals_cover_the_truth():
    """Of images with a difficulty of their own, 95 % intervals hold the true share about so often:
    here 1/2 by symmetry, and no difference."""
    covered, level = 0, 0
    for seed in range(300):
        _, low, high = share_right(answers(seed))
        covered += low <= 0.5 <= high
        _, low, high = difference(answers(seed), answers(1000 + seed))
        level += low <= 0 <= high
    assert 0.90 < covered / 300 < 0.99
    assert 0.90 < level / 300 < 0.99


@pytest.mark.parametrize("n", [6, 9, 15, 21])
def test_the_interval_of_a_median_holds_it(n):
    rng = np.random.default_rng(n)
    found = [median(row) for row in rng.lognormal(0.0, 1.0, (4000, n)).tolist()]
    held = np.mean([one.low <= 1.0 <= one.high for one in found])
    # The next narrower one, a value less at each end, would hold it with 78 to 92 %.
    assert 0.95 < held < 0.985
    assert all(one.low <= one.value <= one.high for one in found)
    assert median([3.0, 1.0]) == (2.0, 1.0, 3.0)


def test_spearman_with_ties():
    rng = np.random.default_rng(0)
    for size in (2, 5, 60):
        x, y = rng.integers(0, 1 + size // 2, (2, size))
        x[0], y[0], x[-1], y[-1] = 0, 9, 7, 0
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
        assert spearman(x, x**3) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_what_cannot_be_compared():
    a = answers(0)
    with pytest.raises(ValueError, match="do not answer the same questions"):
        difference(a, a[:-1])
    with pytest.raises(ValueError, match=r"must both be \[images, questions\]"):
        share_right(a[0])
    with pytest.raises(ValueError, match=r"of 1 images: an interval needs two"):
        share_right(a[:1])
    with pytest.raises(ValueError, match=r"of 0 images"):
        share_right(a, np.zeros(a.shape, bool))
    for x, y in (([1], [2]), ([1, 2], [1, 2, 3])):
        with pytest.raises(ValueError, match="in pairs"):
            spearman(x, y)
