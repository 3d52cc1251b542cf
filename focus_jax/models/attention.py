"""Attention over packed rows: one function, one oracle, fused kernels where they exist."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.models.blocked_attention import blocked_attention
from focus_jax.models.chunked_attention import chunked_attention

NEG_INF = -1e30  # finite, so that a row without any key stays free of NaN


class Rows(NamedTuple):
    """Which keys a packed row may see.

    `length` [B]: valid rows stand first. `segment` [B S] or None: rows of segment 0 are seen by
    all later rows, rows of another segment only by their own (questions that share one image).
    `causal` False means every valid row.
    """

    length: Int[Array, " B"]
    segment: Int[Array, "B S"] | None = None
    causal: bool = True


def softmax(logits: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """Softmax over the last axis in fp32.

    Written out: at small sizes its gradient is more than twice as fast on a CPU as the library's.
    """
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exp = jnp.exp(logits - top)
    return exp / jnp.sum(exp, axis=-1, keepdims=True)


def visible(rows: Rows, size: int) -> Bool[Array, "B S S"] | Bool[Array, "B 1 S"]:
    """The boolean mask (row, key) that `rows` stands for."""
    index = jnp.arange(size)
    mask = index[None, None, :] < rows.length[:, None, None]
    if rows.causal:
        mask &= index[:, None] >= index[None, :]
    if rows.segment is not None:
        row, key = rows.segment[:, :, None], rows.segment[:, None, :]
        mask &= (key == 0) | (key == row)
    return mask


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    rows: Rows,
    mask: Bool[Array, "..."] | None = None,
    impl: Literal["xla", "chunked", "blocked", "cudnn"] = "xla",
) -> Float[Array, "B S H K"]:
    """Self-attention of packed rows; G divides H (grouped queries).

    `mask` is `visible(rows, S)`, handed in so that a scan over layers builds it once. `cudnn`
    takes causal and length, never a mask: with segments it raises. For CPUs: `chunked` (training)
    and `blocked` (long prompts), which behave as `xla` where they do not apply.
    """
    if impl == "chunked" and mask is not None:
        heads = q.shape[2]
        return chunked_attention(q, repeat_groups(k, heads), repeat_groups(v, heads), mask)
    if impl == "blocked" and is_maskless(rows, impl):
        return blocked_attention(q, k, v)
    if impl == "cudnn":
        if rows.segment is not None:
            raise ValueError(
                "attention='cudnn' has no question segments: set data.questions=1 or "
                "model.attention='xla'"
            )
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=rows.causal, implementation="cudnn",
            query_seq_lengths=rows.length, key_value_seq_lengths=rows.length,
        )  # fmt: skip
    return attend(q, k, v, mask)


def is_maskless(rows: Rows, impl: str) -> bool:
    """Whether `attention` works without a mask: valid rows stand first and see those before."""
    return impl in ("blocked", "cudnn") and rows.segment is None and rows.causal


def attend(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B J G K"],
    v: Float[Array, "B J G K"],
    mask: Bool[Array, "B S J"] | None,
) -> Float[Array, "B S H K"]:
    """The oracle: products in the compute dtype, softmax in fp32, explicit mask."""
    q = q * q.shape[-1] ** -0.5
    k, v = repeat_groups(k, q.shape[2]), repeat_groups(v, q.shape[2])
    logits = jnp.einsum("bshd,bjhd->bhsj", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, NEG_INF)
    return jnp.einsum("bhsj,bjhd->bshd", softmax(logits).astype(v.dtype), v)


def repeat_groups(x: Float[Array, "B J G K"], heads: int) -> Float[Array, "B J H K"]:
    """Give every query head its own copy of its group's key or value."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
