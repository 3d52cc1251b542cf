"""Training: stages in order, exact resumption, what learns and what does not, errors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax import training
from focus_jax.checkpoint import (
    CheckpointDamaged,
    CheckpointMismatch,
    Checkpoints,
    load_params,
)
from focus_jax.config import LoraConfig
from focus_jax.experiment import Experiment, TrainConfig, TrainStage, with_lora
from focus_jax.objectives import OBJECTIVES, Loss
from focus_jax.step import State, make_optimiser, make_step, seed_words
from focus_jax.throughput import CLOCKED
from focus_jax.training import Run
from focus_jax.watch import NonFiniteLoss
from tests.micro import get_config

ROOT = Path(__file__).parents[1]

WORDS = TrainStage(
    "words", "words", steps=6, learning_rate=1e-2, muon=1e-2, train=("decoder.",), samplers=False,
    batch=4, questions=2,
)  # fmt: skip
FIT = TrainStage(
    "fit", "fit", steps=2, learning_rate=0.0, samplers=False, batch=4, questions=1, clutter=0.5
)
JOINT = TrainStage(
    "joint", "answers", steps=6, learning_rate=1e-2,
    train=("decoder.", "projector.", "samplers."), batch=4, questions=2,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _programs(kept_programs):
    """Runs here compile the same steps again and again."""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Makes the micro experiment with these stages; the data are written once."""
    directory = str(tmp_path_factory.mktemp("data"))

    def make(*stages, **train) -> Experiment:
        config = get_config()
        settings = {"log_every": 1, "save_every": 3, "keep": 20, **train}
        return replace(
            config,
            model=replace(config.model, vision=replace(config.model.vision, feature_layer=-1)),
            data=replace(config.data, directory=directory),
            train=TrainConfig(stages=stages, **settings),
        )

    return make


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """An uninterrupted run of three stages: its config, workdir, first and last parameters."""
    config = experiment(WORDS, FIT, JOINT)
    workdir = tmp_path_factory.mktemp("whole")
    run = Run(config, workdir, quiet=True)
    first = {name: np.asarray(leaf) for name, leaf in run.first_tree().items()}
    return SimpleNamespace(config=config, workdir=workdir, run=run, first=first, last=run.train())


def stop_at(monkeypatch, number):
    """Interrupt a run right after it has taken step `number`."""
    see = training.Watch.see

    def stopping(watch, step, *seen):
        see(watch, step, *seen)
        if step == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Watch, "see", stopping)


def metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def assert_same(one, other, prefix=""):
    assert one.keys() == other.keys()
    for name in one:
        if name.startswith(prefix):
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def parameters(workdir, step):
    return load_params(workdir / "checkpoints" / str(step))[0]


def test_stages_run_in_order_and_the_loss_falls(whole):
    rows = {row["step"]: row for row in metrics(whole.workdir)}
    assert list(rows) == [*range(1, 7), 8, *range(9, 15)]
    assert Checkpoints(whole.workdir / "checkpoints", 1).steps() == [3, 6, 8, 9, 12, 14]
    assert set(whole.run.seconds) == {"words", "joint"}
    assert 0 <= rows[8]["unexplained"] < 1
    for first, last in ((1, 6), (9, 14)):
        assert rows[last]["loss_answers"] < 0.9 * rows[first]["loss_answers"]
    # Both samplers are at work in the joint stage, and only there.
    assert rows[14]["text/kept@1"] == 4 and 0 < rows[14]["vision/tokens"] <= 8
    assert "vision/tokens" not in rows[6]
    assert_same(whole.last, parameters(whole.workdir, 14))


def test_what_a_stage_does_not_train_stays_bit_equal(whole):
    words, fit, joint = (parameters(whole.workdir, step) for step in (6, 8, 14))
    for part in ("vision.", "projector.", "samplers."):
        assert_same(whole.first, words, part)
    assert (words["decoder.layers.q.kernel"] != whole.first["decoder.layers.q.kernel"]).any()
    changed = {name for name in fit if (fit[name] != words[name]).any()}
    assert changed == {"projector.linear_2.kernel", "projector.linear_2.bias"}
    assert_same(whole.first, joint, "vision.")
    for part in ("decoder.layers.q.kernel", "projector.linear_1.kernel", "samplers.vision.up.bias"):
        assert (joint[part] != fit[part]).any()


def test_frozen_parts_hold_no_optimiser_state(whole):
    _, state, frozen, _ = whole.run.state_of(JOINT, whole.last)
    assert {name.split(".")[0] for name in state.learning} == {"decoder", "projector", "samplers"}
    assert {name.split(".")[0] for name in frozen} == {"vision"}
    stored = whole.run.stored(state, {})["optimiser"]
    assert any("samplers." in name for name in stored)
    assert not any("vision.layers" in name or "'vision." in name for name in stored)


