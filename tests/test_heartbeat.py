"""Signs of life: a file, a line, and a clock of their own."""

import json
import sys
import threading

import jax
import pytest

from focus_jax.heartbeat import Heartbeat
from tests.test_throughput import Clock


def read(path):
    return json.loads(path.read_text())


def pairs(line):
    """What a log reader makes of a line."""
    mark, *words = line.split()
    assert mark == "heartbeat"
    return dict(word.split("=", 1) for word in words)


def beating(workdir, clock, **settings):
    heartbeat = Heartbeat(workdir, 1e6, total=40, clock=clock, **settings)
    heartbeat.update(12, stage="stage 2", loss=0.5, step_seconds=0.25, memory_in_use=None)
    return heartbeat


def test_a_hang_shows_as_a_step_that_stands_still(tmp_path):
    clock = Clock()
    heartbeat = beating(tmp_path, clock)
    heartbeat.beat()
    first = read(tmp_path / "heartbeat.json")
    assert first["time"] == "1970-01-01T00:01:40Z"
    assert first["step"] == 12 and first["total"] == 40 and first["since_step"] == 0
    assert first["loss"] == 0.5 and first["stage"] == "stage 2" and first["process"] == 0
    assert "memory_in_use" not in first
    clock.now += 90
    heartbeat.beat()
    later = read(tmp_path / "heartbeat.json")
    assert later == {**first, "time": "1970-01-01T00:03:10Z", "since_step": 90.0}
    heartbeat.update(13, loss=0.25)
    heartbeat.beat()
    assert read(tmp_path / "heartbeat.json")["since_step"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_the_line_holds_the_same_pairs(tmp_path, capsys):
    heartbeat = beating(tmp_path, Clock())
    heartbeat.beat()
    (line,) = capsys.readouterr().err.splitlines()
    told = pairs(line)
    stored = read(tmp_path / "heartbeat.json")
    assert told.keys() == stored.keys()
    assert {name: json.loads(told[name]) for name in ("step", "loss", "step_seconds")} == {
        "step": 12, "loss": 0.5, "step_seconds": 0.25,
    }  # fmt: skip
    assert json.loads(told["stage"]) == "stage 2" and told["state"] == "running"


def test_a_loss_that_is_no_number_keeps_the_file_json(tmp_path):
    heartbeat = beating(tmp_path, Clock())
    heartbeat.update(13, loss=float("nan"))
    heartbeat.beat()
    text = (tmp_path / "heartbeat.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == "nan"


def test_it_beats_by_itself_until_the_end(tmp_path):
    beats, enough = [], threading.Event()

    def clock():
        beats.append(threading.current_thread().name)
        if beats.count("heartbeat") == 3:
            enough.set()
        return 0.0

    with Heartbeat(tmp_path, 0.01, total=4, quiet=True, clock=clock) as heartbeat:
        assert read(tmp_path / "heartbeat.json")["state"] == "running"
        assert enough.wait(10)
    assert not heartbeat.thread.is_alive()
    assert read(tmp_path / "heartbeat.json")["state"] == "done"
    with pytest.raises(KeyError), Heartbeat(tmp_path, 100, total=4, quiet=True):
        raise KeyError
    assert read(tmp_path / "heartbeat.json")["state"] == "stopped"


def test_zero_seconds_are_none(tmp_path, capsys):
    with Heartbeat(tmp_path, 0, total=4) as heartbeat:
        heartbeat.update(1, loss=1.0)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_other_processes_have_a_file_and_no_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    beating(tmp_path, Clock()).beat()
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat-3.json"]
    assert read(tmp_path / "heartbeat-3.json")["process"] == 3
    assert capsys.readouterr().err == ""


def test_quiet_runs_and_terminals_get_no_line(tmp_path, capsys, monkeypatch):
    beating(tmp_path, Clock(), quiet=True).beat()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    beating(tmp_path, Clock()).beat()
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_written_is_told_and_ends_nothing(tmp_path, capsys):
    with Heartbeat(tmp_path / "none", 100, total=4, quiet=True):
        pass
    first, last = capsys.readouterr().err.splitlines()
    assert first == last and "none/heartbeat.json is not written: [Errno 2]" in first
