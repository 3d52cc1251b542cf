"""What a run shows of its steps: when it looks, what it logs, when it stops."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from focus_jax.gradient_norms import gradient_norms
from focus_jax.throughput import CLOCKED, Load, Pace
from focus_jax.watch import NonFiniteLoss, Watch, Watching, outlets
from tests.test_throughput import Clock

LOAD = Load(images=8, tokens=800, flops=4e12, devices=2, peak=1e12)
INDEX = np.array([[4, 7]])


class Later:
    """A number on a device: reading it waits for its step."""

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __float__(self):
        self.read.append(self.value)
        return self.value


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def metrics(loss, norm=1.0):
    return {"loss": loss, "gradient_norm": norm}


@pytest.fixture
def out(tmp_path):
    with outlets(Watching(heartbeat=1e6), tmp_path, 10, "run", quiet=True) as found:
        yield found


def test_a_step_is_read_when_the_next_one_has_been_handed_over(out, tmp_path):
    watch, read = Watch(out, "stage", 1), []
    for number in (1, 2, 3):
        with watch.step(number):
            watch.see(number, metrics(Later(float(number), read)), INDEX, LOAD)
        assert read == [float(n) for n in range(1, number)]
    watch.flush()
    watch.flush()
    assert read == [1.0, 2.0, 3.0]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_checkpoint_waits_for_the_steps_before_it(out):
    watch, read = Watch(out, "stage", 1), []
    watch.see(1, metrics(Later(1.0, read)), INDEX, LOAD)
    with watch.aside():
        assert read == [1.0]


def test_lines_hold_the_rates_of_the_steps_since_the_last(out, tmp_path):
    clock = Clock()
    device = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 5, "peak_bytes_in_use": 9})
    watch = Watch(out, "stage", 2, [device], Pace(clock))
    for number, seconds in enumerate((100.0, 3.0, 5.0, 1.0, 6.0), start=1):
        with watch.waiting():
            clock.now += 1.0
        watch.see(number, metrics(1 / number), INDEX, LOAD)
        clock.now += seconds - 1.0
    watch.flush()
    two, four = rows(tmp_path)
    # Step n ends while step n + 1 is under way, whose batch was waited for meanwhile.
    assert two["step_seconds"] == 3.0 and two["data_wait"] == pytest.approx(1 / 3)
    assert two["images_per_second"] == pytest.approx(8 / 3)
    assert four["step_seconds"] == 3.0 and four["tokens_per_second"] == pytest.approx(800 / 3)
    assert four["mfu"] == pytest.approx(4e12 / (3 * 2e12)) and four["seconds_per_step"] == 3.0
    assert (four["memory/in_use"], four["memory/peak"]) == (5, 9)
    assert four["loss"] == 0.25
    clocked = set(four) - {"step", "loss", "gradient_norm"}
    assert clocked <= set(CLOCKED)


def test_steps_of_several_shapes_are_told_together(out, tmp_path):
    clock = Clock()
    watch = Watch(out, "stage", 4, pace=Pace(clock))
    small = replace(LOAD, images=0, tokens=200, flops=1e12)
    for number, load in enumerate((LOAD, LOAD, small, small, LOAD), start=1):
        with watch.running(load):
            # The first step of each shape is compiled while it is handed over.
            clock.now += 100.0 if number in (1, 3) else 0.0
        watch.see(number, metrics(1.0), INDEX, load)
        clock.now += 2.0
    [four] = rows(tmp_path)
    assert four["step_seconds"] == 2.0 and four["compile_seconds"] == 200
    # Steps 2 to 4: one of 800 tokens and two of 200.
    assert four["tokens_per_second"] == pytest.approx(1200 / 6)
    assert four["images_per_second"] == pytest.approx(8 / 6)


def test_the_heartbeat_knows_the_last_step_that_was_done(out, tmp_path):
    clock = Clock()
    watch = Watch(out, "stage", 5, pace=Pace(clock))
    for number in (1, 2, 3):
        watch.see(number, metrics(1 / number), INDEX, LOAD)
        clock.now += 2.0
    told = out.heartbeat.beat()
    assert (told["step"], told["stage"], told["loss"]) == (2, "stage", 0.5)
    assert told["step_seconds"] == 2.0 and told["tokens_per_second"] == 400
    assert not rows(tmp_path)


@pytest.mark.parametrize("bad", [metrics(math.nan), metrics(1.0, math.inf)])
def test_a_loss_that_is_not_finite_is_told_with_its_images(out, tmp_path, bad):
    watch = Watch(out, "late", 1)
    watch.see(1, metrics(1.0), INDEX, LOAD)
    watch.see(2, bad, INDEX, LOAD)
    with pytest.raises(NonFiniteLoss, match=r"step 2 \(stage 'late'\): .*images \[4, 7\]\."):
        watch.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert out.heartbeat.beat()["step"] == 2


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_a_heartbeat_without_a_pace_is_refused(seconds):
    with pytest.raises(ValueError, match=f"--heartbeat {seconds}: give seconds"):
        Watching(heartbeat=seconds)


def test_gradient_norms_of_parts_make_up_the_whole():
    random = np.random.default_rng(0)
    names = ("decoder.head.kernel", "decoder.stages.0.q.kernel", "image_newline", "vision.norm")
    grads = {name: random.normal(size=(3, 2)) for name in names}
    norms = gradient_norms(grads)
    whole = norms.pop("gradient_norm")
    assert set(norms) == {f"gradient_norm/{p}" for p in ("decoder", "image_newline", "vision")}
    both = np.concatenate([grads[names[0]], grads[names[1]]])
    np.testing.assert_allclose(norms["gradient_norm/decoder"], np.sqrt((both**2).sum()), rtol=1e-6)
    np.testing.assert_allclose(whole, np.sqrt(sum((g**2).sum() for g in grads.values())), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(list(norms.values())), whole, rtol=1e-6)


def test_a_real_run_tells_rates_parts_and_routers(micro):
    first, second = rows(micro.workdir)
    assert "step_seconds" not in first  # the first step compiles
    assert second["step_seconds"] > 0 and 0 <= second["data_wait"] <= 1
    # 2 images a step; on a device without a published peak there is no MFU.
    rate = 2 / second["step_seconds"]
    assert second["images_per_second"] == pytest.approx(rate)
    assert second["tokens_per_second"] == pytest.approx(rate * (2 + 8 + 2 * 11))
    assert second["flops_per_second"] > 0 and "mfu" not in second
    for row in (first, second):
        parts = [row[f"gradient_norm/{part}"] for part in ("decoder", "projector", "vision")]
        assert 0 < np.linalg.norm(parts) <= row["gradient_norm"] * (1 + 1e-5)
        assert row["loss"] == pytest.approx(row["loss_answers"] + row.get("loss_router", 0), 1e-5)
        shares = [row[f"vision/share_scale_{p}"] for p in (2, 1)]
        assert sum(shares) == pytest.approx(1) and row["text/kept@1"] == 4
    told = json.loads((micro.workdir / "heartbeat.json").read_text())
    assert (told["step"], told["total"], told["state"]) == (2, 2, "done")
    assert told["loss"] == second["loss"]
