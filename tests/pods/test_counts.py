"""Model FLOPs against sums written out for a small model."""

from dataclasses import replace

import pytest

from focus_jax.compress.baselines import full
from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
from focus_jax.experiment import TrainStage, usual_samplers
from focus_jax.pods import counts

MODEL = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=8, layers=3, heads=2, mlp_width=24),
    decoder=DecoderConfig(
        vocab_size=50, width=16, layers=4, heads=4, kv_heads=2, head_dim=6, mlp_width=40
    ),
)
REQUEST = counts.Request(tiles=1, text=7, prefix=2)
ROWS = 2 + 16 + 7


def attention():
    """Each row with each key up to its own: logits and their product with values."""
    return sum(4 * 4 * 6 * (row + 1) for row in range(ROWS)) * 4


def weights():
    """Numbers of a decoder layer's matrices."""
    return 16 * (24 + 12 + 12) + 24 * 16 + 3 * 16 * 40


def stage(*train):
    return TrainStage("s", "answers", steps=1, learning_rate=1.0, train=train)


def test_forward_of_full_tokens():
    cost = counts.forward(MODEL, full(), REQUEST, train=False, head_tokens=1)
    assert cost.decoder == pytest.approx(2 * ROWS * weights() * 4)
    assert cost.attention == pytest.approx(attention())
    assert cost.head == 2 * 16 * 50
    assert cost.projector == 2 * 16 * (8 * 16 + 16 * 16)
    assert cost.samplers == 0
    assert sum(cost) == pytest.approx(counts.prefill_flops(MODEL, full(), REQUEST))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (("",), {"tower": 3, "projector": 3, "decoder": 3, "attention": 3, "head": 3}),
        (
            ("decoder.", "projector."),
            {"tower": 1, "projector": 3, "decoder": 3, "attention": 3, "head": 3},
        ),
        (("projector.",), {"tower": 1, "projector": 3, "decoder": 2, "attention": 3, "head": 2}),
        # Through low-rank updates gradients pass; no kernel's own is computed.
        (
            ("decoder.layers.lora.", "projector."),
            {"tower": 1, "projector": 3, "decoder": 2, "attention": 3, "head": 2},
        ),
        (
            ("decoder.layers.lora.",),
            {"tower": 1, "projector": 1, "decoder": 2, "attention": 3, "head": 2},
        ),
        (("vision.",), {"tower": 3, "projector": 2, "decoder": 2, "attention": 3, "head": 2}),
        (("decoder.",), {"tower": 1, "projector": 1, "decoder": 3, "attention": 3, "head": 3}),
    ],
)
def test_a_step_counts_what_learns(train, said):
    by = counts.times(stage(*train))
    assert {name: by[name] for name in said} == said
    cost = counts.forward(MODEL, full(), REQUEST, train=True, head_tokens=None)
    want = sum(getattr(cost, name) * count for name, count in said.items())
    assert counts.train_flops(MODEL, full(), REQUEST, stage(*train)) == pytest.approx(want)


def test_all_text_reaches_the_vocabulary_in_training():
    cost = counts.forward(MODEL, full(), REQUEST, train=True, head_tokens=None)
    assert cost.head == 7 * 2 * 16 * 50


def test_a_cut_leaves_fewer_rows_and_attention_with_them():
    compress = usual_samplers(MODEL)
    compress = replace(compress, vision=replace(compress.vision, enabled=False))
    method = compress.value()  # half of the layers with a quarter of 16 tokens
    cost = counts.forward(MODEL, method, REQUEST, train=False, head_tokens=1)
    rows = (ROWS, ROWS, 13, 13)
    assert cost.decoder == pytest.approx(2 * weights() * sum(rows))
    pairs = sum(row * (row + 1) / 2 for row in rows)
    assert cost.attention == pytest.approx(4 * 4 * 6 * pairs)
    assert counts.entering_rows(MODEL, method, REQUEST, train=False) == ROWS


def test_one_new_token():
    got = counts.decode_flops(MODEL, full(), REQUEST)
    met = 4 * 4 * 6 * (ROWS + 1)
    assert got == pytest.approx(4 * (2 * weights() + met) + 2 * 16 * 50)
