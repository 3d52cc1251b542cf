"""Density-peak clustering over nearest neighbours (DPC-KNN), with masks and a fixed room."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.select import Selection, places, top_k


class Clusters(NamedTuple):
    """Centres in falling order of their peak score, and the cluster of each row (-1: none)."""

    centre: Selection
    assign: Int[Array, "*B N"]


def density_peaks(
    x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"], count: Int[Array, "*B"], most: int
) -> Clusters:
    """`count` clusters (at most `most`) of the valid rows; each also looks at `count` neighbours.

    Distances are Euclidean, divided by sqrt(D). Density: exp of minus the mean squared distance to
    the nearest rows, itself among them. Peak score: density times the distance to the nearest
    denser row; the densest takes the largest distance of all. The highest scores are centres, every
    other row joins the nearest centre. Of two equally dense rows the first counts as denser, and
    other ties go to the lowest index too (the usual code adds random noise to the densities).
    No gradient flows. Source: Du et al. 2016 (DPC-KNN) as token clustering uses it.
    """
    distance = distances(jax.lax.stop_gradient(x), valid)
    score = peak_score(distance, valid, count, most)
    centre = top_k(score, valid, most, count)
    return Clusters(centre, nearest_centre(distance, valid, centre))


def distances(x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"]) -> Float[Array, "*B N N"]:
    """Distance of each pair of rows over sqrt(D), in fp32; infinite where one is not valid."""
    x = jnp.where(valid[..., None], x, 0).astype(jnp.float32)
    # Distances do not change with the origin, but differences of large squares lose digits.
    mean = x.sum(-2, keepdims=True) / jnp.maximum(valid.sum(-1), 1)[..., None, None]
    x = (x - mean) * x.shape[-1] ** -0.5
    inner = jnp.einsum("...id,...jd->...ij", x, x, precision=jax.lax.Precision.HIGHEST)
    square = (x * x).sum(-1)
    square = square[..., :, None] + square[..., None, :] - 2 * inner
    square = jnp.maximum((square + square.swapaxes(-1, -2)) / 2, 0)
    square = jnp.where(jnp.eye(x.shape[-2], dtype=bool), 0, square)
    return jnp.where(valid[..., :, None] & valid[..., None, :], jnp.sqrt(square), jnp.inf)


def peak_score(
    distance: Float[Array, "*B N N"], valid: Bool[Array, "*B N"], near: Int[Array, "*B"], most: int
) -> Float[Array, "*B N"]:
    """Density times the distance to the nearest denser row, from `near` (<= `most`) neighbours."""
    shown = min(most, distance.shape[-1])
    nearest = -jax.lax.top_k(-distance, shown)[0]
    counted = (jnp.arange(shown) < near[..., None, None]) & jnp.isfinite(nearest)
    square = jnp.where(counted, nearest, 0) ** 2
    spread = square.sum(-1) / jnp.maximum(counted.sum(-1), 1)
    # Compared before the exponential, which makes ties of small densities.
    mine, other = spread[..., :, None], spread[..., None, :]
    index = jnp.arange(distance.shape[-1])
    denser = (other < mine) | ((other == mine) & (index < index[:, None]))
    pair = jnp.isfinite(distance)
    parent = jnp.where(denser & pair, distance, jnp.inf).min(-1)
    widest = jnp.where(pair, distance, 0).max((-2, -1))
    parent = jnp.where(jnp.isfinite(parent), parent, widest[..., None])
    return jnp.where(valid, parent * jnp.exp(-spread), 0)


def nearest_centre(
    distance: Float[Array, "*B N N"], valid: Bool[Array, "*B N"], centre: Selection
) -> Int[Array, "*B N"]:
    """The number of the nearest centre of each valid row (a centre's own is its own), or -1."""
    rows = jnp.take_along_axis(distance, centre.index[..., None], axis=-2)
    rows = jnp.where(centre.valid[..., None], rows, jnp.inf)
    rows = jnp.where(places(centre, distance.shape[-1]), -1, rows)
    chosen = jnp.argmin(rows, axis=-2).astype(jnp.int32)
    return jnp.where(valid & centre.valid.any(-1, keepdims=True), chosen, -1)
