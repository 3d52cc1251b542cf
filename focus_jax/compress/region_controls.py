"""Controls of the vision-guided sampler: what a region loses at each scale, without a router.

Their losses go through the same `scales.allocate` as a router's, at the same budget.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def in_turn(worth: Float[Array, "*B R"], cost: tuple[int, ...]) -> Float[Array, "*B R S"]:
    """Losses by which regions are refined to the finest scale one after another, by their worth.

    A token is worth the same at each of a region's scales (`cost` tokens, ascending).
    """
    left = (cost[-1] - np.asarray(cost, np.float32)) / cost[-1]
    return worth[..., None] * left


def evenly(rows: int, cols: int, cost: tuple[int, ...]) -> Float[np.ndarray, "R S"]:
    """Losses by which no region is a scale ahead of another where the budget allows.

    Regions lie `rows` x `cols` in a tile; those that a last step still reaches lie apart. A step's
    worth of a token is a whole number, so that no rounding changes the order: first by the step,
    then by the place in `spread_order`.
    """
    regions = rows * cols
    place = np.empty(regions, np.int64)
    place[spread_order(rows, cols)] = np.arange(regions)
    steps = np.arange(len(cost) - 1)[::-1]
    worth = steps * regions + (regions - place)[:, None]
    saved = np.cumsum((worth * np.diff(cost))[:, ::-1], axis=-1)[:, ::-1]
    return np.pad(saved, [(0, 0), (0, 1)]).astype(np.float32)


def spread_order(rows: int, cols: int) -> Int[np.ndarray, " R"]:
    """Row-major indices of a grid's cells, such that the first k lie evenly apart for each k.

    The order of Bayer's dither matrix: four cells that follow one another lie in the four quarters
    of a square grid, and so on inside them. Of other grids it is the square's, cut off.
    """
    matrix = np.zeros((1, 1), np.int64)
    while len(matrix) < max(rows, cols):
        parts = [[0, 2], [3, 1]]
        matrix = np.block([[4 * matrix + part for part in line] for line in parts])
    return np.argsort(matrix[:rows, :cols].reshape(-1), kind="stable")


def crowding(
    counts: Sequence[Float[Array, "*B R _"]], scales: tuple[int, ...]
) -> Float[Array, "*B R S"]:
    """Losses by content: `counts` is how many filled patches each token of a scale holds.

    A token of p x p patches loses all but one of its filled patches, which it cannot tell apart,
    and of each of them the share 1 - 1 / p**2, because the pool's other patches thin it out. So a
    crowded region is worth more than a sparse one, at the scale of single patches nothing is lost,
    and an empty region is worth no token beyond the coarsest scale.
    """
    losses = []
    for count, side in zip(counts, scales, strict=True):
        mixed = jnp.maximum(count - 1, 0) * (side > 1)
        losses.append((mixed + (1 - 1 / side**2) * count).sum(-1))
    return jnp.stack(losses, axis=-1)
