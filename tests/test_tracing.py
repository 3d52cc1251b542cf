"""Traces of some steps: which ones, and when the devices are waited for."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest

from focus_jax.tracing import Profile, check_steps, parse_steps


class Tracer:
    """Notes what it is asked for."""

    def __init__(self):
        self.events = []

    def start_trace(self, folder):
        self.events.append(f"start {folder}")

    def stop_trace(self):
        self.events.append("stop")

    @contextmanager
    def StepTraceAnnotation(self, name, step_num):
        self.events.append(step_num)
        yield


def traced(steps, numbers, start=0):
    """What happens while these steps run."""
    tracer = Tracer()
    with Profile("folder", steps, start, tracer) as profile:
        for number in numbers:
            with profile.step(number, lambda: tracer.events.append("settle")):
                pass
    return tracer.events


def test_ranges_hold_both_ends():
    assert parse_steps("10:15") == (10, 15)
    assert parse_steps("7:7") == (7, 7)


@pytest.mark.parametrize("text", ["", "10", "10:", "-1:5", "1.5:3", "a:b", "1:2:3", "10-15"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match=r"is no range of steps: give FIRST:LAST"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["0:5", "6:5"])
def test_a_range_without_steps_is_refused(text):
    with pytest.raises(ValueError, match=f"'{text}' holds no step"):
        parse_steps(text)


def test_a_range_behind_the_end_is_refused():
    with pytest.raises(ValueError, match=r"--profile 21:30 lies behind the last step, 20"):
        check_steps((21, 30), 20)
    check_steps((20, 30), 20)
    check_steps(None, 20)


def test_devices_are_waited_for_at_both_ends_alone():
    inside = ["settle", "start folder", 2, 3, "settle", "stop"]
    assert traced((2, 3), range(1, 6)) == [1, *inside, 4, 5]
    assert traced(None, range(1, 3)) == [1, 2]


def test_a_trace_ends_with_the_run():
    assert traced((2, 9), range(1, 4)) == [1, "settle", "start folder", 2, 3, "stop"]


def test_steps_that_are_not_run_here_end_a_trace_too():
    # Steps 3 and 4 are those of a stage that takes no optimiser steps.
    assert traced((2, 4), [1, 2, 5]) == [1, "settle", "start folder", 2, "stop", 5]


def test_a_resumed_run_traces_what_is_left(capsys):
    assert traced((2, 5), [5, 6], start=4) == ["settle", "start folder", 5, "settle", "stop", 6]
    assert capsys.readouterr().err == ""
    assert traced((2, 5), [7, 8], start=6) == [7, 8]
    assert "--profile 2:5: the run goes on behind step 6" in capsys.readouterr().err


def test_a_step_that_fails_closes_the_trace():
    tracer = Tracer()
    profile = Profile("folder", (1, 5), tracer=tracer)
    with pytest.raises(KeyError), profile, profile.step(1, lambda: None):
        raise KeyError
    assert tracer.events == ["start folder", 1, "stop"]


def test_other_processes_trace_nothing(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert traced((1, 2), [1, 2]) == [1, 2]


@pytest.mark.slow
def test_a_real_trace_lies_in_the_folder(tmp_path):
    with Profile(tmp_path / "profile", (1, 1)) as profile, profile.step(1, lambda: None):
        jnp.ones(3).block_until_ready()
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train" in trace.read_bytes()
