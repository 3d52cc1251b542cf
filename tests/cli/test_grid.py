"""`focus_jax grid` trains and scores each combination once."""

import json
import shutil

import pytest

from focus_jax.cli import grid
from focus_jax.evaluate import study


@pytest.fixture
def flags(micro):
    return ["--config", str(micro.program), "--quiet", *micro.flags]


@pytest.mark.slow
def test_finished_cells_are_neither_trained_nor_scored_again(
    micro, flags, tmp_path, monkeypatch, capsys
):
    cell = tmp_path / "micro__compress.text.keep=0.5"
    shutil.copytree(micro.workdir, cell)  # its training is finished, by another name
    monkeypatch.setattr(study.Run, "train", lambda self: pytest.fail("trained again"))
    argv = ["--workdir", str(tmp_path), *flags, "--vary", "compress.text.keep=0.5"]
    argv += ["--methods", "full,vision_only:vision.budget=6", "--split", "test", "--limit", "2"]
    assert grid.main(argv) == 0
    first, text = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    assert [(row["method"], row["n"], row["visual_slots_mean"]) for row in first] == [
        ("full", 8, 16.0), ("vision_only:vision.budget=6", 8, 6.0),
    ]  # fmt: skip
    assert first[0]["settings"] == {"compress.text.keep": "0.5"}
    assert text in (tmp_path / "results.md").read_text()
    assert (tmp_path / "accuracy.png").stat().st_size > 1000

    monkeypatch.setattr(study, "evaluate", lambda *a, **k: pytest.fail("scored again"))
    assert grid.main(argv) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == first
    assert len(list((cell / "evaluations").glob("*.json"))) == 2
    asked = {**json.loads((cell / "evaluations" / "full_test.json").read_text())["asked"]}
    assert (asked["limit"], asked["step"]) == (2, 2)


def test_a_changed_question_is_scored_again(micro, flags, tmp_path, monkeypatch):
    shutil.copytree(micro.workdir, tmp_path / "micro")
    calls = []
    monkeypatch.setattr(study, "evaluate", lambda *a, **k: calls.append(k["limit"]) or stop())

    def stop():
        raise ValueError("enough")

    for limit in ("1", "2"):
        assert grid.main(["--workdir", str(tmp_path), *flags, "--limit", limit]) == 1
    assert calls == [1, 2]


def test_what_cannot_run_is_found_before_training(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.Run, "train", lambda self: pytest.fail("trained"))
    argv = ["--workdir", str(tmp_path / "grid"), *flags]
    assert grid.main([*argv, "--vary", "compress.text.layer=1,2"]) == 1
    assert "layer 2 is outside" in capsys.readouterr().err
    off = ["--compress.vision.enabled", "False"]
    assert grid.main([*argv, *off, "--methods", "vision_only"]) == 1
    assert "trains 'text_only' and so has no samplers.vision." in capsys.readouterr().err
    assert grid.main([*argv, "--vary", "train.seed=1,1"]) == 1
    assert "two trainings would be called micro__train.seed=1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        grid.main([*argv, "--vary", "compress.text.leyer=1"])
    assert end.value.code == 2
    assert "--compress.text.layer" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_cells_are_all_combinations(micro):
    vary = [(("train.seed", "1"), ("train.seed", "2")), (("compress.text.keep", "0.25"),)]
    cells = grid.make_cells([micro.program], vary, ["--data.seed", "7"])
    assert [cell.slug for cell in cells] == [
        "micro__train.seed=1__compress.text.keep=0.25",
        "micro__train.seed=2__compress.text.keep=0.25",
    ]
    assert [cell.config.train.seed for cell in cells] == [1, 2]
    assert {(cell.config.data.seed, cell.config.compress.text.keep) for cell in cells} == {
        (7, 0.25)
    }
