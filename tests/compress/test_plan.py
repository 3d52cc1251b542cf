"""A plan against the compiler's own count, and against published numbers."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax import generate
from focus_jax.compress.baselines import downsample, full, pool
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.method import Context, Method
from focus_jax.compress.plan import pairs, plan, runs
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.config import (
    DecoderConfig,
    ModelConfig,
    VisionConfig,
    llava_1_5_7b,
    llava_1_5_13b,
    llava_next_vicuna_7b,
    tiny,
)
from focus_jax.models.params import abstract
from focus_jax.models.vlm import Inputs, dims_of, sizes_of
from tests.quick import compiled

TINY = replace(tiny(), attention="xla", unroll=True)
BASE = ModelConfig(
    vision=VisionConfig(
        image_size=128, patch_size=8, width=96, layers=2, heads=4, mlp_width=192,
        activation="gelu", feature_layer=-1,
    ),
    decoder=DecoderConfig(
        vocab_size=128, width=128, layers=6, heads=4, kv_heads=4, head_dim=32, mlp_width=256
    ),
    unroll=True,
)  # fmt: skip
SMALL = replace(
    BASE,
    vision=replace(BASE.vision, image_size=64, activation="quick_gelu", feature_layer=-2),
    decoder=replace(BASE.decoder, kv_heads=2),
    projector="linear",
)
CONV = replace(SMALL, vision=replace(SMALL.vision, stem="conv", feature_layer=-1))
BOTH = focusllava(VisionGuided(budget=100), TextGuided(layer=3))
PEAK = focusllava(VisionGuided(budget=100, gate="uniform"), TextGuided(layer=2, queries="peak"))
DRAWN = focusllava(VisionGuided(budget=100, gate="random"), TextGuided(layer=2, rank="random"))
MEASURED = focusllava(
    VisionGuided(budget=100, gate="measured"), TextGuided(layer=2, queries="last")
)
TWICE = focusllava(
    VisionGuided(budget=30, gate="switch"),
    (TextGuided(layer=2, keep=0.5), TextGuided(layer=4, normalise="visual")),
)


def shapes_of(cfg: ModelConfig, prefix: int, questions: int, text: int) -> Inputs:
    """One image and its questions, without values."""
    shape = jax.ShapeDtypeStruct
    n, side = cfg.vision.patches, cfg.vision.image_size
    asked = shape((1, questions, text), bool)
    return Inputs(
        shape((1, 1, side, side, 3), jnp.uint8), shape((1, 1, n), bool), shape((1, 1, 2), int),
        shape((1, prefix), jnp.int32), shape((1, prefix), bool),
        shape((1, questions, text), jnp.int32), asked, asked, asked,
    )  # fmt: skip


def counted(cfg: ModelConfig, method: Method, prefix: int, questions: int, text: int) -> float:
    """Operations of a compiled prefill of one image, from shapes alone."""

    def prefill(vlm, inputs):
        return vlm.decoder.logits(vlm(inputs, Context(jax.random.key(0))).hidden)

    inputs = shapes_of(cfg, prefix, questions, text)
    program = compiled(prefill).lower(abstract(cfg, method), inputs).compile()
    return program.cost_analysis()["flops"]


@pytest.mark.parametrize("method", [full(), BOTH])
def test_a_prompt_to_be_continued_is_what_the_compiler_counts(method):
    """Layers apart: the last one does less, and so does the head."""
    cfg = replace(BASE, stacked=False)
    table = plan(method, dims_of(cfg, 1), sizes_of(cfg), 24, prefix_tokens=8, head_tokens=1)
    run = compiled(lambda vlm, inputs: generate.prefill(vlm, inputs, jax.random.key(0), room=1))
    program = run.lower(abstract(cfg, method), shapes_of(cfg, 8, 1, 24)).compile()
    assert table.flops.total == pytest.approx(program.cost_analysis()["flops"], rel=0.03)
    whole = plan(method, dims_of(BASE, 1), sizes_of(BASE), 24, prefix_tokens=8, head_tokens=1)
    assert table.flops.decoder < 0.94 * whole.flops.decoder


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_blocks_meet_the_keys_up_to_their_end(rows):
    sizes = sizes_of(replace(BASE, attention="blocked"))
    met = sum(min(-(-(row + 1) // 256) * 256, rows) for row in range(rows))
    assert pairs(sizes, rows) == met
    assert pairs(sizes_of(BASE), rows) == rows**2


@pytest.mark.parametrize(
    ("cfg", "method", "prefix", "questions", "text"),
    [
        (TINY, full(), 8, 1, 24),
        (TINY, pool(8), 8, 1, 24),
        (TINY, downsample(12), 0, 1, 24),
        (TINY, BOTH, 8, 1, 24),
        (BASE, BOTH, 8, 1, 24),
        (BASE, MEASURED, 8, 3, 40),
        (SMALL, full(), 4, 2, 40),
        (SMALL, TWICE, 8, 2, 64),
        (TINY, PEAK, 8, 1, 24),
        (TINY, DRAWN, 8, 1, 24),
        (CONV, full(), 4, 1, 16),
    ],
)
def test_total_is_what_the_compiler_counts(cfg, method, prefix, questions, text):
    table = plan(
        method, dims_of(cfg, 1), sizes_of(cfg), text, prefix_tokens=prefix, questions=questions
    )
    assert table.flops.total == pytest.approx(
        counted(cfg, method, prefix, questions, text), rel=0.03
    )
    assert table.flops.elementwise < 0.05 * table.flops.total


@pytest.mark.parametrize(
    ("cfg", "macs", "twice"), [(llava_1_5_7b(), 3.82, 7.63), (llava_1_5_13b(), 7.445, 14.89)]
)
def test_published_conventions(cfg, macs, twice):
    table = plan(full(), dims_of(cfg, 1), sizes_of(cfg), 64)
    assert table.slots == (576,) * cfg.decoder.layers
    assert table.decoder_macs / 1e12 == pytest.approx(macs, abs=0.006)
    assert table.decoder_flops_x2 / 1e12 == pytest.approx(twice, abs=0.006)


def test_published_schedules():
    """PyramidDrop's 1.78 T; 288 slots from layer 2 on."""
    cfg = llava_1_5_7b()
    cuts = tuple(
        TextGuided(layer=layer, keep=keep) for layer, keep in ((8, 0.5), (16, 0.25), (24, 0.125))
    )
    table = plan(focusllava(text=cuts), dims_of(cfg, 1), sizes_of(cfg), 64)
    assert table.slots == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert table.mean_slots == 270
    assert table.decoder_macs / 1e12 == pytest.approx(1.78, abs=0.006)
    half = plan(focusllava(text=TextGuided(layer=2, keep=0.5)), dims_of(cfg, 1), sizes_of(cfg), 64)
    assert half.slots == (576,) * 2 + (288,) * 30
    assert half.share_entering == 1.0
    assert half.mean_share == pytest.approx((2 + 15) / 32)


