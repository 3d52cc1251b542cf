"""What a step amounts to, what the clock says of it, and how full devices are."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from focus_jax import throughput
from focus_jax.compress.baselines import full
from focus_jax.objectives import WORD_SLOTS
from focus_jax.sharding import make_layout
from focus_jax.throughput import Load, Pace, load_of, mean_load, memory_of
from tests.micro import get_config

LOAD = Load(images=8, tokens=800, flops=4e12, devices=2, peak=1e12)


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_are_of_the_whole_job_and_mfu_of_all_its_devices():
    assert LOAD.rates(4.0) == {
        "images_per_second": 2.0,
        "tokens_per_second": 200.0,
        "flops_per_second": 1e12,
        "mfu": 0.5,
    }


def test_what_is_not_known_is_left_out():
    assert "mfu" not in replace(LOAD, peak=None).rates(4.0)
    assert replace(LOAD, peak=None).rates(4.0)["flops_per_second"] == 1e12
    unknown = replace(LOAD, flops=None).rates(4.0)
    assert set(unknown) == {"images_per_second", "tokens_per_second"}


# ---------------------------------------------------------------- a step of a stage


@pytest.fixture(scope="module")
def layout():
    return make_layout()


def products(decoder, rows):
    """Operations of the decoder's layers on one sample, causal, written out."""
    per_row = 4 * decoder.width * decoder.heads * decoder.head_dim
    per_row += 3 * decoder.width * decoder.mlp_width
    attention = sum(2 * (row + 1) * decoder.heads * decoder.head_dim for row in range(rows))
    return 2 * decoder.layers * (rows * per_row + attention)


def test_a_step_counts_all_images_and_what_learns_three_times(layout):
    cfg = get_config()
    stage = replace(cfg.train.stages[0], batch=4, accumulate=3, questions=2, train=("decoder.",))
    whole = load_of(cfg, stage, full(), layout)
    # 16 patches and 2 tokens before 2 questions of 11 tokens.
    rows = 2 + 16 + 2 * 11
    assert (whole.images, whole.tokens, whole.devices) == (12, 12 * rows, layout.mesh.size)
    frozen = load_of(cfg, replace(stage, train=("samplers.",)), full(), layout)
    head = 2 * 2 * 11 * cfg.model.decoder.width * cfg.model.decoder.vocab_size
    learnt = products(cfg.model.decoder, rows) + head
    assert whole.flops - frozen.flops == pytest.approx(12 * 2 * learnt)
    tower = load_of(cfg, replace(stage, train=("vision.", "decoder.")), full(), layout)
    assert tower.flops > whole.flops


def test_samplers_leave_fewer_tokens_and_operations(layout):
    cfg = get_config()
    stage, method = cfg.train.stages[0], cfg.compress.value()
    focus, whole = (load_of(cfg, stage, one, layout) for one in (method, full()))
    assert whole.tokens - focus.tokens == stage.batch * (16 - 8)
    assert focus.flops < whole.flops and focus.images == whole.images


def test_scenes_in_words_have_tokens_but_no_known_operations(layout):
    cfg = get_config()
    stage = replace(cfg.train.stages[0], objective="words", batch=4, questions=2)
    load = load_of(cfg, stage, full(), layout)
    assert load.tokens == 4 * (2 + WORD_SLOTS + 2 * 11) and load.flops is None


def test_a_device_without_a_published_peak_has_no_mfu(layout, monkeypatch):
    cfg = get_config()
    assert load_of(cfg, cfg.train.stages[0], full(), layout).peak is None
    monkeypatch.setattr(throughput, "peak_of", {layout.mesh.devices.flat[0].device_kind: 2e12}.get)
    assert load_of(cfg, cfg.train.stages[0], full(), layout).peak == 2e12


# ---------------------------------------------------------------- clock and memory


def test_the_pace_knows_waiting_checkpoints_and_the_mean():
    clock = Clock()
    pace = Pace(clock)
    with pace.waiting():
        clock.now += 50  # the first batch
    clock.now += 500  # the first step compiles
    pace.tick()
    assert pace.take(LOAD) == {} and pace.median == 0 and pace.lately is None
    for waited, rest in ((1.0, 3.0), (2.0, 8.0), (0.0, 4.0)):
        with pace.waiting():
            clock.now += waited
        clock.now += rest
        pace.tick()
        assert pace.times[-1] == waited + rest
        with pace.aside():
            clock.now += 1000
    told = pace.take(LOAD)
    assert told["step_seconds"] == 6.0 and told["data_wait"] == pytest.approx(3 / 18)
    assert told["images_per_second"] == pytest.approx(8 / 6)
    # The last checkpoint is told with the step that follows it.
    assert told["checkpoint_seconds"] == 2000 and pace.median == 4.0
    clock.now += 7.0
    pace.tick()
    assert pace.lately == pytest.approx(25 / 4)
    told = pace.take(LOAD)
    assert told["step_seconds"] == 7.0 and told["data_wait"] == 0
    assert told["checkpoint_seconds"] == 1000
    assert pace.take(LOAD) == {}


def test_compiling_is_no_part_of_a_step():
    clock = Clock()
    pace = Pace(clock)
    for compiled, rest in ((500.0, 1.0), (0.0, 2.0), (300.0, 4.0)):
        if compiled:
            with pace.compiling():
                clock.now += compiled
        pace.tick()
        clock.now += rest
    told = pace.take(LOAD)
    assert told["step_seconds"] == 1.5 and told["compile_seconds"] == 800
    assert "compile_seconds" not in pace.take(LOAD)


def test_the_mean_of_loads():
    other = replace(LOAD, images=0, tokens=200, flops=1e12)
    assert mean_load([LOAD, other]) == replace(LOAD, images=4, tokens=500, flops=2.5e12)
    assert mean_load([LOAD, replace(other, flops=None)]).flops is None


def test_memory_is_that_of_the_fullest_device_that_tells():
    def device(stats):
        return SimpleNamespace(memory_stats=lambda: stats)

    one = device({"bytes_in_use": 3, "peak_bytes_in_use": 9, "bytes_limit": 16})
    two = device({"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 16})
    found = {"memory/in_use": 5, "memory/peak": 9, "memory/limit": 16}
    assert memory_of([one, device(None), two]) == found
    assert memory_of([device(None)]) == {} == memory_of([])
