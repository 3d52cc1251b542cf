"""Stages with visual compute against row-by-row arithmetic, and against themselves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.baselines import Full, full, pool
from focus_jax.compress.method import Method, compose
from focus_jax.compress.pyramiddrop import pyramiddrop
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.compress.visual_compute import VisualCompute
from focus_jax.compress.vtw import Withdraw
from focus_jax.generate import append, prefill, rewind, with_room
from focus_jax.models.params import named_leaves
from tests.models.test_vlm import with_padding, with_tiles
from tests.models.tiny_models import RUN, SINGLE, TILED, random_inputs, random_model, random_tree
from tests.models.yopo_reference import Knobs, rows_of, run, scores
from tests.quick import compiled

APART = {"stacked": False, "attention": "blocked"}  # as loaded checkpoints have it
# Four heads share two key heads; the last layer keeps none.
MASK = ((True,) * 4, (False, False, True, True), (False,) * 4)


def close(got, want) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def method(cuts=(), stage=None, **fields) -> Method:
    return Method("yopo", stage or Full(), cuts, VisualCompute(**fields))


def official(**fields) -> Method:
    return method(window=3, heads=MASK, layers=2, ffn=2, **fields)


def renormalised(**fields) -> Method:
    return method((Withdraw(layer=2),), window=3, heads=MASK, ffn=2, mass="renormalise", **fields)


def knobs_of(m: Method, cell: float = 1.0) -> Knobs:
    """What the reference calls the same."""
    c = m.compute
    cut = m.cuts[0].layer if m.cuts else 10**6
    alive = np.ones((3, 4), bool) if c.heads is None else np.asarray(c.heads)
    half = None if c.window is None else c.window // 2
    renormalise = c.mass == "renormalise"
    return Knobs(alive, half, cut if renormalise else c.layers or 10**6, c.ffn, renormalise, cell)


@compiled
def run_model(model, inputs):
    """Streams at the decoder's entry, and scores of the question's rows."""
    entry = model.begin(inputs, model.see(inputs, RUN)[0])
    return entry, model.decoder.logits(model(inputs, RUN).hidden)


def check(cfg, m: Method, inputs, cell: float = 1.0) -> None:
    """Scores of every valid question row, sample by sample."""
    model, tree = random_model(cfg, m), random_tree(cfg, m)
    entry, got = run_model(model, inputs)
    for b in range(len(got)):
        rows = rows_of(entry, b)
        want = scores(tree, cfg, run(tree, cfg, rows, knobs_of(m, cell)))[~rows.leaves]
        asked = np.asarray(inputs.token_valid)[b, 0]
        close(np.asarray(got)[b][asked], want[np.asarray(inputs.prefix_valid)[b].sum() :])


def unpadded(inputs):
    """The first sample's stitched grid loses rows at its top; the texts are of unlike lengths."""
    valid = np.array(inputs.patch_valid).reshape(*inputs.patch_valid.shape[:2], 8, 8)
    valid[0, 1:3, :3] = False
    return inputs._replace(
        patch_valid=jnp.asarray(valid.reshape(inputs.patch_valid.shape)),
        token_valid=inputs.token_valid.at[1, :, 4:].set(False),
    )


def in_a_row(inputs, sample: int):
    """Four tiles, of which the last three stand below each other; the fifth is not there."""
    origin = inputs.origin.at[sample].set(jnp.asarray([[0, 0], [0, 0], [8, 0], [16, 0], [0, 0]]))
    return inputs._replace(origin=origin, patch_valid=inputs.patch_valid.at[sample, 4].set(False))


def two_images():
    """Two images of three tiles between the words of one prompt."""
    one = random_inputs(TILED, tiles=3, batch=2, text=7, prefix=1)
    first = ("prefix", "prefix_valid", "tokens", "token_valid", "instruction", "label")
    return one._replace(
        pixels=one.pixels.reshape(1, 6, *one.pixels.shape[2:]),
        patch_valid=one.patch_valid.reshape(1, 6, -1).at[:, 4, :16].set(False),
        origin=one.origin.reshape(1, 6, 2),
        image_at=jnp.asarray([[2, 5]]),
        **{name: getattr(one, name)[:1] for name in first},
    )


