"""Evaluation by several processes and devices says what one device says."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from focus_jax.cli.evaluate import main

ROOT = Path(__file__).parents[2]
MESHES = ("data", "fsdp=2,tensor=2")

# Starting takes longer than answering: both meshes in one job.
PROGRAM = """
    import argparse
    import jax
    from focus_jax.cli.common import add_process_flags, joined
    from focus_jax.cli.evaluate import parser, score
    from focus_jax.evaluate.runner import read_run
    from focus_jax.sharding import make_layout
    from focus_jax.workdir import open_workdir

    own = argparse.ArgumentParser()
    own.add_argument("--out")
    own.add_argument("--meshes", nargs="+")
    add_process_flags(own)
    given, flags = own.parse_known_args()
    with joined(given, preemptible=False):
        assert (jax.process_count(), jax.device_count()) == (2, 4)
        for mesh in given.meshes:
            out = f"{given.out}/{mesh}_{jax.process_index()}"
            files = ["--json", out + ".json", "--answers", out + ".jsonl"]
            score(parser().parse_args([*flags, "--mesh", mesh, *files]))
        # Each device reads its own part of the parameters.
        kernel = read_run(flags[1], make_layout("fsdp=2,tensor=2")).tree["decoder.layers.q.kernel"]
        assert [part.data.size * 4 for part in kernel.addressable_shards] == [kernel.size] * 2
        # A folder below a file: process 0 cannot write it, and none goes on without.
        try:
            open_workdir(read_run(flags[1]).config, given.out + "/program.py/run")
        except ValueError as error:
            print(error)
    """


def in_two_processes(folder, flags):
    """Evaluate with each of `MESHES` in two processes of two devices; what they printed."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    launch = [
        sys.executable, "-m", "focus_jax", "launch", "--processes", "2", "--devices-per-process",
        "2", str(program), *flags, "--out", str(folder), "--meshes", *MESHES,
    ]  # fmt: skip
    done = subprocess.run(
        launch,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    program.unlink()
    return done


def result_of(path):
    """What a result says, without how long it took and on what."""
    value = json.loads(path.read_text())
    return {name: v for name, v in value.items() if name not in ("seconds_per_sample", "device")}


@pytest.mark.slow
def test_two_processes_answer_as_one_does(micro, tmp_path):
    # 12 questions: the second batch is half padding.
    flags = ["--checkpoint", str(micro.workdir), "--split", "test", "--batch", "8"]
    out = ["--json", str(tmp_path / "one.json"), "--answers", str(tmp_path / "one.jsonl")]
    assert main([*flags, *out]) == 0
    folder = tmp_path / "two"
    folder.mkdir()
    said = in_two_processes(folder, flags)
    names = {f"{mesh}_0.json{end}" for mesh in MESHES for end in ("", "l")}
    assert {path.name for path in folder.iterdir()} == names
    for mesh in MESHES:
        assert result_of(folder / f"{mesh}_0.json") == result_of(tmp_path / "one.json")
        answers = (folder / f"{mesh}_0.jsonl").read_text()
        assert answers == (tmp_path / "one.jsonl").read_text()
    assert len(answers.splitlines()) == 12
    assert said.stdout.count("[0] focusllava on test") == len(MESHES)
    # Of the second process nothing but its error; Gloo writes to stdout as well, in pieces.
    first, second = (
        "\n".join(line for line in said.stdout.splitlines() if line.startswith(f"[{number}]"))
        for number in (0, 1)
    )
    assert "|" not in second and "focusllava on" not in second
    assert "program.py/run cannot be written (process 0 tells why)" in second
    assert "program.py/run cannot be written ([Errno 20] Not a directory" in first
    assert "[0] evaluate 2/2" in said.stderr and "[1] evaluate" not in said.stderr