def test_an_interrupted_run_goes_on_bit_equal(whole, tmp_path):
    # Within the first stage, right behind the end of the second, within the last.
    for stop in (5, 9, 13):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, stop)
            Run(whole.config, tmp_path, quiet=True).train()
    last = Run(whole.config, tmp_path, quiet=True).train()
    assert_same(last, whole.last)
    assert metrics(tmp_path) == metrics(whole.workdir)


def test_a_finished_run_gives_its_parameters_and_trains_no_more(whole, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole.workdir, tmp_path / "copy")
    monkeypatch.setattr(training, "make_step", None)
    monkeypatch.setattr(Run, "fit_stage", None)
    assert_same(Run(whole.config, workdir, quiet=True).train(), whole.last)
    assert metrics(workdir) == metrics(whole.workdir)


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    workdir = shutil.copytree(whole.workdir, tmp_path / "copy")
    files = [p for p in (workdir / "checkpoints" / "14" / "state").rglob("*") if p.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointDamaged, match=r"step 14.*damaged.*one of \[3, 6, 8, 9, 12\]"):
        Run(whole.config, workdir, quiet=True).train()


def test_a_run_starts_from_another_ones_parameters(whole, experiment, tmp_path):
    init = str(whole.workdir / "checkpoints")
    run = Run(experiment(JOINT, init_from=init), tmp_path / "same", quiet=True)
    assert_same(run.first_tree(), whole.last)
    config = experiment(JOINT, init_from=init)
    decoder = replace(config.model.decoder, mlp_width=24)
    config = replace(config, model=replace(config.model, decoder=decoder))
    message = r"has model\.decoder\.mlp_width 16, the config 24: set --model\.decoder\.mlp_width 16"
    with pytest.raises(ValueError, match=message):
        Run(config, tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- low-rank updates


TUNE = TrainStage(
    "tune", "answers", steps=4, learning_rate=1e-2, batch=4, questions=2,
    train=("decoder.layers.lora.", "projector.", "samplers."),
)  # fmt: skip
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))


def with_rank(config, lora=LORA):
    return replace(config, model=replace(config.model, lora=lora))


@pytest.fixture(scope="module")
def tuned(whole, experiment, tmp_path_factory):
    """A run with low-rank updates on top of `whole`: config, workdir, first and last parameters."""
    config = with_rank(experiment(TUNE, init_from=str(whole.workdir), save_every=2))
    workdir = tmp_path_factory.mktemp("tuned")
    run = Run(config, workdir, quiet=True)
    first = {name: np.asarray(leaf) for name, leaf in run.first_tree().items()}
    return SimpleNamespace(config=config, workdir=workdir, first=first, last=run.train())


@pytest.mark.slow
def test_low_rank_updates_learn_alone(whole, tuned):
    base = {name: leaf for name, leaf in tuned.first.items() if ".lora." not in name}
    assert_same(base, whole.last)
    updates = tuned.first.keys() - base.keys()
    assert updates == {f"decoder.layers.lora.{t}.{p}" for t in ("q", "down") for p in "ab"}
    assert not any(tuned.first[name].any() for name in updates if name.endswith(".b"))
    for name, leaf in tuned.last.items():
        learns = name.startswith(("decoder.layers.lora.", "projector.", "samplers."))
        assert (leaf != tuned.first[name]).any() == learns, name
    assert_same(parameters(tuned.workdir, 4), tuned.last)


@pytest.mark.slow
def test_an_interrupted_run_with_low_rank_updates_goes_on_bit_equal(tuned, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3)
        Run(tuned.config, tmp_path, quiet=True).train()
    assert Checkpoints(tmp_path / "checkpoints", 1).steps() == [2]
    assert_same(Run(tuned.config, tmp_path, quiet=True).train(), tuned.last)
    assert metrics(tmp_path) == metrics(tuned.workdir)


@pytest.mark.slow
def test_updates_of_a_run_go_on_or_are_added(tuned, experiment, tmp_path):
    """The next run keeps them if its own are alike; otherwise the kernels take them up."""
    after = experiment(TUNE, init_from=str(tuned.workdir))
    assert_same(Run(with_rank(after), tmp_path / "same", quiet=True).first_tree(), tuned.last)
    name = "decoder.layers.q.kernel"
    update = 2.0 * np.einsum(
        "lir,lro->lio", *(tuned.last[f"decoder.layers.lora.q.{part}"] for part in "ab")
    )
    other = with_rank(after, LoraConfig(rank=1, targets=("v",)))
    plain = replace(after, train=replace(after.train, stages=(JOINT,)))
    for number, config in enumerate((plain, other)):
        tree = Run(config, tmp_path / str(number), quiet=True).first_tree()
        found = {n for n in tree if ".lora." in n}
        assert found == (
            {"decoder.layers.lora.v.a", "decoder.layers.lora.v.b"} if number else set()
        )
        np.testing.assert_allclose(tree[name], tuned.last[name] + update, rtol=1e-6, atol=1e-7)
        assert (tree[name] != tuned.last[name]).any()
        assert_same({"x": tree["decoder.layers.v.kernel"]},
                    {"x": tuned.last["decoder.layers.v.kernel"]})  # fmt: skip


