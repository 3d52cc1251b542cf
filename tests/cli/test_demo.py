"""The demo from nothing to its tables, with micro experiments in place of the real ones."""

import json
from dataclasses import replace

import numpy as np
import pytest

from focus_jax.cli import demo, demo_placement, demo_report
from focus_jax.compress.text_guided import TextGuided
from focus_jax.evaluate import study
from focus_jax.evaluate.runner import read_run
from focus_jax.study.placement import Curve
from focus_jax.study.statistics import Estimate
from focus_jax.workdir import read_workdir

BASE = "from micro import get_config\n"
FULL = """
from dataclasses import replace
import micro

def get_config():
    config = micro.get_config()
    off = replace(config.compress.text, enabled=False)
    vision = replace(config.compress.vision, enabled=False)
    return replace(config, compress=replace(config.compress, vision=vision, text=off))
"""
NAMES = [
    "full", "pool", "downsample", "uniform", "random", "random_trained", "focusllava",
    "vision_only", "text_only",
]  # fmt: skip


@pytest.fixture
def configs(micro, tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "micro.py").write_text(micro.program.read_text())
    for name, text in {"base": BASE, "full": FULL, "focus": BASE}.items():
        (folder / f"glyphs_{name}.py").write_text(text)
    monkeypatch.setattr(demo, "CONFIGS", folder)
    return folder


@pytest.mark.slow
def test_from_nothing_to_the_tables(micro, configs, tmp_path, monkeypatch, capsys):
    argv = ["--workdir", str(tmp_path / "demo"), *micro.flags]
    assert demo.main(argv) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(found) == {
        "seconds", "train_step_seconds", "train_step_flops_ratio", "methods", "paired",
        "placement",
    }  # fmt: skip
    assert list(found["methods"]) == NAMES
    for value in found["methods"].values():
        assert set(value) == {
            "accuracy", "low", "high", "n", "visual_slots_entering", "visual_slots_mean", "flops",
            "seconds_per_sample", "by_kind",
        }  # fmt: skip
        assert value["n"] == 12
    slots = {name: value["visual_slots_mean"] for name, value in found["methods"].items()}
    assert slots == {
        "full": 16, "pool": 4, "downsample": 4, "uniform": 6, "random": 6, "random_trained": 6,
        "focusllava": 6, "vision_only": 8, "text_only": 12,
    }  # fmt: skip
    assert set(found["train_step_seconds"]) == {"full", "focusllava", "random_trained"}
    assert all(seconds > 0 for seconds in found["train_step_seconds"].values())
    assert 0 < found["train_step_flops_ratio"] < 1.5
    accuracy = {name: value["accuracy"] for name, value in found["methods"].items()}
    for name, (a, b) in demo_report.PAIRS.items():
        value, low, high = found["paired"][name]
        assert value == pytest.approx(accuracy[a] - accuracy[b]) and low <= value <= high
    trained, _ = read_workdir(tmp_path / "demo" / "random")
    assert trained.compress.value().name == "random"
    placed = found["placement"]
    assert (placed["images"], placed["n"], placed["nearest_keep"]) == (3, 12, 0.25)
    assert placed["full"][0] == accuracy["full"]
    of = [(c["layer"], c["keep"], c["rank"]) for c in placed["curves"]]
    ranks = ("top", "random", "least", "oracle")
    assert of == [(x, y, z) for x in (0, 1) for y in demo_placement.KEEPS for z in ranks]
    page = (tmp_path / "demo" / "results.md").read_text()
    assert table in page and "python eval.py --checkpoint" in page
    for picture in ("accuracy.png", "samplers.png", "placement.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 1000

    # Again: nothing is repeated, and the clock goes on.
    monkeypatch.setattr(study.Run, "train", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(study, "evaluate", lambda *a, **k: pytest.fail("scored again"))
    monkeypatch.setattr(demo_placement, "place", lambda *a, **k: pytest.fail("cut again"))
    assert demo.main(argv) == 0
    again = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert again.pop("seconds") > found.pop("seconds")
    assert again == found


def test_experiments_share_a_base_and_train_their_last_stage(configs, tmp_path):
    found = demo.experiments(tmp_path, ["--data.seed", "3"])
    assert list(found) == ["base", "full", "focus", "random"]
    assert found["base"].train.init_from == ""
    for name in ("full", "focus", "random"):
        assert found[name].train.init_from == str(tmp_path / "base" / "checkpoints")
        assert [stage.name for stage in found[name].train.stages] == ["joint"]
    assert {config.data.seed for config in found.values()} == {3}
    assert found["full"].compress.value().name == "full"
    assert found["random"].compress.method == "random:keep=0.375"
    assert found["random"].train == found["focus"].train


def test_baselines_spend_what_focusllava_spends(micro):
    run = read_run(micro.workdir)
    rows = {row.name: row for row in demo.rows(run.config)}
    assert list(rows) == NAMES
    assert rows["random"].method == "random:keep=0.375"  # 8 then 4 of 16 patches
    assert rows["pool"].method == "pool:size=2"
    assert (rows["uniform"].run, rows["text_only"].run) == ("full", "focus")
    assert rows["random_trained"] == demo_report.Row(
        "random_trained", "random", "random:keep=0.375"
    )


def test_slots_that_no_baseline_can_match(micro):
    config, _ = read_workdir(micro.workdir)
    text = replace(config.compress.text, keep=0.2)  # 8 then 2 slots: 5 of 16
    odd = replace(config, compress=replace(config.compress, text=text))
    assert {row.name: row for row in demo.rows(odd)}["random"]
    layer = replace(config.compress.text, layer=1, keep=0.3)  # 8 then 3: 5.5 of 16
    odd = replace(config, compress=replace(config.compress, text=layer))
    with pytest.raises(ValueError, match="no fair comparison"):
        demo.rows(odd)


def test_answers_pair_by_image_and_question(tmp_path):
    """Lines in any order; differences by hand, full's own against itself being none."""
    full = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0]], bool)
    lines = [
        {"index": i, "question_number": q, "correct": bool(full[i, q])}
        for i, q in np.random.default_rng(0).permutation(list(np.ndindex(3, 3))).tolist()
    ]
    path = tmp_path / "full.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.testing.assert_array_equal(demo_report.right(path), full)
    better = full.copy()
    better[0, 2] = better[2, 1] = True
    found = demo_report.paired(
        {"full": full, "focusllava": better, "random_trained": full, "random": better}
    )
    assert found["focusllava"].value == pytest.approx(2 / 9)
    assert found["focusllava"] == found["focusllava_to_random_trained"]
    assert found["random_trained"] == found["focusllava_to_random"] == (0, 0, 0)
    table = demo_report.paired_table(found)
    assert "focusllava minus full" in table and "+22.2 [" in table


