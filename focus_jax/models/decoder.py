"""Llama-style decoder whose layers are stacked per stage; a stage has one row count."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from focus_jax.config import DecoderConfig, ModelConfig
from focus_jax.models.attention import (
    NEG_INF,
    RESIDUALS,
    Rows,
    attention,
    is_maskless,
    repeat_groups,
    softmax,
    visible,
)
from focus_jax.models.lora import ADAPTED, LowRank, adapted
from focus_jax.sharding import Layout, in_use, pinned


class KeyValue(NamedTuple):
    """Rotated keys and values of a layer, or of a stage's stacked layers.

    Samples and key heads share an axis: the loop that decodes one sample would copy its caches
    several times a step if they stood apart.
    """

    k: Float[Array, "*L BG S K"]
    v: Float[Array, "*L BG S K"]


# Of a stage: stacked [L ...], or a layer each.
Cache = KeyValue | tuple[KeyValue, ...]


class Rotary(NamedTuple):
    """cos and sin of a row's position, [B S K/2]."""

    cos: Float[Array, "B S K2"]
    sin: Float[Array, "B S K2"]


def inverse_frequencies(cfg: DecoderConfig) -> Float[Array, " K2"]:
    """Rotary frequencies [K/2] with Hugging Face's `linear` and `llama3` scaling."""
    exponent = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim
    freq = 1.0 / cfg.rope_theta**exponent
    scaling = cfg.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    wavelength = 2 * math.pi / freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - low) / (high - low)
    smooth = jnp.clip(smooth, 0.0, 1.0)  # 0: long waves, stretched; 1: short waves, kept
    return (1 - smooth) * freq / scaling.factor + smooth * freq


