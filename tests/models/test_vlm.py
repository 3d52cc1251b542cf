"""The whole model: what is padded, bucketed or shared must not change an answer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.baselines import full, pool
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.models.params import named_leaves, with_leaves
from focus_jax.models.vlm import Inputs, dims_of
from tests.models.tiny_models import (
    RUN,
    SINGLE,
    TILED,
    logits,
    random_inputs,
    random_model,
    random_tree,
    shape_of,
)
from tests.quick import compiled

FOCUS = focusllava(
    VisionGuided(budget=28, hidden=8),
    (TextGuided(layer=1, keep=0.5), TextGuided(layer=2, keep=0.2, renumber=True)),
)
MASS = focusllava(
    VisionGuided(budget=28, gate="measured", min_gain=0.001, thumbnail="full"),
    TextGuided(layer=1, keep=0.5, mode="top_p", mass=0.6, queries="last", sharing="pooled"),
)
METHODS = {"full": full(), "focusllava": FOCUS, "top_p": MASS}


def close(got, want) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def alone(inputs: Inputs) -> Inputs:
    """Questions that share an image, as samples of their own."""
    b, q, t = inputs.tokens.shape
    asked = {"tokens", "token_valid", "instruction", "label"}
    return Inputs(
        **{
            name: a.reshape(b * q, 1, t) if name in asked else jnp.repeat(a, q, axis=0)
            for name, a in inputs._asdict().items()
            if a is not None
        }
    )


def garbage(shape, seed: int = 9):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 50, shape))


def with_padding(inputs: Inputs, text: int, prefix: int) -> Inputs:
    """More text slots behind, more prefix slots in front; the tokens in them are garbage."""
    b, q, _ = inputs.tokens.shape
    behind, front = [(0, 0), (0, 0), (0, text)], [(0, 0), (prefix, 0)]
    return inputs._replace(
        tokens=jnp.concatenate([inputs.tokens, garbage((b, q, text)).astype(jnp.int32)], -1),
        token_valid=jnp.pad(inputs.token_valid, behind),
        instruction=jnp.pad(inputs.instruction, behind, constant_values=True),
        label=jnp.pad(inputs.label, behind),
        prefix=jnp.concatenate([garbage((b, prefix)).astype(jnp.int32), inputs.prefix], -1),
        prefix_valid=jnp.pad(inputs.prefix_valid, front),
    )


def with_tiles(inputs: Inputs, tiles: int) -> Inputs:
    """More tiles without a valid patch, pixels and place garbage."""
    b, m = inputs.pixels.shape[:2]
    more = tiles - m
    pixels = garbage((b, more, *inputs.pixels.shape[2:])).astype(jnp.uint8)
    return inputs._replace(
        pixels=jnp.concatenate([inputs.pixels, pixels], 1),
        patch_valid=jnp.pad(inputs.patch_valid, [(0, 0), (0, more), (0, 0)]),
        origin=jnp.pad(inputs.origin, [(0, 0), (0, more), (0, 0)], constant_values=8),
    )


def unpadded(inputs: Inputs) -> Inputs:
    """The first sample's tiles lose rows at top and bottom, the second's nothing."""
    grid = TILED.vision.grid
    valid = np.array(inputs.patch_valid).reshape(*inputs.patch_valid.shape[:2], grid, grid)
    valid[0, 1:, :3] = False
    valid[0, 1:, 6:] = False
    return inputs._replace(patch_valid=jnp.asarray(valid.reshape(inputs.patch_valid.shape)))


@pytest.fixture(scope="module", params=METHODS)
def tiled(request):
    """A model, three-tile inputs of which some patches are padding, and their logits."""
    model = random_model(TILED, METHODS[request.param])
    inputs = unpadded(random_inputs(TILED, tiles=3, text=6))
    return model, inputs, logits(model, inputs)


def test_slots_are_the_plans(tiled):
    model, inputs, _ = tiled
    shape = jax.eval_shape(lambda model, inputs: model(inputs, RUN, keep=2), model, inputs)
    text = inputs.prefix.shape[1] + inputs.tokens.shape[2]
    slots = model.method.stage_slots(dims_of(TILED, 3))
    assert [cache.size for cache in shape.caches] == [s + text + 2 for s in slots]


def test_padding_and_a_larger_bucket_change_nothing(tiled):
    model, inputs, want = tiled
    got = logits(model, with_tiles(with_padding(inputs, text=3, prefix=2), 5))
    close(got[:, :6], want)


def test_samples_do_not_see_each_other(tiled):
    """A batch of one image twice gives what that image got beside another."""
    model, inputs, want = tiled
    for i in range(2):
        twice = jax.tree.map(lambda a: jnp.stack([a[i], a[i]]), inputs)  # noqa: B023
        close(logits(model, twice), jnp.stack([want[i], want[i]]))


def test_unlike_lengths_equal_single_runs():
    """A prompt of three tokens beside one of six, as if alone and unpadded."""
    model = random_model(SINGLE, FOCUS)
    inputs = random_inputs(SINGLE, text=6)
    lengths = jnp.asarray([3, 6])
    inputs = inputs._replace(
        token_valid=jnp.arange(6) < lengths[:, None, None], instruction=jnp.ones((2, 1, 6), bool)
    )
    asked = ("tokens", "token_valid", "instruction", "label")
    one = jax.tree.map(lambda a: a[:1], inputs)
    one = one._replace(**{name: getattr(one, name)[..., :3] for name in asked})
    close(logits(model, inputs)[:1, :3], logits(model, one))


EARLY = replace(FOCUS, cuts=(TextGuided(layer=0, keep=0.6), TextGuided(layer=2, keep=0.2)))


@pytest.mark.parametrize("method", [full(), EARLY])
def test_questions_that_share_an_image_equal_single_ones(method):
    model = random_model(SINGLE, method)
    inputs = random_inputs(SINGLE, questions=3, text=5)
    valid = jnp.arange(5) < jnp.asarray([[3, 5, 4], [5, 2, 5]])[..., None]
    inputs = inputs._replace(token_valid=valid)
    got, want = logits(model, inputs), logits(model, alone(inputs))
    close(got[valid.reshape(6, 5)], want[valid.reshape(6, 5)])


def test_pooled_questions_keep_one_set():
    cut = TextGuided(layer=1, keep=0.3, sharing="pooled")
    model = random_model(SINGLE, focusllava(text=cut))
    inputs = random_inputs(SINGLE, questions=3)
    out = compiled(lambda model, inputs: model(inputs, RUN))(model, inputs)
    assert out.streams.visual.shape[:2] == (2, 20)  # no sample for each question
    score = out.aux.maps["text/score@1"]
    assert score.shape == (2, 1, 64)
    for b in range(2):
        best = np.sort(np.argsort(-score[b, 0], stable=True)[:20])
        np.testing.assert_array_equal(out.streams.slot[b], best)


@pytest.mark.parametrize("renumber", [False, True])
def test_positions_after_a_cut(renumber):
    cut = TextGuided(layer=1, keep=0.25, renumber=renumber)
    model = random_model(SINGLE, focusllava(text=cut))
    inputs = random_inputs(SINGLE)
    out = compiled(lambda model, inputs: model(inputs, RUN, keep=3))(model, inputs)
    s, first, last = out.streams, *out.caches
    assert first.length.tolist() == [2 + 64 + 6] * 2
    assert last.length.tolist() == [2 + 16 + 6] * 2
    assert first.position.tolist() == [72, 72]
    assert last.position.tolist() == ([24, 24] if renumber else [72, 72])
    want = 2 + (np.arange(16)[None] if renumber else np.asarray(s.slot))
    np.testing.assert_array_equal(s.visual_position, np.broadcast_to(want, (2, 16)))
    text = np.arange(6) + (18 if renumber else 66)
    np.testing.assert_array_equal(s.token_position, np.broadcast_to(text, (2, 1, 6)))


def test_a_cut_that_keeps_all_changes_nothing():
    inputs = random_inputs(SINGLE)
    whole = logits(random_model(SINGLE), inputs)
    cut = logits(random_model(SINGLE, focusllava(text=TextGuided(layer=1, keep=1.0))), inputs)
    close(cut, whole)


def test_finest_scale_everywhere_is_all_tokens():
    """A budget of the whole grid: the same tokens in the order of regions; the order is seen."""
    model = random_model(
        SINGLE, focusllava(VisionGuided(budget=64, gate="measured", pooling="avg"))
    )
    out = compiled(lambda model, inputs: model.see(inputs, RUN))(model, random_inputs(SINGLE))[0]
    plain = compiled(lambda model, inputs: model.see(inputs, RUN))(
        random_model(SINGLE), random_inputs(SINGLE)
    )[0]
    assert out.valid.all()
    index = np.asarray(out.centre[0] @ jnp.array([8, 1]), int)
    assert sorted(index) == list(range(64))
    close(out.features[0], plain.features[0][index])


def test_observed_attention_is_the_cuts_score():
    """What `observe` reports for a layer is what a cut at that layer would rank by."""
    cut = TextGuided(layer=1, keep=0.4, queries="instruction")
    model = random_model(SINGLE, focusllava(text=cut))
    inputs = random_inputs(SINGLE)
    inputs = inputs._replace(instruction=inputs.instruction.at[..., -1].set(True))
    out = compiled(lambda model, inputs: model(inputs, RUN, observe=True))(model, inputs)
    (before, slots), (after, kept) = out.importance
    assert before.shape == (1, 2, 64)
    assert after.shape == (2, 2, 26)
    np.testing.assert_array_equal(slots, np.broadcast_to(np.arange(64), (2, 64)))
    np.testing.assert_array_equal(kept, out.streams.slot)
    whole = random_model(SINGLE)
    seen = compiled(lambda model, inputs: model(inputs, RUN, observe=True))(whole, inputs)
    np.testing.assert_allclose(
        seen.importance[0][0][1], out.aux.maps["text/score@1"][:, 0], rtol=1e-3, atol=1e-6
    )
    with pytest.raises(ValueError, match="one question"):
        jax.eval_shape(
            lambda model, inputs: model(inputs, RUN, observe=True),
            whole, random_inputs(SINGLE, questions=2),
        )  # fmt: skip


def test_visual_tokens_may_be_handed_in():
    model = random_model(SINGLE)
    inputs = random_inputs(SINGLE)

    @compiled
    def twice(model, inputs):
        visual, _ = model.see(inputs, RUN)
        return model(inputs, RUN).hidden, model(inputs, RUN, visual=visual).hidden

    own, handed = twice(model, inputs)
    close(handed, own)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "chunked", "unroll": True, "remat": "full"},
        {"attention": "blocked", "stacked": False},
        {"stacked": False, "remat": "dots"},
    ],
    ids=str,
)
def test_programs_of_other_kinds_compute_one_function(settings):
    """Other attention, unrolled layers, layers apart, rematerialisation."""
    inputs = random_inputs(SINGLE)
    tree = random_tree(SINGLE, FOCUS)
    got = logits(random_model(replace(SINGLE, **settings), FOCUS, tree=tree), inputs)
    close(got, logits(random_model(SINGLE, FOCUS, tree=tree), inputs))


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16(tied):
    """Logits come in fp32, close to those of fp32; gradients keep the dtype of the weights."""
    cfg = replace(SINGLE, decoder=replace(SINGLE.decoder, tie_embeddings=tied))
    low = random_model(replace(cfg, compute_dtype="bfloat16"), full())
    x = jax.random.normal(jax.random.key(0), (3, cfg.decoder.width))
    want = random_model(cfg, full()).decoder.logits(x)
    got = low.decoder.logits(x.astype(jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.3 if tied else 0.03)
    grads = jax.grad(lambda d: (d.logits(x.astype(jnp.bfloat16)) ** 2).sum())(low.decoder)
    array = grads.embed.embedding if tied else grads.head.kernel
    assert array.dtype == jnp.float32
    assert jnp.abs(array[...]).max() > 0


def test_bfloat16_runs():
    model = random_model(replace(SINGLE, compute_dtype="bfloat16"), pool(4))
    inputs = random_inputs(SINGLE)
    want = logits(random_model(SINGLE, pool(4)), inputs)
    np.testing.assert_allclose(logits(model, inputs), want, rtol=0.1, atol=0.25)


def text_alone() -> tuple[Inputs, Inputs]:
    """Prompts without an image: none at all, and three tiles of which nothing is valid."""
    inputs = random_inputs(TILED, tiles=3, text=5)
    padded = inputs._replace(
        image_at=jnp.ones((2, 1), jnp.int32), patch_valid=jnp.zeros_like(inputs.patch_valid)
    )
    none = {name: getattr(inputs, name)[:, :0] for name in ("pixels", "patch_valid", "origin")}
    return inputs._replace(**none, image_at=jnp.zeros((2, 0), jnp.int32)), padded


def test_text_alone_equals_an_image_without_a_patch():
    model = random_model(TILED, FOCUS)
    alone, padded = text_alone()
    close(logits(model, alone), logits(model, padded))


@pytest.mark.slow
def test_text_alone_teaches_the_decoder_and_nothing_else():
    def slope(leaves, inputs):
        found = with_leaves(shape_of(TILED, FOCUS), leaves)(inputs, RUN._replace(train=True))
        return found.hidden.sum() + sum(found.aux.losses.values())

    leaves = named_leaves(random_model(TILED, FOCUS))
    slopes = compiled(jax.grad(slope))(leaves, text_alone()[0])
    assert {name.split(".")[0] for name in slopes} > {"decoder", "samplers", "vision"}
    idle = ("decoder.head", "decoder.norm")  # behind the hidden rows
    for name, leaf in slopes.items():
        learns = name.startswith("decoder.") and not name.startswith(idle)
        assert bool((leaf != 0).any()) == learns, name
