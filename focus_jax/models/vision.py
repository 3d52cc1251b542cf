"""CLIP-style vision transformer that hands out what compression methods ask for, by name."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from focus_jax.config import ModelConfig, VisionConfig
from focus_jax.models.attention import Implementation, Rows, attend, attention, softmax
from focus_jax.models.blocked_attention import by_heads
from focus_jax.sharding import Layout, in_use, pinned


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
        impl: Implementation,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        layout: Layout | None = None,
    ):
        def linear(a: int, b: int) -> nnx.Linear:
            return nnx.Linear(a, b, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(
                cfg.width, epsilon=cfg.norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.heads, self.impl = cfg.heads, impl
        self.activation, self.layout = cfg.activation, layout
        self.norm_1, self.norm_2 = norm(), norm()
        self.q, self.k, self.v = (linear(cfg.width, cfg.width) for _ in range(3))
        self.out = linear(cfg.width, cfg.width)
        self.up, self.down = linear(cfg.width, cfg.mlp_width), linear(cfg.mlp_width, cfg.width)

    def split(self, x: Float[Array, "B S C"]) -> Float[Array, "B S H K"]:
        """Heads apart."""
        return pinned(self.layout, x.reshape(*x.shape[:2], self.heads, -1), "batch", None, "heads")

    def normed(self, norm: nnx.LayerNorm, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        """Rows as a block reads them: whole."""
        return pinned(self.layout, norm(x), "batch")

    def attend(self, q: Array, k: Array, v: Array) -> Float[Array, "B S H K"]:
        """Every row sees all rows, on each device's own heads."""
        if self.impl == "splash":
            rows = Rows(jnp.full(len(q), q.shape[1]), causal=False)
            return attention(q, k, v, rows, None, self.impl, self.layout)
        kernel = by_heads if self.impl == "blocked" else partial(attend, mask=None)
        if self.layout is None:
            return kernel(q, k, v)
        spec = self.layout.spec("batch", None, "heads")
        return self.layout.local(kernel, (spec,) * 3, spec)(q, k, v)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        y = self.normed(self.norm_1, x)
        mixed = self.attend(*(self.split(linear(y)) for linear in (self.q, self.k, self.v)))
        x = x + pinned(self.layout, self.out(mixed.reshape(x.shape)), "batch")
        up = pinned(self.layout, self.up(self.normed(self.norm_2, x)), "batch", None, "mlp")
        return x + pinned(self.layout, self.down(ACTIVATIONS[self.activation](up)), "batch")


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

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs, layout: Layout | None = None):
        cfg = model.vision
        self.layout = layout
        self.cfg, self.dtype = cfg, jnp.dtype(model.compute_dtype)
        self.unroll, self.remat = model.unroll, model.remat != "none"
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
        kw_layer = kw | {"impl": model.attention, "layout": layout}
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
        return pinned(self.layout, self.pre_norm(x + position), "batch")

    def run(self, x: Float[Array, "B M C"], first: int, last: int) -> Float[Array, "B M C"]:
        """Layers first..last-1."""
        if first == last:
            return x
        layers = jax.tree.map(lambda a: a[first:last], self.layers)
        body = lambda h, layer: (self.use(layer)(h), None)  # noqa: E731
        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, x, layers, unroll=last - first if self.unroll else 1)[0]

    def use(self, layer: VisionLayer) -> VisionLayer:
        """A layer as it computes: its parameters gathered."""
        return in_use(self.layout, layer, "vision.layers.")

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
        block = self.use(jax.tree.map(lambda a: a[layer], self.layers))
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
