"""The dispatcher, and what all commands share: errors are one message, flags name near ones."""

import re
import subprocess
import sys

import pytest

from focus_jax.__main__ import COMMANDS, main
from focus_jax.cli import evaluate, grid, show
from focus_jax.cli.arguments import Meter


def test_help_lists_the_commands_without_loading_jax():
    script = (
        "import sys, runpy\n"
        "sys.argv = ['focus_jax', '--help']\n"
        "try: runpy.run_module('focus_jax', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_unknown_command_names_the_near_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["plna"])
    assert end.value.code == 2
    assert "unknown command 'plna': did you mean plan?" in capsys.readouterr().err


def test_a_command_gets_the_rest(capsys):
    assert main(["plan", "--preset", "tiny", "--method", "pool:size=8"]) == 0
    assert "| visual slots entering | 64 (25.0% of full) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "argv", "said"),
    [
        (evaluate, ["--chekpoint", "x"], "--chekpoint: did you mean --checkpoint"),
        (evaluate, ["--checkpoint", "x", "--limits=3"], "--limits: did you mean --limit"),
        (evaluate, ["--checkpoint", "x", "--batch", "0"], "give at least 1"),
        (evaluate, ["--checkpoint", "x", "--split", "tset"], "choose from .*test"),
        (show, ["--checkpoint", "x", "--out", "y", "--questions", "1;2"], "give whole numbers"),
        (grid, ["--workdri", "x"], "--workdri: did you mean --workdir"),
        (grid, ["--workdir", "x", "--config", "y", "--vary", "seed"], "give FIELD=VALUE"),
    ],
)
def test_wrong_flags_exit_with_2(command, argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error


def test_meter_tells_every_tenth(capsys):
    meter = Meter("work")
    for done in range(1, 101):
        meter(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work 1/100"
    assert lines[-1] == "work 100/100"
    assert len(lines) == 11
