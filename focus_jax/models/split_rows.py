"""A stage's rows in two parts, text and visual: who stands where, and who sees whom."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from focus_jax.compress.select import Selection, pack, take_values
from focus_jax.compress.visual_compute import Layout
from focus_jax.models.attention import Rows, visible
from focus_jax.models.decoder import Rotary
from focus_jax.models.neighbours import Near, Places, arranged, neighbour_mask, places_of, scattered
from focus_jax.models.streams import Packed, Streams


class Split(NamedTuple):
    """The packed rows of a stage in two parts, and who sees whom.

    `text`, `visual`: the packed rows in the slots of either part; `back` the slot, text before
    visual, of each packed row. Masks are (row, key) for text on text, text on visual, and visual on
    text; visual rows see each other by `near`.
    """

    text: Selection
    visual: Selection
    back: Selection
    by_text: Rotary
    by_visual: Rotary
    text_text: Bool[Array, "B T T"]
    text_visual: Bool[Array, "B T N"]
    visual_text: Bool[Array, "B N T"]
    near: Near


def is_visual(packed: Packed, s: Streams) -> Bool[Array, "B S"]:
    """Valid visual rows among the packed ones, newlines left out."""
    return in_packed_order(s.visual_valid & ~s.newline, packed, s, False)


def in_packed_order(values: Array, packed: Packed, s: Streams, fill: Any) -> Array:
    """What visual slots hold, at their packed rows; `fill` at the others."""
    lead, behind = s.prefix.shape[1], packed.order.shape[1] - s.prefix.shape[1] - values.shape[1]
    pad = [(0, 0), (lead, behind)] + [(0, 0)] * (values.ndim - 2)
    whole = jnp.pad(values, pad, constant_values=fill)
    at = packed.order.reshape(*packed.order.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(whole, at, axis=1)


def places(packed: Packed, s: Streams) -> Places:
    """Where the packed rows lie in their images, if they do."""
    return places_of(in_packed_order(s.centre, packed, s, 0), in_packed_order(s.view, packed, s, 0))


def split_rows(packed: Packed, s: Streams, rows: Layout, by: Rotary) -> Split:
    """Part the packed rows; visual ones come in the order of their blocks where these are full."""
    size = packed.order.shape[1]
    seen = is_visual(packed, s)
    valid = jnp.arange(size) < packed.rows.length[:, None]
    text, _ = pack(valid & ~seen, size - s.visual.shape[1] + rows.newlines)
    visual, _ = pack(seen, rows.visual)
    lie = jax.tree.map(partial(pick, selection=visual), places(packed, s))
    visual, near = arranged(visual, lie, rows)
    t = text.index.shape[1]
    both = [jnp.concatenate(pair, axis=1) for pair in zip(text, visual, strict=True)]
    slots = jnp.broadcast_to(jnp.arange(both[0].shape[1], dtype=jnp.int32), both[0].shape)
    back = scattered(both[0], slots, both[1], size)
    by_text, by_visual = (Rotary(*(pick(a, part) for a in by)) for part in (text, visual))
    mine = Rows(text.valid.sum(-1), None)
    if packed.rows.segment is not None:
        mine = mine._replace(segment=take_values(packed.rows.segment, text, 0))
    before = visual.index[:, None] < text.index[:, :, None]
    return Split(
        text, visual, Selection(jnp.maximum(back, 0), back >= 0), by_text, by_visual,
        text_text=visible(mine, t),
        text_visual=before & visual.valid[:, None],
        visual_text=~before.swapaxes(1, 2) & text.valid[:, None],
        near=near,
    )  # fmt: skip


def pick(values: Array, selection: Selection) -> Array:
    """Rows of `values` [B S ...] at the selected slots, whatever stands at empty ones."""
    at = selection.index.reshape(*selection.index.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, at, axis=1)


def masked_rows(packed: Packed, s: Streams, rows: Layout) -> Bool[Array, "B S S"]:
    """Who sees whom: as ever, but visual rows their neighbours on both sides."""
    mask = jnp.broadcast_to(
        visible(packed.rows, packed.order.shape[1]), (*packed.order.shape, packed.order.shape[1])
    )
    if rows.causal:
        return mask
    seen = is_visual(packed, s)
    both = seen[:, :, None] & seen[:, None]
    return jnp.where(both, neighbour_mask(places(packed, s), rows), mask)
