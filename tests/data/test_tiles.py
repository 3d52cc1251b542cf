"""Images of several tiles: what views show is held against loops over cells and against PIL."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from focus_jax.data.cells import (
    at_cells,
    at_patches,
    first_tile,
    shown,
    tiles_across,
    tiles_alone,
    views,
)
from focus_jax.data.conversation import BRIEF
from focus_jax.data.glyphs import GlyphsConfig, vocabulary
from focus_jax.data.images import decode
from focus_jax.data.loader import LoaderConfig, make_loader
from focus_jax.data.preprocess import ImageConfig, preprocess
from focus_jax.data.sources import FreshSource
from focus_jax.data.tokenizer import build_tokenizer
from focus_jax.workdir import glyph_tokenizer, make_eval_loader, make_train_loader
from tests.micro import get_config, get_tiled

GLYPHS = GlyphsConfig(grid=8, groups=2, questions=5)
CONFIG = LoaderConfig(
    batch=3, questions=2, image_size=32, across=2, text_length=20, epochs=1, threads=0
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([], vocabulary(GLYPHS), ("USER:", "ASSISTANT:"))


def slow(cells, across, side):
    """What views show of one image's cells [C], a thumbnail first where there are tiles."""
    grid = across * side
    at = lambda row, col: cells[row * grid + col]  # noqa: E731
    out = []
    if across > 1:
        thumbnail = []
        for row in range(side):
            for col in range(side):
                behind = [
                    at(row * across + i, col * across + j)
                    for i in range(across)
                    for j in range(across)
                ]
                thumbnail.append(max(behind))
        out.append(thumbnail)
    for down in range(across):
        for right in range(across):
            out.append(
                [
                    at(down * side + row, right * side + col)
                    for row in range(side)
                    for col in range(side)
                ]
            )
    return out


@pytest.mark.parametrize(("across", "side"), [(1, 4), (2, 4), (3, 2), (4, 1)])
def test_cells_lie_where_loops_find_them(across, side):
    count = (across * side) ** 2
    rng = np.random.default_rng(across)
    cells = rng.integers(0, 1000, (2, 3, count))
    wanted = np.array([[slow(cells[b, q], across, side) for q in range(3)] for b in range(2)])
    np.testing.assert_array_equal(at_patches(cells, side**2), wanted)
    np.testing.assert_array_equal(at_patches(jnp.asarray(cells), side**2), wanted)
    filled = rng.random((2, count)) < 0.2
    wanted = np.array([slow(filled[b], across, side) for b in range(2)])
    found = at_patches(filled, side**2)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, wanted)
    assert found.shape[1] == views(across) and first_tile(across) == (across > 1)
    assert tiles_across(count, side**2) == across
    # Every cell lies behind one patch of a tile, and what tiles say of it comes back to it.
    tiles = tiles_alone(at_patches(cells[:, 0], side**2))
    assert tiles.shape[1] == across**2
    np.testing.assert_array_equal(at_cells(tiles[..., None])[..., 0], cells[:, 0])


def test_one_view_is_its_own_cells():
    np.testing.assert_array_equal(shown(1, 4), np.arange(16).reshape(1, 16, 1))
    pixels = np.zeros((2, 1, 8, 8, 3))
    assert tiles_alone(pixels).shape == pixels.shape


@pytest.mark.parametrize(("cells", "patches"), [(32, 16), (8, 16), (65, 16)])
def test_cells_that_no_tiles_make_up(cells, patches):
    with pytest.raises(ValueError, match=f"image of {cells} cells is no square of views of 16"):
        tiles_across(cells, patches)


