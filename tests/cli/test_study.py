"""The study from nothing to its page, with micro experiments in place of the real ones."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest

from focus_jax.cli import study
from focus_jax.experiment import load_program
from focus_jax.study import seed
from focus_jax.study.clock import Clock
from focus_jax.study.config import Arm, Study, arm_of, base_of, check, load_study, overridden
from focus_jax.study.processes import at_once

PROGRAM = """
from dataclasses import replace
import micro
from focus_jax.study.config import Arm, Study


def get_study(size):
    base = micro.get_config()
    [joint] = base.train.stages
    first = replace(joint, name="language", samplers=False, train=("decoder.",))
    align = replace(joint, name="align", train=("samplers.",))
    base = replace(base, train=replace(base.train, stages=(first, align)))
    arms = (
        Arm("full", "full", role="full"),
        Arm("focusllava", "focusllava:vision.gate=distortion", role="ours"),
        Arm("random", "random:keep=0.375", role="plain"),
        Arm("gate_random", "focusllava:vision.gate=random", role="gate"),
        Arm("unaligned", "focusllava:vision.gate=distortion", aligned=False, role="part",
            against="focusllava"),
        Arm("cut_1", "text_only:text.layer=1,text.keep=0.1", role="cut"),
    )
    return Study(
        base, joint, arms, seeds=(0, 1), layers=(0, 1), keeps=(0.25,), shares=(0.5,),
        methods=("random", "pool", "focusllava"), gates=("oracle",), batch=2, timed=2, rounds=2,
        timed_share=0.5,
    )
