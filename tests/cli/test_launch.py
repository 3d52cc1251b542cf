"""Starting several processes: what each sees, their output, signals, and the first that fails."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from focus_jax.cli import launch


def program(tmp_path, code):
    path = tmp_path / "program.py"
    path.write_text("import os, signal, sys, time\n" + textwrap.dedent(code))
    return str(path)


def run(*argv):
    return launch.main(["--processes", "2", "--on", "cpu", *argv])


def test_each_process_gets_its_place_and_devices(tmp_path, capfd):
    code = """
        place = dict(zip(sys.argv[2::2], sys.argv[3::2]))
        print(sys.argv[1], place["--processes"], place["--process-id"])
        print(place["--coordinator"], file=sys.stderr)
        print(os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"].split()[-1])
        """
    assert run("--devices-per-process", "3", program(tmp_path, code), "own") == 0
    out, err = capfd.readouterr()
    devices = "cpu --xla_force_host_platform_device_count=3"
    assert sorted(out.splitlines()) == sorted(
        ["[0] own 2 0", "[1] own 2 1", f"[0] {devices}", f"[1] {devices}"]
    )
    first, second = sorted(err.splitlines())
    assert first.startswith("[0] 127.0.0.1:") and second == first.replace("[0]", "[1]")


def test_the_first_failure_is_the_exit_code_and_ends_the_rest(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.3)
    code = """
        if sys.argv[-1] == "1":
            sys.exit(7)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        """
    start = time.monotonic()
    assert run(program(tmp_path, code)) == 7
    assert time.monotonic() - start < 20
    err = capfd.readouterr().err
    assert "launch: process 1 ended with exit code 7; the others get 0.3 s to end" in err
    assert "launch: process 0 has not ended: killed" in err


def test_a_killed_process_counts_as_a_shell_counts(tmp_path, capfd):
    code = "os.kill(os.getpid(), signal.SIGKILL) if sys.argv[-1] == '1' else time.sleep(1)"
    assert run(program(tmp_path, code)) == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(tmp_path, sent):
    code = """
        def end(number, frame):
            print("got", number, flush=True)
            sys.exit(75)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        print("ready", flush=True)
        time.sleep(60)
        """
    command = [sys.executable, "-m", "focus_jax", "launch", "--processes", "2", "--on", "cpu"]
    child = subprocess.Popen(
        [*command, program(tmp_path, code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert {child.stdout.readline(), child.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    child.send_signal(sent)
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 75
    assert sorted(out.splitlines()) == [f"[{i}] got {sent.value}" for i in (0, 1)]


def test_gpus_are_split_and_not_shared(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7,9")
    seen = lambda *given: [e["CUDA_VISIBLE_DEVICES"] for e in launch.environments("gpu", *given)]  # noqa: E731
    assert seen(2, None) == ["0,2", "5,7"]
    assert seen(2, 1) == ["0", "2"]
    with pytest.raises(ValueError, match="2 processes of 3 GPUs each, and there are 5: give fewer"):
        seen(2, 3)
    with pytest.raises(ValueError, match="6 processes of 1 GPUs each"):
        seen(6, None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch.kind_here() == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert launch.kind_here() == "gpu"


@pytest.mark.parametrize("command", [[], ["absent.py"]])
def test_a_program_that_is_not_there(command, capsys):
    assert run(*command) == 1
    assert "launch runs train.py or eval.py" in capsys.readouterr().err


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as end:
        launch.main(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Exit code: that of the first that failed" in said and "75: all stopped by SIGTERM" in said
    )
