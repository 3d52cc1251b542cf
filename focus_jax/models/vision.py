"""CLIP-style vision transformer that hands out what compression methods ask for, by name."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from focus_jax.config import ModelConfig, VisionConfig
from focus_jax.models.attention import attend, softmax
from focus_jax.models.blocked_attention import by_heads


def quick_gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """OpenAI CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class VisionLayer(nnx.Module):
    """Pre-norm transformer block with biases, as in CLIP."""

    def __init__(
        self,
        cfg: VisionConfig,
        *,
        attend_by_heads: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def linear(a: int, b: int) -> nnx.Linear:
            return nnx.Linear(a, b, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(
                cfg.width, epsilon=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.heads, self.attend_by_heads = cfg.heads, attend_by_heads
        self.activation = cfg.activation
        self.norm_1, self.norm_2 = norm(), norm()
        self.q, self.k, self.v = (linear(cfg.width, cfg.width) for _ in range(3))
        self.out = linear(cfg.width, cfg.width)
        self.up, self.down = linear(cfg.width, cfg.mlp_width), linear(cfg.mlp_width, cfg.width)

    def split(self, x: Float[Array, "B S C"]) -> Float[Array, "B S H K"]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        y = self.norm_1(x)
        q, k, v = (self.split(linear(y)) for linear in (self.q, self.k, self.v))
        mixed = by_heads(q, k, v) if self.attend_by_heads else attend(q, k, v, None)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm_2(x))))


