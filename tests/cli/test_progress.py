"""Progress tells rate and time left of what this run does itself."""

import io

import pytest

from focus_jax.cli import progress
from focus_jax.cli.progress import SampleMeter


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    out = Clock()
    monkeypatch.setattr(progress, "time", out)
    return out


def test_lines_every_tenth(clock):
    out = io.StringIO()
    with SampleMeter("pope full", out) as meter:
        for done in (400, 410, 500, 505, 990, 1000):  # 400 were there before
            meter(done, 1000)
            clock.now += 10
    assert out.getvalue().splitlines() == [
        "pope full 400/1000",
        "pope full 500/1000, 5.00 samples/s, 0:01:40 left",
        "pope full 990/1000, 14.75 samples/s, 0:00:01 left",
        "pope full 1000/1000, 12.00 samples/s, 0:00:00 left",
    ]


def test_a_bar_on_a_terminal(clock, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with SampleMeter("pope", out) as meter:
        meter(0, 9000)
        clock.now += 2
        meter(9, 9000)
    assert "9/9000" in out.getvalue() and "4.50 samples/s, 0:33:18 left" in out.getvalue()
