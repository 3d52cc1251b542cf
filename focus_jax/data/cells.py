"""Which cells of an image its views show: one view, or a thumbnail and then tiles, row-major.

Cells are numbered row-major over the whole image. A patch of a tile is a cell; a patch of the
thumbnail shows a square of them at once. One view is a tile without a thumbnail.
"""

from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
from jaxtyping import Int


def scales(across: int) -> tuple[int, ...]:
    """Cells along a patch of the thumbnail and of the tiles, for `across` tiles along an image."""
    return tuple(sorted({across, 1}, reverse=True))


def views(across: int) -> int:
    """M: the views of an image that is `across` tiles wide and high."""
    return sum((across // scale) ** 2 for scale in scales(across))


def first_tile(across: int) -> int:
    """The number of the first view in which a patch is a cell."""
    return views(across) - across**2


def tiles_across(cells: int, patches: int) -> int:
    """Tiles along an image of so many cells. ValueError unless tiles of `patches` make it up."""
    across = isqrt(cells // patches)
    if across**2 * patches != cells:
        raise ValueError(
            f"an image of {cells} cells is no square of views of {patches} patches, a patch a "
            "cell: give tables of the images that the views show"
        )
    return across


@lru_cache
def shown(across: int, side: int) -> Int[np.ndarray, "M N P"]:
    """The cells behind each patch of views of `side` x `side` patches; a tile's own is repeated."""
    number = np.arange((across * side) ** 2)
    parts = []
    for scale in scales(across):
        n = across // scale
        grid = number.reshape(n, side, scale, n, side, scale).transpose(0, 3, 1, 4, 2, 5)
        parts.append(np.repeat(grid.reshape(n * n, side * side, scale * scale), n * n, axis=-1))
    return np.concatenate(parts)


def at_patches(cells: Any, patches: int) -> Any:
    """Cells [... C] as the views show them, [... M N]: the most that a cell of a patch holds.

    NumPy's arrays and jax's. ValueError as of `tiles_across`.
    """
    across = tiles_across(cells.shape[-1], patches)
    return cells[..., shown(across, isqrt(patches))].max(-1)


def tiles_alone(x: Any) -> Any:
    """Views [B M ...] without a thumbnail: those in which a patch is a cell."""
    return x[:, -(isqrt(x.shape[1]) ** 2) :]


def at_cells(tiles: Any) -> Any:
    """Rows of the tiles' patches [B K N F] by the cell that they show, [B C F]."""
    b, count, patches, width = tiles.shape
    across, side = isqrt(count), isqrt(patches)
    grid = tiles.reshape(b, across, across, side, side, width).swapaxes(2, 3)
    return grid.reshape(b, count * patches, width)