@pytest.mark.parametrize("train", [True, False])
def test_tiles_are_quarters_and_the_thumbnail_is_pils(tokenizer, train):
    source = FreshSource(GLYPHS, 0, 6)
    seen = 0
    for batch in make_loader(source, tokenizer, BRIEF, CONFIG, train, GLYPHS):
        q = 2 if train else 5
        assert batch["pixels"].shape == (3, 5, 32, 32, 3) and batch["pixels"].dtype == np.uint8
        assert batch["patch_valid"].shape == (3, 5, 16) and batch["patch_valid"].all()
        assert batch["evidence"].shape == (3, q, 64) and batch["cell_words"].shape == (3, 64, 3)
        for b, index in enumerate(batch["index"].tolist()):
            record = source[index]
            image = decode(record["image"])
            small = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(batch["pixels"][b, 0], np.asarray(small))
            for tile, (row, col) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)], start=1):
                quarter = image[8 * row : 8 * row + 32, 8 * col : 8 * col + 32]
                np.testing.assert_array_equal(batch["pixels"][b, tile], quarter)
                assert batch["tile_origin"][b, tile].tolist() == [row, col]
            whole = preprocess(image, ImageConfig("anyres", 32, 8, ((64, 64),)))
            np.testing.assert_array_equal(batch["pixels"][b], whole.pixels)
            np.testing.assert_array_equal(batch["tile_origin"][b], whole.origin)
            # Tables stay those of the image's cells.
            np.testing.assert_array_equal(batch["glyph"][b], record["glyph"])
            np.testing.assert_array_equal(batch["colour"][b], record["colour"])
            np.testing.assert_array_equal(batch["cell_filled"][b], record["glyph"] > 0)
            for row, number in enumerate(batch["question"][b].tolist()):
                about = record["evidence"][number]
                assert set(np.flatnonzero(batch["evidence"][b, row])) == set(about[about >= 0])
                seen += 1
    assert seen == 6 * (2 if train else 5)


def test_answers_see_the_tiles_without_tables():
    config = get_tiled()
    config = replace(config, eval=replace(config.eval, batch=4))
    source = FreshSource(config.data.glyphs, 0, 1)
    [batch] = make_eval_loader(config, source, glyph_tokenizer(config.data))
    assert batch["pixels"].shape == (4, 5, 32, 32, 3) and "cell_filled" not in batch
    image = decode(source[0]["image"])
    np.testing.assert_array_equal(batch["pixels"][3, 4], image[32:, 32:])


def test_a_corrupt_image_leaves_its_tiles_empty(tokenizer):
    good = FreshSource(GLYPHS, 0, 3)
    records = [{**good[0], "image": b"broken"}, good[1], good[2]]
    config = replace(CONFIG, max_bad_share=0.5)
    [batch] = make_loader(records, tokenizer, BRIEF, config, False, GLYPHS)
    assert not batch["pixels"][0].any() and not batch["row_valid"][0].any()
    assert batch["pixels"][1:].any() and batch["row_valid"][1:].all()


def test_an_experiments_images_are_one_view_or_a_grid_of_its_model():
    one, tiled = get_config(), get_tiled()
    assert (one.across, one.tiles) == (1, 1) and (tiled.across, tiled.tiles) == (2, 5)
    assert replace(one, model=tiled.model).tiles == 1  # a small image needs no tiles
    larger = replace(tiled.data, glyphs=replace(tiled.data.glyphs, grid=12))
    wrong = [
        replace(tiled, model=one.model),
        replace(tiled, model=replace(tiled.model, grids=((1, 2), (2, 1)))),
        replace(tiled, model=replace(tiled.model, max_tiles=4)),
        replace(tiled, data=larger),
    ]
    for config in wrong:
        assert config.tiles == 1
        glyphs, [stage] = config.data.glyphs, config.train.stages
        sources = {"": FreshSource(glyphs, 0, 4)}
        said = rf"across=1 do not match glyphs of {glyphs.image_size} pixels.*k x k tiles"
        with pytest.raises(ValueError, match=said):
            make_train_loader(config, sources, glyph_tokenizer(config.data), stage, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"across": 1}, "image_size=32, patch=8 and across=1 do not match glyphs of 64 pixels"),
        ({"across": 3}, "across=3 do not match glyphs of 64"),
        ({"across": 0}, "across=0: give 1 or more"),
    ],
)
def test_wrong_tiles_are_named(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(
            FreshSource(GLYPHS, 0, 6), tokenizer, BRIEF, replace(CONFIG, **changes), True, GLYPHS
        )
