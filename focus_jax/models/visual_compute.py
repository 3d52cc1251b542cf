"""Decoder stages in which visual rows pass through a part of each layer only.

The rows of a stage stand apart throughout: those that count as text (newlines of images among
them) go through whole layers, the visual ones through kept heads and neurons, in the order of
their blocks. One gather parts them at the entry, one joins them at the exit.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.method import Dims, Method
from focus_jax.compress.select import take
from focus_jax.compress.visual_compute import Heads, Layout, VisualCompute, heads_of
from focus_jax.models.attention import NEG_INF, attend, repeat_groups, softmax
from focus_jax.models.decoder import (
    Cache,
    Decoder,
    DecoderLayer,
    Rotary,
    as_cache,
    rotary,
    rotate,
    spans,
)
from focus_jax.models.neighbours import Piece, joined, near_piece, piece
from focus_jax.models.split_rows import Split, is_visual, masked_rows, pick, split_rows
from focus_jax.models.streams import Packed, Streams


class Part(NamedTuple):
    """Key heads of a layer as arrays: `order` has those first that visual rows compute, C of them.

    `slot` undoes the order. `live`: which of the C count; `values` [C] multiplies the values of
    visual rows, None where nobody reads them.
    """

    order: Int[np.ndarray, " G"]
    slot: Int[np.ndarray, " G"]
    live: Float[np.ndarray, " C"]
    values: Float[np.ndarray, " C"] | None

    @property
    def computed(self) -> Int[np.ndarray, " C"]:
        """Key heads that visual rows compute."""
        return self.order[: self.live.shape[-1]]


# ------------------------------------------------------------------------- efficient layers


class Keys(NamedTuple):
    """Rotated keys and values, head by head; those of visual rows as far as they are computed."""

    text_k: Float[Array, "G B T K"]
    text_v: Float[Array, "G B T K"]
    visual_k: Float[Array, "F B N K"]
    visual_v: Float[Array, "C B N K"] | None


class Efficient(NamedTuple):
    """What the layers of an efficient stage have in common."""

    compute: VisualCompute
    rows: Layout
    split: Split
    blocked: bool
    keep: bool

    @property
    def official(self) -> bool:
        return self.compute.mass == "official"

    def over(self, heads: Callable[[Array], Array], first: int, last: int) -> list[Array]:
        """`heads` of each number first .. last - 1: one after another where logits are to stay in
        cache, else at once."""
        if first == last:
            return []
        each = jax.lax.map if self.blocked else lambda f, x: jax.vmap(f)(x)
        return [each(heads, jnp.arange(first, last))]

    def layer(
        self, x: tuple[Array, Array], layer: DecoderLayer, part: Part
    ) -> tuple[tuple[Array, Array], Any]:
        """One layer over text rows [B T D] and visual rows [B N D]; their cache with `keep`."""
        text, visual = x
        split, count, after = self.split, part.live.shape[0], known_after(visual)
        q, k, v = layer.qkv(text, split.by_text)
        y = layer.norm_1(visual)
        kernel = partial(of_heads, part=part, groups=k.shape[2], start=after)
        q_near = rotate(layer.heads(product(y, kernel(layer.q, 1))), split.by_visual)
        keys = layer.k(y) if self.official else product(y, kernel(layer.k, 1))
        k_near = rotate(layer.heads(keys), split.by_visual)
        v_near = None
        if part.values is not None:
            v_near = layer.heads(product(y, kernel(layer.v, 1)))
            v_near = v_near * jnp.asarray(part.values, v_near.dtype)[:, None]
        first = lambda a: a.transpose(2, 0, 1, 3)  # noqa: E731
        held = Keys(first(k), first(v), first(k_near), None if v_near is None else first(v_near))
        seen = self.text_attention(by_group(q, k.shape[2]), held, part)
        text = layer.finish(text, ungrouped(seen))
        near = self.visual_attention(by_group(q_near, count), held, part)
        mixed = ungrouped(near).astype(y.dtype).reshape(*visual.shape[:2], -1)
        visual = visual + product(mixed, kernel(layer.out, 0))
        y = layer.norm_2(visual)
        neurons = self.compute.neurons(layer.gate.kernel.shape[-1])
        some = lambda a, axis: jax.lax.dynamic_slice_in_dim(a.kernel[...], after, neurons, axis)  # noqa: E731
        gate, up = product(y, some(layer.gate, 1)), product(y, some(layer.up, 1))
        visual = visual + product(jax.nn.silu(gate) * up, some(layer.down, 0))
        kept = self.cache((k, v), (k_near, v_near), part) if self.keep else None
        return (text, visual), kept

    def key_of(self, i: Array, part: Part) -> Array:
        """Which of the visual keys belong to the i-th head in the layer's order."""
        return jnp.asarray(part.order)[i] if self.official else i

    def text_attention(
        self, q: Float[Array, "G B R T K"], held: Keys, part: Part
    ) -> Float[Array, "G B R T K"]:
        """Text rows: all heads on text, one softmax with the visual keys that they see."""
        order, live = jnp.asarray(part.order), jnp.asarray(part.live) > 0
        split, count = self.split, part.live.shape[0]

        def own(g: Array) -> Piece:
            return piece(q[g], held.text_k[g], held.text_v[g], split.text_text)

        def computed(i: Array) -> Array:
            k, v = held.visual_k[self.key_of(i, part)], held.visual_v
            mask = split.text_visual if self.official else split.text_visual & live[i]
            g = order[i]
            return joined(own(g), piece(q[g], k, None if v is None else v[i], mask))

        def rest(i: Array) -> Array:
            g = order[i]
            if not self.official:
                return joined(own(g))
            return joined(own(g), piece(q[g], held.visual_k[g], None, split.text_visual))

        out = [*self.over(computed, 0, count), *self.over(rest, count, q.shape[0])]
        return jnp.concatenate(out)[jnp.asarray(part.slot)].astype(q.dtype)

    def visual_attention(
        self, q: Float[Array, "C B R N K"], held: Keys, part: Part
    ) -> Float[Array, "C B R N K"]:
        """Visual rows: computed heads on the text before them and on their neighbours."""
        order, live = jnp.asarray(part.order), jnp.asarray(part.live)

        def one(i: Array) -> Array:
            g, v = order[i], None if held.visual_v is None else held.visual_v[i]
            before = piece(q[i], held.text_k[g], held.text_v[g], self.split.visual_text)
            near = near_piece(
                q[i], held.visual_k[self.key_of(i, part)], v,
                self.split.near, self.rows, self.blocked,
            )  # fmt: skip
            return (joined(before, near) * live[i]).astype(q.dtype)

        return self.over(one, 0, q.shape[0])[0]

    def cache(self, text: tuple, visual: tuple, part: Part) -> Cache:
        """Keys and values of all packed rows; where visual ones are not computed they are 0."""
        groups = part.order.shape[0]
        out = []
        for mine, near in zip(text, visual, strict=True):
            if near is None:
                shape = mine.shape[0], self.rows.visual, *mine.shape[2:]
                near = jnp.zeros(shape, mine.dtype)
            elif near.shape[2] < groups:
                near = jnp.pad(near, [(0, 0), (0, 0), (0, groups - near.shape[2]), (0, 0)])
                near = near[:, :, jnp.asarray(part.slot)]
            out.append(pick(jnp.concatenate([mine, near], axis=1), self.split.back))
        keys, values = out
        return as_cache(keys, values)


