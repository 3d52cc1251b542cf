"""Plans of a small experiment: by analysis for GPUs, compiled for TPUs where libtpu is there."""

from dataclasses import replace
from math import prod
from pathlib import Path

import jax
import numpy as np
import pytest

from focus_jax.experiment import load_program
from focus_jax.models import params as names
from focus_jax.pods.plan import plan_pod
from focus_jax.pods.programs import Job
from focus_jax.pods.sweep import batches, best_first, meshes
from focus_jax.pods.topology import parse_topology

CONFIG = load_program(Path(__file__).with_name("pod_micro.py"))
ALIGN, JOINT = CONFIG.train.stages
NODE, SLICE = parse_topology("h100:4"), parse_topology("v5e:2x2")


def job(what="train", stage=JOINT, method=""):
    compress = replace(CONFIG.compress, method=method)
    return Job(replace(CONFIG, compress=compress), what, stage, tiles=1)


def parameter_bytes(learning=3):
    """Masters in fp32, and two moments of those that learn."""
    leaves = names.named_leaves(names.abstract(CONFIG.model, CONFIG.compress.value()))
    return sum(4 * prod(leaf.shape) for leaf in leaves.values()) * learning


# ---------------------------------------------------------------------------- by analysis


def test_arguments_are_exact():
    alone = plan_pod(job(), parse_topology("h100:1"), "data")
    batch = alone.memory.argument - parameter_bytes()
    # Pixels, and little beside them: two questions of 11 tokens, 4 arrays; counters.
    pixels = 8 * 32 * 32 * 3
    assert pixels < batch < pixels + 8 * (16 + 2 * 11 * 7 + 2 * 5 + 8) + 64
    split = plan_pod(job(), NODE, "fsdp")
    assert alone.memory.argument / 4 < split.memory.argument < alone.memory.argument / 2
    copies = plan_pod(job(), NODE, "data")
    assert copies.memory.argument == pytest.approx(parameter_bytes() + batch / 4, rel=0.01)


def test_analysis_says_so_and_follows_the_mesh():
    plan = plan_pod(job(), NODE, "fsdp")
    assert not plan.compiled and plan.fits and "estimates" in plan.notes[0]
    kinds = {(one.kind, one.axes) for one in plan.traffic}
    assert kinds == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))}
    copies = plan_pod(job(), NODE, "data")
    assert {(one.kind, one.axes) for one in copies.traffic} == {("all-reduce", ("data",))}
    both = plan_pod(job(), NODE, "fsdp=2,tensor=2")
    assert ("all-reduce", ("tensor",)) in {(one.kind, one.axes) for one in both.traffic}
    assert plan_pod(job(), parse_topology("h100:1"), "data").traffic == ()


def test_a_frozen_decoder_sends_no_gradients():
    every, align = (plan_pod(job(stage=stage), NODE, "fsdp") for stage in (JOINT, ALIGN))
    sent = {one.kind: one.payload for one in align.traffic}
    assert sent["reduce-scatter"] < 0.5 * {o.kind: o.payload for o in every.traffic}["all-gather"]
    assert align.memory.argument < every.memory.argument
    assert align.flops.model < every.flops.model


