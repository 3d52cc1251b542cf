"""`eval.py --benchmark`: one command from a checkpoint to a table, with methods side by side."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from focus_jax.cli import evaluate_benchmarks
from focus_jax.cli.evaluate import main
from focus_jax.evaluate.lock import held
from tests.evaluate.toy import TOY, write_toy
from tests.hf_models import write_llava

ROOT = Path(__file__).parents[2]
OTHER = replace(TOY, name="other", title="Other", folders=())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`llava-v1.5-7b`, and `data` with a folder of four questions for one benchmark of two."""
    path = tmp_path_factory.mktemp("bench")
    write_llava(path / "llava-v1.5-7b")
    write_toy(path / "data" / "Toy", 4)
    return path


@pytest.fixture
def flags(root, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_benchmarks, "known", lambda: {"toy": TOY, "other": OTHER})
    return [
        "--checkpoint", str(root / "llava-v1.5-7b"), "--data", str(root / "data"), "--batch", "2",
        "--out", str(tmp_path / "out"), "--dtype", "float32",
    ]  # fmt: skip


def test_methods_side_by_side(flags, tmp_path, capsys):
    names = "full,pool:size=2"
    more = ["--benchmark", "toy", "--methods", names, "--limit", "2"]
    assert main([*flags, *more, "--json", str(tmp_path / "all.json")]) == 0
    said = capsys.readouterr()
    rows = [line.split(" | ") for line in said.out.splitlines() if line.startswith("| Toy")]
    assert [row[3].strip() for row in rows] == ["full", "pool:size=2"]
    assert [row[8].strip() for row in rows] == ["16.0 (100.0%)", "4.0 (25.0%)"]
    assert all(row[6].strip() == "61.5 (llava-1.5-7b)" and row[7].strip() == "2" for row in rows)
    [gap] = [line.split(" | ") for line in said.out.splitlines() if line.startswith("| toy")]
    assert [cell.strip() for cell in gap[1:3]] == ["pool:size=2", "full"]
    found = json.loads((tmp_path / "all.json").read_text())
    scores = [result["score"] for result in found["results"]]
    assert found["differences"][0]["gap"]["value"] == pytest.approx(scores[1] - scores[0])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "results.md").read_text() == said.out
    files = sorted(path.suffix for path in (tmp_path / "out" / "answers").iterdir())
    assert files == [".json"] * 2 + [".jsonl"] * 2
    last = [line for line in said.err.splitlines() if line.startswith("toy full 2/2")]
    assert last and "samples/s, 0:00:00 left" in last[0]


def test_all_takes_those_whose_folder_is_there(root, flags, monkeypatch):
    chosen = evaluate_benchmarks.with_folders("all", root / "data")
    assert [(b.name, folder.name) for b, folder in chosen] == [("toy", "Toy")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--benchmark", "toi"], "unknown benchmark 'toi': did you mean toy?"),
        (["--benchmark", "toy,other"], "Other: "),
        (["--benchmark", "toy", "--split", "test"], "--split belongs to the embedded set"),
        (["--benchmark", "toy", "--method", "full", "--methods", "full"], "give one of them"),
        ([], "--data goes with --benchmark"),
        (["--benchmark", "toy", "--data", "/none"], "--data /none is no folder"),
        (["--benchmark", "toy", "--method", "ful"], "unknown method 'ful': did you mean full?"),
        (["--benchmark", "toy", "--method", "vision_only"], "has no weights for samplers."),
    ],
)
def test_flags_that_do_not_fit(flags, more, said, capsys):
    assert main([*flags, *more]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and said in error


def test_what_is_wrong_is_found_before_the_checkpoint_is_read(
    root, flags, tmp_path, monkeypatch, capsys
):
    def never(*_, **__):
        raise AssertionError("the checkpoint was read")

    def torn(folder, protocol):
        raise ValueError("a file of the second benchmark is torn")

    monkeypatch.setattr(evaluate_benchmarks, "load", never)
    twins = {"toy": TOY, "other": replace(OTHER, folders=("Toy",), read=torn)}
    monkeypatch.setattr(evaluate_benchmarks, "known", lambda: twins)
    for more, said in (
        (["--benchmark", "toy,other"], "a file of the second benchmark is torn"),
        (["--benchmark", "toy", "--methods", "full,fastw"], "unknown method 'fastw'"),
    ):
        assert main([*flags, *more]) == 1
        assert said in capsys.readouterr().err
    with held(tmp_path / "out"):
        assert main([*flags, "--benchmark", "toy"]) == 1
    assert f"another evaluation writes to {tmp_path / 'out'} (process" in capsys.readouterr().err


# A program of its own, for it is killed. Every batch takes a while, so that there is time to.
PROGRAM = """
    import sys, time
    from focus_jax.cli import evaluate, evaluate_benchmarks
    from focus_jax.evaluate import suite
    from tests.evaluate.toy import TOY
    evaluate_benchmarks.known = lambda: {"toy": TOY}
    pause, append = float(sys.argv[1]), suite.files.append
    def slowly(path, rows):
        append(path, rows)
        time.sleep(pause)
    suite.files.append = slowly
    sys.exit(evaluate.main(sys.argv[2:]))
    """


def start(*words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def table_of(text: str) -> list[list[str]]:
    """The table without seconds."""
    lines = [line.removeprefix("[0] ") for line in text.splitlines()]
    rows = [line.split(" | ") for line in lines if line.startswith("| Toy")]
    assert rows
    return [[cell.strip() for i, cell in enumerate(row) if i != 9] for row in rows]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_table(root, flags, tmp_path, capsys):
    write_toy(tmp_path / "data" / "toy", 12)
    flags = [*flags, "--data", str(tmp_path / "data"), "--benchmark", "toy"]
    assert main(flags) == 0
    whole = capsys.readouterr().out
    [path] = (tmp_path / "out" / "answers").glob("*.jsonl")
    wanted = path.read_bytes()
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    killed = [*flags, "--out", str(tmp_path / "killed")]
    first, mine = start(program, 1.0, *killed), tmp_path / "killed" / "answers" / path.name
    end = time.monotonic() + 120
    while not (mine.exists() and mine.read_text().count("\n") >= 3):
        assert first.poll() is None and time.monotonic() < end, first.communicate()[1]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    there = mine.read_text().count("\n")
    assert 3 <= there < 12
    # Two processes of two devices go on where one was killed.
    launch = ["-m", "focus_jax", "launch", "--processes", 2, "--devices-per-process", 2]
    second = start(*launch, program, 0, *killed, "--mesh", "fsdp=2,tensor=2", "--batch", 4)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    assert mine.read_bytes() == wanted
    assert table_of(out) == table_of(whole)
    assert f"[0] toy full {there}/12" in err.splitlines()
    assert "[1] toy" not in err and "[1] |" not in out
