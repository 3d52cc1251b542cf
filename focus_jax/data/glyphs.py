"""The embedded data set: procedural images of coloured glyphs with questions about them.

Every example is a function of (version, config, seed, index). Colours, numbers, shapes and places
are uniform draws, so the question alone says nothing about its answer.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from focus_jax.data.glyph_art import CARDS, DIGITS, GLYPHS, LETTERS, SHAPES, paint
from focus_jax.data.glyph_config import ABOVE_KINDS, HOPS, KINDS, GlyphsConfig
from focus_jax.data.glyph_scenes import Cell, Group, Scene, beside, make_scene, quadrant, stacked

# Raise it whenever an example changes for the same seed and index.
VERSION = "1.1.0"
EMPTY = "empty"

__all__ = [
    "HOPS",
    "KINDS",
    "VERSION",
    "CellWords",
    "GlyphsConfig",
    "cell_words",
    "make_example",
    "split_seed",
    "vocabulary",
]


class CellWords(NamedTuple):
    """Words of a cell's labels; `colour` and `glyph` are indexed by label, so 0 is "empty"."""

    colour: tuple[str, ...]
    glyph: tuple[str, ...]
    place: tuple[str, ...]
    card: tuple[str, ...] = ()


class Candidate(NamedTuple):
    """A question that a scene can answer, and the cells (row, col) that it is about."""

    question: str
    answer: str
    cells: tuple[Cell, ...]


def make_example(config: GlyphsConfig, seed: int, index: int) -> dict[str, Any]:
    """One image with its questions and labels.

    Returns image uint8 [S, S, 3]; questions, a list of {question, answer, kind, hops, cells}, where
    cells are the numbers of those that the question is about, over all hops;
    glyph, colour and card uint8 [N] (0 = empty, else 1 + index in `cell_words`); index.
    """
    rng = np.random.default_rng((seed, index))
    scene = make_scene(config, rng)
    questions = _ask(config, scene, rng)
    if config.clutter:
        _add_clutter(config, scene, rng)
    image = paint(
        rng, scene.glyph, scene.colour, config.colours, config.cell, config.jitter, config.light,
        scene.card,
    )  # fmt: skip
    return {
        "index": index,
        "image": image,
        "questions": questions,
        "glyph": scene.glyph.reshape(-1),
        "colour": scene.colour.reshape(-1),
        "card": scene.card.reshape(-1),
    }


def _add_clutter(config: GlyphsConfig, scene: Scene, rng: np.random.Generator) -> None:
    """Fill a share of the empty cells with any of the glyphs that scenes use, in any colour."""
    names = [*DIGITS, *SHAPES, *(LETTERS if config.letters or config.tally else ())]
    codes = np.array([1 + GLYPHS.index(name) for name in names], np.uint8)
    shape = scene.glyph.shape
    chosen = (scene.glyph == 0) & (rng.random(shape) < config.clutter)
    scene.glyph[chosen] = rng.choice(codes, shape)[chosen]
    scene.colour[chosen] = rng.integers(1, len(config.colours) + 1, shape)[chosen]
    if config.cards:  # as often as not
        tint = rng.integers(1, 2 * len(CARDS) + 1, shape)
        scene.card[chosen] = np.where(tint <= len(CARDS), tint, 0)[chosen]