CASES = {
    "causal": (SINGLE, method(heads=MASK, layers=1, ffn=3), APART),
    "cells of two patches": (SINGLE, method(window=3, stage=pool(4).vision), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_view(name):
    cfg, m, settings = CASES[name]
    cell = 2.0 if "two" in name else 1.0
    check(replace(cfg, **settings), m, random_inputs(SINGLE), cell)


TILED_CASES = {
    "masked": (official(mode="masked"), {}),
    "renormalised, apart": (renormalised(), APART),
}


@pytest.mark.parametrize("name", TILED_CASES)
def test_tiles_with_newlines(name):
    """A stitched image of 2 x 2 tiles beside one of 3 x 1, both with padding."""
    m, settings = TILED_CASES[name]
    inputs = in_a_row(unpadded(random_inputs(TILED, tiles=5)), 1)
    check(replace(TILED, **settings), m, inputs)


def test_images_between_words():
    check(replace(TILED, stacked=False), official(), two_images())


DECODING = {
    "official": (official(), {}),
    "renormalised": (method(window=3, heads=MASK, mass="renormalise"), APART),
    "masked, stacked": (method(window=3, heads=MASK, mass="renormalise", mode="masked"), {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["official", *(pytest.param(n, marks=pytest.mark.slow) for n in list(DECODING)[1:])],
)
def test_what_follows_a_prompt_equals_the_whole_run(name):
    """A prompt of unlike lengths, its last row, and five rows behind it, in two steps."""
    m, settings = DECODING[name]
    cfg = replace(SINGLE, **settings)
    model, tree = random_model(cfg, m), random_tree(cfg, m)
    inputs = random_inputs(SINGLE, text=11)
    lengths = np.array([6, 4])
    words = np.asarray(inputs.tokens)[:, 0]
    new = jnp.asarray([words[i, n : n + 5] for i, n in enumerate(lengths)])
    prompt = inputs._replace(
        **{k: getattr(inputs, k)[..., :6] for k in ("tokens", "instruction", "label")},
        token_valid=jnp.asarray(np.arange(6) < lengths[:, None])[:, None],
    )

    @compiled
    def both(model, inputs, prompt, new):
        entry = model.begin(inputs, model.see(inputs, RUN)[0])
        start = prefill(model, prompt, RUN.key, room=8)
        grown, out = start.caches, []
        for piece in (new[:, :2], new[:, 2:]):
            valid = jnp.ones(piece.shape, bool)
            rows, grown = append(model, model.decoder.embed(piece), valid, grown)
            grown = with_room(rewind(grown, jnp.zeros(2, jnp.int32)), 1)
            out.append(model.decoder.logits(rows))
        return entry, jnp.concatenate([start.logits[:, None], *out], axis=1)

    entry, got = both(model, inputs, prompt, new)
    for b, length in enumerate(lengths):
        rows = rows_of(entry, b)
        want = scores(tree, cfg, run(tree, cfg, rows, knobs_of(m)))[~rows.leaves]
        close(got[b], want[2 + length - 1 : 2 + length + 5])


def test_irregular_tokens():
    """Of the vision-guided sampler: neighbours by the distance of their centres."""
    both = compose(Method("v", VisionGuided(budget=28, gate="measured")), official())
    check(TILED, both, unpadded(random_inputs(TILED, tiles=4)))


@pytest.mark.slow
def test_questions_with_cuts_of_their_own():
    """Efficient as masked, before and behind a cut; blocks then hold more cells than tokens."""
    both = compose(pyramiddrop((1,), (0.5,)), official())
    masked = replace(both, compute=replace(both.compute, mode="masked"))
    tree = random_tree(TILED, both)
    inputs = random_inputs(TILED, tiles=3, batch=1, questions=2)
    got, want = (run_model(random_model(TILED, m, tree=tree), inputs)[1] for m in (both, masked))
    close(got, want)


@pytest.mark.slow
def test_padding_and_a_larger_bucket_change_nothing():
    """More prefix, text and tiles, all of them empty."""
    model = random_model(TILED, renormalised())
    inputs = unpadded(random_inputs(TILED, tiles=3))
    want = run_model(model, inputs)[1]
    got = run_model(model, with_tiles(with_padding(inputs, text=3, prefix=2), 5))[1]
    close(got[:, :6], want)


@pytest.mark.slow
def test_gradients():
    """Of the official mass: efficient as masked, also when recomputed."""
    inputs, tree = random_inputs(SINGLE, batch=1), random_tree(SINGLE)

    @compiled
    def gradient(model, inputs):
        loss = lambda m: jnp.sin(m.decoder.logits(m(inputs, RUN).hidden)).sum()  # noqa: E731
        grads = named_leaves(jax.grad(loss)(model))
        return {name: a for name, a in grads.items() if name.startswith(("decoder", "proj"))}

    want = gradient(random_model(SINGLE, official(mode="masked"), tree=tree), inputs)
    again = replace(SINGLE, remat="full")
    got = gradient(random_model(again, official(), tree=tree), inputs)
    for name, grad in want.items():
        scale = np.abs(grad).max()
        assert scale > 0
        np.testing.assert_allclose(got[name] / scale, grad / scale, atol=1e-4, err_msg=name)


def test_observed_attention():
    """With narrow feed-forward alone, the first layer attends as in the full model."""
    inputs = random_inputs(SINGLE, batch=1)
    run_both = compiled(lambda model, inputs: model(inputs, RUN, observe=True).importance[0][0])
    want, got = (run_both(random_model(SINGLE, m), inputs) for m in (full(), method(ffn=2)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    assert np.abs(got[1] - want[1]).max() > 1e-4


@pytest.mark.slow
def test_low_precision():
    """bfloat16 throughout stays near fp32."""
    low = replace(SINGLE, compute_dtype="bfloat16", stacked=False)
    inputs, m = random_inputs(SINGLE), renormalised()
    got = run_model(random_model(low, m), inputs)[1]
    rows = rows_of(run_model(random_model(SINGLE, m), inputs)[0], 0)
    assert got.dtype == jnp.float32
    assert rows.x.shape == (72, 24)
    tree = random_tree(SINGLE, m)
    want = scores(tree, SINGLE, run(tree, SINGLE, rows, knobs_of(m)))[~rows.leaves][2:]
    np.testing.assert_allclose(got[0], want, atol=0.2)


def test_visual_tokens_of_no_whole_image():
    model = random_model(SINGLE, official())
    inputs = random_inputs(SINGLE)
    seen = jax.eval_shape(lambda m, i: m.see(i, RUN)[0], model, inputs)
    part = jax.tree.map(lambda a: jnp.zeros((a.shape[0], 50, *a.shape[2:]), a.dtype), seen)
    with pytest.raises(ValueError, match=r"50 visual slots are no whole images of \[64\] slots"):
        jax.eval_shape(lambda m, i: m(i, RUN, visual=part), model, inputs)
