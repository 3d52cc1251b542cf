"""Operations of attention kernels, from their shapes in a compiled program."""

import numpy as np
import pytest

from focus_jax.models.splash import block_size
from focus_jax.pods.attention import attention_flops, blocks_of
from focus_jax.pods.hlo import Kernel


def kernel(name, samples=2, heads=4, rows=2560, width=128, results=1, times=1):
    query = f"bf16[{samples},{heads},{rows},{width}]"
    keys = f"bf16[{samples},{heads // 2},{rows},{width}]"
    return Kernel(
        "tpu_custom_call", ("s32[4]", query, keys, keys), (query,) * results, times, f"a/{name}/b"
    )


def counted(rows, side, products, samples=2, heads=4, width=128):
    """Two operations for each entry of each block that the diagonal touches or leaves below."""
    first = np.arange(0, rows, side)
    blocks = (first[:, None] >= first).sum()
    return products * 2 * blocks * side**2 * samples * heads * width


def test_causal_kernels():
    asked = 2500
    side = block_size(asked)
    rows = -(-asked // side) * side
    blocks = blocks_of([asked])
    assert blocks == {rows: side}
    for name, products in (("splash_mha_fwd_residuals", 2), ("splash_mha_dq", 3)):
        got = attention_flops([kernel(name, rows=rows, times=5)], blocks)
        assert got == 5 * counted(rows, side, products)
    # Two results: dk and dv; three: dq with them.
    apart = kernel("splash_mha_dkv_no_residuals", rows=rows, results=2)
    fused = kernel("splash_mha_dkv_no_residuals", rows=rows, results=3)
    assert attention_flops([apart], blocks) == counted(rows, side, 4)
    assert attention_flops([fused], blocks) == counted(rows, side, 5)


def test_calls_where_every_row_sees_every_key():
    got = attention_flops([kernel("splash_mha_fwd", rows=640)], blocks_of([2500]))
    assert got == 2 * 2 * 640**2 * 2 * 4 * 128


def test_other_kernels_are_none():
    assert attention_flops([kernel("top_k"), kernel("Sharding")], {}) == 0


@pytest.mark.parametrize("rows", [128, 577, 1309, 2161, 3952])
def test_padding_is_to_whole_blocks(rows):
    ((padded, side),) = blocks_of([rows]).items()
    assert padded % side == 0 and rows <= padded < rows + side and side % 128 == 0