def split_seed(seed: int, split: str) -> int:
    """The seed of one split (63 bits): splits of one data seed never share a stream."""
    digest = hashlib.sha256(f"glyphs/{VERSION}/{seed}/{split}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def cell_words(config: GlyphsConfig) -> CellWords:
    """Words that describe a cell: its colour, its glyph, and the quarter it lies in."""
    return CellWords(
        colour=(EMPTY, *config.colours),
        glyph=(EMPTY, *GLYPHS),
        place=tuple(quadrant(divmod(n, config.grid), config.grid) for n in range(config.grid**2)),
        card=(EMPTY, *CARDS) if config.cards else (),
    )


def vocabulary(config: GlyphsConfig) -> tuple[str, ...]:
    """All words that questions, answers and cells can hold, in a fixed order."""
    plain = (
        "what number is shape colour the where matches matching above letter"
        " how many letters are left of"
    )
    return tuple(dict.fromkeys([*plain.split(), *(w for ws in cell_words(config) for w in ws)]))


def _ask(config: GlyphsConfig, scene: Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Questions in random order of kinds, each kind once before any comes again."""
    kinds = config.asked_kinds
    left = {kind: _candidates(kind, scene, config.grid) for kind in kinds}
    asked: list[dict[str, Any]] = []
    while len(asked) < config.questions:
        for place in rng.permutation(len(kinds)).tolist():
            kind = kinds[place]
            if not left[kind] or len(asked) == config.questions:
                continue
            question, answer, at = left[kind].pop(int(rng.integers(len(left[kind]))))
            cells = tuple(row * config.grid + col for row, col in at)
            asked.append(
                {
                    "question": question, "answer": answer, "kind": kind, "hops": HOPS[kind],
                    "cells": cells,
                }
            )  # fmt: skip
    return asked


def _candidates(kind: str, scene: Scene, grid: int) -> list[Candidate]:
    """Every question of one kind about a scene."""
    if kind == "count_of_colour":
        return [_count(group, scene) for group in scene.groups]
    if kind in _OF_PAIR:
        pairs = stacked(scene) if kind in ABOVE_KINDS else beside(scene)
        return [_OF_PAIR[kind](first, second, grid) for first, second in pairs]
    return [_OF_GROUP[kind](group, grid) for group in scene.groups]


def _count(group: Group, scene: Scene) -> Candidate:
    cells = tuple(cell for cell, colour, _ in scene.spare if colour == group.colour)
    return Candidate(f"how many letters are {group.colour}", str(len(cells)), cells)


# To match is to share the colour. Cells are those of every hop.
_OF_GROUP: dict[str, Callable[[Group, int], Candidate]] = {
    "digit_of_colour": lambda g, _: Candidate(
        f"what number is {g.colour}", g.number, g.number_cells
    ),
    "shape_of_colour": lambda g, _: Candidate(f"what shape is {g.colour}", g.shape, (g.shape_at,)),
    "colour_of_number": lambda g, _: Candidate(
        f"what colour is the {g.number}", g.colour, g.number_cells
    ),
    "colour_of_shape": lambda g, _: Candidate(
        f"what colour is the {g.shape}", g.colour, (g.shape_at,)
    ),
    "quadrant_of_shape": lambda g, n: Candidate(
        f"where is the {g.shape}", quadrant(g.shape_at, n), (g.shape_at,)
    ),
    "number_matching_shape": lambda g, _: Candidate(
        f"what number matches the {g.shape}", g.number, (g.shape_at, *g.number_cells)
    ),
    "shape_matching_number": lambda g, _: Candidate(
        f"what shape matches the {g.number}", g.shape, (g.shape_at, *g.number_cells)
    ),
    "quadrant_matching_shape": lambda g, n: Candidate(
        f"where is the number matching the {g.shape}",
        quadrant(g.number_at, n),
        (g.shape_at, *g.number_cells),
    ),
    "letter_of_colour": lambda g, _: Candidate(
        f"what letter is {g.colour}", g.letter, g.letter_cells
    ),
    "colour_of_letter": lambda g, _: Candidate(
        f"what colour is the {g.letter}", g.colour, g.letter_cells
    ),
    "letter_matching_shape": lambda g, _: Candidate(
        f"what letter matches the {g.shape}", g.letter, (g.shape_at, *g.letter_cells)
    ),
}

# (lower, upper) of stacked shapes; (right, left) where a number stands left of a shape.
_OF_PAIR: dict[str, Callable[[Group, Group, int], Candidate]] = {
    "shape_above_shape": lambda low, up, _: Candidate(
        f"what shape is above the {low.shape}", up.shape, (low.shape_at, up.shape_at)
    ),
    "colour_above_shape": lambda low, up, _: Candidate(
        f"what colour is above the {low.shape}", up.colour, (low.shape_at, up.shape_at)
    ),
    # Three hops: find the named shape, take the colour of what is above it, find its number.
    "number_above_shape": lambda low, up, _: Candidate(
        f"what number matches the shape above the {low.shape}",
        up.number,
        (low.shape_at, up.shape_at, *up.number_cells),
    ),
    "quadrant_above_shape": lambda low, up, n: Candidate(
        f"where is the number matching the shape above the {low.shape}",
        quadrant(up.number_at, n),
        (low.shape_at, up.shape_at, *up.number_cells),
    ),
    "number_left_of_shape": lambda right, left, _: Candidate(
        f"what number is left of the {right.shape}",
        left.number,
        (right.shape_at, *left.number_cells),
    ),
    "colour_left_of_shape": lambda right, left, _: Candidate(
        f"what colour is left of the {right.shape}",
        left.colour,
        (right.shape_at, *left.number_cells),
    ),
    "shape_matching_left": lambda right, left, _: Candidate(
        f"what shape matches the number left of the {right.shape}",
        left.shape,
        (right.shape_at, *left.number_cells, left.shape_at),
    ),
}
