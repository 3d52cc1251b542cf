"""Low-rank updates, held against plain kernels: outputs, gradients, and what a step computes."""

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
from focus_jax.compress.yopo import yopo
from focus_jax.config import LoraConfig, ModelConfig
from focus_jax.models.attention import Rows
from focus_jax.models.decoder import DecoderLayer
from focus_jax.models.lora import PREFIX, is_lora, merged, without_lora
from focus_jax.models.params import abstract, named_leaves, staged, with_leaves, with_method
from tests.models.tiny_models import (
    SINGLE,
    logits,
    random_inputs,
    random_model,
    random_tree,
    shape_of,
)
from tests.quick import compiled

LORA = LoraConfig(rank=3, alpha=1.5, targets=("q", "v", "out", "up", "down"))
CFG = replace(SINGLE, lora=LORA)
CUT = focusllava(text=TextGuided(layer=1, keep=0.5))


def explicit(tree: dict) -> dict:
    """The tree with W + alpha / rank (a @ b) in the place of each kernel, written out."""
    out = {name: leaf for name, leaf in tree.items() if ".lora." not in name}
    for target in LORA.targets:
        a, b = (tree[f"decoder.layers.lora.{target}.{part}"] for part in "ab")
        out[f"decoder.layers.{target}.kernel"] += 0.5 * jnp.einsum("lir,lro->lio", a, b)
    return out


def loss(cfg: ModelConfig, tree: dict) -> jax.Array:
    """A number that every layer of the decoder has a part in."""
    decoder = with_leaves(shape_of(cfg, full()), staged(tree, ())).decoder
    x = jnp.sin(jnp.arange(2 * 5 * 24.0)).reshape(2, 5, 24)
    position = jnp.broadcast_to(jnp.arange(5), (2, 5))
    return (decoder.run(0, x, position, Rows(jnp.array([5, 3])))[0] ** 3).sum()


def test_shapes_and_fresh_values():
    base = named_leaves(abstract(SINGLE, full()))
    found = named_leaves(abstract(CFG, full()))
    more = {n.removeprefix("decoder.stages.0.lora."): found[n].shape for n in found.keys() - base}
    sizes = {"q": (24, 24), "v": (24, 12), "out": (24, 24), "up": (24, 32), "down": (32, 24)}
    wanted = {f"{t}.a": (3, i, 3) for t, (i, _) in sizes.items()}
    assert more == wanted | {f"{t}.b": (3, 3, o) for t, (_, o) in sizes.items()}

    @compiled
    def fresh():
        return [named_leaves(DecoderLayer(cfg, rngs=nnx.Rngs(3))) for cfg in (SINGLE, CFG)]

    plain, other = fresh()
    for name, leaf in plain.items():
        np.testing.assert_array_equal(other[name], leaf, err_msg=name)
    for target, (inputs, _) in sizes.items():
        a = np.asarray(other[f"lora.{target}.a"])
        assert not np.asarray(other[f"lora.{target}.b"]).any()
        # Uniform within 1 / sqrt(in): its deviation is that over sqrt(3).
        assert abs(a).max() <= inputs**-0.5
        np.testing.assert_allclose(a.std(), (3 * inputs) ** -0.5, rtol=0.2)


def test_an_update_of_zero_changes_nothing():
    inputs, tree = random_inputs(SINGLE), random_tree(CFG)
    tree |= {name: 0 * leaf for name, leaf in tree.items() if name.endswith(".b")}
    base = logits(random_model(SINGLE, CUT, tree=explicit(tree)), inputs)
    np.testing.assert_array_equal(logits(random_model(CFG, CUT, tree=tree), inputs), base)


# Parts of kernels are taken: of heads and of neurons.
PARTS = yopo(window=3, layers=2, ffn=2.0, heads=0.5, whole=1)


