"""Operations of products, against sums of products of ones: each multiplication adds one."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from focus_jax.pods.hlo_flops import flops, meetings
from focus_jax.pods.hlo_text import parse
from tests.quick import compiled

NHWC = ("NHWC", "HWIO", "NHWC")
conv = jax.lax.conv_general_dilated
PRODUCTS = {
    "matrix": (lambda x, w: x @ w, (5, 7), (7, 3)),
    "batch": (partial(jnp.einsum, "bqhd,bkhd->bhqk"), (2, 5, 3, 4), (2, 6, 3, 4)),
    "contracted twice": (partial(jnp.einsum, "btd,btf->df"), (2, 5, 4), (2, 5, 6)),
    "patches": (
        partial(conv, window_strides=(4, 4), padding="VALID", dimension_numbers=NHWC),
        (2, 12, 12, 3),
        (4, 4, 3, 5),
    ),
    "padded, dilated, grouped": (
        partial(
            conv,
            window_strides=(2, 1),
            padding=[(1, 2), (0, 3)],
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 1),
            feature_group_count=2,
            dimension_numbers=NHWC,
        ),
        (2, 9, 8, 4),
        (3, 2, 2, 6),
    ),
    "batch groups": (
        partial(
            conv,
            window_strides=(1, 1),
            padding="SAME",
            batch_group_count=2,
            dimension_numbers=NHWC,
        ),
        (4, 5, 5, 3),
        (3, 3, 3, 4),
    ),
    "cut padding": (
        partial(conv, window_strides=(1, 1), padding=[(-1, 2), (3, -2)], dimension_numbers=NHWC),
        (1, 6, 7, 2),
        (3, 3, 2, 2),
    ),
}


def counted(text):
    return sum(flops(c, op) for c in parse(text).computations.values() for op in c)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_multiplication_counts_twice(name):
    function, lhs, rhs = PRODUCTS[name]
    ones = jnp.ones(lhs), jnp.ones(rhs)
    program = compiled(function).lower(*ones).compile()
    assert counted(program.as_text()) == 2 * int(program(*ones).sum())


# Dots as a TPU states them, with the sizes of the dot: (shapes, window and labels, 2 * B*M*N*K).
TPU_DOTS = [
    ("[2,512,1024]", "[1024,2048,1]", "[2,512,2048]", "window={size=1}, ", "0bf_io0->0bf",
     2 * 1024 * 1024 * 2048),
    ("[2,512,1024]", "[2,512,2048]", "[1024,2048,1]", "window={size=2}, ", "0fb_0io->bf0",
     2 * 1024 * 2048 * 1024),
    ("[512,1024]", "[1024,1024]", "[512,1024]", "", "bf_io->bf", 2 * 512 * 1024 * 1024),
    ("[4,256,8,64]", "[4,256,8,64]", "[4,8,256,256]",
     "window={size=4x8 stride=3x7 lhs_dilate=4x8}, ", "0b1f_0o1i->01bf",
     2 * (4 * 8) * 256 * 256 * 64),
    ("[4,256,8,64]", "[4,8,256,256]", "[4,8,64,256]",
     "window={size=4x8 stride=3x7 lhs_dilate=4x8}, ", "0f1b_01oi->01bf",
     2 * (4 * 8) * 256 * 64 * 256),
    # A concatenation of two, one of which the window's padding stands for.
    ("[2,2048,5504,1]", "[2,2048,2,512]", "[5504,2,512,1]",
     "window={size=2x2 pad=1_1x0_0 rhs_reversal=1x0}, ", "1fb0_1i0o->b0f1",
     2 * 5504 * 1024 * 4096),
]  # fmt: skip


@pytest.mark.parametrize(("lhs", "rhs", "out", "window", "labels", "expected"), TPU_DOTS)
def test_a_dot_stated_as_a_convolution(lhs, rhs, out, window, labels, expected):
    text = f"""HloModule m

ENTRY %main (a: bf16{lhs}, b: bf16{rhs}) -> bf16{out} {{
  %a = bf16{lhs}{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %b = bf16{rhs}{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %c = bf16{out}{{1,0:T(8,128)(2,1)}} convolution(%a, %b), {window}dim_labels={labels}
}}
"""
    assert counted(text) == expected


def test_a_matrix_product_of_a_gpu_library():
    text = """HloModule m

ENTRY %main (a: bf16[2,8,64], b: bf16[2,64,16]) -> bf16[2,8,16] {
  %a = bf16[2,8,64]{2,1,0} parameter(0)
  %b = bf16[2,64,16]{2,1,0} parameter(1)
  %c = (bf16[2,8,16]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %d = bf16[2,8,16]{2,1,0} get-tuple-element(%c), index=0
}
"""  # noqa: E501
    assert counted(text) == 2 * 2 * 8 * 16 * 64


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", [-1, 0, 2])
@pytest.mark.parametrize("dilate", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_places_of_a_window_one_by_one(stride, pad, dilate):
    size, outputs, kernel = 5, 4, 3
    held = set(range(0, size * dilate[0], dilate[0]))
    by_hand = sum(
        out * stride + place * dilate[1] - pad in held
        for out in range(outputs)
        for place in range(kernel)
    )
    assert meetings(size, outputs, kernel, stride, pad, *dilate) == by_hand