def rotary(cfg: DecoderConfig, position: Int[Array, "B S"]) -> Rotary:
    """Angles of each row, in fp32."""
    angle = position[..., None].astype(jnp.float32) * inverse_frequencies(cfg)
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B S H K"], by: Rotary) -> Float[Array, "B S H K"]:
    """Rotate queries or keys; the two halves form the pairs (Hugging Face's layout)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def dtypes(model: ModelConfig) -> dict[str, Any]:
    """Dtypes of computation and parameters, for flax."""
    return {"dtype": jnp.dtype(model.compute_dtype), "param_dtype": jnp.dtype(model.param_dtype)}


def orthogonalised(kernel: Float[Array, "D W"]) -> Float[Array, "D W"]:
    """The nearest matrix with orthonormal rows or columns, by Newton-Schulz iteration.

    Products alone: a QR inside a vmapped, compiled initialisation can hang on CPUs.
    """
    x = kernel.astype(jnp.float32)
    x = x / jnp.linalg.norm(x)
    # A singular value grows by up to 1.5 a step: the smallest of a random matrix needs about 30.
    step = lambda _, x: 1.5 * x - 0.5 * x @ (x.T @ x)  # noqa: E731
    return jax.lax.fori_loop(0, 40, step, x).astype(kernel.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm block: rotary grouped-query attention, then SwiGLU."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs, layout: Layout | None = None):
        cfg = model.decoder
        kw = dtypes(model)

        def linear(a: int, b: int, std: float = 0.0) -> nnx.Linear:
            std = std or a**-0.5
            init = nnx.initializers.normal(std)
            return nnx.Linear(a, b, use_bias=False, kernel_init=init, **kw, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(cfg.width, epsilon=cfg.norm_eps, **kw, rngs=rngs)

        self.head_dim, self.impl, self.layout = cfg.head_dim, model.attention, layout
        self.norm_1, self.norm_2 = norm(), norm()
        self.q = linear(cfg.width, cfg.heads * cfg.head_dim)
        self.k = linear(cfg.width, cfg.kv_heads * cfg.head_dim)
        self.v = linear(cfg.width, cfg.kv_heads * cfg.head_dim)
        self.out = linear(cfg.heads * cfg.head_dim, cfg.width, std=INTO_RESIDUAL)
        self.gate = linear(cfg.width, cfg.mlp_width)
        self.up = linear(cfg.width, cfg.mlp_width)
        self.down = linear(cfg.mlp_width, cfg.width, std=INTO_RESIDUAL)

        if cfg.init == "mimetic":
            self.imitate()
        # Last, so that the other fresh weights are those of a model without updates.
        targets = model.lora.targets if model.lora.rank else ()
        self.lora = nnx.Dict({t: self.low_rank(t, model.lora.rank, rngs) for t in targets})

    def low_rank(self, target: str, rank: int, rngs: nnx.Rngs) -> LowRank:
        """A fresh low-rank update of a kernel."""
        inputs, outputs = getattr(self, target).kernel.shape
        return LowRank(inputs, outputs, rank, rngs=rngs)

    def imitate(self) -> None:
        """Tie fresh weights: keys to queries, output to values, feed-forward silent."""
        for linear in (self.q, self.v):
            linear.kernel[...] = orthogonalised(linear.kernel[...])
        self.k.kernel[...] = self.q.kernel[...]
        self.out.kernel[...] = self.v.kernel[...].T
        self.down.kernel[...] = jnp.zeros_like(self.down.kernel[...])

    def heads(self, x: Float[Array, "B S W"], axis: str = "heads") -> Float[Array, "B S H K"]:
        """Heads apart; `axis` tells queries (`heads`) from keys and values (`kv_heads`)."""
        apart = x.reshape(*x.shape[:2], x.shape[2] // self.head_dim, self.head_dim)
        return pinned(self.layout, apart, "batch", None, axis)

    def normed(self, norm: nnx.RMSNorm, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Rows as a block reads them: whole, so that its products need no more of them."""
        return pinned(self.layout, norm(x), "batch")

    def qkv(self, x: Float[Array, "B S D"], by: Rotary) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values."""
        y = self.normed(self.norm_1, x)
        q, k = self.heads(self.q(y)), self.heads(self.k(y), "kv_heads")
        return rotate(q, by), rotate(k, by), self.heads(self.v(y), "kv_heads")

    def finish(self, x: Float[Array, "B S D"], mixed: Float[Array, "B S H K"]) -> Array:
        """Residual of attention, then the feed-forward half."""
        x = x + pinned(self.layout, self.out(mixed.reshape(*x.shape[:2], -1)), "batch")
        y = self.normed(self.norm_2, x)
        gate, up = (
            checkpoint_name(pinned(self.layout, linear(y), "batch", None, "mlp"), "mlp")
            for linear in (self.gate, self.up)
        )
        return x + pinned(self.layout, self.down(jax.nn.silu(gate) * up), "batch")

    def __call__(
        self, x: Float[Array, "B S D"], by: Rotary, rows: Rows, mask: Array | None
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        q, k, v = self.qkv(x, by)
        mixed = attention(q, k, v, rows, mask, self.impl, self.layout)
        return self.finish(x, mixed), (q, k, v)

    def last(
        self, x: Float[Array, "B S D"], by: Rotary, rows: Rows
    ) -> tuple[Float[Array, "B 1 D"], KeyValue]:
        """Keys and values of all rows, everything else for the last valid row alone."""
        y = self.normed(self.norm_1, x)
        k, v = (self.heads(linear(y), "kv_heads") for linear in (self.k, self.v))
        k = rotate(k, by)
        at = rows.length - 1
        pick = lambda a: jnp.take_along_axis(a, at.reshape(-1, 1, 1), axis=1)  # noqa: E731
        q = rotate(self.heads(self.q(pick(y))), Rotary(*(pick(a) for a in by)))
        mask = jnp.arange(x.shape[1]) <= at[:, None, None]
        cache = as_cache(k, v, self.layout)
        return self.finish(pick(x), attend_cache(q, cache, mask, self.layout)), cache

    def step(
        self,
        x: Float[Array, "B T D"],
        by: Rotary,
        cache: KeyValue,
        length: Int[Array, " B"],
        absent: Bool[Array, "B G S"] | None = None,
    ) -> tuple[Array, KeyValue]:
        """T new rows for each batch row: write keys and values from `length` on, attend to all.

        `absent`: cached rows that a key head does not have.
        """
        q, k, v = self.qkv(x, by)
        cache = write(cache, k, v, length, self.layout)
        last = length[:, None] + jnp.arange(x.shape[1])
        mask = jnp.arange(cache.k.shape[1]) <= last[..., None]
        if absent is not None:
            mask = mask[:, None] & ~absent[:, :, None]
        return self.finish(x, attend_cache(q, cache, mask, self.layout)), cache


def by_device(layout: Layout | None, function: Any, *axes: tuple[str | None, ...] | None) -> Any:
    """A function of arrays with these logical axes (None: a cache) that returns a cache or,
    where the first one is a query's, something that lies as that does; on each device's own part.

    The order in which a cache's samples and key heads share their axis is each device's own.
    """
    if layout is None:
        return function
    joined = layout.joined("batch", "kv_heads")
    cache: Any = KeyValue(joined, joined)  # type: ignore[arg-type]  # where they lie
    inputs = tuple(cache if a is None else layout.spec(*a) for a in axes)
    return layout.local(function, inputs, inputs[0] if axes[0] == QUERIES else cache)


QUERIES, KEYS = ("batch", None, "heads"), ("batch", None, "kv_heads")


def as_cache(
    k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], layout: Layout | None = None
) -> KeyValue:
    """Keys and values as caches hold them: rows of a head beside each other."""

    def merge(k: Array, v: Array) -> KeyValue:
        b, s, g, d = k.shape
        return KeyValue(*(a.swapaxes(1, 2).reshape(b * g, s, d) for a in (k, v)))

    return by_device(layout, merge, KEYS, KEYS)(k, v)


def write(
    cache: KeyValue,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    at: Int[Array, " B"],
    layout: Layout | None = None,
) -> KeyValue:
    """Put new rows at each sample's own place."""

    def put(cache: KeyValue, k: Array, v: Array, at: Array) -> KeyValue:
        new = as_cache(k, v)
        return KeyValue(*(write_rows(a, rows, at) for a, rows in zip(cache, new, strict=True)))

    return by_device(layout, put, None, KEYS, KEYS, ("batch",))(cache, k, v, at)


