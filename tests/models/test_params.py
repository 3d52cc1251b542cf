"""Parameter counts to the last one, and one canonical tree for every method."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from focus_jax.compress.baselines import full
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.config import (
    ModelConfig,
    llava_1_5_7b,
    llava_1_5_13b,
    llava_next_llama3_8b,
    llava_next_vicuna_7b,
)
from focus_jax.models.params import (
    abstract,
    canonical,
    check_same,
    named_leaves,
    staged,
    with_method,
)
from focus_jax.models.vlm import VLM, dims_of
from tests.models.tiny_models import (
    SINGLE,
    logits,
    random_inputs,
    random_model,
    random_tree,
)
from tests.quick import compiled

METHOD = focusllava(VisionGuided(budget=24, hidden=8), TextGuided(layer=2, keep=0.5))


def parameters(cfg: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in named_leaves(abstract(cfg, full())).values())


def clip_large_336() -> int:
    c, inner, patches = 1024, 4096, 24 * 24
    embedding = c + 3 * 14 * 14 * c + (patches + 1) * c
    layer = 4 * (c * c + c) + (c * inner + inner) + (inner * c + c) + 2 * 2 * c
    return embedding + 24 * layer + 2 * 2 * c


def llama(vocab: int, d: int, layers: int, inner: int, keys: int) -> int:
    """`keys`: width of all key heads together."""
    layer = d * d + 2 * d * keys + d * d + 3 * d * inner + 2 * d
    return 2 * vocab * d + layers * layer + d


def projector(d: int) -> int:
    return 1024 * d + d + d * d + d


def with_vocabulary(cfg: ModelConfig, size: int) -> ModelConfig:
    return replace(cfg, decoder=replace(cfg.decoder, vocab_size=size))


def test_llava_1_5_7b():
    assert parameters(llava_1_5_7b()) == 7_062_902_784
    assert parameters(with_vocabulary(llava_1_5_7b(), 32064)) == 7_063_427_072


@pytest.mark.parametrize(
    ("cfg", "decoder", "d", "newline"),
    [
        (llava_1_5_7b(), llama(32000, 4096, 32, 11008, 4096), 4096, 0),
        (llava_1_5_13b(), llama(32000, 5120, 40, 13824, 5120), 5120, 0),
        (llava_next_vicuna_7b(), llama(32000, 4096, 32, 11008, 4096), 4096, 4096),
        (llava_next_llama3_8b(), llama(128256, 4096, 32, 14336, 1024), 4096, 4096),
    ],
)
def test_big_presets(cfg, decoder, d, newline):
    assert parameters(cfg) == clip_large_336() + projector(d) + decoder + newline


def test_decoders_alone_are_the_official_ones():
    assert llama(32000, 4096, 32, 11008, 4096) == 6_738_415_616
    assert llama(32000, 5120, 40, 13824, 5120) == 13_015_864_320
    assert llama(128256, 4096, 32, 14336, 1024) == 8_030_261_248


def test_most_visual_slots_of_next():
    cfg = llava_next_vicuna_7b()
    assert full().vision.slots(dims_of(cfg, 5)) == 2928
    assert full().vision.slots(dims_of(cfg, 3)) == 3 * 576 + 2 * 24
    assert full().vision.slots(dims_of(cfg, 4)) == 4 * 576 + 3 * 24
    assert full().vision.slots(dims_of(llava_1_5_7b(), 1)) == 576


def test_canonical_undoes_staged():
    tree = random_tree(SINGLE)
    for bounds in ((), (1,), (1, 2)):
        parts = staged(tree, bounds)
        assert len({name.split(".")[2] for name in parts if "stages" in name}) == len(bounds) + 1
        again = canonical(parts)
        assert again.keys() == tree.keys()
        assert all(jnp.array_equal(again[name], tree[name]) for name in tree)


def test_canonical_serves_shapes():
    whole = named_leaves(abstract(SINGLE, full()))
    split = named_leaves(abstract(SINGLE, focusllava(text=TextGuided(layer=1))))
    assert canonical(split) == canonical(whole)


def test_fresh_layers_do_not_depend_on_the_method():
    """One seed, one model: a method's stages only cut the stack elsewhere."""

    @compiled
    def fresh():
        models = (VLM(SINGLE, method, rngs=nnx.Rngs(3)) for method in (full(), METHOD))
        return [canonical(named_leaves(model)) for model in models]

    one, two = fresh()
    for name, leaf in one.items():
        np.testing.assert_allclose(leaf, two[name], rtol=1e-6, err_msg=name)


