import json
import math
import re
import struct
import sys

import jax
import pytest
from tensorboardX.proto import event_pb2

from focus_jax.tracker import Tracker


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_scalars(workdir):
    """(step, tag, value) of every scalar, by the record format: length, crc, bytes, crc."""
    scalars = []
    for path in sorted((workdir / "tensorboard").glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return scalars


class Terminal:
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


def run(workdir, steps, total=100, start=0, quiet=False):
    with Tracker(workdir, total, "train", start_step=start, quiet=quiet) as tracker:
        for step in steps:
            tracker.log(step, {"loss": 1 / step, "lr": 0.5})


def test_lines_are_on_disk_at_once(tmp_path):
    with Tracker(tmp_path / "new", 3, "train", quiet=True) as tracker:
        tracker.log(1, {"loss": 0.25, "lr": jax.numpy.float32(0.5)})
        assert read(tmp_path / "new") == [{"step": 1, "loss": 0.25, "lr": 0.5}]


def test_events_hold_the_same_values(tmp_path):
    run(tmp_path, [1, 2], quiet=True)
    want = [
        (step, tag, value) for step in (1, 2) for tag, value in (("loss", 1 / step), ("lr", 0.5))
    ]
    assert sorted(read_scalars(tmp_path)) == sorted(want)


def test_a_resumed_run_has_every_step_once(tmp_path):
    run(tmp_path, range(1, 8), quiet=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the kill came in the middle of a line
    run(tmp_path, range(5, 11), start=4, quiet=True)
    assert [record["step"] for record in read(tmp_path)] == list(range(1, 11))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        Tracker(tmp_path, 3, "train", start_step=2)


def test_values_that_are_not_finite_keep_the_file_json(tmp_path):
    with Tracker(tmp_path, 1, "train", quiet=True) as tracker:
        tracker.log(1, {"loss": math.nan, "norm": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": "nan", "norm": "inf"}


def test_plain_lines_come_at_the_first_step_and_every_tenth(tmp_path, capsys):
    run(tmp_path, range(1, 101))
    lines = capsys.readouterr().err.splitlines()
    shown = [int(re.match(r"train (\d+)/100, loss [\d.]+", line)[1]) for line in lines]
    assert shown == [1, *range(10, 101, 10)]
    assert re.search(r", [\d.]+ steps/s, \d+:\d\d:\d\d left$", lines[-1])


def test_plain_lines_of_sparse_logging_reach_the_last_step(tmp_path, capsys):
    run(tmp_path, [*range(7, 100, 7), 100], start=3)
    shown = [int(line.split("/")[0].split()[-1]) for line in capsys.readouterr().err.splitlines()]
    assert shown[0] == 7 and shown[-1] == 100
    assert len(shown) <= 11 and shown == sorted(set(shown))


def test_quiet_prints_nothing(tmp_path, capsys):
    run(tmp_path, range(1, 101), quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    run(tmp_path, range(1, 11), total=10)
    assert "10/10" in terminal.text and "loss 0.1000" in terminal.text


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path / "none", range(1, 3))
    assert not (tmp_path / "none").exists()


def test_a_start_outside_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="start_step is 5 of 4 steps"):
        Tracker(tmp_path, 4, "train", start_step=5)