def test_a_run_never_resumes_without_its_updates(whole, tmp_path):
    """Fresh ones are for a start: a checkpoint that lacks them is of another run."""
    workdir = shutil.copytree(whole.workdir, tmp_path / "copy")
    config = replace(with_rank(whole.config), train=replace(whole.config.train, stages=(TUNE,)))
    with pytest.raises(ValueError, match=r"another run: model\.lora\.rank was 0, is 2"):
        Run(config, workdir, quiet=True)
    (workdir / "config.json").unlink()
    with pytest.raises(CheckpointMismatch, match=r"lora.*nothing"):
        Run(config, workdir, quiet=True).train()


@pytest.mark.parametrize("prefix", ["decoder.", "", "decoder.layers.q"])
def test_kernels_do_not_learn_beside_their_updates(experiment, tmp_path, prefix):
    stage = replace(TUNE, train=("projector.", prefix))
    message = f"train names '{prefix}', by which .*name 'decoder.layers.lora.' in its place"
    with pytest.raises(ValueError, match=message):
        Run(with_rank(experiment(stage)), tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_an_experiment_gets_low_rank_updates(experiment):
    config = with_lora(experiment(WORDS, FIT, JOINT), LORA)
    assert config.model.lora == LORA
    assert [stage.train for stage in config.train.stages] == [
        ("decoder.layers.lora.",), ("",), ("decoder.layers.lora.", "projector.", "samplers.")
    ]  # fmt: skip


def killed_at(step, command, environment, workdir):
    """Start a training program and end it with SIGKILL once `step` stands in its metrics."""
    path = workdir / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if path.exists() and f'{{"step": {step},' in path.read_text():
                break
            time.sleep(0.005)
    finally:
        process.kill()
    return process.wait()


@pytest.mark.slow
def test_a_killed_program_goes_on_bit_equal(tmp_path):
    steps = 60
    stops = sorted(random.sample(range(2, steps - 20), 3))
    print("killed at", stops)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def command(workdir):
        program = [sys.executable, "train.py", "--config", "tests/micro.py", "--quiet"]
        flags = {"data.directory": tmp_path / "data", "train.stages.0.steps": steps}
        flags |= {"train.save-every": 4, "train.stages.0.learning-rate": 0.01, "model.lora.rank": 2}
        told = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        learn = ["--train.stages.0.train", "decoder.layers.lora.", "projector.", "samplers."]
        return [*program, "--workdir", str(workdir), *told, *learn]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), cwd=ROOT, env=environment, check=True)
    for stop in stops:
        assert killed_at(stop, command(cut), environment, cut) == -signal.SIGKILL
    subprocess.run(command(cut), cwd=ROOT, env=environment, check=True)
    assert_same(parameters(cut, steps), parameters(whole, steps))
    assert [row["step"] for row in metrics(cut)] == list(range(1, steps + 1))
    assert metrics(cut) == metrics(whole)


# ---------------------------------------------------------------- one step


def additive(config):
    """A loss that is a mean over images: answers of one token, no loss scaled by its batch."""
    glyphs = replace(config.data.glyphs, kinds=("shape_of_colour", "colour_of_shape"))
    vision = replace(config.compress.vision, gate="measured")
    return replace(
        config,
        data=replace(config.data, glyphs=glyphs),
        compress=replace(config.compress, vision=vision),
    )


@pytest.mark.slow
def test_two_batches_accumulated_are_one_of_both(experiment, tmp_path):
    stage = replace(JOINT, steps=3, learning_rate=1e-3)
    found = []
    for place, (batch, accumulate) in enumerate(((4, 1), (2, 2))):
        asked = replace(stage, batch=batch, accumulate=accumulate)
        run = Run(additive(experiment(asked)), tmp_path / str(place), quiet=True)
        found.append((run.train(), metrics(run.workdir)))
    (one, lines), (two, others) = found
    assert [row["step"] for row in others] == [1, 2, 3]
    for row, other in zip(lines, others, strict=True):
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=1e-4)
    for name in one:
        # Adam follows the sign of a gradient near zero, so single elements may part.
        assert np.abs(one[name] - two[name]).mean() < 2e-5, name