def test_newlines_count_as_slots():
    cfg = llava_next_vicuna_7b()
    table = plan(full(), dims_of(cfg, 5), sizes_of(cfg), 64)
    assert table.entering == table.full == 5 * 576 + 2 * 24
    table = plan(focusllava(VisionGuided()), dims_of(cfg, 5), sizes_of(cfg), 64)
    assert table.entering == 5 * 225 + 2 * 6
    assert table.share_entering == pytest.approx(1137 / 2928)


def test_cache_bytes_by_hand():
    method = focusllava(text=TextGuided(layer=2, keep=0.25))
    sizes, dims = sizes_of(SMALL), dims_of(SMALL, 1)
    row = 2 * 2 * 32 * 4  # key and value, two heads of 32, fp32
    table = plan(method, dims, sizes, 10, prefix_tokens=3, questions=2)
    # Behind a cut for each question there are two samples, each with its own 16 visual tokens.
    assert table.kv_bytes == (2 * (3 + 64 + 20) * row, 4 * 2 * (3 + 16 + 10) * row)
    pooled = focusllava(text=TextGuided(layer=2, keep=0.25, sharing="pooled"))
    table = plan(pooled, dims, sizes, 10, prefix_tokens=3, questions=2)
    assert table.kv_bytes == (2 * (3 + 64 + 20) * row, 4 * (3 + 16 + 20) * row)
    bf16 = sizes_of(replace(SMALL, compute_dtype="bfloat16"))
    halved = plan(pooled, dims, bf16, 10, prefix_tokens=3, questions=2)
    assert 2 * sum(halved.kv_bytes) == sum(table.kv_bytes)


def test_cut_at_layer_zero_shortens_what_enters():
    method = focusllava(text=TextGuided(layer=0, keep=0.25))
    table = plan(method, dims_of(SMALL, 1), sizes_of(SMALL), 10)
    assert table.entering == 16
    assert table.full == 64
    assert table.slots == (16,) * 6
    assert table.flops.projector == 2.0 * 64 * 96 * 128


def test_expected_valid_tokens_follow_padding():
    method = focusllava(VisionGuided(budget=40), TextGuided(layer=3, keep=0.5))
    table = plan(method, dims_of(SMALL, 1), sizes_of(SMALL), 10, valid_share=0.5)
    assert table.slots == (40, 40, 40, 20, 20, 20)
    assert table.valid == (20, 20, 20, 10, 10, 10)


def test_training_slots_are_those_of_the_largest_share():
    method = focusllava(text=TextGuided(layer=3, keep=0.25, train_keep=(0.1, 0.5)))
    dims, sizes = dims_of(SMALL, 1), sizes_of(SMALL)
    assert plan(method, dims, sizes, 10).slots[-1] == 16
    assert plan(method, dims, sizes, 10, train=True).slots[-1] == 32


def test_table_and_json():
    table = plan(BOTH, dims_of(BASE, 1), sizes_of(BASE), 24)
    text = table.table()
    assert "| slots by decoder layer | 0-2: 100, 3-5: 25 |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    numbers = json.loads(json.dumps(table.to_json()))
    assert numbers["slots"] == [100, 100, 100, 25, 25, 25]
    assert numbers["flops_total"] == pytest.approx(sum(numbers["flops"].values()))
    assert numbers["mean_slots"] == pytest.approx(np.mean(numbers["slots"]))


def test_runs():
    assert runs((3, 3, 3)) == "0-2: 3"
    assert runs((3, 1, 1, 2)) == "0: 3, 1-2: 1, 3: 2"


def test_head_rows_of_generation():
    every = plan(full(), dims_of(SMALL, 1), sizes_of(SMALL), 10, questions=2)
    last = plan(full(), dims_of(SMALL, 1), sizes_of(SMALL), 10, questions=2, head_tokens=1)
    assert every.flops.head == 10 * last.flops.head == 2 * 20 * 128 * 128


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"text_tokens": 0}, "text_tokens=0"),
        ({"text_tokens": 4, "questions": 0}, "questions=0"),
        ({"text_tokens": 4, "valid_share": 0.0}, "valid_share=0.0"),
    ],
)
def test_counts_must_be_counts(kwargs, named):
    with pytest.raises(ValueError, match=named):
        plan(full(), dims_of(SMALL, 1), sizes_of(SMALL), **kwargs)
