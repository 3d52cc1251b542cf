"""A folder of answers has one evaluation at a time; a killed one bars nobody."""

import fcntl
import os
import socket
import subprocess
import sys

import pytest

from focus_jax.evaluate.lock import LOCK, alone, held

# A process of its own that holds the file named and waits to be killed.
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print('{"host": "elsewhere", "process": 7}', file=file, flush=True)
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_a_killed_one_bars_nobody(tmp_path):
    words = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        said = r"process 7 on elsewhere.*give another folder"
        with pytest.raises(ValueError, match=said), alone(tmp_path):
            pass
        other.kill()
    with alone(tmp_path):
        assert (tmp_path / LOCK).is_file()


def test_the_holder_says_who_it_is_and_lets_go(tmp_path):
    said = f"process {os.getpid()} on {socket.gethostname()}"
    with held(tmp_path / "deep" / "out"):
        with pytest.raises(ValueError, match=said), held(tmp_path / "deep" / "out"):
            pass
        with held(tmp_path / "another"):
            pass
    with held(tmp_path / "deep" / "out"):
        pass


def test_where_files_cannot_be_locked_it_warns(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.warns(UserWarning, match="cannot be locked"), held(tmp_path):
        pass