def by_group(q: Float[Array, "B S H K"], groups: int) -> Float[Array, "G B R S K"]:
    """Scaled queries by the key head that they share."""
    q = q * q.shape[-1] ** -0.5
    return q.reshape(*q.shape[:2], groups, -1, q.shape[-1]).transpose(2, 0, 3, 1, 4)


def ungrouped(x: Float[Array, "G B R S K"]) -> Float[Array, "B S H K"]:
    g, b, r, s, k = x.shape
    return x.transpose(1, 3, 0, 2, 4).reshape(b, s, g * r, k)


def product(x: Float[Array, "B S D"], kernel: Float[Array, "D W"]) -> Float[Array, "B S W"]:
    """A linear map in the dtype of the rows."""
    return jnp.dot(x, kernel[...].astype(x.dtype))


def known_after(x: Float[Array, "B N D"]) -> Int[Array, ""]:
    """0, known only once `x` is.

    Slices of kernels depend on nothing else: compilers would cut those of all layers first and hold
    half of the decoder twice. XLA on CPUs drops barriers before it orders its operations.
    """
    return (x[0, 0, 0] > jnp.inf).astype(jnp.int32)


def of_heads(
    linear: Any, axis: int, part: Part, groups: int, start: Int[Array, ""]
) -> Float[Array, "D W"]:
    """The part of a projection that belongs to the computed heads, which lie along `axis`."""
    kernel, count = linear.kernel[...], part.live.shape[0]
    if count == groups:
        return kernel
    shape = kernel.shape
    split = (shape[0], groups, -1) if axis else (groups, -1, shape[1])
    kernel = jnp.take(
        kernel.reshape(split), start + jnp.asarray(part.computed), axis=axis, mode="clip"
    )
    return kernel.reshape(shape[0], -1) if axis else kernel.reshape(-1, shape[1])


