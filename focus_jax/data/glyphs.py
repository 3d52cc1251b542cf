"""The embedded data set: procedural images of coloured glyphs with questions about them.

Every example is a function of (version, config, seed, index). Colours, numbers, shapes and places
are uniform draws, so the question alone says nothing about its answer.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from focus_jax.data.glyph_art import DIGITS, GLYPHS, LETTERS, SHAPES, paint
from focus_jax.data.glyph_config import HOPS, KINDS, GlyphsConfig
from focus_jax.data.glyph_scenes import Group, Scene, make_scene, quadrant, stacked

# Raise it whenever an example changes for the same seed and index.
VERSION = "1.0.0"
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


def make_example(config: GlyphsConfig, seed: int, index: int) -> dict[str, Any]:
    """One image with its questions and labels.

    Returns image uint8 [S, S, 3]; questions, a list of {question, answer, kind, hops};
    glyph and colour uint8 [N] (0 = empty, else 1 + index in `cell_words`); index.
    """
    rng = np.random.default_rng((seed, index))
    scene = make_scene(config, rng)
    questions = _ask(config, scene, rng)
    if config.clutter:
        _add_clutter(config, scene, rng)
    return {
        "index": index,
        "image": paint(
            rng, scene.glyph, scene.colour, config.colours, config.cell, config.jitter, config.light
        ),
        "questions": questions,
        "glyph": scene.glyph.reshape(-1),
        "colour": scene.colour.reshape(-1),
    }


def _add_clutter(config: GlyphsConfig, scene: Scene, rng: np.random.Generator) -> None:
    """Fill a share of the empty cells with any of the glyphs that scenes use, in any colour."""
    names = [*DIGITS, *SHAPES, *(LETTERS if config.letters else ())]
    codes = np.array([1 + GLYPHS.index(name) for name in names], np.uint8)
    shape = scene.glyph.shape
    chosen = (scene.glyph == 0) & (rng.random(shape) < config.clutter)
    scene.glyph[chosen] = rng.choice(codes, shape)[chosen]
    scene.colour[chosen] = rng.integers(1, len(config.colours) + 1, shape)[chosen]


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
    )


def vocabulary(config: GlyphsConfig) -> tuple[str, ...]:
    """All words that questions, answers and cells can hold, in a fixed order."""
    plain = "what number is shape colour the where matches matching above letter"
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
            question, answer = left[kind].pop(int(rng.integers(len(left[kind]))))
            asked.append({"question": question, "answer": answer, "kind": kind, "hops": HOPS[kind]})
    return asked


def _candidates(kind: str, scene: Scene, grid: int) -> list[tuple[str, str]]:
    """Every (question, answer) of one kind in a scene."""
    if kind in _ABOVE:
        return [_ABOVE[kind](lower, upper, grid) for lower, upper in stacked(scene)]
    return [_OF_GROUP[kind](group, grid) for group in scene.groups]


# To match is to share the colour.
_OF_GROUP: dict[str, Callable[[Group, int], tuple[str, str]]] = {
    "digit_of_colour": lambda g, _: (f"what number is {g.colour}", g.number),
    "shape_of_colour": lambda g, _: (f"what shape is {g.colour}", g.shape),
    "colour_of_number": lambda g, _: (f"what colour is the {g.number}", g.colour),
    "colour_of_shape": lambda g, _: (f"what colour is the {g.shape}", g.colour),
    "quadrant_of_shape": lambda g, n: (f"where is the {g.shape}", quadrant(g.shape_at, n)),
    "number_matching_shape": lambda g, _: (
        f"what number matches the {g.shape}",
        g.number,
    ),
    "shape_matching_number": lambda g, _: (
        f"what shape matches the {g.number}",
        g.shape,
    ),
    "quadrant_matching_shape": lambda g, n: (
        f"where is the number matching the {g.shape}",
        quadrant(g.number_at, n),
    ),
    "letter_of_colour": lambda g, _: (f"what letter is {g.colour}", g.letter),
    "colour_of_letter": lambda g, _: (f"what colour is the {g.letter}", g.colour),
    "letter_matching_shape": lambda g, _: (
        f"what letter matches the {g.shape}",
        g.letter,
    ),
}

# Three hops: find the named shape, take the colour of the shape above it, find its number.
_ABOVE: dict[str, Callable[[Group, Group, int], tuple[str, str]]] = {
    "number_above_shape": lambda low, up, _: (
        f"what number matches the shape above the {low.shape}",
        up.number,
    ),
    "quadrant_above_shape": lambda low, up, n: (
        f"where is the number matching the shape above the {low.shape}",
        quadrant(up.number_at, n),
    ),
}
