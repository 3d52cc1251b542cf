"""Text and visual tokens as two streams, packed into one row sequence for a decoder stage."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.method import Kept, Merged
from focus_jax.compress.select import Selection, permute, take, take_values
from focus_jax.models.attention import Rows


class Streams(NamedTuple):
    """What flows between stages: a shared prefix, the visual tokens, Q questions behind them.

    Everything carries validity and rotary positions. `slot` is the index of a visual token among
    those that entered the decoder; `entered` how many valid ones did. `after`: how many of the
    question's tokens stand before a visual token (0: the image is in front). `centre` (row, col in
    patches), `view` (image and tile) and `newline` tell where it lies in its image.
    `instruction` marks the user's own words, `prompt` what is not supervised, `last` the prompt's
    last token, `starts` the token before each supervised span, `raters` the rows that judge.
    """

    prefix: Float[Array, "B P D"]
    prefix_valid: Bool[Array, "B P"]
    prefix_position: Int[Array, "B P"]
    visual: Float[Array, "B V D"]
    visual_valid: Bool[Array, "B V"]
    visual_position: Int[Array, "B V"]
    slot: Int[Array, "B V"]
    after: Int[Array, "B V"]
    centre: Float[Array, "B V 2"]
    view: Int[Array, "B V"]
    newline: Bool[Array, "B V"]
    token: Float[Array, "B Q T D"]
    token_valid: Bool[Array, "B Q T"]
    token_position: Int[Array, "B Q T"]
    instruction: Bool[Array, "B Q T"]
    prompt: Bool[Array, "B Q T"]
    last: Bool[Array, "B Q T"]
    starts: Bool[Array, "B Q T"]
    raters: Bool[Array, "B Q T"]
    entered: Int[Array, " B"]


class Packed(NamedTuple):
    """One stage's rows: valid ones first, by question, then by position; `order` undoes it."""

    hidden: Float[Array, "B S D"]
    position: Int[Array, "B S"]
    rows: Rows
    order: Int[Array, "B S"]


SEGMENT = 1 << 20  # more than any position; 2**10 questions fit an int32


def renumber(s: Streams) -> Streams:
    """Contiguous positions: prefix, then each question on its own with the images in their places.

    Visual tokens stand in the order of their places; with several questions all are in front.
    """

    def rank(valid: Array) -> Array:
        return jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1

    before = s.prefix_valid.sum(-1, dtype=jnp.int32)
    texts = jnp.cumsum(jnp.pad(s.token_valid[:, 0], [(0, 0), (1, 0)]), axis=-1, dtype=jnp.int32)
    index = jnp.arange(s.token_valid.shape[-1])
    seen = (s.after[:, None] <= index[:, None]) & s.visual_valid[:, None]
    seen = seen.sum(-1, dtype=jnp.int32)  # [B T]: visual tokens before a text token
    return s._replace(
        prefix_position=rank(s.prefix_valid),
        visual_position=before[:, None]
        + rank(s.visual_valid)
        + jnp.take_along_axis(texts, s.after, axis=1),
        token_position=before[:, None, None] + seen[:, None] + rank(s.token_valid),
    )


def spread(s: Streams, places: Int[Array, "B V"]) -> Streams:
    """Visual tokens at given places behind the prefix; the questions follow the last of them.

    For images in front of the questions.
    """
    before = s.prefix_valid.sum(-1, dtype=jnp.int32)
    last = jnp.where(s.visual_valid, places, -1).max(-1)
    shift = last + 1 - s.visual_valid.sum(-1, dtype=jnp.int32)
    return s._replace(
        visual_position=before[:, None] + places,
        token_position=s.token_position + shift[:, None, None],
    )