def test_a_step_of_several_batches_sends_its_weights_again():
    once, twice = (
        plan_pod(job(stage=replace(JOINT, batch=8 // n, accumulate=n)), NODE, "fsdp")
        for n in (1, 2)
    )
    assert {o.kind: 2 * o.payload for o in once.traffic} == {
        o.kind: o.payload for o in twice.traffic
    }
    assert twice.flops.model == once.flops.model and twice.job.images == once.job.images == 8
    assert twice.memory.temporary < once.memory.temporary


def test_remat_trades_memory_for_operations():
    found = []
    for remat in ("dots", "mlp", "full"):
        own = job()
        model = replace(own.cfg.model, remat=remat)
        found.append(plan_pod(replace(own, cfg=replace(own.cfg, model=model)), NODE, "fsdp"))
    assert [p.memory.temporary for p in found] == sorted(
        (p.memory.temporary for p in found), reverse=True
    )
    assert found[0].flops.ratio == 1.0 > found[1].flops.ratio > found[2].flops.ratio > 0.7


def test_figures_add_up():
    plan = plan_pod(job(method="full"), NODE, "fsdp")
    said = plan.to_json()
    assert said["method"] == "full" and said["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    memory = said["memory"]
    parts = memory["argument"] + memory["output"] - memory["aliased"] + memory["temporary"]
    assert memory["total"] == parts and memory["hbm"] == 80 * 2**30
    chip, seconds = NODE.chip, said["seconds"]
    assert seconds["compute"] == pytest.approx(said["flops"]["compiled"] / chip.flops)
    assert seconds["network_all_links"] == pytest.approx(said["wire"] / 450e9)
    assert seconds["least"] == max(
        seconds["compute"], seconds["memory"], seconds["network_own_links"]
    )
    assert said["images_per_second"] == pytest.approx(8 / seconds["least"])
    reached = said["flops"]["model"] / seconds["least"] / chip.flops
    assert said["mfu_ceiling"] == pytest.approx(reached)


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_generation_by_analysis(what):
    plan = plan_pod(job(what), NODE, "fsdp=2,tensor=2")
    assert plan.fits and plan.flops.model > 0
    assert plan.tokens == (8 if what == "decode" else 8 * (2 + 8 + 11))


@pytest.mark.parametrize(
    ("mesh", "batch", "said"),
    [
        ("fsdp=3", 8, "mesh 'fsdp=3' has 3 = 3 places, there are 4 devices"),
        ("fsdp", 6, "a batch of 6 rows does not divide over 4 devices"),
        ("model=4", 8, "'model' is no axis"),
    ],
)
def test_what_does_not_fit_together(mesh, batch, said):
    with pytest.raises(ValueError, match=said):
        plan_pod(job(stage=replace(JOINT, batch=batch)), NODE, mesh)


# --------------------------------------------------------------------------------- sweeps


def test_a_sweep_tries_what_divides_and_sorts_by_speed():
    assert list(meshes(NODE, job())) == ["fsdp=4,tensor=1", "fsdp=2,tensor=2"]  # two heads
    assert batches(job()) == (4, 8, 16)
    tried = [plan_pod(job(stage=replace(JOINT, batch=b)), NODE, "fsdp") for b in (4, 16, 8)]
    tight = replace(tried[1], refused="no room")
    first, second, last = best_first([tried[0], tight, tried[2]])
    assert first.per_second(first.job.images) >= second.per_second(second.job.images)
    assert last is tight and not last.fits


# --------------------------------------------------------------------------------- compiled


@pytest.fixture(scope="module")
def compiled():
    """The step on four chips; `libtpu` comes with `make test-tpu`."""
    pytest.importorskip("libtpu")
    return plan_pod(job(), SLICE, "fsdp=2,tensor=2")


@pytest.mark.slow
def test_the_real_step_is_compiled_for_a_tpu(compiled):
    assert compiled.compiled and compiled.fits and not compiled.refused
    assert jax.default_backend() == "cpu"
    # All of the model's own products are there, and little else.
    assert 0.7 < compiled.flops.ratio <= 1.0
    exact = plan_pod(job(), parse_topology("h100:4"), "fsdp=2,tensor=2").memory.argument
    assert exact <= compiled.memory.argument  # a TPU pads small arrays to its tiles
    assert compiled.traffic and np.isfinite(compiled.times.least)


@pytest.mark.slow
def test_generation_is_compiled_for_a_tpu(compiled):
    prefill = plan_pod(job("prefill"), SLICE, "fsdp=2,tensor=2")
    decode = plan_pod(job("decode"), SLICE, "fsdp=2,tensor=2")
    assert prefill.fits and decode.fits
    assert decode.flops.compiled < prefill.flops.compiled < compiled.flops.compiled
