"""Baselines against loops over patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress import baselines
from focus_jax.compress.baselines import Downsample, Full, Pool, Random, Uniform, area_weights
from focus_jax.compress.method import block_key
from tests.compress.views import RUN, dims, identity, random_views


def one_group(stage, d, views):
    [tokens], aux = stage.apply(views, d, None, identity, RUN)
    assert not aux.losses
    assert tokens.features.shape[2] == stage.tile_slots(d)[0]
    return tokens


def test_full_is_every_patch():
    d = dims(3)
    views = random_views(d, padded=0.3)
    tokens = one_group(Full(), d, views)
    np.testing.assert_array_equal(tokens.features, views.features)
    np.testing.assert_array_equal(tokens.valid, views.patch_valid)
    assert tokens.centre[0, 1, 19].tolist() == [2, 3]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_pool_is_the_mean_of_valid_patches(size):
    d = dims(1)
    views = random_views(d, padded=0.6)
    tokens = one_group(Pool(size), d, views)
    x = np.asarray(views.features).reshape(2, 8, 8, -1)
    seen = np.asarray(views.patch_valid).reshape(2, 8, 8)
    step = 8 // size
    for b, i, j in np.ndindex(2, size, size):
        cell = np.s_[b, i * step : (i + 1) * step, j * step : (j + 1) * step]
        k = i * size + j
        assert tokens.valid[b, 0, k] == seen[cell].any()
        assert tokens.centre[b, 0, k].tolist() == [(i + 0.5) * step - 0.5, (j + 0.5) * step - 0.5]
        assert tokens.side[b, 0, k] == step
        if seen[cell].any():
            want = x[cell][seen[cell]].mean(0)
            np.testing.assert_allclose(tokens.features[b, 0, k], want, rtol=1e-5, atol=1e-6)


def test_pool_to_a_size_that_does_not_divide():
    """Three cells over eight patches: shared patches count by the area in each."""
    d = dims(1)
    views = random_views(d)
    tokens = one_group(Pool(3), d, views)
    fine = np.asarray(views.features).reshape(2, 8, 8, -1).repeat(3, 1).repeat(3, 2)
    want = fine.reshape(2, 3, 8, 3, 8, -1).mean((2, 4)).reshape(2, 9, -1)
    np.testing.assert_allclose(tokens.features[:, 0], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(area_weights(8, 3).sum(1), 8 / 3, rtol=1e-6)


def test_a_key_for_each_sample_draws_whatever_stands_beside_it():
    d = dims(1)
    views, keys = random_views(d), jax.random.split(jax.random.key(3), 2)

    def draw(views, keys):
        ctx = RUN._replace(key=keys)
        ctx = ctx._replace(key=block_key(ctx, "vision"))
        [tokens], _ = Random(0.3).apply(views, d, None, identity, ctx)
        return tokens.centre

    both = draw(views, keys)
    turned = draw(jax.tree.map(lambda x: x[::-1], views), keys[::-1])
    np.testing.assert_array_equal(turned, both[::-1])
    assert (both[0] != both[1]).any()


def kept_cells(d, views, keys):
    """Which patches `Random` keeps, for each tile: sets of their numbers."""
    [tokens], _ = Random(0.3).apply(views, d, None, identity, RUN._replace(key=keys))
    cells = (np.asarray(tokens.centre) @ [d.cols, 1]).astype(int)
    return [
        [set(row[ok]) for row, ok in zip(*tile, strict=True)]
        for tile in zip(cells, np.asarray(tokens.valid), strict=True)
    ]


def test_with_one_image_a_prompt_each_key_draws_for_its_own():
    d = dims(3)
    views, keys = random_views(d, padded=0.3), jax.random.split(jax.random.key(7), 2)
    for key, valid, kept in zip(
        keys, np.asarray(views.patch_valid), kept_cells(d, views, keys), strict=True
    ):
        score = np.where(valid, jax.random.uniform(key, valid.shape), -1)
        for tile, (row, ok) in enumerate(zip(score, valid, strict=True)):
            best = np.argsort(-row)[: int(np.ceil(0.3 * ok.sum()))]
            assert kept[tile] == set(best.tolist())


def test_several_images_a_prompt_share_a_key_and_no_draw():
    d = dims(1)
    views, keys = random_views(d, batch=4), jax.random.split(jax.random.key(7), 2)
    kept = kept_cells(d, views, keys)  # images 0, 1 of the first prompt, 2, 3 of the second
    assert len({frozenset(image) for [image] in kept}) == 4
    alone = kept_cells(d, jax.tree.map(lambda x: x[2:], views), keys[1:])
    assert alone == kept[2:]


@pytest.mark.parametrize("stage", [Random(0.3), Uniform(0.3)])
def test_a_share_in_raster_order(stage):
    d = dims(3)
    views = random_views(d, padded=0.5)
    tokens = one_group(stage, d, views)
    x = np.asarray(views.features)
    for b, m in np.ndindex(2, 3):
        valid = np.asarray(tokens.valid[b, m])
        index = (np.asarray(tokens.centre[b, m]) @ [8, 1]).astype(int)[valid]
        assert (np.diff(index) > 0).all()
        assert views.patch_valid[b, m, index].all()
        np.testing.assert_array_equal(tokens.features[b, m, valid], x[b, m, index])
        if isinstance(stage, Random):
            assert len(index) == np.ceil(0.3 * int(views.patch_valid[b, m].sum()))


def test_random_draws_differ_between_images():
    d = dims(1)
    tokens = one_group(Random(0.25), d, random_views(d))
    assert not jnp.array_equal(tokens.centre[0], tokens.centre[1])


def test_downsample_takes_the_towers_smaller_grid():
    d = dims(1)
    stage = Downsample(4)
    assert stage.grid == 4
    views = random_views(d, grid=4)
    valid = np.zeros((2, 8, 8), bool)
    valid[0, 3:5, 0] = True  # of two cells, a corner each
    tokens = one_group(stage, d, views._replace(patch_valid=jnp.asarray(valid.reshape(2, 1, 64))))
    np.testing.assert_array_equal(tokens.features, views.features)
    assert np.flatnonzero(tokens.valid[0, 0]).tolist() == [4, 8]
    assert not tokens.valid[1].any()


def test_rows_of_cells_end_in_one_newline():
    d = dims(5)
    assert Full().slots(d) == 5 * 64 + 16
    for stage in (Pool(4), Downsample(4)):
        assert stage.slots(d) == 5 * 16 + 8


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (baselines.random(0.0), "keep=0.0"),
        (baselines.random(1.5), "keep=1.5"),
        (baselines.uniform(-0.5), "keep=-0.5"),
        (baselines.pool(0), "size=0"),
        (baselines.pool(9), "size=9"),
        (baselines.downsample(9), "size=9"),
        (baselines.pool(3), "size=3 does not divide"),
        (baselines.downsample(3), "size=3 does not divide"),
    ],
)
def test_errors_name_the_number(method, named):
    with pytest.raises(ValueError, match=named):
        method.check(dims(5))
