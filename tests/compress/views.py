"""Random tower tokens for the tests of vision stages."""

import jax
import jax.numpy as jnp
import numpy as np

from focus_jax.compress.method import Context, Dims, Views
from focus_jax.config import NEXT_GRIDS

RUN = Context(jax.random.key(0))


def dims(tiles: int = 1, side: int = 8, width: int = 6) -> Dims:
    """Tiles of `side` x `side` patches, `width` channels before and after the projector."""
    return Dims(side, side, tiles, NEXT_GRIDS, width, width, layers=6, newline=tiles > 1)


def random_views(
    d: Dims, batch: int = 2, seed: int = 0, padded: float = 0.0, grid: int = 0
) -> Views:
    """Five tiles lie 2x2, others in a row; a share of the patches is padding."""
    rng = np.random.default_rng(seed)
    across = 2 if d.tiles == 5 else max(d.tiles - 1, 1)
    origin = [(0, 0)] + [(i // across * d.rows, i % across * d.cols) for i in range(d.tiles - 1)]
    n = grid**2 or d.patches
    features = rng.standard_normal((batch, d.tiles, n, d.vision_width))
    valid = rng.random((batch, d.tiles, d.patches)) >= padded
    return Views(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(valid),
        jnp.asarray(valid.reshape(batch, d.tiles, d.rows, d.cols).any(-1)),
        jnp.broadcast_to(jnp.asarray(origin, jnp.int32), (batch, d.tiles, 2)),
        {},
    )


def identity(x):
    """A projector that changes nothing."""
    return x