"""


@pytest.fixture
def program(micro, tmp_path, monkeypatch):
    (tmp_path / "micro.py").write_text(micro.program.read_text())
    path = tmp_path / "study.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(study, "PROGRAM", path)
    return path


@pytest.mark.slow
def test_from_nothing_to_the_page(micro, program, tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    argv = ["--workdir", str(tmp_path / "study"), "--markdown", str(page), *micro.flags]
    # One seed by itself, as one of several processes runs it: no page yet.
    assert study.main([*argv, "--alone", "1"]) == 0
    assert not (tmp_path / "study" / "results.json").exists()
    assert not (tmp_path / "study" / "seed0").exists()
    capsys.readouterr()
    assert study.main(argv) == 0
    out, told = capsys.readouterr()
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    names = [(row["name"], row["weights"], row["share"]) for row in found["rows"]]
    arms = ["full", "focusllava", "random", "gate_random", "unaligned", "cut_1"]
    assert names == [
        *((arm, arm, 0.0) for arm in arms), ("oracle", "focusllava", 0.0),
        *((name, "full", 0.5) for name in ("random", "pool", "focusllava")),
        ("focusllava", "focusllava", 0.5),
    ]  # fmt: skip
    assert found["seeds"] == [0, 1] and found["images"] == 6  # three of each seed
    assert all(row["ms"] > 0 and row["kv_bytes"] > 0 for row in found["rows"])
    assert found["rows"][1]["mean_slots"] == 6
    # Eight rankings at two layers; routers of arms and the control on one's weights.
    assert len(found["placement"]) == 16
    assert [one["name"] for one in found["routing"]] == [
        "focusllava", "gate_random", "unaligned", "oracle",
    ]  # fmt: skip
    assert len(found["claims"]) == 8
    assert "0:00:00 left" in told.splitlines()[-1]
    text = page.read_text()
    assert out in text and "--only" not in text
    for name in ("placement", "routing", "slots", "time"):
        assert (page.parent / f"study_{name}.png").stat().st_size > 1000
        assert f"(study_{name}.png)" in text

    # Again: nothing is trained, answered or placed a second time.
    forbid(monkeypatch, "answer", "place", "route", "read_batches", "prefill_ms")
    monkeypatch.setattr("focus_jax.evaluate.study.Run.train", lambda self: pytest.fail("trained"))
    assert study.main([*argv, "--only", "placement,routing"]) == 0
    again = json.loads((tmp_path / "study" / "results.json").read_text())
    assert again["rows"] == found["rows"][:7]
    assert again["placement"] == found["placement"]


def forbid(monkeypatch, *names):
    for name in names:
        monkeypatch.setattr(seed, name, lambda *a, n=name, **k: pytest.fail(f"{n} again"))


def test_arms_share_a_base_and_are_aligned_where_there_is_a_router(program):
    asked = load_study(program, "cpu")
    assert [stage.name for stage in base_of(asked, 1).train.stages] == ["language"]
    stages = {}
    for arm in asked.arms:
        cfg = arm_of(asked, arm, 1, "base/checkpoints")
        assert cfg.train.init_from == "base/checkpoints"
        assert (cfg.train.seed, cfg.data.seed) == (1, 1)
        stages[arm.name] = [stage.name for stage in cfg.train.stages]
    assert stages.pop("focusllava") == ["align", "joint"]
    assert set(map(tuple, stages.values())) == {("joint",)}


def test_every_second_seed_goes_the_other_way(program, tmp_path):
    asked = replace(load_study(program, "cpu"), seeds=(5, 7, 9))
    orders = [seed.Seed(asked, tmp_path, n, Clock({})).in_turn(range(7)) for n in asked.seeds]
    assert orders == [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6]]


def test_the_repositorys_study_fits_its_models():
    for size in ("cpu", "gpu"):
        asked = check(load_study(study.PROGRAM, size))
        assert {arm.role for arm in asked.arms} >= {"full", "ours", "plain", "gate", "part", "cut"}


def test_wrong_studies_are_told(program, tmp_path):
    base = load_program(tmp_path / "micro.py")
    [joint] = base.train.stages
    full, ours = Arm("full", "full", role="full"), Arm("ours", role="ours")
    with pytest.raises(ValueError, match="0 arms have the role 'ours'"):
        Study(base, joint, (full,))
    with pytest.raises(ValueError, match="names of their own"):
        Study(base, joint, (full, ours, Arm("ours")))
    with pytest.raises(ValueError, match="stands against 'none', no arm"):
        Study(base, joint, (full, ours, Arm("part", role="part", against="none")))
    with pytest.raises(ValueError, match="its name is a folder's"):
        Arm("a/b")
    with pytest.raises(ValueError, match="arm 'bad': unknown method 'fulll'"):
        check(Study(base, joint, (full, ours, Arm("bad", "fulll")), layers=(0,)))
    with pytest.raises(ValueError, match=r"layers \[2\] are outside the decoder's 2"):
        check(Study(base, joint, (full, ours), layers=(0, 2)))
    with pytest.raises(FileNotFoundError, match="there is no"):
        load_study(tmp_path / "none.py", "cpu")


def test_arguments_replace_each_other():
    text = "focusllava:vision.gate=switch,vision.balance=0"
    assert overridden(text, "", vision__gate="oracle") == (
        "focusllava:vision.gate=oracle,vision.balance=0"
    )
    assert overridden("", "focusllava", vision__gate="random") == "focusllava:vision.gate=random"


def test_wrong_flags(program, capsys):
    with pytest.raises(SystemExit):
        study.main(["--workdir", "w", "--only", "placement,speed"])
    assert "'speed': choose from placement, routing, methods" in capsys.readouterr().err
    assert study.main(["--workdir", "w", "--seeds", "3"]) == 1
    assert "the study has 2 seeds" in capsys.readouterr().err


def test_processes_run_at_once_and_share_the_cores(tmp_path):
    code = (
        "import os, sys, time; time.sleep(1); "
        "open(sys.argv[1], 'w').write(str(sorted(os.sched_getaffinity(0))))"
    )
    files = [tmp_path / str(number) for number in range(3)]
    at_once([(sys.executable, "-c", code, str(file)) for file in files], 2)
    first, second, third = (set(json.loads(file.read_text())) for file in files)
    cores = os.sched_getaffinity(0)
    assert first == third and first | second == cores
    assert len(cores) == 1 or not first & second


def test_a_process_that_fails_ends_the_others():
    fails = (sys.executable, "-c", "raise SystemExit(3)")
    waits = (sys.executable, "-c", "import time; time.sleep(600)")
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match="failed with exit code 3: its message"):
        at_once([fails, waits], 2)
    assert time.monotonic() - start < 60
