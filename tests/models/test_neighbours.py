"""Neighbours by blocks are the neighbours by distance, whatever the layout of tiles."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.baselines import Full, Pool
from focus_jax.compress.method import Dims, Method
from focus_jax.compress.visual_compute import VisualCompute, block_side, layout
from focus_jax.models.neighbours import Places, blocks_of, in_reach, neighbour_mask
from tests.quick import compiled

GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
DIMS = Dims(
    rows=8, cols=8, tiles=5, grids=GRIDS, vision_width=4, width=4, layers=2, newline=True,
    heads=2, kv_heads=2,
)  # fmt: skip


def tokens_of(grid: tuple[int, int], tiles: int, cell: float, size: int, images: int = 1):
    """Centre, view and validity of `size` x `size` tokens a tile; missing tiles are no tokens."""
    at = (np.mgrid[:size, :size].reshape(2, -1).T + 0.5) * cell - 0.5
    centre, view, valid = [], [], []
    for image in range(images):
        for tile in range(tiles):
            place = max(tile - 1, 0)
            origin = np.array([place // grid[1], place % grid[1]]) * 8
            centre.append(at + (origin if tile else 0))
            view.append(np.full(len(at), 2 * image + (tile > 0)))
            valid.append(np.full(len(at), tile <= grid[0] * grid[1] or tiles == 1))
    return tuple(np.concatenate(part)[None] for part in (centre, view, valid))


def by_distance(centre, view, valid, half: int, cell: float) -> np.ndarray:
    """The definition, token by token: [N N]."""
    out = np.zeros((len(centre), len(centre)), bool)
    for i, (a, here) in enumerate(zip(centre, view, strict=True)):
        for j, (b, there) in enumerate(zip(centre, view, strict=True)):
            near = abs(a[0] - b[0]) <= half * cell + 1e-6 and abs(a[1] - b[1]) <= half * cell + 1e-6
            out[i, j] = near and here == there and valid[i] and valid[j]
    return out


def from_blocks(blocks, rows, count: int) -> np.ndarray:
    """The pairs that the blocks of the first sample hold, each at most once: [N N]."""
    out, near = np.zeros((count, count), int), in_reach(rows)
    q, qv, k, kv = (np.asarray(a[0]) for a in (*blocks.query, *blocks.key))
    for block in range(q.shape[0]):
        pairs = near & qv[block][:, None] & kv[block]
        np.add.at(out, (q[block][:, None], k[block][None]), pairs)
    return out


CASES = [
    ((2, 2), 5, 3, 1.0, 1), ((1, 3), 5, 3, 1.0, 1), ((3, 1), 5, 5, 1.0, 1), ((1, 2), 5, 3, 1.0, 1),
    ((2, 1), 3, 3, 1.0, 1), ((1, 2), 3, 3, 2.0, 2), ((1, 1), 1, 3, 1.0, 1), ((1, 1), 1, 3, 1.0, 2),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "tiles", "window", "cell", "images"), CASES)
def test_blocks_hold_each_pair_of_neighbours_once(grid, tiles, window, cell, images):
    dims = replace(DIMS, tiles=tiles, newline=tiles > 1)
    size = int(8 / cell)
    stage = Full() if cell == 1 else Pool(size)
    method = Method("yopo", stage, compute=VisualCompute(window=window))
    rows = layout(method, dims, images, images * stage.slots(dims))
    assert rows.blocks
    assert rows.aligned
    centre, view, valid = tokens_of(grid, tiles, cell, size, images)
    if tiles == 5:  # the image was padded: rows at its top are no tokens
        valid &= (view == 0) | (centre[..., 0] >= 2)
    order = np.random.default_rng(0).permutation(valid.shape[1])
    centre, view, valid = (a[:, order] for a in (centre, view, valid))

    @compiled
    def both(centre, view, valid):
        places = Places(centre, view)
        return blocks_of(places, valid, rows), neighbour_mask(places, rows)

    blocks, mask = both(*map(jnp.asarray, (centre.astype(np.float32), view, valid)))
    want = by_distance(centre[0], view[0], valid[0], (window - 1) // 2, cell)
    np.testing.assert_array_equal(from_blocks(blocks, rows, valid.shape[1]), want)
    both_valid = valid[0][:, None] & valid[0]
    np.testing.assert_array_equal(np.asarray(mask[0]) & both_valid, want)
    # Every token stands in one query cell, and no other does.
    found = np.sort(np.asarray(blocks.query.index[blocks.query.valid]))
    np.testing.assert_array_equal(found, np.flatnonzero(valid[0]))


def test_samples_have_their_own_layout():
    method = Method("yopo", Full(), compute=VisualCompute(window=3))
    rows = layout(method, DIMS, 1, Full().slots(DIMS))
    parts = [tokens_of(grid, 5, 1.0, 8) for grid in ((2, 2), (3, 1))]
    centre, view, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
    args = jnp.asarray(centre, jnp.float32), jnp.asarray(view)
    run = compiled(lambda c, v, ok: blocks_of(Places(c, v), ok, rows))
    blocks = run(*args, jnp.asarray(valid))
    for i in range(2):
        mine = type(blocks)(*(type(s)(*(a[i : i + 1] for a in s)) for s in blocks))
        want = by_distance(centre[i], view[i], valid[i], 1, 1.0)
        np.testing.assert_array_equal(from_blocks(mine, rows, valid.shape[1]), want)


def test_official_window_counts():
    """24 x 24 tokens in a window of 5: 22.6 keys on average, and as the published mask counts."""
    at = np.mgrid[:24, :24].reshape(2, -1).T.astype(np.float32)[None]
    dims = replace(DIMS, rows=24, cols=24, tiles=1, newline=False)
    rows = layout(Method("yopo", Full(), compute=VisualCompute(window=5)), dims, 1, 576)
    mask = neighbour_mask(Places(jnp.asarray(at), jnp.zeros((1, 576), jnp.int32)), rows)
    counts = np.asarray(mask[0]).sum(-1)
    assert counts.reshape(24, 24)[0].tolist() == [9, 12, *[15] * 20, 12, 9]
    assert counts.mean() == pytest.approx(22.56, abs=0.01)


def test_irregular_tokens_are_near_by_their_centres():
    """Without a grid, the window counts patches between centres."""
    rows = layout(
        Method("yopo", Pool(4), compute=VisualCompute(window=5)), replace(DIMS, tiles=1), 1, 16
    )
    assert rows.blocks == 0  # a block would be the whole view
    assert rows.unit == 2.0
    centre = jnp.asarray([[[0.0, 0.0], [1.5, 4.0], [4.5, 0.0], [0.5, 4.5]]])
    mask = neighbour_mask(Places(centre, jnp.asarray([[0, 0, 0, 1]])), rows)[0]
    assert mask.tolist() == [
        [True, True, False, False], [True, True, True, False], [False, True, True, False],
        [False, False, False, True],
    ]  # fmt: skip


def test_sides_of_blocks():
    assert block_side(24, 5) == 8
    assert block_side(24, 3) == 6
    assert block_side(7, 3) == 1
    assert block_side(16, 47) == 16
