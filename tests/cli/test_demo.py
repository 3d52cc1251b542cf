"""The demo from nothing to its tables, with micro experiments in place of the real ones."""

import json
from dataclasses import replace

import pytest

from focus_jax.cli import demo
from focus_jax.evaluate import study
from focus_jax.evaluate.runner import read_run

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
    "full", "pool", "downsample", "uniform", "random", "focusllava", "vision_only", "text_only",
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
    assert set(found) == {"seconds", "train_step_seconds", "train_step_flops_ratio", "methods"}
    assert list(found["methods"]) == NAMES
    for value in found["methods"].values():
        assert set(value) == {
            "accuracy", "low", "high", "n", "visual_slots_entering", "visual_slots_mean", "flops",
            "seconds_per_sample", "by_kind",
        }  # fmt: skip
        assert value["n"] == 12
    slots = {name: value["visual_slots_mean"] for name, value in found["methods"].items()}
    assert slots == {
        "full": 16, "pool": 4, "downsample": 4, "uniform": 6, "random": 6, "focusllava": 6,
        "vision_only": 8, "text_only": 12,
    }  # fmt: skip
    assert set(found["train_step_seconds"]) == {"full", "focusllava"}
    assert all(seconds > 0 for seconds in found["train_step_seconds"].values())
    assert 0 < found["train_step_flops_ratio"] < 1.5
    page = (tmp_path / "demo" / "results.md").read_text()
    assert table in page and "python eval.py --checkpoint" in page
    for picture in ("accuracy.png", "samplers.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 1000

    # Again: nothing is repeated, and the clock goes on.
    monkeypatch.setattr(study.Run, "train", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(study, "evaluate", lambda *a, **k: pytest.fail("scored again"))
    assert demo.main(argv) == 0
    again = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert again.pop("seconds") > found.pop("seconds")
    assert again == found


def test_experiments_share_a_base_and_train_their_last_stage(configs, tmp_path):
    found = demo.experiments(tmp_path, ["--data.seed", "3"])
    assert list(found) == ["base", "full", "focus"]
    assert found["base"].train.init_from == ""
    for name in ("full", "focus"):
        assert found[name].train.init_from == str(tmp_path / "base" / "checkpoints")
        assert [stage.name for stage in found[name].train.stages] == ["joint"]
    assert {config.data.seed for config in found.values()} == {3}
    assert found["full"].compress.value().name == "full"


def test_baselines_spend_what_focusllava_spends(micro):
    run = read_run(micro.workdir)
    rows = {row.name: row for row in demo.rows({"full": run, "focus": run})}
    assert list(rows) == NAMES
    assert rows["random"].method == "random:keep=0.375"  # 8 then 4 of 16 patches
    assert rows["pool"].method == "pool:size=2"
    assert (rows["uniform"].run, rows["text_only"].run) == ("full", "focus")


def test_slots_that_no_baseline_can_match(micro):
    run = read_run(micro.workdir)
    text = replace(run.config.compress.text, keep=0.2)  # 8 then 2 slots: 5 of 16
    odd = replace(run, config=replace(run.config, compress=replace(run.config.compress, text=text)))
    assert {row.name: row for row in demo.rows({"full": odd, "focus": odd})}["random"]
    layer = replace(run.config.compress.text, layer=1, keep=0.3)  # 8 then 3: 5.5 of 16
    odd = replace(
        run, config=replace(run.config, compress=replace(run.config.compress, text=layer))
    )
    with pytest.raises(ValueError, match="no fair comparison"):
        demo.rows({"full": odd, "focus": odd})


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
