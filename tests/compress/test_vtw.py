"""Withdrawal against recorded runs of its official code, and the random layer of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.baselines import full
from focus_jax.compress.method import Context, block_key
from focus_jax.compress.vtw import leaving, vtw
from focus_jax.golden.decoder import read_case, replay
from tests.compress.layer_views import random_layer
from tests.compress.recorded import RECORDED, assert_replayed
from tests.compress.slow_decoder import (
    DEEP,
    SlowDecoder,
    assert_text_equal,
    mixed_batch,
    questions,
)
from tests.compress.views import RUN, dims
from tests.models.tiny_models import SINGLE, random_model, random_tree
from tests.quick import compiled


def test_a_recorded_run():
    assert assert_replayed("vtw/k4") == {
        "hidden_layerK", "positions_after", "prefill_output", "decode_output", "kv_lengths",
        "kv_lengths_after_decode",
    }  # fmt: skip


@pytest.mark.slow
def test_recorded_withdrawals_of_several_samples():
    case = read_case(RECORDED / "vtw/kl_search")
    whole = replay(case, full())
    np.testing.assert_allclose(whole.logits, case.arrays["logits_full_last"], atol=2e-4)
    for i, layer in enumerate(range(5, 10)):
        last = replay(case, vtw(layer)).last
        np.testing.assert_allclose(last, case.arrays["last_hidden_per_layer"][:, i], atol=1e-4)


# ---------------------------------------------------------------------- a random layer


def layers_left(first: int, last: int, samples: int, seed: int) -> np.ndarray:
    """The layer before which each sample's visual tokens are gone, cut by cut as the model goes."""
    ctx = Context(jax.random.key(seed), train=True)
    one = random_layer((3,), questions=1)
    view = jax.tree.map(lambda a: jnp.repeat(a, samples, axis=0), one)
    left = np.full(samples, -1)
    for cut in vtw(last, train_layers=(first, last)).cuts:
        slots = min(cut.slots(3, train=True), view.visual_valid.shape[1])
        run = ctx._replace(key=block_key(ctx, f"cut{cut.layer}"))
        selection, _ = cut.select(view, slots, run)
        valid = selection.valid[:, 0]
        gone = ~np.asarray(valid.any(-1)) & (left < 0)
        left[gone] = cut.layer
        view = view._replace(visual_valid=valid) if slots else view
    return left


def test_the_layer_is_uniform():
    """Chi-squared of 6000 draws over 4..9, and of a sample's neighbours: not far beyond chance."""
    left = layers_left(4, 9, 6000, seed=0)
    counts = np.bincount(left, minlength=10)[4:]
    assert counts.sum() == 6000
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # 5 degrees of freedom: one in a thousand
    pairs = np.bincount((left[::2] - 4) * 6 + left[1::2] - 4, minlength=36)
    expected = 3000 / 36
    assert ((pairs - expected) ** 2 / expected).sum() < 66.6  # 35 degrees of freedom
    assert (layers_left(4, 9, 6000, seed=1) != left).any()


def test_the_last_cut_leaves_nothing_and_one_layer_is_no_choice():
    assert leaving(jax.random.key(0), 50, 1).all()
    assert (layers_left(5, 5, 20, seed=0) == 5).all()


def test_slots_at_training_and_evaluation():
    """Training keeps them up to the last layer of the span; evaluation ends at its own layer."""
    method, d = vtw(3, train_layers=(2, 4)), dims()
    assert method.check(d).stage_slots(d, train=True) == (64, 64, 64, 0)
    assert method.stage_slots(d) == (64, 64, 0, 0)
    assert vtw(3).stage_slots(d) == vtw(3).stage_slots(d, train=True) == (64, 0)


def test_training_equals_each_samples_own_withdrawal():
    """Both questions of an image lose it at the same layer; gradients are finite."""
    method = vtw(2, train_layers=(1, 2))
    tree = random_tree(SINGLE, method)
    inputs, visual = mixed_batch(valid=(12, 7))
    model = random_model(SINGLE, method, tree=tree)

    @compiled
    def loss_of(model, visual, key):
        def loss(model):
            out = model(inputs, Context(key, train=True), visual=visual)
            real = inputs.token_valid.reshape(4, -1)[..., None]
            return jnp.where(real, out.hidden, 0).sum(), out

        return jax.value_and_grad(loss, has_aux=True, allow_int=True)(model)

    decoder, seen = SlowDecoder(SINGLE, tree), set()
    for seed in range(3):
        (_, out), gradient = loss_of(model, visual, jax.random.key(seed))
        assert out.streams.visual.shape[1] == 0
        for leaf in jax.tree.leaves(gradient):
            assert leaf.dtype == jax.dtypes.float0 or jnp.isfinite(leaf).all()
        for b, q, sample in questions(decoder, inputs, visual):
            layer = 1 if not out.aux.maps["vtw/index@1"][b].any() else 2
            seen.add(layer)
            end = decoder.run(sample, {layer: lambda s: s.keep([])})
            assert_text_equal(out.hidden, inputs, b, q, end)
    assert seen == {1, 2}


def test_evaluation_goes_on_without_visual_tokens():
    method = vtw(2, train_layers=(1, 4))
    inputs, visual = mixed_batch(valid=(12, 7))
    out = jax.eval_shape(lambda: random_model(DEEP, method)(inputs, RUN, keep=1, visual=visual))
    rows = [cache.size - 1 for cache in out.caches]
    assert rows == [28, 28, 16, 16, 16]  # 2 of the prefix, 12 of the image, 2 x 7 of text


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"layer": 6}, r"layer 6 .* use 0\.\.5"),
        ({"layer": -1}, "layer -1"),
        ({"layer": 3, "train_layers": (4, 5)}, r"train_layers=\(4, 5\) .* layer=3"),
        ({"layer": 3, "train_layers": (3, 2)}, r"train_layers=\(3, 2\)"),
        ({"layer": 3, "train_layers": (-1, 4)}, r"train_layers=\(-1, 4\)"),
        ({"layer": 3, "train_layers": (2, 6)}, r"layer of training 6 must lie in 2\.\.5"),
    ],
)
def test_errors_name_the_number(given, named):
    with pytest.raises(ValueError, match=named):
        vtw(**given).check(dims())
