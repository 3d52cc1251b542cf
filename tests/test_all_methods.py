"""What holds for every method: batches equal single runs, the plan equals the arrays, JSON."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.method import Context, compose
from focus_jax.compress.plan import plan
from focus_jax.experiment import CompressConfig, TextSampler, VisionSampler
from focus_jax.generate import prefill
from focus_jax.methods import METHODS, SAMPLERS, method_from_json, method_to_json, parse_method
from focus_jax.models.vlm import VLM, Inputs, dims_of, sizes_of
from tests.models.tiny_models import SINGLE, TILED, random_inputs, random_model
from tests.quick import compiled

# For tiles of 8x8 patches and decoders of 3 layers: each method at least once.
ON_TILES = (
    "full",
    "random:keep=0.5",
    "uniform",
    "pool:size=4",
    "downsample:size=4",
    "prumerge:neighbours=4,budget=9",
    "prumerge_plus:neighbours=4,budget=20",
    "visionzip:dominant=9,contextual=3",
    "divprune",
    "cdpruner",
    "trimtokenator",
    "fastv",
    "pyramiddrop:layers=1/2,keep=0.5/0.25",
    "sparsevlm:layers=0/1,keep=300/110",
    "vtw:layer=2",
    "yopo:layers=2,window=3,heads=0.5,ffn=2,whole=0",
    "yopo:layers=2,window=3,heads=0.5,ffn=2,whole=0,mass=official",
    "focusllava",
    "prumerge_plus:neighbours=4,budget=20+fastv:layer=1",
    "vision_only+vtw:layer=1",
    "yopo:layers=none,window=3,heads=0.5,ffn=2,whole=0+pyramiddrop:layers=1/2,keep=0.5/0.25",
)
SAMPLED = CompressConfig(
    VisionSampler(region=4, scales=(4, 2, 1), budget=20, gate="measured"), TextSampler(layer=1)
)
ROOM = 2


def named(text: str):
    return parse_method(text, SAMPLED)


def test_every_method_is_here():
    asked = {part.split(":")[0] for text in ON_TILES for part in text.split("+")}
    assert set(METHODS) - asked == set()
    assert asked - set(METHODS) <= set(SAMPLERS)


@cache
def run(text: str) -> tuple[VLM, Inputs, object]:
    """A prompt of two samples: the second has fewer patches and fewer words."""
    model = random_model(TILED, named(text))
    inputs = random_inputs(TILED, tiles=3, batch=2, text=5)
    valid = np.ones((2, 3, 8, 8), bool)
    valid[1, 1:, 5:] = False
    words = jnp.arange(5) < jnp.asarray([[[5]], [[3]]])
    inputs = inputs._replace(
        patch_valid=jnp.asarray(valid.reshape(2, 3, 64)),
        token_valid=words, instruction=inputs.instruction & words,
    )  # fmt: skip
    return model, inputs, fill(model, inputs)


@compiled
def fill(model: VLM, inputs: Inputs):
    return prefill(model, inputs, jax.random.key(0), ROOM)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(t, marks=[pytest.mark.slow] * t.startswith("yopo:layers=none"))
        for t in ON_TILES
        if not t.startswith("random")
    ],
)
def test_a_batch_of_mixed_sizes_equals_single_runs(text):
    model, inputs, both = run(text)
    for i in range(2):
        own = fill(model, jax.tree.map(lambda a, i=i: a[i : i + 1], inputs))
        np.testing.assert_allclose(own.logits[0], both.logits[i], atol=2e-4, err_msg=text)
        for stage, (alone, among) in enumerate(zip(own.caches, both.caches, strict=True)):
            said = f"{text}, stage {stage}"
            assert int(alone.length[0]) == int(among.length[i]), said
            assert int(alone.position[0]) == int(among.position[i]), said


@pytest.mark.parametrize("text", ON_TILES)
def test_the_plan_is_what_the_caches_hold(text):
    model, inputs, out = run(text)
    prefix, words = inputs.prefix.shape[1], inputs.tokens.shape[2]
    dims = dims_of(TILED, 3)
    cost = plan(
        model.method, dims, sizes_of(TILED), words, prefix_tokens=prefix, head_tokens=1
    )  # fmt: skip
    slots = model.method.stage_slots(dims)
    assert len(out.caches) == len(slots) == len(cost.kv_bytes)
    for stage, (held, many) in enumerate(zip(out.caches, slots, strict=True)):
        rows = prefix + many + words
        assert held.size - ROOM == rows, (text, stage)
        # Of one sample, without the room for what is to come.
        held_bytes = sum(a.nbytes for a in jax.tree.leaves(held.kv)) * rows // held.size // 2
        assert held_bytes == cost.kv_bytes[stage], (text, stage)
        assert (np.asarray(held.length) <= rows).all()
    assert cost.decoder_macs > 0 and f"| {model.method.name} |" in cost.table()


@pytest.mark.parametrize("text", ON_TILES)
def test_a_method_survives_its_json(text):
    method = named(text)
    assert method_from_json(method_to_json(method)) == method
    assert hash(method_from_json(method_to_json(method))) == hash(method)


def test_the_second_sample_has_fewer_tokens():
    _, _, out = run("full")
    assert int(out.caches[0].length[1]) < int(out.caches[0].length[0]) - 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pool:size=4+uniform", "2 vision stages .Pool, Uniform.: one can stand"),
        ("fastv:layer=1+text_only:text.layer=1", "cut layers .1, 1. must rise strictly"),
        ("vtw:layer=1+fastv:layer=2", "withdraws all visual tokens before layer 1"),
        ("yopo:layers=1+fastv:layer=2", "withdraws all visual tokens before layer 1"),
        ("yopo+yopo", "2 kinds of visual compute"),
        ("fastv:layer=0", "ranks by the layer before it: use layer 1 or later"),
    ],
)
def test_what_cannot_be_is_refused_at_once(text, said):
    with pytest.raises(ValueError, match=said):
        named(text)


@pytest.mark.parametrize("text", ["prumerge", "prumerge_plus", "visionzip:dominant=9"])
def test_a_tower_without_class_token_tells_what_would_work(text):
    bare = replace(SINGLE, vision=replace(SINGLE.vision, class_token=False))
    with pytest.raises(ValueError, match=r"class token.*divprune"):
        random_model(bare, named(text))


def test_a_tower_without_class_token_serves_the_others():
    bare = replace(SINGLE, vision=replace(SINGLE.vision, class_token=False))
    model = random_model(bare, named("divprune"))
    assert model.vision.position.shape[0] == bare.vision.patches
    out = fill(model, random_inputs(bare, batch=1, text=5))
    assert np.isfinite(out.logits).all()


def test_composed_methods_have_all_parts():
    whole = compose(named("vtw:layer=2"), named("prumerge_plus"), named("fastv:layer=1"))
    assert [cut.layer for cut in whole.cuts] == [1, 2]
    assert whole.vision == named("prumerge_plus").vision
    assert whole.name == "vtw+prumerge_plus+fastv"
    assert compose(named("full"), named("full")).vision == named("full").vision
    single = dims_of(SINGLE, 1)
    assert compose(named("vtw:layer=2")).stage_slots(single) == (64, 0)


def prompts(images: int) -> Inputs:
    """Two prompts with so many images of three tiles, which stand before the third token."""
    inputs = random_inputs(TILED, tiles=3, batch=2, text=5)
    many = {
        name: jnp.concatenate([getattr(inputs, name)[:, :0], *[getattr(inputs, name)] * images], 1)
        for name in ("pixels", "patch_valid", "origin")
    }
    return inputs._replace(**many, image_at=jnp.full((2, images), 2, jnp.int32))


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize(
    "text", [text if at in (12, 15, 17) else pytest.param(text, marks=pytest.mark.slow)
             for at, text in enumerate(ON_TILES)],
)  # fmt: skip
def test_text_alone_and_several_images_are_as_planned(text, images):
    model, inputs = random_model(TILED, named(text)), prompts(images)
    out = jax.eval_shape(
        lambda model, inputs: model(inputs, Context(jax.random.key(0), True), keep=1), model, inputs
    )
    dims, words = dims_of(TILED, 3), inputs.prefix.shape[1] + inputs.tokens.shape[2]
    slots = model.method.stage_slots(dims, train=True, images=images)
    assert [cache.size - 1 for cache in out.caches] == [words + many for many in slots]
    cost = plan(
        model.method, dims, sizes_of(TILED), inputs.tokens.shape[2],
        prefix_tokens=inputs.prefix.shape[1], train=True, images=images,
    )  # fmt: skip
    assert cost.slots[0] == slots[0]
    assert out.visual.valid.shape[1] == images * model.method.vision.slots(dims)
    if not images:
        assert not out.aux.losses and not out.aux.metrics and not sum(slots)
        assert cost.flops.tower == cost.flops.projector == cost.flops.samplers == 0
        assert cost.flops.decoder > 0
