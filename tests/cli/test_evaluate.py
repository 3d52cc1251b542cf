"""eval.py prints a table, writes what it is asked to, and fails with one message."""

import json
import shutil

import pytest

from focus_jax.cli.evaluate import main


def test_table_json_and_answers(micro, tmp_path, capsys):
    out, answers = tmp_path / "deep" / "result.json", tmp_path / "answers.jsonl"
    code = main(
        ["--checkpoint", str(micro.workdir), "--method", "random:keep=0.25", "--split", "test",
         "--json", str(out), "--answers", str(answers), "--batch", "12"]
    )  # fmt: skip
    assert code == 0
    said = capsys.readouterr()
    result = json.loads(out.read_text())
    assert len(answers.read_text().splitlines()) == result["n"] == 12
    assert said.err.splitlines()[-1] == "evaluate 1/1"
    lines = said.out.splitlines()
    assert lines[0] == f"random:keep=0.25 on test, {micro.workdir} at step 2"
    kinds = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert {"all", *result["by_kind"]} <= set(kinds)
    assert "4.0 (25.0% of full)" in said.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "ful"], "unknown method 'ful': did you mean full?"),
        (["--method", "random:keep=0"], "keep=0.0 is a share"),
        (["--method", "text_only:text.layer=2"], "layer 2 is outside the decoder's 2 layers"),
        (["--mesh", "fsdp=2"], "mesh 'fsdp=2' has 2 = 2 places, there are 1 devices"),
        (["--mesh", "rows"], "mesh 'rows': 'rows' is no axis"),
        (["--processes", "2"], "--processes without --coordinator and --process-id"),
    ],
)
def test_flags_that_do_not_fit(micro, flags, said, capsys):
    assert main(["--checkpoint", str(micro.workdir), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error


def test_missing_run_and_checkpoint(micro, tmp_path, capsys):
    assert main(["--checkpoint", str(tmp_path / "none")]) == 1
    assert "none is no run" in capsys.readouterr().err
    shutil.copy(micro.workdir / "config.json", tmp_path)
    shutil.copytree(micro.workdir / "tokenizer", tmp_path / "tokenizer")
    assert main(["--checkpoint", str(tmp_path)]) == 1
    assert "error: no checkpoint directory" in capsys.readouterr().err


def test_a_sampler_of_other_sizes_has_no_weights(micro, capsys):
    flags = ["--checkpoint", str(micro.workdir), "--method", "focusllava:vision.hidden=5"]
    assert main(flags) == 1
    assert "has no weights for samplers.vision." in capsys.readouterr().err
