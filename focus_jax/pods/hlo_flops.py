"""Floating-point operations of one product: two for each multiplication with its addition."""

import re
from math import prod

import numpy as np

from focus_jax.pods.hlo_text import Computation, Instruction

WINDOW = ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")


def flops(computation: Computation, op: Instruction) -> int:
    """Operations of a dot, a convolution or a matrix product of cuBLAS; 0 for all others."""
    match op.opcode:
        case "dot":
            contracted = op.numbers("lhs_contracting_dims")
        case "convolution":
            return convolution(computation, op)
        case "custom-call" if op.target.startswith("__cublas$"):
            found = op.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
            contracted = tuple(map(int, re.findall(r"\d+", found)))
        case _:
            return 0
    lhs = computation[op.operands[0]].shape.arrays[0].dims
    return 2 * op.shape.arrays[0].elements * prod(lhs[at] for at in contracted)


def convolution(computation: Computation, op: Instruction) -> int:
    """Operations of a convolution: of each output, the kernel's places that meet an input.

    A TPU states dots as convolutions: batch dimensions become a window in which dilation leaves
    one place that counts, contracted ones a window without padding.
    """
    lhs, rhs = (computation[name].shape.arrays[0].dims for name in op.operands)
    out = op.shape.arrays[0].dims
    labels = op.find(r"\bdim_labels=(\S+?)(?:,|$)")
    left, right, result = re.split("_|->", labels)
    window = parse_window(op.find(r"\bwindow=\{([^}]*)\}"), sum(map(str.isdigit, left)))
    places = 1
    for at, sizes in enumerate(window):
        axis = str(at)
        places *= meetings(lhs[left.index(axis)], out[result.index(axis)], *sizes)
    # The kernel's `i` is already divided by feature_group_count, the result's `b` by batch groups.
    return 2 * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")] * places


def parse_window(text: str, rank: int) -> list[tuple[int, int, int, int, int]]:
    """Size, stride, low padding, dilation of input and of kernel, for each spatial dimension."""
    if not rank:
        return []
    parts = dict(part.split("=") for part in text.split())
    default = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    columns = []
    for key in WINDOW:
        values = parts.get(key, "x".join([default[key]] * rank)).split("x")
        columns.append([int(value.split("_")[0]) for value in values])
    return list(zip(*columns, strict=True))


def meetings(
    size: int, outputs: int, kernel: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of an output and a place of the kernel that meet an input, not padding or a hole."""
    if stride == lhs_dilate == 1 and pad == 0 and outputs + (kernel - 1) * rhs_dilate <= size:
        return outputs * kernel
    found = 0
    for place in range(kernel):
        at = np.arange(outputs) * stride + place * rhs_dilate - pad
        inside = (at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)
        found += int(inside.sum())
    return found
