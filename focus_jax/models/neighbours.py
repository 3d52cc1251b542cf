"""Neighbours among visual tokens, and attention to them: by a mask, or by blocks and halos."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.select import Selection, pack, take_values
from focus_jax.compress.visual_compute import Layout
from focus_jax.models.attention import NEG_INF
from focus_jax.models.blocked_attention import ROWS


class Places(NamedTuple):
    """Where visual tokens lie: (row, col) in patches, and in which of all images' views.

    An image's thumbnail (or its only tile) is a view, its stitched tiles are the next. Tokens of
    two views are never neighbours.
    """

    centre: Float[Array, "B N 2"]
    view: Int[Array, "B N"]


class Blocks(NamedTuple):
    """Blocks of cells: the token of each query cell, and of each key cell in reach of the block."""

    query: Selection  # [B blocks side**2]
    key: Selection  # [B blocks reach**2]


VIEWS = 1 << 10  # more than the tiles of any image


def joined_view(image: Int[Array, "*B"], tile: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """One number for a tile of an image."""
    return image * VIEWS + tile


def places_of(centre: Float[Array, "B N 2"], view: Int[Array, "B N"]) -> Places:
    """Where tokens lie, `view` being `joined_view` of their image and tile."""
    return Places(centre, view // VIEWS * 2 + (view % VIEWS > 0))


class Near(NamedTuple):
    """How visual rows find the visual keys that they may see: by a mask, by blocks, or, with
    neither, all before them. `home`: where blocks hold a row, None where rows stand in that order.
    `uses`: all the key cells that hold a row.
    """

    mask: Bool[Array, "B N N"] | None = None
    blocks: Blocks | None = None
    home: Int[Array, "B N"] | None = None
    uses: Selection | None = None  # [B N U]


def within(gap: Float[Array, "*B 2"], rows: Layout) -> Bool[Array, "*B"]:
    """Whether tokens that far apart (rows, cols) are neighbours."""
    return jnp.abs(gap).max(-1) <= rows.half * rows.unit + 1e-3


def neighbour_mask(places: Places, rows: Layout) -> Bool[Array, "B N N"]:
    """Which tokens each token has as neighbours; it is its own."""
    gap = places.centre[:, :, None] - places.centre[:, None]
    return within(gap, rows) & (places.view[:, :, None] == places.view[:, None])


def cells_of(places: Places, rows: Layout) -> Int[Array, "B N 2"]:
    """Row and column of a token in its view's grid of tokens."""
    return jnp.round((places.centre + 0.5) / rows.unit - 0.5).astype(jnp.int32)