def write_rows(
    cache: Float[Array, "BG S K"], rows: Float[Array, "BG T K"], at: Int[Array, " B"]
) -> Float[Array, "BG S K"]:
    """Put rows at each sample's own place.

    One write a sample happens in place; past a few the program would grow, and a scatter it is.
    """
    if len(at) > WRITES:
        one = jax.vmap(lambda c, r, i: jax.lax.dynamic_update_slice(c, r, (0, i, 0)))
        apart = lambda a: a.reshape(len(at), -1, *a.shape[1:])  # noqa: E731
        return one(apart(cache), apart(rows), at).reshape(cache.shape)
    groups = len(rows) // len(at)
    for i in range(len(at)):
        own = rows[i * groups : (i + 1) * groups]
        cache = jax.lax.dynamic_update_slice(cache, own, (i * groups, at[i], 0))
    return cache


def attend_cache(
    q: Float[Array, "B T H K"],
    cache: KeyValue,
    mask: Bool[Array, "B T S"] | Bool[Array, "B G T S"],
    layout: Layout | None = None,
) -> Float[Array, "B T H K"]:
    """Attention of a few rows to a cache; the queries of a group share one product."""
    axes = ("batch",) if mask.ndim == 3 else ("batch", "kv_heads")
    return by_device(layout, attend_own, QUERIES, None, axes)(q, cache, mask)