# ---------------------------------------------------------------------------- masked layers


class Masked(NamedTuple):
    """What the layers of a masked stage have in common: all is computed, then cleared."""

    compute: VisualCompute
    by: Rotary
    seen: Bool[Array, "B S"]
    mask: Bool[Array, "B S S"]
    keep: bool
    observe: Callable | None

    def layer(self, x: Array, layer: DecoderLayer, part: Part) -> tuple[Array, Any]:
        """One layer over packed rows [B S D]; its cache with `keep`, what `observe` saw."""
        q, k, v = layer.qkv(x, self.by)
        visual = self.seen[..., None, None]
        live = jnp.asarray(part.live, v.dtype)[:, None]
        values = 0.0 if part.values is None else jnp.asarray(part.values, v.dtype)[:, None]
        v = jnp.where(visual, v * values, v)
        if self.compute.mass == "official":
            mask, mixed = self.mask, attend(q, k, v, self.mask)
        else:
            hidden = self.seen[:, None, None] & (live <= 0)[None, :, :, None]
            mask = self.mask[:, None] & ~jnp.repeat(hidden, q.shape[2] // k.shape[2], axis=1)
            mixed = attend_by_head(q, k, v, mask)
        mixed = jnp.where(visual, mixed * repeat_groups(live[None, None], q.shape[2]), mixed)
        x = x + layer.out(mixed.reshape(*x.shape[:2], -1))
        y = layer.norm_2(x)
        inner = jax.nn.silu(layer.gate(y)) * layer.up(y)
        neurons = jnp.arange(inner.shape[-1]) < self.compute.neurons(inner.shape[-1])
        inner = jnp.where(self.seen[..., None] & ~neurons, 0, inner)
        seen = None if self.observe is None else self.observe(q, k, mask)
        return x + layer.down(inner), (as_cache(k, v) if self.keep else None, seen)


def attend_by_head(q: Array, k: Array, v: Array, mask: Bool[Array, "B H S J"]) -> Array:
    """`attend` with a mask for each head."""
    k, v = repeat_groups(k, q.shape[2]), repeat_groups(v, q.shape[2])
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bshd,bjhd->bhsj", q, k, preferred_element_type=jnp.float32)
    weights = softmax(jnp.where(mask, logits, NEG_INF)).astype(v.dtype)
    return jnp.einsum("bhsj,bjhd->bshd", weights, v)


# ------------------------------------------------------------------------------- a stage


def parts_of(heads: tuple[Heads, ...]) -> list[Part]:
    """Arrays for each layer."""
    out = []
    for each in heads:
        order = np.asarray(each.order, np.int32)
        live, values = (np.asarray(a, np.float32) for a in (each.live, each.read))
        slot = np.argsort(order).astype(np.int32)
        out.append(Part(order, slot, live, values if each.read else None))
    return out


def run(
    decoder: Decoder, method: Method, stage: int, packed: Packed, s: Streams, rows: Layout,
    dims: Dims, keep: bool, observe: Callable | None = None,
) -> tuple[Float[Array, "B S D"], Any, Array | None]:  # fmt: skip
    """`Decoder.run` of a stage whose visual rows pass through parts of its layers.

    With `observe` everything is computed, as in the masked mode: it wants attention of all rows.
    It sees what the softmax gives, before official columns are cleared.
    """
    apart, compute = isinstance(decoder.stages[stage], nnx.List), method.compute
    assert compute is not None
    if observe is not None:
        compute = replace(compute, mode="masked")
    span = spans(method.bounds, dims.layers)[stage]
    parts = parts_of(heads_of(compute, dims, *span, stacked=not apart))
    by = rotary(decoder.cfg, packed.position)
    if compute.mode == "masked":
        masked = Masked(
            compute, by, is_visual(packed, s), masked_rows(packed, s, rows), keep, observe
        )
        x, kept = decoder.walk(stage, masked.layer, packed.hidden, parts)
        caches: Any
        seen: Any
        caches, seen = zip(*kept, strict=True) if apart else kept
        if observe is not None:
            seen = jnp.stack(seen) if apart else seen
        return x, caches if keep else None, seen if observe is not None else None
    split = split_rows(packed, s, rows, by)
    common = Efficient(compute, rows, split, decoder.impl == "blocked", keep)
    streams = take(packed.hidden, split.text), take(packed.hidden, split.visual)
    streams, caches = decoder.walk(stage, common.layer, streams, parts)
    if apart:
        caches = tuple(caches)
    return take(jnp.concatenate(streams, axis=1), split.back), caches if keep else None, None
