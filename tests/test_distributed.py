"""Several processes: how they meet, and one run that faults hit, on one mesh after the other."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from focus_jax import distributed, training
from focus_jax.checkpoint import Checkpoints
from focus_jax.cli import train
from focus_jax.cli.launch import free_port
from focus_jax.distributed import Place, make_place
from focus_jax.preemption import PREEMPTED, Preemption

ROOT = Path(__file__).parents[1]
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


def test_a_place_needs_all_three():
    assert make_place(None, None, None) is None
    assert make_place("host:1", 2, 1) == Place("host:1", 2, 1)
    with pytest.raises(ValueError, match=r"--process-id without --coordinator and --processes"):
        make_place(None, None, 1)
    with pytest.raises(ValueError, match=r"--coordinator and --processes without --process-id"):
        make_place("host:1", 2, None)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("host", 2, 0), "give the host and port of process 0"),
        (("host:80", 2, 2), "--process-id 2 of --processes 2: .* counted from 0"),
        (("host:80", 2, -1), "--process-id -1"),
        (("host:80", 0, 0), "--processes 0"),
    ],
)
def test_a_place_that_is_none_is_refused(place, said):
    with pytest.raises(ValueError, match=said):
        Place(*place)


def test_a_lone_flag_ends_training_before_anything_is_written(tmp_path, capsys):
    workdir = tmp_path / "run"
    code = train.main(["--config", "c.py", "--workdir", str(workdir), "--process-id", "1"])
    assert code == 1 and not workdir.exists()
    assert "error: --process-id without --coordinator" in capsys.readouterr().err


def test_help_tells_the_exit_codes(capsys):
    assert train.main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--process-id" in said and "75 stopped by SIGTERM behind a checkpoint" in said


def test_a_cluster_is_seen_by_its_variables(monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    assert distributed.cluster() is None
    assert distributed.join() is None and not distributed.several()
    with monkeypatch.context() as inside:
        inside.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
        inside.setenv("OMPI_COMM_WORLD_SIZE", "4")
        assert distributed.cluster().name == "ompi"
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert distributed.cluster().name == "slurm"
    # jax would show one task one GPU, whatever the node has.
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert distributed.cluster() is None


def test_sigterm_is_noted_once_and_then_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2) and preemption.reached(3)
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_sigterm_stops_a_run_behind_a_checkpoint(tmp_path, monkeypatch, capsys):
    see = training.Watch.see

    def asked(watch, number, *rest):
        see(watch, number, *rest)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Watch, "see", asked)
    program = str(ROOT / "tests" / "micro.py")
    run = ["--config", program, "--workdir", str(tmp_path / "run"), "--quiet"]
    run += ["--data.directory", str(tmp_path / "data")]
    assert train.main(run) == PREEMPTED
    said = "stopped by SIGTERM at step 1 of 2, behind a checkpoint: start again to go on"
    assert said in capsys.readouterr().err
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 1)
    assert checkpoints.steps() == [1]
    assert train.main(run) == 0
    assert checkpoints.steps() == [1, 2]


# ------------------------------------------------------------------------- real processes

# The tower is frozen: near-ties in max pooling would send gradients elsewhere.
PROGRAM = """
from dataclasses import replace
from tests import micro
from focus_jax.experiment import TrainConfig, TrainStage

def get_config():
    config = micro.get_config()
    joint = TrainStage(
        "joint", "answers", steps=12, learning_rate=3e-3, batch=4, questions=2,
        train=("decoder.", "projector.", "samplers."),
    )
    glyphs = replace(micro.GLYPHS, train=48)
    return replace(
        config,
        data=replace(config.data, glyphs=glyphs, directory=DIRECTORY),
        train=TrainConfig((joint,), log_every=1, save_every=2, keep=9),
    )
