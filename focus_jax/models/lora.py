"""Low-rank updates of a decoder layer's kernels: kernel + alpha / rank x (a @ b).

Source: Hu et al., arXiv 2106.09685. In training rows pass through a and b beside the frozen kernel,
so that no gradient of a whole kernel is ever computed: that would be a third of a step's
operations, and in bfloat16 a kernel's rounding would swallow small updates. Otherwise
(`merged`) the update is added to the kernel once.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from focus_jax.config import LoraConfig, ModelConfig

# Canonical names begin so: `decoder.layers.lora.q.a` [L, in, r] and `.b` [L, r, out].
PREFIX = "decoder.layers.lora."
# Checkpoint name of what kernel and update give together: saved as one array, not as two.
ADAPTED = "adapted"


class LowRank(nnx.Module):
    """The update of one kernel, in fp32; a fresh one is zero.

    `a` is uniform within 1 / sqrt(in), which is Hugging Face PEFT's choice (LLaVA trains with it).
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, rngs: nnx.Rngs):
        bound = inputs**-0.5
        shape = (inputs, rank)
        self.a = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        self.b = nnx.Param(jnp.zeros((rank, outputs), jnp.float32))


class Adapted(nnx.Module):
    """A linear map with its update."""

    def __init__(self, linear: nnx.Linear, update: LowRank, scale: float):
        self.linear, self.update, self.scale = linear, update, scale

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Rows through the kernel and, beside it, through a and b."""
        y = self.linear(x)
        a, b = (part[...].astype(y.dtype) for part in (self.update.a, self.update.b))
        return checkpoint_name(y + jnp.dot(jnp.dot(x.astype(y.dtype), a) * self.scale, b), ADAPTED)

    @property
    def kernel(self) -> Float[Array, "I O"]:
        """The sum, for those who take parts of a kernel."""
        return added(self.linear.kernel[...], self.update.a[...], self.update.b[...], self.scale)


def added(
    kernel: Float[Array, "I O"], a: Float[Array, "I R"], b: Float[Array, "R O"], scale: float
) -> Float[Array, "I O"]:
    """A kernel with its update, rounded once to the kernel's dtype."""
    update = jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def adapted(layer: Any, cfg: LoraConfig) -> Any:
    """A decoder layer as it computes, its updates in place; the layer itself if there are none."""
    if not cfg.rank:
        return layer
    own = jax.tree.map(lambda a: a, layer)  # a copy: what is kept stays as it is
    for target in cfg.targets:
        linear = getattr(own, target)
        setattr(own, target, Adapted(linear, own.lora[target], cfg.alpha / cfg.rank))
    return own


def is_lora(name: str) -> bool:
    """Whether a parameter (canonical name) is part of an update."""
    return name.startswith(PREFIX)


def has_lora(tree: Mapping[str, Any]) -> bool:
    """Whether a canonical tree holds updates."""
    return any(is_lora(name) for name in tree)


def without_lora(cfg: ModelConfig) -> ModelConfig:
    """The config of a model whose updates are `merged`."""
    return replace(cfg, lora=LoraConfig())


def merged(tree: Mapping[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    """A canonical tree whose kernels hold their updates, for a model without any (`rank=0`).

    cfg: what the updates were trained with. Layer by layer, so that one of them at a time is in
    fp32; sharded kernels stay where they lie. ValueError: the tree has other updates than `cfg`.
    """
    found = {name.removeprefix(PREFIX) for name in tree if is_lora(name)}
    wanted = {f"{target}.{part}" for target in cfg.targets for part in "ab"} if cfg.rank else set()
    if found != wanted:
        raise ValueError(
            f"the tree has low-rank updates {sorted(found)}, and the config speaks of "
            f"{sorted(wanted)}: give the lora config that they were trained with"
        )
    out = {name: leaf for name, leaf in tree.items() if not is_lora(name)}
    for target in cfg.targets if cfg.rank else ():
        name = f"decoder.layers.{target}.kernel"
        parts = out[name], tree[f"{PREFIX}{target}.a"], tree[f"{PREFIX}{target}.b"]
        if parts[1][0].shape[-1] != cfg.rank:
            raise ValueError(
                f"{PREFIX}{target}.a has rank {parts[1][0].shape[-1]}, and the config's is "
                f"{cfg.rank}: give the lora config that it was trained with"
            )
        one = partial(added, scale=cfg.alpha / cfg.rank)
        if isinstance(parts[0], list):
            out[name] = [jax.jit(one)(*layer) for layer in zip(*parts, strict=True)]
        else:
            where = getattr(parts[0], "sharding", None)
            out[name] = jax.jit(partial(by_layer, one), out_shardings=where)(parts)
    return out


def by_layer(one: Callable[..., Array], stacks: tuple[Array, ...]) -> Array:
    """`one` of each layer's arrays, one layer after another."""
    return jax.lax.map(lambda layer: one(*layer), stacks)
