"""FastV against a recorded run of its official code, and mixed batches against loops."""

import numpy as np
import pytest

from focus_jax.compress.fastv import FastV, fastv
from tests.compress.recorded import assert_replayed
from tests.compress.slow_decoder import (
    DEEP,
    SlowDecoder,
    assert_text_equal,
    highest,
    mixed_batch,
    questions,
)
from tests.compress.views import RUN, dims
from tests.models.tiny_models import random_model, random_tree
from tests.quick import compiled


def test_a_recorded_run():
    assert assert_replayed("fastv/k3_r50") == {
        "scores", "kept_indices", "kept_positions", "hidden_layerK", "prefill_output",
        "decode_output", "kv_lengths_clean",
    }  # fmt: skip


def test_each_question_of_a_mixed_batch_is_as_alone():
    """Two key heads for four, padding everywhere: the layer before ranks, rounding is down."""
    method = fastv(layer=2, keep=0.3)
    tree = random_tree(DEEP, method)
    inputs, visual = mixed_batch(valid=(30, 17))
    model = random_model(DEEP, method, tree=tree)
    out = compiled(lambda model, inputs, visual: model(inputs, RUN, visual=visual))(
        model, inputs, visual
    )
    assert out.streams.visual.shape[1] == 9
    decoder = SlowDecoder(DEEP, tree)
    chosen = set()
    for b, q, sample in questions(decoder, inputs, visual):
        count = (9, 5)[b]  # of 5.1: not 6

        def cut(s, b=b, q=q, count=count):
            score = decoder.scores(1, s.before)
            kept = highest(score, count)
            np.testing.assert_allclose(
                out.aux.maps["fastv/score@2"][b, q, : len(score)], score, rtol=1e-4, atol=1e-7
            )
            assert out.aux.maps["fastv/index@2"][b, q, :count].tolist() == kept
            chosen.add((b, *kept))
            return s.keep(kept)

        assert_text_equal(out.hidden, inputs, b, q, decoder.run(sample, {2: cut}))
    assert len(chosen) == 4  # each question chose for itself


def test_slots_are_rounded_down():
    assert FastV(keep=0.5).slots(577) == 288
    assert FastV(keep=0.1).slots(576) == 57
    assert FastV(keep=0.1).slots(5) == 1


def test_flops_count_one_row_against_all_columns():
    [cut] = fastv().cuts
    got = cut.flops(dims(width=6), 10, 5, width=24, kv_width=12, prefix=3, questions=2)
    projections = 2 * 6 * (2 * 5 * 24 + (3 + 10 + 2 * 5) * 12)
    assert got == projections + 2 * 2 * 1 * (3 + 10 + 5) * 24


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"keep": 0.0}, r"keep=0\.0"),
        ({"keep": 1.5}, r"keep=1\.5"),
        ({"layer": 0}, "layer 0 ranks by the layer before it: use layer 1"),
        ({"layer": 6}, r"layer 6 .* use 1\.\.5"),
    ],
)
def test_errors_name_the_number(given, named):
    with pytest.raises(ValueError, match=named):
        fastv(**given).check(dims())