class ConvStem(nnx.Module):
    """Stride-2 convolutions, then one that completes the patch: local detail for tiny towers."""

    def __init__(
        self, cfg: VisionConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        def conv(a: int, b: int, kernel: int, stride: int) -> nnx.Conv:
            return nnx.Conv(
                a, b, (kernel, kernel), strides=stride, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        widths = (3, *cfg.stem_widths)
        rest = cfg.patch_size // 2 ** len(cfg.stem_widths)
        self.convs = nnx.List([conv(a, b, 3, 2) for a, b in pairwise(widths)])
        self.last = conv(widths[-1], cfg.width, rest, rest)

    def __call__(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B G G C"]:
        for conv in self.convs:
            pixels = jax.nn.gelu(conv(pixels))
        return self.last(pixels)


def sincos_2d(grid: int, width: int) -> np.ndarray:
    """2-D sines and cosines of a patch's row and column, float32 [grid**2 width]; MoCo v3's."""
    freq = 1.0 / 10000 ** (np.arange(width // 4) / (width // 4))
    row, col = (axis.reshape(-1, 1) * freq for axis in np.mgrid[:grid, :grid])
    return np.concatenate([np.sin(row), np.cos(row), np.sin(col), np.cos(col)], 1).astype("f4")


class VisionTower(nnx.Module):
    """The tower. Layers are stacked [L, ...] and scanned.

    `__call__` gives a dict of named arrays: always `features` [B N C] (patches of
    `feature_layer`) and `class_token` [B 1 C] (its row there, if it has one), and for each
    requested `name@layer`:
    `cls_attention@l` [B H N] (softmax over class token and patches, class column dropped),
    `queries@l`, `keys@l` [B 1+N C] (with bias, before scaling; class token first),
    `cls_query@l` [B 1 C] (the class token's row of the queries),
    `hidden@l` [B 1+N C] (the layer's input). Without a class token there is no row before the
    patches. Layers count from 0; negative from the end.
    """

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        cfg = model.vision
        self.cfg, self.dtype = cfg, jnp.dtype(model.compute_dtype)
        self.unroll = model.unroll
        kw: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.dtype(model.param_dtype)}

        def normal(*shape: int) -> nnx.Param:
            value = 0.02 * jax.random.normal(rngs.params(), shape)
            return nnx.Param(value.astype(kw["param_dtype"]))

        self.stem: ConvStem | nnx.Conv = (
            ConvStem(cfg, **kw, rngs=rngs)
            if cfg.stem == "conv"
            else nnx.Conv(
                3,
                cfg.width,
                (cfg.patch_size,) * 2,
                strides=cfg.patch_size,
                use_bias=False,
                padding="VALID",
                **kw,
                rngs=rngs,
            )
        )
        self.class_token = normal(cfg.width) if cfg.class_token else None
        self.lead = int(cfg.class_token)  # rows before the patches
        self.position = normal(self.lead + cfg.patches, cfg.width)
        if cfg.position_init == "sincos":
            waves = jnp.asarray(0.5 * sincos_2d(cfg.grid, cfg.width), kw["param_dtype"])
            self.position[...] = self.position[...].at[self.lead :].set(waves)
        self.pre_norm = nnx.LayerNorm(cfg.width, epsilon=cfg.norm_eps, **kw, rngs=rngs)
        kw_layer = kw | {"attend_by_heads": model.attention == "blocked"}
        self.layers = jax.vmap(lambda key: VisionLayer(cfg, **kw_layer, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), cfg.layers)
        )
        # CLIP's checkpoint carries it; LLaVA reads the patches before it.
        self.post_norm = nnx.LayerNorm(cfg.width, epsilon=cfg.norm_eps, **kw, rngs=rngs)

    def embed(self, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B M C"]:
        """Normalise pixels [0, 255], cut patches, put the class token first, add positions.

        An image smaller than `image_size` gets interpolated positions.
        """
        cfg = self.cfg
        mean, std = jnp.asarray(cfg.pixel_mean), jnp.asarray(cfg.pixel_std)
        x = ((pixels.astype(jnp.float32) / 255.0 - mean) / std).astype(self.dtype)
        patches = self.stem(x)
        b, rows, cols, c = patches.shape
        position = self.position[...].astype(self.dtype)
        if (rows, cols) != (cfg.grid, cfg.grid):
            grid = position[self.lead :].reshape(cfg.grid, cfg.grid, c)
            grid = jax.image.resize(grid, (rows, cols, c), "bicubic").reshape(rows * cols, c)
            position = jnp.concatenate([position[: self.lead], grid])
        x = patches.reshape(b, rows * cols, c)
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (b, 1, c))
            x = jnp.concatenate([token, x], axis=1)
        return self.pre_norm(x + position)

    def run(self, x: Float[Array, "B M C"], first: int, last: int) -> Float[Array, "B M C"]:
        """Layers first..last-1."""
        if first == last:
            return x
        layers = jax.tree.map(lambda a: a[first:last], self.layers)
        return jax.lax.scan(
            lambda h, layer: (layer(h), None), x, layers, unroll=last - first if self.unroll else 1
        )[0]

    def __call__(
        self, pixels: UInt8[Array, "B S S 3"], requests: tuple[str, ...] = ()
    ) -> dict[str, Array]:
        asked = sorted({request_layer(r, self.cfg.layers) for r in requests} | {self.cfg.depth})
        out: dict[str, Array] = {}
        x, at = self.embed(pixels), 0
        for layer in asked:
            x, at = self.run(x, at, layer), layer
            if layer == self.cfg.depth:
                out["features"] = x[:, self.lead :]
                if self.lead:
                    out["class_token"] = x[:, : self.lead]
            for request in requests:
                if request_layer(request, self.cfg.layers) == layer:
                    out[request] = self.hand_out(request.split("@")[0], layer, x)
        return out

    def hand_out(self, name: str, layer: int, x: Float[Array, "B M C"]) -> Array:
        """One requested array of `layer`, whose input is `x`."""
        if name.startswith("cls_") and not self.lead:
            raise ValueError(f"{name}@{layer}: this tower has no class token")
        if name == "hidden":
            return x
        block = jax.tree.map(lambda a: a[layer], self.layers)
        y = block.norm_1(x)
        if name == "keys":
            return block.k(y)
        if name == "queries":
            return block.q(y)
        if name == "cls_query":
            return block.q(y[:, :1])
        q, k = block.split(block.q(y[:, :1])), block.split(block.k(y))
        logits = jnp.einsum("bihd,bjhd->bhj", q, k, preferred_element_type=jnp.float32)
        return softmax(logits * q.shape[-1] ** -0.5)[..., 1:]


HANDED_OUT = ("cls_attention", "cls_query", "queries", "keys", "hidden")


def request_layer(request: str, layers: int) -> int:
    """The layer of a request `name@layer`, counted from 0."""
    name, _, layer = request.partition("@")
    if name not in HANDED_OUT or not layer.lstrip("-").isdigit():
        raise ValueError(f"the tower hands out {HANDED_OUT} as 'name@layer', not {request!r}")
    if not -layers <= int(layer) < layers:
        raise ValueError(f"{request!r} asks for a layer outside the tower's {layers}")
    return int(layer) % layers
