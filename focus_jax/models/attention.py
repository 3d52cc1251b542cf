"""Attention over packed rows: one function, one oracle, fused kernels where they exist."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from focus_jax.config import ModelConfig
from focus_jax.models.blocked_attention import blocked_attention
from focus_jax.models.chunked_attention import chunked_attention
from focus_jax.sharding import Layout

# Output and log-sum-exp of fused attention carry this checkpoint name: a remat policy that saves it
# spares the backward pass a second run of the forward kernel.
RESIDUALS = "fused_attention"
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


Implementation = Literal["xla", "chunked", "blocked", "cudnn", "splash"]
FUSED = ("cudnn", "splash")  # kernels that know causal and length and no mask


def attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    rows: Rows,
    mask: Bool[Array, "..."] | None = None,
    impl: Implementation = "xla",
    layout: Layout | None = None,
) -> Float[Array, "B S H K"]:
    """Self-attention of packed rows; G divides H (grouped queries).

    `mask` is `visible(rows, S)`, handed in so that a scan over layers builds it once. `cudnn`
    (NVIDIA) and `splash` (TPU) take causal and length, never a mask: with segments they raise
    ValueError, and so does `splash` elsewhere. For CPUs: `chunked` (training) and `blocked` (long
    prompts), which behave as `xla` where they do not apply. Under a layout each device works on
    its own samples and heads (`check_heads`).
    """
    if impl in FUSED and rows.segment is not None:
        raise ValueError(
            f"attention={impl!r} has no question segments: set data.questions=1 or "
            "model.attention='xla'"
        )
    if impl == "splash" and (platform := platform_of(layout)) != "tpu":
        raise ValueError(
            f"attention='splash' is a kernel for TPUs, and the devices are of platform "
            f"{platform!r}: set model.attention='xla', or 'cudnn' on NVIDIA GPUs"
        )
    if layout is None:
        return attention_at_hand(q, k, v, rows, mask, impl)
    batch, query = layout.spec("batch"), layout.spec("batch", None, "heads", None)
    key = layout.spec("batch", None, "kv_heads", None)
    one_for_all = mask is not None and mask.shape[0] == 1
    specs = (query, key, key, batch, batch, PartitionSpec() if one_for_all else batch)

    def own(q, k, v, length, segment, mask):
        return attention_at_hand(q, k, v, Rows(length, segment, rows.causal), mask, impl)

    return layout.local(own, specs, query)(q, k, v, rows.length, rows.segment, mask)


def attention_at_hand(
    q: Array, k: Array, v: Array, rows: Rows, mask: Array | None, impl: Implementation
) -> Float[Array, "B S H K"]:
    """`attention` where every sample and head is at hand."""
    if impl == "splash":
        from focus_jax.models.splash import splash_attention  # takes a second to import

        return splash_attention(q, k, v, rows.length, causal=rows.causal)
    if impl == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=rows.causal, implementation="cudnn",
            query_seq_lengths=rows.length, key_value_seq_lengths=rows.length,
        )  # fmt: skip
    if impl == "chunked" and mask is not None:
        heads = q.shape[2]
        return chunked_attention(q, repeat_groups(k, heads), repeat_groups(v, heads), mask)
    if impl == "blocked" and is_maskless(rows, impl):
        return blocked_attention(q, k, v)
    return attend(q, k, v, mask)


def platform_of(layout: Layout | None) -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh, which a program may be compiled for from elsewhere."""
    if layout is None:
        return jax.default_backend()
    if isinstance(layout.mesh, Mesh):
        return layout.mesh.devices.flat[0].platform
    raise ValueError("attention='splash' needs a mesh of devices, and this one is abstract")


def is_maskless(rows: Rows, impl: str) -> bool:
    """Whether `attention` works without a mask: valid rows stand first and see those before."""
    return impl in ("blocked", *FUSED) and rows.segment is None and rows.causal


def check_heads(cfg: ModelConfig, layout: Layout) -> None:
    """ValueError unless heads and feed-forward neurons divide over the mesh."""
    split = [
        ("decoder.heads", cfg.decoder.heads, "heads"),
        ("decoder.kv_heads", cfg.decoder.kv_heads, "kv_heads"),
        ("decoder.mlp_width", cfg.decoder.mlp_width, "mlp"),
        ("vision.heads", cfg.vision.heads, "heads"),
        ("vision.mlp_width", cfg.vision.mlp_width, "mlp"),
    ]
    for name, size, axis in split:
        if size % layout.ways(axis):
            places = ", ".join(f"{a}={layout.mesh.shape[a]}" for a in layout.mesh_axes(axis) or ())
            raise ValueError(
                f"model.{name} {size} does not divide over {places}: choose a mesh (train.mesh) "
                f"that splits it {math.gcd(size, layout.ways(axis))} ways"
            )
    if layout.mesh_axes("heads") != layout.mesh_axes("kv_heads"):
        raise ValueError(
            f"rules.heads {layout.rules.heads} and rules.kv_heads {layout.rules.kv_heads} differ, "
            "and queries would meet the keys of other heads: set both alike"
        )


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
