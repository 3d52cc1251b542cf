"""`focus_jax plan` prints plans of presets and of config programs."""

import json

import pytest

from focus_jax.cli.plan import main, of_preset
from focus_jax.config import PRESETS
from focus_jax.methods import parse_method
from focus_jax.models.vlm import dims_of


def test_preset_with_its_usual_samplers(tmp_path, capsys):
    path = tmp_path / "plans.json"
    flags = ["--preset", "llava_next_vicuna_7b", "--tiles", "5", "--text", "64"]
    assert main([*flags, "--method", "full,focusllava:text.keep=0.5", "--json", str(path)]) == 0
    full, focus = json.loads(path.read_text())
    assert full["slots"] == [2928] * 32  # 5 tiles of 576 patches and 48 newlines
    # 5 x 225 tokens and a newline for each of 12 rows of regions; half of it from the middle on.
    assert focus["slots"] == [1137] * 16 + [569] * 16
    assert full["text_tokens"] == 64
    out = capsys.readouterr().out
    assert "| full | tiles 5, text 64 |" in out
    assert "| slots by decoder layer | 0-15: 1137, 16-31: 569 |" in out


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_samplers_that_fit(name):
    subject = of_preset(name)
    parse_method("focusllava", subject.compress).check(dims_of(subject.model, 1))


def test_config_with_settings(micro, tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = ["--config", str(micro.program), "--compress.text.keep", "0.25"]
    assert main([*flags, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["slots"] == [8, 2]
    assert "focusllava" in capsys.readouterr().out


def test_what_does_not_fit(micro, tmp_path, capsys):
    assert main(["--preset", "llava_1_5_7b", "--tiles", "2"]) == 1
    assert "--tiles 2: the model takes up to 1" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.py")]) == 1
    assert "no config at" in capsys.readouterr().err
    assert main(["--config", str(micro.program), "--compress.text.layer", "2"]) == 1
    assert "layer 2 is outside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "tiny", "--methud", "full"], "--methud: did you mean --method"),
        (["--config", "PROGRAM", "--compress.txt.layer", "1"], "--compress.text.layer"),
        ([], "--preset --config --markdown is required"),
    ],
)
def test_wrong_flags_exit_with_2(micro, flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(micro.program) if flag == "PROGRAM" else flag for flag in flags])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