def test_seeds_draw_apart_by_one_program(whole):
    model, state, frozen, optimiser = whole.run.state_of(WORDS, whole.last)
    step = make_step(model, WORDS, optimiser, whole.run.layout)
    with closing(iter(whole.run.loader(WORDS, 0))) as batches:
        batch = training.for_device(training.next_batches(batches, 1))
    losses = []
    for seed in (3, 3, 4):
        own = jax.tree.map(jnp.copy, state)
        metrics = step(own, frozen, batch, seed_words(seed), np.int32(0), np.float32(0))[1]
        losses.append(float(metrics["loss"]))
    # The objective draws how many empty cells it tells, and where.
    assert losses[0] == losses[1] != losses[2]
    assert step._cache_size() == 1


def test_rates_follow_the_schedule_and_the_part():
    stage = replace(
        JOINT, steps=40, learning_rate=0.1, warmup=0.25, final=0.1,
        scale=(("decoder.", 0.5), ("decoder.layers.q", 0.25), ("vision.", 0.0)),
    )  # fmt: skip
    factor = {
        "projector.linear_1.kernel": 1.0,
        "decoder.embed.embedding": 0.5,
        "decoder.stages.1.q.kernel": 0.25,
        "vision.norm.scale": 0.0,
    }
    optimiser = make_optimiser(TrainConfig(), stage)
    values = {name: jnp.zeros(2) for name in factor}
    gradient = {name: jnp.full(2, 0.1) for name in factor}
    moments = optimiser.init(values)
    update = jax.jit(optimiser.update)
    for number in range(40):
        # Adam's step under a constant gradient is the learning rate itself.
        rate = 0.1 * number / 10
        if number >= 10:
            rate = 0.1 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (number - 10) / 30)))
        updates, moments = update(gradient, moments, values)
        for name in factor:
            np.testing.assert_allclose(updates[name], -rate * factor[name], rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(experiment, tmp_path, monkeypatch):
    def broken(vlm, batch, ctx):
        loss = OBJECTIVES["words"](vlm, batch, ctx)
        return Loss(jnp.where(ctx.progress > 0.5, jnp.nan, loss.value), loss.metrics)

    monkeypatch.setitem(OBJECTIVES, "answers", broken)
    stage = replace(WORDS, objective="answers", name="bad", steps=6)
    run = Run(experiment(stage, save_every=2), tmp_path, quiet=True)
    loader = run.loader(stage, 0)
    with training.closing(iter(loader)) as batches:
        images = [next(batches)["index"].tolist() for _ in range(4)][-1]
    with pytest.raises(NonFiniteLoss) as error:
        run.train()
    assert str(error.value).startswith("step 4 (stage 'bad'): loss nan")
    assert f"images {images}." in str(error.value)
    assert Checkpoints(tmp_path / "checkpoints", 1).steps() == [2]
    assert all(np.isfinite(leaf).all() for leaf in parameters(tmp_path, 2).values())
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (replace(JOINT, train=("samplers.",), samplers=False), "no parameter learns with train="),
        (replace(JOINT, train=()), "no parameter learns"),
        (replace(JOINT, train=("decoder.", "projecter.")), "train names 'projecter.'.*projector"),
        (replace(JOINT, scale=(("vison.", 0.1),)), "scale names 'vison.'"),
    ],
)
def test_a_stage_that_trains_nothing_is_refused(experiment, tmp_path, stage, message):
    with pytest.raises(ValueError, match=f"stage 'joint': {message}"):
        Run(experiment(stage), tmp_path, quiet=True).train()


def test_an_experiment_without_stages_is_refused(experiment, tmp_path):
    with pytest.raises(ValueError, match=r"'micro' has no training stages: set train\.stages"):
        Run(experiment(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_scenes_too_full_for_words_are_refused(experiment, tmp_path):
    config = experiment(WORDS)
    glyphs = replace(config.data.glyphs, grid=16, groups=6, digits=4)
    with pytest.raises(ValueError, match=r"'words' tells 24 .* data\.glyphs fill 30: lower their"):
        Run(replace(config, data=replace(config.data, glyphs=glyphs)), tmp_path)
    fuller = replace(WORDS, name="fuller", glyphs=glyphs)
    with pytest.raises(ValueError, match=r"stage 'fuller': .* its own glyphs fill 30: lower their"):
        Run(experiment(WORDS, fuller), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_state_of_a_fit_is_empty(whole):
    stored, data, meta = whole.run.checkpoints.restore(
        8, whole.run.stored(State({}, ()), whole.last)
    )
    assert stored["optimiser"] == {} and meta["stage"] == 1 and data["order"]["train"]
