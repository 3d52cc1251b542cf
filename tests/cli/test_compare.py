"""Every method spends an equal share of slots, is scored once, and stands in the table."""

import json
from dataclasses import replace

import pytest

from focus_jax.cli.compare import main
from focus_jax.evaluate.budgets import behind_uniform, spenders, spending, squares
from focus_jax.evaluate.runner import read_run
from focus_jax.methods import METHODS, SAMPLERS
from focus_jax.models.params import is_sampler
from focus_jax.models.vlm import dims_of
from tests.micro import get_tiled


@pytest.fixture(scope="module")
def run(micro):
    return read_run(micro.workdir)


def test_all_methods_have_budgets(run):
    assert set(spenders(run)) == {*METHODS, *SAMPLERS} - {"full"}
    assert set(behind_uniform(dims_of(run.config.model, 1))) <= set(spenders(run))


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_shares_are_met_but_not_passed(run, share):
    for name in ("random", "divprune", "vtw", "visionzip", "prumerge_plus", "text_only"):
        one = spending(run, name, share)
        assert one.share <= share * 1.005, one
        cost = run.plan(run.method(one.asked))
        assert cost.mean_share == one.share, one
        # One token in each layer, of the micro run's 16, or a whole layer of its two.
        coarse = 0.5 if name in ("vtw", "text_only") else 1.1 / cost.full
        assert one.share >= share - coarse, one


def test_a_cut_that_cannot_spend_so_little_stands_behind_uniform(run):
    one = spending(run, "vtw", 0.3)
    assert one.asked.startswith("uniform:keep=0.") and one.asked.endswith("+vtw:layer=1")
    assert one.share == pytest.approx(0.3, abs=0.05)


def test_without_weights_for_the_router_regions_are_ranked_by_what_they_lose(run):
    assert any(map(is_sampler, run.tree))
    full = replace(run, tree={k: leaf for k, leaf in run.tree.items() if not is_sampler(k)})
    for name in ("vision_only", "focusllava"):
        assert "gate" not in spending(run, name, 0.5).asked
        asked = spending(full, name, 0.5).asked
        assert asked.endswith(",vision.gate=measured")
        assert full.model(full.method(asked)).method.vision.gate == "measured"
        with pytest.raises(ValueError, match="no weights for samplers"):
            full.model(full.method(name))


def test_what_cannot_be_spent_is_told(run):
    assert spending(run, "vision_only", 0.01).asked == ""
    with pytest.raises(ValueError, match="no budgets are known for 'full'"):
        spending(run, "full", 0.5)


def test_in_a_stitched_image_squares_divide_a_view(run):
    tiled = replace(run, config=get_tiled())
    assert squares(dims_of(run.config.model, 1)) == (1, 2, 3, 4)
    assert squares(dims_of(tiled.config.model, tiled.config.tiles)) == (1, 2, 4)
    for name in ("pool", "downsample"):
        # Five views of 9 of 16 patches would be 0.56: the next square that stands is taken.
        assert spending(tiled, name, 0.6).asked == f"{name}:size=2"
        assert spending(run, name, 0.6).asked == f"{name}:size=3"


def test_budgets_of_a_view_are_met_over_all_tiles(run):
    tiled = replace(run, config=get_tiled())
    for name in set(spenders(tiled)) - {"pyramiddrop", "sparsevlm"}:  # cuts at three layers
        one = spending(tiled, name, 0.5)
        cost = tiled.plan(tiled.method(one.asked))
        assert cost.tiles == 5 and cost.full == 5 * 16 + 8
        assert one.share == cost.mean_share <= 0.5 * 1.005, one


def test_the_command_scores_once_and_goes_on(micro, tmp_path, capsys):
    flags = [
        "--checkpoint", str(micro.workdir), "--methods", "uniform,vision_only",
        "--shares", "0.5,0.01", "--out", str(tmp_path / "out"), "--workdir", str(tmp_path / "work"),
        "--limit", "1",
    ]  # fmt: skip
    assert main(flags) == 0
    page = (tmp_path / "out" / "results.md").read_text()
    assert capsys.readouterr().out == page
    assert "## 50% of the tokens" in page and "| uniform " in page and "`uniform:keep=0." in page
    assert "cannot" in page.split("## 1% of the tokens")[1]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [line["method"] for line in found] == ["full", *["uniform", "vision_only"] * 2]
    assert found[0]["result"]["n"] == 4 and found[-1]["result"] is None
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json")}
    assert main(flags) == 0
    assert done == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json")}


def test_shares_must_be_shares(micro, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(micro.workdir), "--shares", "0.5,2"])
    assert "give shares in (0, 1]" in capsys.readouterr().err
