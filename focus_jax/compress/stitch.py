"""Tokens of tiles laid out as the decoder reads them."""

import jax.numpy as jnp
from jaxtyping import Array

from focus_jax.compress.method import Dims, TileTokens, Views, VisualTokens
from focus_jax.compress.select import Selection, take, take_values


def stitch(
    groups: list[TileTokens], views: Views, dims: Dims, band: int, tile_newline: bool = False
) -> VisualTokens:
    """Lay the tiles' tokens out in reading order: thumbnail, then the stitched grid by bands.

    Each band with a valid row is closed by a newline slot. Without a grid (`band` 0) tiles stand
    one behind another, closed by a newline each with `tile_newline`. A group covers consecutive
    tiles; together they cover all. Padding ends up behind.
    """
    flat, first = [], 0
    tile_slots: tuple[int, ...] = ()
    for group in groups:
        flat.append(place(group, views, dims, band, first))
        first += group.features.shape[1]
        tile_slots += (group.features.shape[2],) * group.features.shape[1]
    parts = [jnp.concatenate(column, axis=1) for column in zip(*flat, strict=True)]
    features, valid, centre, side, view, key = parts
    newline = jnp.zeros(valid.shape, bool)
    per_tile = not band and tile_newline and dims.newline
    if count := dims.tiles if per_tile else dims.newlines(band):
        ends = tile_ends(views) if per_tile else newlines(views, dims, band, count)
        extra, extra_key = ends
        pad = [(0, 0), (0, count)]
        features = jnp.pad(features, [*pad, (0, 0)])
        centre, side = jnp.pad(centre, [*pad, (0, 0)]), jnp.pad(side, pad)
        view, newline = jnp.pad(view, pad), jnp.pad(newline, pad, constant_values=True)
        valid = jnp.concatenate([valid, extra], axis=1)
        key = jnp.concatenate([key, extra_key], axis=1)
    order = jnp.argsort(jnp.where(valid, key, jnp.iinfo(jnp.int32).max), axis=1, stable=True)
    order = order[:, : dims.stitched(tile_slots, band) + (count if per_tile else 0)]
    return gather_tokens(
        VisualTokens(features, valid, centre, side, view, newline), Selection(order, order >= 0)
    )


def place(group: TileTokens, views: Views, dims: Dims, band: int, first: int) -> tuple:
    """One group's tokens with stitched centres and the sort key of their band."""
    b, m, k = group.valid.shape
    origin = views.origin[:, first : first + m]
    view = jnp.broadcast_to(jnp.arange(first, first + m, dtype=jnp.int32)[:, None], (b, m, k))
    centre = group.centre + origin[:, :, None].astype(jnp.float32)
    if band:
        row = jnp.floor((centre[..., 0] + 0.5) / band).astype(jnp.int32)
        key = row * KEY_BAND + origin[:, :, None, 1]
        key = jnp.where((view == 0) & (dims.tiles > 1), -1, key)
    else:
        key = view * KEY_BAND
    flat = lambda a: a.reshape(b, m * k, *a.shape[3:])  # noqa: E731
    return tuple(flat(a) for a in (group.features, group.valid, centre, group.side, view, key))


KEY_BAND = 1 << 12  # more than the columns of any stitched grid


def newlines(views: Views, dims: Dims, band: int, count: int) -> tuple[Array, Array]:
    """Which bands of the stitched grid hold a valid row [B count], and their sort keys."""
    if dims.tiles == 1:
        present = views.row_valid.any(axis=(1, 2))[:, None]
        return present, jnp.full(present.shape, dims.rows * KEY_BAND, jnp.int32)
    rows = views.origin[:, 1:, 0][..., None] + jnp.arange(dims.rows)
    bands = jnp.where(views.row_valid[:, 1:], rows // band, -1)
    index = jnp.arange(count)
    present = (bands[..., None] == index).any(axis=(1, 2))
    return present, jnp.broadcast_to(index * KEY_BAND + KEY_BAND - 1, present.shape)


def tile_ends(views: Views) -> tuple[Array, Array]:
    """Which tiles hold anything [B M], and the sort keys of what closes them."""
    present = views.row_valid.any(-1)
    index = jnp.arange(present.shape[1], dtype=jnp.int32)
    return present, jnp.broadcast_to(index * KEY_BAND + KEY_BAND - 1, present.shape)


def gather_tokens(tokens: VisualTokens, selection: Selection) -> VisualTokens:
    """The selected tokens, in the selection's order."""
    return VisualTokens(
        take(tokens.features, selection),
        take_values(tokens.valid, selection, False),
        take(tokens.centre, selection),
        take_values(tokens.side, selection, 0.0),
        take_values(tokens.view, selection, 0),
        take_values(tokens.newline, selection, False),
    )