def attend_own(
    q: Float[Array, "B T H K"],
    cache: KeyValue,
    mask: Bool[Array, "B T S"] | Bool[Array, "B G T S"],
) -> Float[Array, "B T H K"]:
    """`attend_cache` where everything is at hand."""
    b, t, h, d = q.shape
    groups, size = cache.k.shape[0] // b, cache.k.shape[1]
    q = (q * d**-0.5).reshape(b, t, groups, -1, d).transpose(0, 2, 3, 1, 4)
    q = q.reshape(b * groups, -1, d)
    logits = jnp.einsum("gqd,gsd->gqs", q, cache.k, preferred_element_type=jnp.float32)
    logits = logits.reshape(b, groups, -1, t, size)
    mask = mask[:, None, None] if mask.ndim == 3 else mask[:, :, None]
    weights = softmax(jnp.where(mask, logits, NEG_INF)).astype(cache.v.dtype)
    out = jnp.einsum("gqs,gsd->gqd", weights.reshape(b * groups, -1, size), cache.v)
    return out.reshape(b, groups, -1, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


WRITES = 16

# Standard deviations of fresh weights: embeddings, and what each block adds to the residual.
EMBEDDING, INTO_RESIDUAL = 0.1, 0.088

# What a layer's backward pass finds saved; the fused attention's own residuals always are.
POLICIES = jax.checkpoint_policies
REMAT = {
    "full": POLICIES.save_only_these_names(RESIDUALS),
    "mlp": POLICIES.save_only_these_names(RESIDUALS, "mlp"),
    "dots": POLICIES.save_from_both_policies(
        POLICIES.dots_with_no_batch_dims_saveable,
        POLICIES.save_only_these_names(RESIDUALS, ADAPTED),
    ),
}


class Decoder(nnx.Module):
    """Embedding, stages of layers, final norm, head.

    `stages[i]` is a `DecoderLayer` whose arrays carry a leading axis of its layers, or a list of
    layers where the model is not `stacked`; `bounds` are the layers before which a stage starts,
    () for one stage.
    """

    def __init__(
        self,
        model: ModelConfig,
        bounds: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        layout: Layout | None = None,
    ):
        cfg = model.decoder
        kw = dtypes(model)
        self.layout = layout
        self.cfg, self.remat, self.unroll = cfg, model.remat, model.unroll
        self.impl, self.lora = model.attention, model.lora
        init = nnx.initializers.normal(EMBEDDING)
        self.embed = nnx.Embed(cfg.vocab_size, cfg.width, embedding_init=init, **kw, rngs=rngs)
        keys = jax.random.split(rngs.params(), cfg.layers)

        def make(key: Array) -> DecoderLayer:
            return DecoderLayer(model, rngs=nnx.Rngs(key), layout=layout)

        def stage(a: int, b: int) -> DecoderLayer | nnx.List:
            if model.stacked:
                return jax.vmap(make)(keys[a:b])
            return nnx.List([make(key) for key in keys[a:b]])

        self.stages = nnx.List([stage(a, b) for a, b in spans(bounds, cfg.layers)])
        self.norm = nnx.RMSNorm(cfg.width, epsilon=cfg.norm_eps, **kw, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        head = partial(nnx.Linear, cfg.width, cfg.vocab_size, use_bias=False, kernel_init=init)
        self.head = None if cfg.tie_embeddings else head(**kw, rngs=rngs)
        if cfg.init == "mimetic" and self.head is not None:
            self.head.kernel[...] = self.embed.embedding[...].T

    def first_layer(self, stage: int) -> DecoderLayer:
        """The first layer of a stage: where a cut reads queries and keys."""
        layers = self.stages[stage]
        if isinstance(layers, nnx.List):
            return self.use(layers[0])
        return self.use(jax.tree.map(lambda a: a[0], layers))

    def use(self, layer: DecoderLayer) -> DecoderLayer:
        """A layer as it computes: its parameters gathered, its low-rank updates in place."""
        return adapted(in_use(self.layout, layer, "decoder.layers."), self.lora)

    def embedded(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Rows of the embedding table."""
        table = in_use(self.layout, self.embed, "decoder.embed.")
        return pinned(self.layout, table(tokens), "batch")

    def run(
        self,
        stage: int,
        x: Float[Array, "B S D"],
        position: Int[Array, "B S"],
        rows: Rows,
        keep: bool = False,
        observe=None,
    ) -> tuple[Float[Array, "B S D"], Cache | None, Array | None]:
        """Run one stage.

        With `keep` also its keys and values; `observe(q, k, mask)` is called in every layer and
        its results come back stacked [L ...].
        """
        by = rotary(self.cfg, position)
        maskless = is_maskless(rows, self.impl) and observe is None
        mask = None if maskless else visible(rows, x.shape[1])

        def body(h: Array, layer: DecoderLayer, _):
            h, (q, k, v) = layer(h, by, rows, mask)
            seen = observe(q, k, mask) if observe is not None else None
            return h, (as_cache(k, v, self.layout) if keep else None, seen)

        x, kept = self.walk(stage, body, x)
        if isinstance(self.stages[stage], nnx.List):
            caches, seen = zip(*kept, strict=True)
            return x, caches if keep else None, jnp.stack(seen) if observe is not None else None
        return x, *kept

    def walk(self, stage: int, body, x: Any, parts: Sequence[Any] | None = None) -> tuple[Any, Any]:
        """`body(x, layer, part)` -> (x, result) through a stage's layers, each as `use` gives it.

        `parts`: a tree of arrays for each layer, of one shape where layers are stacked. The results
        are stacked likewise, or a list where layers stand apart.
        """
        layers = self.stages[stage]
        run = lambda h, layer, part: body(h, self.use(layer), part)  # noqa: E731
        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.remat], prevent_cse=False)
        step = lambda h, layer_part: run(h, *layer_part)  # noqa: E731
        if isinstance(layers, nnx.List):
            return through(step, x, zip(layers, parts or [None] * len(layers), strict=True))
        stacked = None if parts is None else jax.tree.map(lambda *a: np.stack(a), *parts)
        return jax.lax.scan(step, x, (layers, stacked), unroll=True if self.unroll else 1)

    def run_last(
        self, stage: int, x: Float[Array, "B S D"], position: Int[Array, "B S"], rows: Rows
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Run the model's last stage for what follows a prompt: its last valid row, and the cache.

        Where layers stand apart, the last one leaves out what only other rows would need.
        """
        layers = self.stages[stage]
        if not isinstance(layers, nnx.List):
            x, cache, _ = self.run(stage, x, position, rows, keep=True)
            at = (rows.length - 1).reshape(-1, 1, 1)
            return jnp.take_along_axis(x, at, axis=1)[:, 0], cache  # type: ignore[return-value]
        by = rotary(self.cfg, position)
        mask = None if is_maskless(rows, self.impl) else visible(rows, x.shape[1])

        def body(h: Array, layer: DecoderLayer):
            h, (_, k, v) = self.use(layer)(h, by, rows, mask)
            return h, as_cache(k, v, self.layout)

        x, caches = through(body, x, layers[:-1])
        last, cache = self.use(layers[-1]).last(x, by, rows)
        return last[:, 0], (*caches, cache)

    def step(
        self,
        stage: int,
        x: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        cache: Cache,
        length: Int[Array, " B"],
        absent: tuple[Bool[Array, "B S"], Bool[np.ndarray, "L G"]] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """T new rows a sample through one stage, behind `length` cached ones; the grown cache.

        `absent`: cached rows that are not there for some key heads of each layer, and these heads.
        """
        by = rotary(self.cfg, position)

        def body(h: Array, layer_cache):
            layer, kv, lacks = layer_cache
            hidden = None if absent is None else absent[0][:, None] & lacks[:, None]
            return self.use(layer).step(h, by, kv, length, hidden)

        layers = self.stages[stage]
        lacking = None if absent is None else absent[1]
        if isinstance(layers, nnx.List):
            each = [None] * len(layers) if lacking is None else list(lacking)
            x, grown = through(body, x, zip(layers, cache, each, strict=True))
            return x, tuple(grown)
        return jax.lax.scan(body, x, (layers, cache, lacking))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        """Final norm and vocabulary scores in fp32."""
        x = self.norm(x)
        return jnp.dot(x, self.head_kernel().astype(x.dtype), preferred_element_type=jnp.float32)

    def head_kernel(self) -> Float[Array, "D W"]:
        """The vocabulary's kernel, gathered."""
        if self.head is None:
            return in_use(self.layout, self.embed, "decoder.embed.").embedding[...].T
        return in_use(self.layout, self.head, "decoder.head.").kernel[...]


def through(body, x: Any, layers) -> tuple[Any, list]:
    """`lax.scan` in plain steps: over layers that stand apart."""
    out = []
    for layer in layers:
        x, kept = body(x, layer)
        out.append(kept)
    return x, out


def spans(bounds: tuple[int, ...], layers: int) -> list[tuple[int, int]]:
    """(first, last) layers of each stage; `bounds` are the later stages' first layers."""
    edges = (0, *bounds, layers)
    return list(pairwise(edges))


def observed_attention(
    q: Float[Array, "B S H K"], k: Float[Array, "B S G K"], mask: Array, row_weight: Array
) -> Float[Array, "B S"]:
    """Head-mean attention that each row gets from the rows weighted by `row_weight` [B S]."""
    q, k = q * q.shape[-1] ** -0.5, repeat_groups(k, q.shape[2])
    logits = jnp.einsum("bshd,bjhd->bhsj", q, k, preferred_element_type=jnp.float32)
    mask = mask[:, None] if mask.ndim == 3 else mask
    weights = softmax(jnp.where(mask, logits, NEG_INF))
    return jnp.einsum("bhsj,bs->bj", weights, row_weight) / q.shape[2]