"""


class Job:
    """Runs of one experiment below a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.program = folder / "job.py"
        self.program.write_text(PROGRAM.replace("DIRECTORY", repr(str(folder / "data"))))

    def command(self, workdir, mesh):
        return [
            "--config", str(self.program), "--workdir", str(self.folder / workdir), "--quiet",
            "--train.mesh", mesh,
        ]  # fmt: skip

    def run(self, launcher, workdir, mesh, fault="none:0:0", devices=1):
        (self.folder / workdir).mkdir(exist_ok=True)
        simulated = f"--xla_force_host_platform_device_count={devices}"
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "FAULT": fault,
            "NOTES": str(self.folder / workdir),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {simulated}",
        }  # fmt: skip
        program = [*launcher, "tests/faults.py", *self.command(workdir, mesh)]
        return subprocess.run(
            [sys.executable, *program], env=environment, cwd=ROOT, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip

    def two(self, workdir, mesh, fault="none:0:0"):
        """Two processes of two devices each."""
        launcher = ["-m", "focus_jax", "launch", "--processes", "2", "--devices-per-process", "2"]
        return self.run(launcher, workdir, mesh, fault)

    def losses(self, workdir):
        lines = (self.folder / workdir / "metrics.jsonl").read_text().splitlines()
        return {row["step"]: row["loss"] for row in map(json.loads, lines)}

    def steps(self, workdir):
        return Checkpoints(self.folder / workdir / "checkpoints", 1).steps()

    def note(self, workdir, name):
        return json.loads((self.folder / workdir / f"{name}.json").read_text())

    def ids(self, workdir, process):
        """The images of each step; of one that was taken again, the last time."""
        lines = (self.folder / workdir / f"ids-{process}.jsonl").read_text().splitlines()
        return {row["step"]: row["ids"] for row in map(json.loads, lines)}


@pytest.mark.slow
def test_a_run_survives_faults_and_moves_between_meshes(tmp_path):
    job = Job(tmp_path)
    assert train.main(job.command("alone", "data")) == 0
    alone = job.losses("alone")
    assert list(alone) == list(range(1, 13))

    # One process is killed: the other ends by itself, and says why.
    done = job.two("run", "fsdp", "kill:1:5")
    hit = (tmp_path / "run" / "ids-1.jsonl").stat().st_mtime
    assert time.time() - hit < 60
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert "launch: process 1 was killed by SIGKILL" in done.stderr
    # By the collective that it waits in, or by jax: the one that notices first.
    assert re.search("another process of this job was lost|another task died", done.stderr)
    assert "has not ended" not in done.stderr
    assert job.steps("run") == [2, 4]

    # It goes on from the last checkpoint, and meets a full disk.
    done = job.two("run", "fsdp", "full:1:7")
    assert done.returncode == 1, done.stderr
    assert "[1] error: a checkpoint could not be written to" in done.stderr
    *_, good = job.steps("run")
    assert f"the last good checkpoint is of step {good}; free the disk" in done.stderr

    # SIGTERM for one process: all stop behind the same step and a checkpoint of it.
    done = job.two("run", "fsdp", "term:1:7")
    assert done.returncode == PREEMPTED, done.stderr
    assert job.note("run", f"restored-{good}") == job.note("run", f"saved-{good}")
    *_, stopped = job.steps("run")
    assert 7 <= stopped < 12
    assert f"[0] stopped by SIGTERM at step {stopped} of 12" in done.stderr
    assert "[1] stopped" not in done.stderr
    # Gloo writes to stdout as well, in pieces.
    assert not re.search("stopped|checkpoint|step|loss|error", done.stdout)

    # Another mesh, and one process: it starts from the same bits.
    done = job.run((), "run", "fsdp=2,tensor=2", devices=4)
    assert done.returncode == 0, done.stderr
    assert job.note("run", f"restored-{stopped}") == job.note("run", f"saved-{stopped}")

    # What a run without faults on one device gives, from the images that it sees.
    assert job.losses("run").keys() == alone.keys()
    np.testing.assert_allclose(list(job.losses("run").values()), list(alone.values()), rtol=1e-5)
    first, second = job.ids("run", 0), job.ids("run", 1)
    for step in range(1, stopped + 1):
        assert len(first[step]) == len(second[step]) == 2
    seen = [*first.values(), *(second[step] for step in range(1, stopped + 1))]
    assert sorted(np.concatenate(seen)) == list(range(48))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_processes_wait_for_each_other_for_a_while(number):
    script = (
        "import sys\n"
        "from focus_jax.distributed import Place, join\n"
        "join(Place(sys.argv[1], 2, int(sys.argv[2])), connect=2)"
    )
    address = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", script, address, str(number)], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    said = f"error: process {number} of 2 did not meet the others at {address} in 2 s: start all"
    assert said in done.stderr


@pytest.mark.slow
def test_processes_meet_by_the_variables_of_a_cluster():
    script = (
        "from focus_jax.distributed import from_first, join, part\n"
        "number = join()\n"
        "import jax\n"
        "assert jax.process_index() == number and jax.process_count() == 2\n"
        "assert from_first(7 + number) == 7\n"
        "part()"
    )
    slurm = {**SLURM, "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, **slurm, "SLURM_PROCID": number}
        )
        for number in "01"
    ]
    assert [child.wait(timeout=60) for child in children] == [0, 0]


@pytest.mark.slow
def test_a_port_that_is_taken_is_named():
    script = (
        "import socket\n"
        "from focus_jax.distributed import CannotJoin, Place, join\n"
        "taken = socket.socket(socket.AF_INET6)\n"
        "taken.bind(('::', 0))\n"
        "taken.listen()\n"
        "try: join(Place(f'127.0.0.1:{taken.getsockname()[1]}', 2, 0))\n"
        "except CannotJoin as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2 cannot listen at 127.0.0.1:" in done.stdout
    assert "Address already in use" in done.stdout


@pytest.mark.slow
def test_silence_ends_the_others():
    script = (
        "import os, sys, time\n"
        "from focus_jax.distributed import Place, join\n"
        "number = int(sys.argv[2])\n"
        "join(Place('127.0.0.1:' + sys.argv[1], 2, number), heartbeat=3)\n"
        "if number: os.kill(os.getpid(), 9)\n"
        "time.sleep(60)"
    )
    port = str(free_port())
    command = [sys.executable, "-c", script, port]
    other = subprocess.Popen([*command, "1"])
    done = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=60)
    assert other.wait() == -signal.SIGKILL
    assert done.returncode == -signal.SIGABRT
    assert "most likely indicates that another task died" in done.stderr
