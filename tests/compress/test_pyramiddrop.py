"""PyramidDrop against a recorded run of its official code, and a training batch against loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.method import Context
from focus_jax.compress.pyramiddrop import PyramidDrop, pyramiddrop
from tests.compress.recorded import assert_replayed
from tests.compress.slow_decoder import (
    DEEP,
    SlowDecoder,
    assert_text_equal,
    highest,
    mixed_batch,
    questions,
)
from tests.compress.views import dims
from tests.models.tiny_models import random_model, random_tree
from tests.quick import compiled

LAYERS, KEEP = (1, 3), (0.5, 0.2)


def test_a_recorded_run():
    stages = ("scores", "keep_local", "keep_raster", "hidden", "position_ids")
    assert assert_replayed("pyramiddrop/ratios_default") == {
        "prefill_output", "decode_output", "kv_lengths", "decode_position_per_layer",
        *(f"{name}_stage{i}" for name in stages for i in range(3)),
    }  # fmt: skip


def answered(inputs):
    """Answers: two spans in the first sample's first question, one elsewhere, none in the last."""
    spans = ["0011001", "0001100", "0000110", "0000000"]
    label = np.array([[c == "1" for c in span] for span in spans]).reshape(2, 2, -1)
    return inputs._replace(label=jnp.asarray(label))


ASKS = {(0, 0): (1, 5), (0, 1): (2,), (1, 0): (3,), (1, 1): (6,)}


@pytest.mark.slow
def test_training_on_a_mixed_batch():
    """The tokens before all answers rank, each question's own; gradients are finite."""
    method = pyramiddrop(LAYERS, KEEP)
    tree = random_tree(DEEP, method)
    inputs, visual = mixed_batch(valid=(30, 17))
    inputs = answered(inputs)

    def loss(model, visual):
        out = model(inputs, Context(jax.random.key(0), train=True), visual=visual)
        real = inputs.token_valid.reshape(4, -1)[..., None]
        return jnp.where(real, out.hidden, 0).sum(), out

    model = random_model(DEEP, method, tree=tree)
    differentiated = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
    (_, out), (gradient, on_visual) = compiled(differentiated)(model, visual)
    assert out.streams.visual.shape == (4, 6, DEEP.decoder.width)
    decoder = SlowDecoder(DEEP, tree)
    for b, q, sample in questions(decoder, inputs, visual):
        maps = out.aux.maps

        def cut(s, layer, count, at, maps=maps):
            kept = highest(decoder.scores(layer, s), count)
            assert maps[f"pyramiddrop/index@{layer}"][*at, :count].tolist() == kept
            return s.keep(kept, renumber=True)

        first, second = ((15, 6), (8, 3))[b]  # of 30 and 17 tokens that entered
        cuts = {
            1: lambda s, n=first, at=(b, q): cut(s, 1, n, at),
            3: lambda s, n=second, at=(2 * b + q, 0): cut(s, 3, n, at),
        }
        sample = replace(sample, asks=ASKS[b, q])
        assert_text_equal(out.hidden, inputs, b, q, decoder.run(sample, cuts))
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jax.dtypes.float0 or jnp.isfinite(leaf).all()
    got = np.abs(on_visual.features).sum(-1)
    assert (got[np.asarray(visual.valid)] > 0).all()  # all are seen below the first cut
    assert (got[~np.asarray(visual.valid)] == 0).all()


@pytest.mark.parametrize(
    ("queries", "train", "row"),
    [("starts", True, "starts"), ("starts", False, "last"), ("last", True, "last"),
     ("instruction", True, "instruction"), ("instruction", False, "instruction")],
)  # fmt: skip
def test_which_rows_ask(queries, train, row):
    assert PyramidDrop(queries=queries).asking(train) == row


def test_flops_count_the_rows_that_ask():
    one, every = (
        PyramidDrop(queries=queries).flops(
            dims(width=6), 10, 5, width=24, kv_width=12, prefix=3, questions=2
        )
        for queries in ("starts", "instruction")
    )
    projections = 2 * 6 * (2 * 5 * 24 + (3 + 10 + 2 * 5) * 12)
    assert one == projections + 2 * 2 * 1 * (3 + 10 + 5) * 24
    assert every == projections + 2 * 2 * 5 * (3 + 10 + 5) * 24


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"layers": (3, 2, 5)}, r"\[3, 2, 5\] must rise"),
        ({"layers": (1, 2)}, "2 layers .* 3 shares"),
        ({"layers": (), "keep": ()}, "0 layers"),
        ({"layers": (1, 2, 6)}, r"layer 6 .* use 0\.\.5"),
        ({"keep": (0.5, 0.5, 0.1)}, r"\(0\.5, 0\.5, 0\.1\) .* must fall"),
        ({"keep": (1.5, 0.5, 0.1)}, r"keep=1\.5"),
        ({"keep": (0.5, 0.1, 0.0)}, r"keep=0\.0"),
    ],
)
def test_errors_name_the_number(given, named):
    with pytest.raises(ValueError, match=named):
        pyramiddrop(**{"layers": (1, 2, 3), **given}).check(dims())
