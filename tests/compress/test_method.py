"""The method as a value: reading order of stitched tiles, stages, names."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.baselines import Full, Pool, tile_tokens
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.method import (
    Aux,
    Context,
    Cut,
    Dims,
    Method,
    block_key,
    merge_aux,
)
from focus_jax.compress.stitch import stitch
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.config import NEXT_GRIDS
from tests.compress.views import RUN, dims, identity, random_views

LLAVA_NEXT = Dims(24, 24, 5, NEXT_GRIDS, 1024, 4096, layers=32, newline=True)


def reading_order(views, d, band: int) -> list[list]:
    """For each image: (view, row, col) of each patch, or "line", as a reader meets them."""
    valid = np.asarray(views.patch_valid).reshape(-1, d.tiles, d.rows, d.cols)
    origin = np.asarray(views.origin)
    images = []
    for b in range(valid.shape[0]):
        order = [(0, r, c) for r in range(d.rows) for c in range(d.cols) if valid[b, 0, r, c]]
        rest = [
            (r + origin[b, m, 0], origin[b, m, 1], m, r, c)
            for m in range(1, d.tiles)
            for r in range(d.rows)
            for c in range(d.cols)
            if valid[b, m, r, c]
        ]
        for line in sorted({row // band for row, *_ in rest}):
            here = sorted((left, m, r, c) for row, left, m, r, c in rest if row // band == line)
            order += [(m, r, c) for _, m, r, c in here] + ["line"]
        images.append(order)
    return images


@pytest.mark.parametrize("tiles", [1, 3, 5])
@pytest.mark.parametrize("band", [1, 4])
@pytest.mark.parametrize("rows_lost", [0, 3])
def test_stitched_order_and_newlines(tiles, band, rows_lost):
    d = dims(tiles)
    views = random_views(d, padded=0.2)
    valid = np.array(views.patch_valid).reshape(2, tiles, 8, 8)
    valid[0, 1:, :rows_lost] = False
    valid[1, -1] = False
    views = views._replace(
        patch_valid=jnp.asarray(valid.reshape(2, tiles, 64)), row_valid=jnp.asarray(valid.any(-1))
    )
    tokens = stitch([tile_tokens(views, d)], views, d, band)
    assert tokens.valid.shape[1] == 64 * tiles + (0 if tiles == 1 else 2 * 8 // band)
    for b, order in enumerate(reading_order(views, d, band)):
        if tiles == 1:  # no newline where nothing is stitched
            order = [entry for entry in order if entry != "line"]
        count = int(tokens.valid[b].sum())
        assert tokens.valid[b, :count].all()
        assert len(order) == count
        for i, entry in enumerate(order):
            assert bool(tokens.newline[b, i]) == (entry == "line")
            if entry == "line":
                continue
            view, row, col = entry
            assert tokens.view[b, i] == view
            want = np.add(views.origin[b, view], (row, col))
            np.testing.assert_array_equal(tokens.centre[b, i], want)
            np.testing.assert_array_equal(
                tokens.features[b, i], views.features[b, view, row * 8 + col]
            )


@pytest.mark.parametrize("size", [2, 4])
def test_pooled_rows_of_tiles_end_in_one_newline(size):
    d = dims(5)
    views = random_views(d)
    stage = Pool(size)
    groups, _ = stage.apply(views, d, None, identity, RUN)
    tokens = stitch(groups, views, d, stage.band(d))
    assert tokens.valid.shape[1] == stage.slots(d)
    assert tokens.valid.all()
    row = [0] * (2 * size) + [1]
    assert tokens.newline[0].astype(int).tolist() == [0] * size**2 + row * (2 * size)


def test_newlines_only_between_stitched_tiles():
    assert dims(1).newlines(1) == 0
    assert dims(3).newlines(1) == 16
    assert dims(4).newlines(1) == 24
    assert dims(5).newlines(4) == 6  # three rows of tiles, or two rows of two


def test_slots_are_those_of_the_largest_grid():
    """2x2 tiles have two rows of newlines; 3x1 have three, which fit where the fourth tile is."""
    assert Full().slots(dims(5)) == 64 * 5 + 16
    assert Full().slots(dims(4)) == 64 * 4 + 24
    assert dims(5).stitched((1,) * 5, band=1) == 4 + 24  # hardly anything left of a tile
    assert LLAVA_NEXT.stitched((576,) * 5, band=1) == 2928


def test_a_column_of_three_in_the_bucket_of_four():
    d = dims(5)
    views = random_views(d, batch=1)
    keep = jnp.asarray([1, 1, 1, 1, 0], bool)
    views = views._replace(
        patch_valid=views.patch_valid & keep[:, None],
        row_valid=views.row_valid & keep[:, None],
        origin=jnp.asarray([[[0, 0], [0, 0], [8, 0], [16, 0], [0, 0]]]),
    )
    tokens = stitch([tile_tokens(views, d)], views, d, 1)
    assert int(tokens.valid.sum()) == 64 * 4 + 24
    assert int((tokens.newline & tokens.valid).sum()) == 24


def test_rows_without_a_patch_may_keep_their_newline():
    """An image one pixel wide unpads to rows of nothing, closed all the same."""
    d = dims(3)
    views = random_views(d, batch=1)
    views = views._replace(patch_valid=views.patch_valid.at[:, 1:].set(False))
    tokens = stitch([tile_tokens(views, d)], views, d, 1)
    assert int(tokens.valid.sum()) == 64 + 8  # two tiles beside each other
    assert tokens.newline[0, 64:72].all()


def test_a_single_view_of_a_tiled_model_ends_in_one_newline():
    d = replace(dims(1), newline=True)
    views = random_views(d, batch=1)
    tokens = stitch([tile_tokens(views, d)], views, d, 1)
    assert Full().slots(d) == 65 == int(tokens.valid.sum())
    assert tokens.newline[0].tolist() == [False] * 64 + [True]


@dataclass(frozen=True)
class Half(Cut):
    def slots(self, entering, train=False):
        return entering // 2


def test_stages_and_their_slots():
    d = dims()
    plain = Method("m", Full(), (Half(2), Half(4)))
    assert plain.bounds == (2, 4)
    assert plain.cut_before(0) is None
    assert plain.cut_before(1).layer == 2
    assert plain.stage_slots(d) == (64, 32, 32)
    early = Method("m", Full(), (Half(0), Half(4)))
    assert early.bounds == (4,)
    assert early.cut_before(0).layer == 0
    assert early.cut_before(1).layer == 4
    assert early.cut_before(2) is None
    assert early.stage_slots(d) == (32, 32)


@pytest.mark.parametrize("layers", [(3, 3), (4, 2), (1, 2, 2)])
def test_cut_layers_must_rise(layers):
    with pytest.raises(ValueError, match="must rise strictly"):
        Method("m", Full(), tuple(Half(layer) for layer in layers))


@pytest.mark.parametrize("layer", [-1, 6, 60])
def test_cut_layer_out_of_range(layer):
    with pytest.raises(ValueError, match=f"Half: layer {layer} is outside .* 6 layers: use 0..5"):
        Method("m", Full(), (Half(layer),)).check(dims())


def test_methods_are_values():
    one = focusllava(VisionGuided(budget=20), TextGuided(layer=2))
    two = focusllava(VisionGuided(budget=20), (TextGuided(layer=2),))
    assert one == two
    assert hash(one) == hash(two)
    assert one != focusllava(VisionGuided(budget=21), TextGuided(layer=2))


def test_focusllava_names_what_is_on():
    vision, text = VisionGuided(), TextGuided()
    assert focusllava(vision, text).name == "focusllava"
    assert focusllava(vision).name == "vision_only"
    assert focusllava(text=text).name == "text_only"
    assert focusllava() == Method("full", Full())
    assert focusllava(vision, (TextGuided(layer=1), TextGuided(layer=3))).bounds == (1, 3)


def test_merged_reports_keep_all_and_refuse_doubles():
    one, two = Aux({"a": 1}, {"m": 2}, {}), Aux({"b": 3}, {}, {"p": 4})
    assert merge_aux(one, two) == Aux({"a": 1, "b": 3}, {"m": 2}, {"p": 4})
    assert one == Aux({"a": 1}, {"m": 2}, {})
    with pytest.raises(ValueError, match="'a'"):
        merge_aux(one, one)


def test_each_use_has_a_key_of_its_own():
    ctx = Context(jax.random.key(0))
    names = [f"cut{layer}" for layer in range(40)] + ["vision", "keep", "gumbel"]
    keys = {tuple(jax.random.key_data(block_key(ctx, name)).tolist()) for name in names}
    assert len(keys) == len(names)
