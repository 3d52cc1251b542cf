"""Causal attention for CPUs and long prompts: little work above the diagonal, logits in cache.

Head by head, in blocks of rows that see only the keys up to their own end: at 2,976 rows the plain
form would write 1.1 GB of logits a layer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focus_jax.models.chunked_attention import NEG_INF

ROWS = 256  # of a block


def blocked_attention(
    q: Float[Array, "B S H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"]
) -> Float[Array, "B S H K"]:
    """Every row sees itself and those before it; softmax in fp32. G divides H."""
    heads, groups = q.shape[2], k.shape[2]
    q = (q * q.shape[-1] ** -0.5).transpose(2, 0, 1, 3)
    k, v = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)

    def one_head(head: Array) -> Float[Array, "B S K"]:
        group = head // (heads // groups)
        return by_blocks(*(a[i] for a, i in ((q, head), (k, group), (v, group))))

    return jax.lax.map(one_head, jnp.arange(heads)).transpose(1, 2, 0, 3)


def by_heads(
    q: Float[Array, "B S H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"]
) -> Float[Array, "B S H K"]:
    """Every row sees all rows, head by head, so that logits stay in cache; for CPUs."""
    q, k, v = (a.transpose(2, 0, 1, 3) for a in (q * q.shape[-1] ** -0.5, k, v))

    def one_head(qkv: tuple[Array, Array, Array]) -> Float[Array, "B S K"]:
        q, k, v = qkv
        logits = jnp.einsum("bsk,bjk->bsj", q, k, preferred_element_type=jnp.float32)
        exp = jnp.exp(logits - logits.max(-1, keepdims=True))
        mixed = jnp.einsum("bsj,bjk->bsk", exp.astype(v.dtype), v)
        return (mixed / exp.sum(-1, keepdims=True)).astype(v.dtype)

    return jax.lax.map(one_head, (q, k, v)).transpose(1, 2, 0, 3)


def by_blocks(
    q: Float[Array, "B S K"], k: Float[Array, "B S K"], v: Float[Array, "B S K"]
) -> Float[Array, "B S K"]:
    """One head, block by block."""
    out = []
    for first in range(0, q.shape[1], ROWS):
        last = min(first + ROWS, q.shape[1])
        logits = jnp.einsum(
            "bsk,bjk->bsj", q[:, first:last], k[:, :last], preferred_element_type=jnp.float32
        )
        seen = jnp.arange(first, last)[:, None] >= jnp.arange(last)
        logits = jnp.where(seen, logits, NEG_INF)
        exp = jnp.exp(logits - logits.max(-1, keepdims=True))
        mixed = jnp.einsum("bsj,bjk->bsk", exp.astype(v.dtype), v[:, :last])
        out.append((mixed / exp.sum(-1, keepdims=True)).astype(v.dtype))
    return jnp.concatenate(out, axis=1)
