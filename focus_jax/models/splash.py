"""Splash attention: the Pallas kernel for TPUs that skips blocks above the diagonal.

The S x S matrix never exists. Rows are padded to whole blocks here and nowhere else, so that the
products around attention compute no padding.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jaxtyping import Array, Float, Int

from focus_jax.models.attention import RESIDUALS

LANES = 128  # a block is a multiple of it
LARGEST = 640  # a side of a block: several fp32 blocks of logits lie in VMEM
# What starting a block costs, in elements of logits: an estimate for a v5e, not a measurement.
START = 1 << 16
# The fused backward kernel shares the logits between dq and dkv, five products instead of seven,
# and writes a dq for every block of keys: with more blocks than this that traffic costs more.
FUSED = 8


def blocks_run(rows: int, block: int, causal: bool = True) -> int:
    """Blocks of logits that a kernel computes: those that touch the diagonal or lie below."""
    count = -(-rows // block)
    return count * (count + 1) // 2 if causal else count**2


def block_size(rows: int, causal: bool = True) -> int:
    """The side of a block for this many rows: little padding, and few blocks."""
    sizes = range(LARGEST, 0, -LANES)
    return min(sizes, key=lambda size: blocks_run(rows, size, causal) * (size**2 + START))


def is_fused(rows: int, block: int) -> bool:
    """Whether one kernel makes all gradients."""
    return -(-rows // block) <= FUSED


def block_sizes(rows: int, block: int) -> kernels.BlockSizes:
    """Blocks of the forward and the backward kernels."""
    fused = is_fused(rows, block)
    alone = None if fused else block
    return kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=alone, block_kv_dq=alone, use_fused_bwd_kernel=fused,
    )  # fmt: skip


def splash_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    length: Int[Array, " B"] | None = None,
    *,
    causal: bool = True,
    block: int = 0,
    interpret: bool = False,
) -> Float[Array, "B S H K"]:
    """Self-attention of rows of which the first `length` (None: all) are valid; G divides H.

    `causal`: a valid row sees only rows before it, all of them valid, so `length` is not needed.
    What other rows give has no meaning. `block`: its side instead of `block_size`'s choice.
    `interpret`: run by JAX's interpreter, for tests away from TPUs.
    """
    rows, heads = q.shape[1:3]
    block = block or block_size(rows, causal)
    spare = -rows % block
    by_head = lambda a: jnp.pad(a, ((0, 0), (0, spare), (0, 0), (0, 0))).swapaxes(1, 2)  # noqa: E731
    q, k, v = by_head(q * q.shape[-1] ** -0.5), by_head(k), by_head(v)
    size = (rows + spare,) * 2
    mask = kernels.CausalMask(size) if causal else kernels.FullMask(size)
    # Made anew in every trace: it holds arrays.
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=block_sizes(rows, block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    segments = None if causal else padding_apart(q, rows, length)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :rows]


def padding_apart(
    q: Float[Array, "B H S K"], rows: int, length: Int[Array, " B"] | None
) -> kernels.SegmentIds:
    """Segment 0 for valid rows, 1 for the others: rows see their own segment."""
    batch, size = q.shape[0], q.shape[2]
    length = jnp.full(batch, rows) if length is None else length
    segment = (jnp.arange(size) >= length[:, None]).astype(jnp.int32)
    return kernels.SegmentIds(segment, segment)
