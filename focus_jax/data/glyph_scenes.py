"""Where the glyphs of one image lie: groups of one colour, placed without overlap."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from focus_jax.data.glyph_art import GLYPHS, LETTERS, SHAPES
from focus_jax.data.glyph_config import GlyphsConfig

Cell = tuple[int, int]
_CODE = {glyph: 1 + index for index, glyph in enumerate(GLYPHS)}
_NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))
# A quarter of the cells is the most that a scene fills, so a free place turns up soon.
_TRIES = 10_000
_DENSE_TRIES = 32


@dataclass(frozen=True)
class Group:
    """What one colour owns, and the cell (row, col) of each; a number's cell is its first."""

    colour: str
    number: str
    number_at: Cell
    shape: str
    shape_at: Cell
    letter: str = ""
    letter_at: Cell | None = None


@dataclass(frozen=True)
class Scene:
    """The groups of an image and its labels per cell (0 = empty, else 1 + index)."""

    groups: tuple[Group, ...]
    glyph: UInt8[np.ndarray, "G G"]
    colour: UInt8[np.ndarray, "G G"]


def make_scene(config: GlyphsConfig, rng: np.random.Generator) -> Scene:
    """Draw colours, numbers, shapes and places uniformly; none repeats within the scene."""
    n = config.groups
    colours = [config.colours[i] for i in rng.permutation(len(config.colours))[:n].tolist()]
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:n].tolist()]
    letters = [""] * n
    if config.letters:
        letters = [LETTERS[i] for i in rng.permutation(len(LETTERS))[:n].tolist()]
    numbers = _numbers(config, rng)
    shape_at, number_at, letter_at = _places(config, rng)
    groups = tuple(
        Group(*parts)
        for parts in zip(
            colours, numbers, number_at, shapes, shape_at, letters, letter_at, strict=True
        )
    )
    return _label(config, groups)


def quadrant(cell: Cell, grid: int) -> str:
    """The quarter of the image that a cell lies in, as one word."""
    row, col = cell
    return f"{'north' if row < grid // 2 else 'south'}{'west' if col < grid // 2 else 'east'}"


def stacked(scene: Scene) -> list[tuple[Group, Group]]:
    """Pairs (lower, upper): the upper group's shape lies directly above the lower one's shape."""
    by_cell = {group.shape_at: group for group in scene.groups}
    pairs = []
    for lower in scene.groups:
        row, col = lower.shape_at
        upper = by_cell.get((row - 1, col))
        if upper is not None:
            pairs.append((lower, upper))
    return pairs


def _numbers(config: GlyphsConfig, rng: np.random.Generator) -> list[str]:
    low = 0 if config.digits == 1 else 10 ** (config.digits - 1)
    high = 10**config.digits
    if high <= 100:
        return [str(low + i) for i in rng.permutation(high - low)[: config.groups].tolist()]
    drawn: dict[int, None] = {}
    while len(drawn) < config.groups:
        drawn[int(rng.integers(low, high))] = None
    return [str(number) for number in drawn]


def _places(
    config: GlyphsConfig, rng: np.random.Generator
) -> tuple[list[Cell], list[Cell], Sequence[Cell | None]]:
    """Cells of the shapes, the numbers and the letters, group by group."""
    board = _Board(config, rng)
    n = config.groups
    shape_at: list[Cell] = []
    if config.max_hops == 3:
        # Groups come in random order, so pairing them in order is fair.
        for _ in range(n // 2):
            row, col = board.place(height=2, width=1)
            shape_at += [(row, col), (row + 1, col)]
    number_at = [board.place(height=1, width=config.digits) for _ in range(n)]
    shape_at += [board.place(1, 1) for _ in range(n - len(shape_at))]
    letter_at = [board.place(1, 1) if config.letters else None for _ in range(n)]
    return shape_at, number_at, letter_at


class _Board:
    """Cells taken so far; objects stay within one quadrant, so "where" has one answer."""

    def __init__(self, config: GlyphsConfig, rng: np.random.Generator):
        self._grid = config.grid
        self._dense = config.dense
        self._rng = rng
        self._taken: dict[Cell, None] = {}

    def place(self, height: int, width: int) -> Cell:
        if self._dense and self._taken and self._rng.random() < self._dense:
            cell = self._beside(height, width)
            if cell is not None:
                return cell
        half = self._grid // 2
        rows, cols = half - height + 1, half - width + 1
        for _ in range(_TRIES):
            draw = int(self._rng.integers(4 * rows * cols))
            quarter, draw = divmod(draw, rows * cols)
            row, col = divmod(draw, cols)
            cell = (row + half * (quarter // 2), col + half * (quarter % 2))
            if self._take(cell, height, width):
                return cell
        raise ValueError(
            f"glyphs: no room for an object of {height} x {width} cells on a grid of"
            f" {self._grid}; enlarge grid or lower groups"
        )

    def _beside(self, height: int, width: int) -> Cell | None:
        taken = list(self._taken)
        for _ in range(_DENSE_TRIES):
            row, col = taken[int(self._rng.integers(len(taken)))]
            down, right = _NEIGHBOURS[int(self._rng.integers(len(_NEIGHBOURS)))]
            if self._take((row + down, col + right), height, width):
                return row + down, col + right
        return None

    def _take(self, cell: Cell, height: int, width: int) -> bool:
        top, left = cell
        bottom, right = top + height - 1, left + width - 1
        if min(top, left) < 0 or max(bottom, right) >= self._grid:
            return False
        half = self._grid // 2
        if top // half != bottom // half or left // half != right // half:
            return False
        cells = [(r, c) for r in range(top, bottom + 1) for c in range(left, right + 1)]
        if any(c in self._taken for c in cells):
            return False
        self._taken.update(dict.fromkeys(cells))
        return True


def _label(config: GlyphsConfig, groups: tuple[Group, ...]) -> Scene:
    glyph = np.zeros((config.grid, config.grid), np.uint8)
    colour = np.zeros((config.grid, config.grid), np.uint8)
    for group in groups:
        code = 1 + config.colours.index(group.colour)
        row, col = group.number_at
        marks = [((row, col + place), digit) for place, digit in enumerate(group.number)]
        marks.append((group.shape_at, group.shape))
        if group.letter_at is not None:
            marks.append((group.letter_at, group.letter))
        for cell, name in marks:
            glyph[cell] = _CODE[name]
            colour[cell] = code
    return Scene(groups, glyph, colour)
