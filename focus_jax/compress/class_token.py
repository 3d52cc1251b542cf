"""What the class token of a CLIP-like tower attends to: how several methods rank patches."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from focus_jax.compress.method import Dims

WITHOUT = (
    "random", "uniform", "pool", "downsample", "focusllava", "divprune", "cdpruner",
    "trimtokenator",
)  # fmt: skip


def check_class_token(name: str, dims: Dims) -> None:
    """ValueError where the tower has no class token, naming methods that ask for none."""
    if not dims.class_token:
        raise ValueError(
            f"{name}: patches are ranked by the attention of the tower's class token, and this "
            f"tower has none: use a tower with one, or one of {', '.join(WITHOUT)}"
        )


def whole_attention(
    query: Float[Array, "B M 1 C"], keys: Float[Array, "B M S C"], valid: Bool[Array, "B M N"]
) -> Float[Array, "B M N"]:
    """Attention of the class token to each patch, the whole width being one head; fp32.

    Softmax of q.k / sqrt(C) over the class token (S = 1 + N, first) and the valid patches; then
    the class token's own share is left out, so that it sums to less than 1. Unscaled queries and
    keys with bias. No gradient.
    """
    query, keys = lax.stop_gradient((query, keys))
    logits = jnp.einsum(
        "bmoc,bmsc->bms", query.astype(jnp.float32), keys.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    seen = jnp.pad(valid, [(0, 0), (0, 0), (1, 0)], constant_values=True)
    logits = jnp.where(seen, logits * keys.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)[..., 1:]


def head_attention(
    attention: Float[Array, "B M H N"], valid: Bool[Array, "B M N"]
) -> Float[Array, "B M H N"]:
    """Attention of the class token to each patch by head, as if padding had not been there; fp32.

    `attention`: the tower's own, over class token and patches, the class token's share left out.
    No gradient.
    """
    attention = lax.stop_gradient(attention).astype(jnp.float32)
    kept = jnp.where(valid[:, :, None], attention, 0)
    lost = (attention - kept).sum(-1, keepdims=True)
    return kept / jnp.maximum(1 - lost, 1e-6)