def pack(s: Streams) -> Packed:
    """Sort all rows by (valid, question, position); padding goes behind."""
    b, q, t = s.token_valid.shape
    first = int(q > 1)  # a question alone shares a segment with the image: they may interleave
    segment = jnp.concatenate(
        [
            jnp.zeros((s.prefix.shape[1] + s.visual.shape[1],), jnp.int32),
            jnp.repeat(jnp.arange(first, q + first, dtype=jnp.int32), t),
        ]
    )
    join = lambda a, b_, c: jnp.concatenate([a, b_, c.reshape(b, q * t, *c.shape[3:])], 1)  # noqa: E731
    hidden = join(s.prefix, s.visual, s.token)
    valid = join(s.prefix_valid, s.visual_valid, s.token_valid)
    position = join(s.prefix_position, s.visual_position, s.token_position)
    key = jnp.where(valid, segment * SEGMENT + position, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(key, axis=1, stable=True)
    sort = lambda a: jnp.take_along_axis(a, order, axis=1)  # noqa: E731
    segments = sort(jnp.broadcast_to(segment, (b, segment.size))) if q > 1 else None
    rows = Rows(valid.sum(-1, dtype=jnp.int32), segments)
    return Packed(permute(hidden, order), sort(position), rows, order)


def unpack(s: Streams, packed: Packed, hidden: Float[Array, "B S D"]) -> Streams:
    """The streams again, with the hidden rows that a stage made."""
    inverse = jnp.argsort(packed.order, axis=1)
    rows = permute(hidden, inverse)
    p, v = s.prefix.shape[1], s.visual.shape[1]
    return s._replace(
        prefix=rows[:, :p],
        visual=rows[:, p : p + v],
        token=rows[:, p + v :].reshape(s.token.shape),
    )


def select_visual(s: Streams, kept: Kept) -> Streams:
    """Keep the selected visual tokens [B 1 k], or [B Q k]: then each question becomes a sample."""
    if kept.selection.index.shape[1] > 1:
        s = fold(s)
    flat = Selection(*(a.reshape(len(s.visual), a.shape[-1]) for a in kept.selection))
    if not flat.index.shape[-1] and kept.merged is None:
        return withdraw_visual(s)
    s = s._replace(
        visual=take(s.visual, flat),
        visual_valid=take_values(s.visual_valid, flat, False),
        visual_position=take_values(s.visual_position, flat, 0),
        slot=take_values(s.slot, flat, 0),
        after=take_values(s.after, flat, 0),
        centre=take(s.centre, flat),
        view=take_values(s.view, flat, 0),
        newline=take_values(s.newline, flat, False),
    )
    return s if kept.merged is None else add_merged(s, kept.merged)


VISUAL = (
    "visual", "visual_valid", "visual_position", "slot", "after", "centre", "view", "newline",
)  # fmt: skip


def withdraw_visual(s: Streams) -> Streams:
    """No visual tokens any more; the others stay as they are."""
    return s._replace(**{name: getattr(s, name)[:, :0] for name in VISUAL})


def add_merged(s: Streams, merged: Merged) -> Streams:
    """New visual tokens behind the others: in the place and the view of the last one, at the mean
    of their centres. They need new positions."""
    features = merged.features.reshape(-1, *merged.features.shape[2:])
    valid = merged.valid.reshape(features.shape[:2])
    spread = lambda a: jnp.broadcast_to(a[:, None], (*valid.shape, *a.shape[1:]))  # noqa: E731
    last = lambda a: jnp.where(s.visual_valid, a, 0).max(-1)  # noqa: E731
    count = jnp.maximum(s.visual_valid.sum(-1, keepdims=True), 1)
    centre = jnp.where(s.visual_valid[..., None], s.centre, 0).sum(1) / count
    new = {
        "visual": features.astype(s.visual.dtype), "visual_valid": valid,
        "visual_position": jnp.zeros(valid.shape, s.visual_position.dtype),
        "slot": spread(last(s.slot)), "after": spread(last(s.after)), "centre": spread(centre),
        "view": spread(last(s.view)), "newline": jnp.zeros(valid.shape, bool),
    }  # fmt: skip
    return s._replace(
        **{name: jnp.concatenate([getattr(s, name), a], axis=1) for name, a in new.items()}
    )


def fold(s: Streams) -> Streams:
    """Questions that shared an image become samples of their own: [B Q T] -> [B*Q 1 T]."""
    b, q = s.token_valid.shape[:2]

    def repeat(a: Array) -> Array:
        return jnp.broadcast_to(a[:, None], (b, q, *a.shape[1:])).reshape(b * q, *a.shape[1:])

    question = {
        "token", "token_valid", "token_position", "instruction", "prompt", "last", "starts",
        "raters",
    }  # fmt: skip
    return Streams(
        **{
            name: a.reshape(b * q, 1, *a.shape[2:]) if name in question else repeat(a)
            for name, a in s._asdict().items()
        }
    )


def last_of_prompt(
    valid: Bool[Array, "B Q T"], label: Bool[Array, "B Q T"]
) -> Bool[Array, "B Q T"]:
    """Marks the token before the last supervised span; without one, the last valid token."""
    starts = label & ~jnp.pad(label, [(0, 0), (0, 0), (1, 0)])[..., :-1]
    index = jnp.arange(valid.shape[-1])
    start = jnp.where(starts, index, -1).max(-1)
    end = jnp.where(start > 0, start - 1, jnp.where(valid, index, -1).max(-1))
    return index == end[..., None]


def before_spans(valid: Bool[Array, "B Q T"], label: Bool[Array, "B Q T"]) -> Bool[Array, "B Q T"]:
    """Marks the token before each supervised span; without one, the last valid token."""
    following = jnp.pad(label, [(0, 0), (0, 0), (0, 1)])[..., 1:]
    before = following & ~label & valid
    return jnp.where(before.any(-1, keepdims=True), before, last_of_prompt(valid, label))


def row_at(x: Float[Array, "B T D"], mark: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The marked row of each sample."""
    at = jnp.argmax(mark, axis=-1)
    return jax.vmap(lambda rows, i: jax.lax.dynamic_index_in_dim(rows, i, 0, False))(x, at)
