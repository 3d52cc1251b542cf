"""Tokens of regions are set beside their glyphs, counted by loops here."""

import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.study.routing import Regions, deciles, glyphs_of, route, summarise


def test_glyphs_of_regions():
    filled = np.random.default_rng(0).random((3, 36)) < 0.4
    wanted = [
        [
            sum(filled[image, 6 * row + col] for row in range(6) for col in range(6)
                if (row // 2, col // 2) == (up, across))
            for up in range(3)
            for across in range(3)
        ]
        for image in range(3)
    ]  # fmt: skip
    np.testing.assert_array_equal(glyphs_of(filled, 2), wanted)


def test_regions_of_a_model(fitted, batches):
    model = fitted.model(fitted.method("focusllava:vision.gate=measured"))
    found = route(model, batches)
    # Five images of four regions, the padding left out; two scales, 8 tokens an image at most.
    assert found.finest == 4 and found.content.shape == found.tokens.shape == (20,)
    assert set(found.tokens.tolist()) <= {1, 4}
    assert (found.tokens.reshape(5, 4).sum(1) <= 8).all()
    filled = np.concatenate([np.asarray(b["cell_filled"]) for b in batches])[:5]
    np.testing.assert_array_equal(found.content, glyphs_of(filled, 2).ravel())
    # A plain image with one busy corner has its finest scale there.
    pixels = jnp.zeros_like(batches[0]["pixels"])
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    busy = {**batches[0], "pixels": pixels.at[:, 0, :16, 16:].set(noise)}
    np.testing.assert_array_equal(route(model, [busy]).tokens.reshape(3, 4), [[1, 4, 1, 1]] * 3)


def test_what_has_no_regions(fitted, batches):
    with pytest.raises(ValueError, match="'full' has no vision-guided sampler"):
        route(fitted.model(fitted.method("full")), batches)
    model = fitted.model(fitted.method("vision_only:vision.gate=measured"))
    bare = {name: array for name, array in batches[0].items() if name != "cell_filled"}
    with pytest.raises(ValueError, match=r"\(`cell_filled`\)"):
        route(model, [bare])


def test_a_summary():
    content = np.array([0] * 12 + [1, 2, 2, 3, 4, 5, 9, 16])
    tokens = np.array([1] * 9 + [4, 4, 16] + [4, 4, 16, 16, 16, 16, 16, 4])
    found = summarise(Regions(content, tokens, 16))
    assert (found.regions, found.finest_share) == (20, 6 / 20)
    assert (found.filled, found.empty) == (5 / 8, 1 / 12)
    assert found.tokens == pytest.approx(tokens.sum())
    assert [(g.low, g.high, g.n, g.share) for g in found.counts] == [
        (0, 0, 12, 1 / 12), (1, 1, 1, 0), (2, 2, 2, 0.5), (3, 3, 1, 1), (4, 16, 4, 0.75)
    ]  # fmt: skip
    assert found.counts[0].mean_tokens == pytest.approx((9 + 8 + 16) / 12)
    assert [(g.low, g.high, g.n) for g in found.deciles] == [
        (0, 0, 12), (1, 1, 1), (2, 3, 3), (4, 5, 2), (9, 16, 2)
    ]  # fmt: skip
    assert 0.6 < (found.correlation or 0) < 1


def test_extremes_of_a_summary():
    content = np.array([0, 0, 1, 3])
    perfect = summarise(Regions(content, np.array([1, 1, 4, 16]), 16))
    assert perfect.correlation == pytest.approx(1)
    assert (perfect.filled, perfect.empty) == (0.5, 0)
    even = summarise(Regions(content, np.full(4, 4), 16))
    assert (even.correlation, even.finest_share) == (None, 0)
    blank = summarise(Regions(np.zeros(3, int), np.array([1, 4, 4]), 4))
    assert (blank.filled, blank.empty) == (None, 2 / 3)
    assert blank.to_json()["counts"][0]["n"] == 3


def test_deciles_are_of_equal_size_and_never_part_equal_contents():
    rng = np.random.default_rng(0)
    distinct = deciles(rng.permutation(200))
    assert np.bincount(distinct).tolist() == [20] * 10
    content = rng.integers(0, 5, 500)
    number = deciles(content)
    for value in range(5):
        assert len(set(number[content == value].tolist())) == 1
    assert (np.diff(number[np.argsort(content)]) >= 0).all()
