"""Operations of attention kernels in a compiled program, which its text does not show."""

import re
from collections.abc import Iterable, Mapping

from focus_jax.models.splash import block_size, blocks_run
from focus_jax.pods.hlo import Kernel

NAME = re.compile(r"splash_(?:mha|mqa)_(fwd|dkv|dq)")
SHAPE = re.compile(r"\w+\[([\d,]+)\]")
# Products of a kernel: logits and output; with dv, dp, dk; dq from its own logits and dp.
PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}


def blocks_of(rows: Iterable[int]) -> dict[int, int]:
    """Padded rows -> the side of a block, for the rows that attention is called with."""
    sides = {count: block_size(count) for count in rows}
    return {-(-count // side) * side: side for count, side in sides.items()}


def attention_flops(kernels: Iterable[Kernel], blocks: Mapping[int, int]) -> float:
    """Operations of all runs of splash attention's kernels on one device.

    `blocks`: padded rows of the causal calls -> side of a block; calls with other rows see every
    key. A block is computed whole, masked entries and padding with it.
    """
    return sum(one(kernel, blocks) for kernel in kernels)


def one(kernel: Kernel, blocks: Mapping[int, int]) -> float:
    """Operations of one kernel; 0 for one that is no attention."""
    found = NAME.search(kernel.name) or NAME.search(kernel.target)
    if found is None:
        return 0.0
    kind = found[1]
    heads, rows, width = widest(kernel.operands)
    products = PRODUCTS[kind]
    if kind == "dkv" and sum(dims(shape)[-2:] == [rows, width] for shape in kernel.results) > 2:
        products = 5  # it makes dq too
    side = blocks.get(rows)
    pairs = rows**2 if side is None else blocks_run(rows, side) * side**2
    return kernel.times * products * 2.0 * heads * pairs * width


def widest(shapes: Iterable[str]) -> tuple[int, int, int]:
    """(samples times query heads, rows, head width): of the largest operand of several axes."""
    found = max((dims(shape) for shape in shapes), key=lambda sides: (len(sides), sides))
    *lead, rows, width = found
    heads = 1
    for side in lead:
        heads *= side
    return heads, rows, width


def dims(shape: str) -> list[int]:
    """`bf16[2,8,4096,128]` as numbers."""
    found = SHAPE.match(shape)
    return [int(side) for side in found[1].split(",")] if found else []
