"""Rows drawn for a look: their images, and their text in pieces that say what each is for."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from focus_jax.data.conversation import (
    IMAGE,
    EncodedDialogue,
    Rendered,
    Template,
    encode_dialogue,
    render_dialogue,
)
from focus_jax.data.dialogue import DialogueSource, Exchange
from focus_jax.data.image_store import MissingImage
from focus_jax.data.images import CorruptImage, to_rgb

State = Literal["learnt", "asked", "neither", "image", "dropped"]


class Piece(NamedTuple):
    """Text of one token, or of an image's place."""

    text: str
    state: State


class Panel(NamedTuple):
    """A row, by its number. `broken`: why its images cannot be read; `title` tells it too."""

    row: int
    title: str
    images: tuple[Image.Image, ...]
    pieces: tuple[Piece, ...]
    broken: str = ""


def sample_panels(
    source: DialogueSource,
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
    max_length: int,
) -> list[Panel]:
    """Rows as panels, their text cut at `max_length` tokens (see `coloured`)."""
    panels = []
    for index in rows:
        name, broken = "", ""
        photos: tuple[Image.Image, ...] = ()
        try:
            example = source[index]
            photos = tuple(to_rgb(i, exif=False, transparency="drop") for i in example.images)
            name, turns = example.id, example.turns
        except (CorruptImage, MissingImage) as error:
            broken, turns = str(error), source.texts(index)
        images = int(source.sizes[index, 0])
        pieces, told = coloured(turns, images, tokenizer, template, max_length)
        seen = " ".join(f"{photo.width}x{photo.height}" for photo in photos) or "text alone"
        seen = f"no image shown: {broken}" if broken else seen
        title = "   ".join(filter(None, (f"row {index}", name, seen, told)))
        panels.append(Panel(index, title, photos, pieces, broken))
    return panels


def varied(images: np.ndarray, wanted: int, seed: int) -> list[int]:
    """So many places in `images` [N] at random, in turn from those of one, none and several."""
    rng = np.random.default_rng(seed)
    kinds = [np.flatnonzero(np.minimum(images, 2) == kind) for kind in (1, 0, 2)]
    shuffled = [rng.permutation(kind).tolist() for kind in kinds]
    out: list[int] = []
    while len(out) < min(wanted, len(images)):
        for kind in shuffled:
            if kind and len(out) < wanted:
                out.append(kind.pop())
    return out


def coloured(
    turns: Sequence[Exchange],
    images: int,
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
    max_length: int,
) -> tuple[tuple[Piece, ...], str]:
    """A dialogue in pieces, and its counts in words. Without a tokenizer the pieces are spans."""
    rendered = render_dialogue(template, turns, images)
    if tokenizer is None:
        return spans_of(rendered), f"{len(rendered.text)} characters"
    try:
        encoded = encode_dialogue(tokenizer, template, turns, images, max_length)
    except ValueError as error:
        return spans_of(rendered), str(error)
    cut = f", cut at {max_length}" if encoded.cut else ""
    told = f"{len(encoded.ids)} tokens, {int(encoded.label_mask.sum())} learnt{cut}"
    return pieces_of(tokenizer, rendered, encoded), told


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, rendered: Rendered, encoded: EncodedDialogue
) -> tuple[Piece, ...]:
    """The text behind each token, and places of images, in order; cut as the tokens are.

    A character of several tokens stands with the first. White space that the tokenizer drops is
    "dropped"; what it adds (BOS) has the token's name.
    """
    names = tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
    text, shown = rendered.text, 0
    out: list[Piece] = []
    places = list(zip(encoded.image_at, rendered.markers, strict=False))
    for number, (start, end) in enumerate(encoded.spans.tolist()):
        while places and places[0][0] == number:
            marker = places.pop(0)[1]
            out += [Piece(text[shown:marker], "dropped"), Piece(IMAGE, "image")]
            shown = marker + len(IMAGE)
        if start == end:
            out.append(Piece(names[number], "neither"))
            continue
        learnt, asked = encoded.label_mask[number], encoded.query_mask[number]
        state: State = "learnt" if learnt else "asked" if asked else "neither"
        out += [Piece(text[shown:start], "dropped"), Piece(text[max(shown, start) : end], state)]
        shown = max(shown, end)
    out += [Piece(IMAGE, "image") for _ in places]
    return tuple(piece for piece in out if piece.text)


def spans_of(rendered: Rendered) -> tuple[Piece, ...]:
    """A text in pieces of one meaning each, by its characters."""
    states: list[State] = ["neither"] * len(rendered.text)
    markers = [(at, at + len(IMAGE)) for at in rendered.markers]
    meant: tuple[tuple[State, Sequence[tuple[int, int]]], ...] = (
        ("learnt", rendered.answer_spans), ("asked", rendered.instruction_spans),
        ("image", markers),
    )  # fmt: skip
    for state, spans in meant:
        for start, end in spans:
            states[start:end] = [state] * (end - start)
    edges = [0, *(i for i in range(1, len(states)) if states[i] != states[i - 1]), len(states)]
    return tuple(Piece(rendered.text[a:b], states[a]) for a, b in pairwise(edges) if a < b)