@pytest.mark.parametrize(
    ("method", "stacked"), [(CUT, True), pytest.param(PARTS, False, marks=pytest.mark.slow)]
)
def test_outputs_are_those_of_the_sum(method, stacked):
    inputs, tree = random_inputs(SINGLE), small(random_tree(CFG))
    cfg = replace(CFG, stacked=stacked)
    ours = logits(random_model(cfg, method, tree=tree), inputs)
    theirs = logits(random_model(SINGLE, method, tree=explicit(tree)), inputs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    base = {name: leaf for name, leaf in tree.items() if not is_lora(name)}
    assert abs(theirs - logits(random_model(SINGLE, method, tree=base), inputs)).max() > 1e-2


def small(tree: dict) -> dict:
    """Updates as large as kernels are, or less."""
    return {name: 0.2 * leaf if is_lora(name) else leaf for name, leaf in tree.items()}


@pytest.mark.parametrize("stacked", [True, False])
def test_merged_is_the_sum(stacked):
    tree = small(random_tree(CFG))
    given = tree
    if not stacked:
        given = {n: list(leaf) if "decoder.layers" in n else leaf for n, leaf in tree.items()}
    found, wanted = merged(given, LORA), explicit(tree)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_allclose(jnp.stack(found[name]) if isinstance(found[name], list)
                                   else found[name], leaf, rtol=1e-6, atol=1e-6)  # fmt: skip
    with_method(without_lora(replace(CFG, stacked=stacked)), found, full())


def test_merged_rounds_once():
    tree = {name: leaf for name, leaf in small(random_tree(CFG)).items() if "layers" in name}
    half = {n: leaf if is_lora(n) else leaf.astype(jnp.bfloat16) for n, leaf in tree.items()}
    exact = explicit({name: leaf.astype(jnp.float32) for name, leaf in half.items()})
    for name, leaf in merged(half, LORA).items():
        assert leaf.dtype == jnp.bfloat16
        # Half a unit in the last of eight bits.
        np.testing.assert_allclose(leaf.astype(jnp.float32), exact[name], rtol=2**-8)


def test_gradients_are_those_of_the_sum():
    tree = small(random_tree(CFG))
    cfg = replace(CFG, remat="dots")
    learning = {name: leaf for name, leaf in tree.items() if is_lora(name)}
    both = compiled(
        lambda own: (
            jax.grad(lambda own: loss(cfg, tree | own))(own),
            jax.grad(lambda own: loss(SINGLE, explicit(tree | own)))(own),
        )
    )
    ours, theirs = both(learning)
    for name, leaf in theirs.items():
        assert abs(leaf).max() > 1e-4, name
        atol = 1e-5 * abs(leaf).max()
        np.testing.assert_allclose(ours[name], leaf, rtol=1e-5, atol=atol, err_msg=name)


def test_no_gradient_of_a_kernel_is_computed():
    """Nothing of a kernel's shape is made in a backward pass, of one layer or of all."""
    tree = random_tree(CFG)

    def made(prefix: str) -> set[str]:
        own = {name: leaf for name, leaf in tree.items() if name.startswith(prefix)}
        grad = jax.make_jaxpr(jax.grad(lambda own: loss(CFG, tree | own)))(own)
        dots = re.findall(r":f32\[([\d,]+)\] = dot_general", str(grad))
        return {dims for dims in dots if dims in ("24,32", "32,24")}

    assert not made(PREFIX)
    assert made("decoder.layers.") == {"24,32", "32,24"}


def test_models_and_trees_that_do_not_fit_are_named():
    tree = random_tree(CFG)
    with pytest.raises(ValueError, match=r"lora\.down\.a: .*models\.lora\.merged"):
        with_method(SINGLE, tree, full())
    with pytest.raises(ValueError, match=r"lora\.down\.a.*has none; set model\.lora\.rank to 0"):
        with_method(CFG, random_tree(SINGLE), full())
    with pytest.raises(ValueError, match=r"speaks of \['q\.a', 'q\.b'\]: give the lora config"):
        merged(tree, LoraConfig(rank=3, targets=("q",)))
    with pytest.raises(ValueError, match=r"has rank 3, and the config's is 4"):
        merged(tree, replace(LORA, rank=4))
    with pytest.raises(ValueError, match="give the lora config"):
        merged(tree, LoraConfig())
    assert merged(random_tree(SINGLE), LoraConfig()).keys() == random_tree(SINGLE).keys()