def test_methods_change_on_one_tree():
    inputs = random_inputs(SINGLE)
    tree = random_tree(SINGLE)
    before = logits(with_method(SINGLE, tree, full()), inputs)
    focused = with_method(SINGLE, tree, METHOD, lambda: random_model(SINGLE, METHOD))
    assert not jnp.allclose(before, logits(focused, inputs))
    back = canonical(named_leaves(focused))
    assert "samplers.vision.up.kernel" in back
    after = logits(with_method(SINGLE, back, full()), inputs)
    np.testing.assert_array_equal(before, after)
    again = with_method(SINGLE, back, METHOD)
    np.testing.assert_array_equal(logits(focused, inputs), logits(again, inputs))


def test_learned_method_without_weights_is_named():
    with pytest.raises(ValueError, match=r"'focusllava' is learned.*samplers\.vision"):
        with_method(SINGLE, random_tree(SINGLE), METHOD)
    measured = focusllava(VisionGuided(budget=24, gate="measured"))
    with_method(SINGLE, random_tree(SINGLE), measured)


def test_sampler_of_another_size_counts_as_missing():
    tree = random_tree(SINGLE, METHOD)
    wider = focusllava(VisionGuided(budget=24, hidden=16), TextGuided(layer=2, keep=0.5))
    with pytest.raises(ValueError, match="'focusllava' is learned"):
        with_method(SINGLE, tree, wider)


def test_check_same_names_the_first_difference():
    shape = jax.ShapeDtypeStruct
    wanted = {"a": shape((2,), float), "b": shape((3, 4), float), "c": shape((5,), float)}
    check_same(wanted, dict(wanted))
    with pytest.raises(ValueError, match=re.escape("at b: the model needs (3, 4), the checkpoint "
                                                   "has (4, 3)")):  # fmt: skip
        check_same(wanted, wanted | {"b": shape((4, 3), float), "c": shape((1,), float)})
    with pytest.raises(ValueError, match=r"at a: .* the checkpoint has none"):
        check_same(wanted, {name: wanted[name] for name in "bc"})
    with pytest.raises(ValueError, match=r"at aa: the model needs none, .* \(1,\)"):
        check_same(wanted, wanted | {"aa": shape((1,), float)})
    with pytest.raises(ValueError, match=r"at a: the model needs \(2,\), the checkpoint has \(\)"):
        check_same(wanted, wanted | {"a": shape((), float)})


def test_wrong_model_config_is_named():
    small = replace(SINGLE, decoder=replace(SINGLE.decoder, layers=2))
    with pytest.raises(ValueError, match=r"decoder\.stages\.0\..*needs \(3, .* has \(2, "):
        with_method(SINGLE, random_tree(small), full())


def test_layers_apart_are_the_same_arrays():
    """No array is copied on the way to another method, and the stacked model is the same one."""
    cut = focusllava(text=TextGuided(layer=1))
    tree = random_tree(SINGLE)
    apart = replace(SINGLE, stacked=False)
    one = random_model(apart, tree=tree)
    lists = canonical(named_leaves(one))
    other = with_method(apart, lists, cut)
    mine, theirs = ({id(leaf) for leaf in jax.tree.leaves(model)} for model in (one, other))
    assert mine == theirs
    names = named_leaves(other)
    np.testing.assert_array_equal(
        names["decoder.stages.1.0.q.kernel"], tree["decoder.layers.q.kernel"][1]
    )
    again = canonical(named_leaves(with_method(SINGLE, canonical(names), cut)))
    for name, leaf in tree.items():
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)