def test_placement_is_told_at_the_nearest_share(tmp_path):
    """The table shows the nearest keep alone, its figures the rank's under its own header."""
    rng, curves = np.random.default_rng(1), []
    for layer in (0, 1):
        for keep in demo_placement.KEEPS:
            for rank, share in (("oracle", 8), ("least", 1), ("random", 3), ("top", 6)):
                correct = np.zeros((10, 1), bool)
                correct[rng.permutation(10)[: share + layer if keep == 0.10 else 0]] = True
                curves.append(Curve(layer, keep, rank, "", correct))
    cut = TextGuided(layer=1, keep=0.12)
    found = demo_placement.figures(curves, cut, Estimate(0.9, 0.7, 1.0))
    assert (found["nearest_keep"], found["n"], len(found["curves"])) == (0.10, 10, 24)
    text = demo_placement.section(curves, found)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    [first, second] = [row for row in cells if row[:1] in (["0"], ["1"])]
    assert first[1:5] == ["60.0%", "30.0%", "10.0%", "80.0%"] and first[5].startswith("+30.0 [")
    assert second[1:5] == ["70.0%", "40.0%", "20.0%", "90.0%"]
    assert "10% of the visual tokens" in text and "90.0% of them" in text


def test_one_image_has_no_interval(configs, tmp_path, capsys):
    assert demo.main(["--workdir", str(tmp_path / "demo"), "--limit", "1"]) == 1
    assert "--limit 1" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_missing_configs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "CONFIGS", tmp_path / "none")
    assert demo.main(["--workdir", str(tmp_path / "demo")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "has no glyphs_base.py" in error
    assert not (tmp_path / "demo").exists()


def test_the_clock_counts_interrupted_work(tmp_path):
    with demo.clock(tmp_path):
        pass
    first = demo.seconds(tmp_path)
    with pytest.raises(KeyboardInterrupt), demo.clock(tmp_path):
        raise KeyboardInterrupt
    assert demo.seconds(tmp_path) > first > 0