def blocks_of(places: Places, valid: Bool[Array, "B N"], rows: Layout) -> Blocks:
    """Lay the tokens on their views' canvases and read the blocks off them.

    Only blocks that hold a token are looked at: `rows.blocks` of them are enough for any layout of
    tiles that lie at multiples of a tile. Only integers are scattered.
    """
    side, half, reach = rows.side, rows.half, rows.reach
    down, across = rows.rows // side, rows.cols // side
    high, wide = rows.rows + 2 * half, rows.cols + 2 * half
    cell = cells_of(places, rows)
    inside = valid & (cell >= 0).all(-1) & (cell < jnp.asarray([rows.rows, rows.cols])).all(-1)
    inside &= (places.view >= 0) & (places.view < rows.views)
    row, col, view = cell[..., 0], cell[..., 1], places.view
    spot = (view * high + row + half) * wide + col + half
    number = jnp.broadcast_to(jnp.arange(valid.shape[1], dtype=jnp.int32), valid.shape)
    canvas = scattered(spot, number, inside, rows.views * high * wide)
    block = (view * down + row // side) * across + col // side
    held = scattered(block, number, inside, rows.views * down * across) >= 0
    chosen, _ = pack(held, rows.blocks)
    corner = (chosen.index // across * side) * wide + chosen.index % across * side
    # A view's canvas is 2 * half rows higher than its blocks together.
    corner += chosen.index // (down * across) * 2 * half * wide

    def read(first: int, count: int) -> Selection:
        steps = np.arange(count) + first
        spots = corner[..., None] + jnp.asarray((steps[:, None] * wide + steps).ravel(), jnp.int32)
        flat = spots.reshape(*spots.shape[:-2], -1)
        found = jnp.take_along_axis(canvas, flat, axis=-1, mode="clip").reshape(spots.shape)
        found = jnp.where(chosen.valid[..., None], found, -1)
        return Selection(jnp.maximum(found, 0), found >= 0)

    return Blocks(query=read(half, side), key=read(0, reach))


def scattered(
    at: Int[Array, "B N"], value: Int[Array, "B N"], valid: Bool[Array, "B N"], size: int
) -> Int[Array, "B S"]:
    """`value` at its place among `size`, -1 elsewhere."""
    at = jnp.where(valid, at, size)  # out of range: dropped
    one = lambda a, v: jnp.full(size, -1, jnp.int32).at[a].set(v, mode="drop")  # noqa: E731
    return jax.vmap(one)(at, value)


def in_reach(rows: Layout) -> np.ndarray:
    """Which key cells each query cell of a block has in its window, bool [side**2 reach**2]."""
    query, key = np.arange(rows.side) + rows.half, np.arange(rows.reach)
    near = np.abs(query[:, None] - key) <= rows.half
    return np.kron(near, near)


def arranged(visual: Selection, lie: Places, rows: Layout) -> tuple[Selection, Near]:
    """Visual rows in the order in which they are to stand, and how they find each other."""
    if rows.causal:
        return visual, Near()
    if not rows.blocks:
        return visual, Near(mask=neighbour_mask(lie, rows) & visual.valid[:, None])
    blocks = blocks_of(lie, visual.valid, rows)
    flat = Selection(*(a.reshape(a.shape[0], -1) for a in blocks.query))
    slots = jnp.broadcast_to(jnp.arange(flat.index.shape[1], dtype=jnp.int32), flat.index.shape)
    home = jnp.maximum(scattered(flat.index, slots, flat.valid, visual.index.shape[1]), 0)
    if not rows.aligned:
        return visual, Near(blocks=blocks, home=home, uses=uses_of(blocks.key, rows))
    visual = Selection(take_values(visual.index, flat, 0), take_values(visual.valid, flat, False))
    key = blocks.key.index
    key = jnp.take_along_axis(home, key.reshape(key.shape[0], -1), axis=1).reshape(key.shape)
    keys = Selection(key, blocks.key.valid)
    return visual, Near(blocks=Blocks(blocks.query, keys), uses=uses_of(keys, rows))


def uses_of(key: Selection, rows: Layout) -> Selection:
    """The key cells, counted over all blocks, in which each row stands: [B N U]."""
    most = ((rows.side - 1 + 2 * rows.half) // rows.side + 1) ** 2
    flat = jnp.where(key.valid, key.index, rows.visual).reshape(key.index.shape[0], -1)
    order = jnp.argsort(flat, axis=1, stable=True)
    row = jnp.take_along_axis(flat, order, axis=1)
    count = jnp.broadcast_to(jnp.arange(row.shape[1], dtype=jnp.int32), row.shape)
    begins = jnp.pad(row[:, 1:] != row[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    rank = count - jax.lax.cummax(jnp.where(begins, count, 0), axis=1)
    found = scattered(row * most + rank, order, row < rows.visual, rows.visual * most)
    found = found.reshape(-1, rows.visual, most)
    return Selection(jnp.maximum(found, 0), found >= 0)


@jax.custom_vjp
def spread(
    x: Float[Array, "B N K"], index: Int[Array, "B A"], uses: Selection
) -> Float[Array, "B A K"]:
    """Rows of `x` at `index`, each as often as `uses` knows; the gradient is a gather as well."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="clip")


def _spread_forward(x, index, uses):
    return spread(x, index, uses), uses


def _spread_backward(uses, gradient):
    b, rows, most = uses.index.shape
    parts = jnp.take_along_axis(gradient, uses.index.reshape(b, -1, 1), axis=1, mode="clip")
    parts = jnp.where(uses.valid.reshape(b, -1, 1), parts, 0)
    return parts.reshape(b, rows, most, -1).sum(2), None, None


spread.defvjp(_spread_forward, _spread_backward)


# ---------------------------------------------------------------- attention of one head


class Piece(NamedTuple):
    """Attention to some of the keys: largest logit, mass relative to it, and mixed values."""

    top: Float[Array, "*B S"]
    mass: Float[Array, "*B S"]
    mixed: Float[Array, "*B S K"] | None


def piece(
    q: Float[Array, "*B R S K"],
    k: Float[Array, "*B J K"],
    v: Float[Array, "*B J K"] | None,
    mask: Bool[Array, "..."],
) -> Piece:
    """R query heads of one key head; softmax in fp32. `mask` [*B S J]."""
    logits = jnp.einsum("...rsk,...jk->...rsj", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[..., None, :, :], logits, NEG_INF)
    top = jax.lax.stop_gradient(logits.max(-1))
    exp = jnp.exp(logits - top[..., None])
    if v is None:
        return Piece(top, exp.sum(-1), None)
    mixed = jnp.einsum(
        "...rsj,...jk->...rsk", exp.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return Piece(top, exp.sum(-1), mixed)


def joined(a: Piece, b: Piece | None = None) -> Float[Array, "*B S K"]:
    """Values mixed by one softmax over the keys of both; `a` has values."""
    assert a.mixed is not None
    if b is None:
        return a.mixed / a.mass[..., None]
    top = jnp.maximum(a.top, b.top)
    mine, other = jnp.exp(a.top - top), jnp.exp(b.top - top)
    mass = a.mass * mine + b.mass * other
    mixed = a.mixed * mine[..., None]
    if b.mixed is not None:
        mixed = mixed + b.mixed * other[..., None]
    return mixed / mass[..., None]


def near_piece(
    q: Float[Array, "B R N K"], k: Float[Array, "B N K"], v: Float[Array, "B N K"] | None,
    near: Near, rows: Layout, blocked: bool,
) -> Piece:  # fmt: skip
    """Attention of visual rows to visual keys."""
    if near.blocks is not None:
        return block_piece(q, k, v, near, near.blocks, rows)
    count = q.shape[2]
    size = ROWS if blocked else count
    pieces = []
    for first in range(0, count, size):
        last = min(first + size, count)
        end = last if near.mask is None else count
        if near.mask is None:
            mask = jnp.arange(first, last)[:, None] >= jnp.arange(end)
        else:
            mask = near.mask[:, first:last]
        pieces.append(
            piece(q[:, :, first:last], k[:, :end], None if v is None else v[:, :end], mask)
        )
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), *pieces)


def block_piece(
    q: Array, k: Array, v: Array | None, near: Near, blocks: Blocks, rows: Layout
) -> Piece:
    """Attention of blocks to the cells within their reach."""
    b, r, _, d = q.shape
    count, side = rows.blocks, rows.side**2

    def halo(x: Array) -> Float[Array, "B A J K"]:
        return spread(x, blocks.key.index.reshape(b, -1), near.uses).reshape(b, count, -1, d)

    if near.home is not None:
        at = blocks.query.index.reshape(b, 1, -1, 1)
        q = jnp.take_along_axis(q, at, axis=2, mode="clip")
    q = q.reshape(b, r, count, side, d).swapaxes(1, 2)
    mask = jnp.asarray(in_reach(rows)) & blocks.key.valid[:, :, None]
    out = piece(q, halo(k), None if v is None else halo(v), mask)
    out = jax.tree.map(lambda a: a.swapaxes(1, 2).reshape(b, r, count * side, *a.shape[4:]), out)
    if near.home is None:
        return out
    home = near.home[:, None]
    back = lambda a: jnp.take_along_axis(  # noqa: E731
        a, home.reshape(*home.shape, *(1,) * (a.ndim - 3)), axis=2, mode="clip"
    )
    return jax.tree.map(back, out)
