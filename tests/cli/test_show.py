"""`focus_jax show` draws what the model really kept."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from focus_jax.cli.show import draw, main, present, spread
from focus_jax.evaluate.runner import read_run
from focus_jax.workdir import data_source
from tests.micro import get_tiled


@pytest.fixture(scope="module")
def run(micro):
    return read_run(micro.workdir)


@pytest.mark.slow
def test_views_of_two_questions(run, tmp_path):
    path = tmp_path / "sub" / "picture.png"
    views = draw(run, None, "test", 1, (3, 0), path)
    record = data_source(run.config, "test")[1]
    assert [v.question for v in views] == [record["question"][3], record["question"][0]]
    assert [v.answer for v in views] == [record["answer"][3], record["answer"][0]]
    assert Image.open(path).size[0] > 1000
    for view in views:
        tokens = int(view.scale_map.sum())
        assert set(view.scale_map.ravel()) <= {1, 4} and tokens <= 8
        assert len(view.kept) == -(-tokens // 2) == len(view.kept_size)
        assert view.cut_layers == (1,)
        # All tokens together cover the image; those that were kept are what layer 1 still has.
        assert np.isfinite(view.importance[0]).all()
        area = (view.kept_size**2).sum()
        assert np.isfinite(view.importance[1]).sum() == area
        for (row, col), side in zip(view.kept, view.kept_size, strict=True):
            inside = view.importance[1][
                int(row - side / 2) : int(row + side / 2), int(col - side / 2) : int(col + side / 2)
            ]
            assert np.isfinite(inside).all() and inside.size == side**2
        assert np.nanmin(view.importance) >= 0 and np.nanmax(view.importance) <= 1


def test_a_method_without_regions_counts_its_tokens(run, tmp_path):
    (view,) = draw(run, "full", "test", 0, (1,), tmp_path / "picture.png")
    assert view.region == (4, 4)
    assert view.scale_map.tolist() == [[16]]
    assert (len(view.kept), view.cut_layers, view.importance.shape) == (16, (), (2, 4, 4))
    assert sorted(map(tuple, view.kept)) == [(r + 0.5, c + 0.5) for r in range(4) for c in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["focusllava", "full"])
def test_of_an_image_in_tiles_the_tiles_are_shown(run, tmp_path, method):
    config = get_tiled()
    model = replace(config.model, decoder=run.config.model.decoder)
    data = replace(config.data, directory=str(tmp_path / "data"))
    newline = np.zeros(model.decoder.width, np.float32)
    tiled = replace(
        run,
        config=replace(config, model=model, data=data),
        tree={**run.tree, "image_newline": newline},
    )
    [view] = draw(tiled, method, "test", 0, (1,), tmp_path / "picture.png")
    assert view.grid == (8, 8) and view.importance.shape == (2, 8, 8)
    region = 2 if method == "focusllava" else 4
    assert view.scale_map.shape == (8 // region, 8 // region)
    # Tokens of all tiles together cover the image, and no other lies over them.
    assert np.isfinite(view.importance[0]).all()
    area = (view.kept_size**2).sum()
    assert np.isfinite(view.importance[1]).sum() == area
    if method == "full":
        assert (view.scale_map == 16).all()
        places = [(r + 0.5, c + 0.5) for r in range(8) for c in range(8)]
        assert sorted(map(tuple, view.kept)) == places
    else:
        assert all(0 < t <= 8 for t in tile_sums(view.scale_map))


def tile_sums(scale_map):
    """Tokens of each of 2 x 2 tiles."""
    return scale_map.reshape(2, 2, 2, 2).sum((1, 3)).ravel().tolist()


def test_command_and_its_errors(micro, tmp_path, capsys):
    flags = ["--checkpoint", str(micro.workdir), "--out", str(tmp_path / "p.png")]
    assert main([*flags, "--image", "3", "--split", "test"]) == 1
    assert "image 3 is outside the split: give 0..2" in capsys.readouterr().err
    assert main([*flags, "--questions", "0,4"]) == 1
    assert "question 4 is not on image 0: give 0..3" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


def test_padding_behind_a_cut_is_no_token():
    valid = np.array([True, True, True, False])
    assert present(np.array([0, 2, 0]), valid).tolist() == [0, 1]
    assert present(np.array([1, 2, 0, 0]), valid).tolist() == [0, 1]
    assert present(np.arange(4), valid).tolist() == [0, 1, 2]


def test_values_lie_on_the_patches_behind_a_token():
    centre, side = np.array([[0.5, 0.5], [2.0, 3.0]]), np.array([2.0, 1.0])
    out = spread((4, 4), centre, side, np.array([0.25, 0.5]))
    wanted = np.full((4, 4), np.nan)
    wanted[:2, :2], wanted[2, 3] = 0.25, 0.5
    np.testing.assert_array_equal(out, wanted)
