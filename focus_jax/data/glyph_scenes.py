"""Where the glyphs of one image lie: groups of one colour, placed without overlap."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from focus_jax.data.glyph_art import CARDS, GLYPHS, LETTERS, SHAPES
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

    @property
    def number_cells(self) -> tuple[Cell, ...]:
        """The cells of its digits."""
        row, col = self.number_at
        return tuple((row, col + place) for place in range(len(self.number)))

    @property
    def letter_cells(self) -> tuple[Cell, ...]:
        """The cell of its letter, if it has one."""
        return () if self.letter_at is None else (self.letter_at,)


@dataclass(frozen=True)
class Scene:
    """The groups of an image and its labels per cell (0 = empty, else 1 + index)."""

    groups: tuple[Group, ...]
    glyph: UInt8[np.ndarray, "G G"]
    colour: UInt8[np.ndarray, "G G"]
    card: UInt8[np.ndarray, "G G"]
    spare: tuple[tuple[Cell, str, str], ...] = ()  # (cell, colour, letter) of what is counted


def make_scene(config: GlyphsConfig, rng: np.random.Generator) -> Scene:
    """Draw colours, numbers, shapes and places uniformly; none repeats within the scene."""
    n = config.groups
    colours = [config.colours[i] for i in rng.permutation(len(config.colours))[:n].tolist()]
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:n].tolist()]
    letters = [""] * n
    if config.letters:
        letters = [LETTERS[i] for i in rng.permutation(len(LETTERS))[:n].tolist()]
    numbers = _numbers(config, rng)
    board = _Board(config, rng)
    shape_at, number_at, letter_at = _places(config, rng, board)
    groups = tuple(
        Group(*parts)
        for parts in zip(
            colours, numbers, number_at, shapes, shape_at, letters, letter_at, strict=True
        )
    )
    spare = tuple(_spare(config, rng, board, colours))
    tints = rng.permutation(len(CARDS))[: len(board.cards)] if config.cards else ()
    return _label(config, groups, spare, dict(zip(tints, board.cards, strict=True)))


def quadrant(cell: Cell, grid: int) -> str:
    """The quarter of the image that a cell lies in, as one word."""
    row, col = cell
    return f"{'north' if row < grid // 2 else 'south'}{'west' if col < grid // 2 else 'east'}"


def stacked(scene: Scene) -> list[tuple[Group, Group]]:
    """Pairs (lower, upper): the upper group's shape lies directly above the lower one's shape.

    Where there are cards, only pairs that share one: what belongs together can be seen.
    """
    by_cell = {group.shape_at: group for group in scene.groups}
    pairs = []
    for lower in scene.groups:
        row, col = lower.shape_at
        upper = by_cell.get((row - 1, col))
        if upper is not None and _together(scene, lower.shape_at, upper.shape_at):
            pairs.append((lower, upper))
    return pairs


def beside(scene: Scene) -> list[tuple[Group, Group]]:
    """Pairs (right, left): the left group's number ends directly left of the right one's shape.

    Where there are cards, only pairs that share one.
    """
    ends = {(g.number_at[0], g.number_at[1] + len(g.number)): g for g in scene.groups}
    pairs = [(group, ends[group.shape_at]) for group in scene.groups if group.shape_at in ends]
    return [
        (right, left) for right, left in pairs if _together(scene, right.shape_at, left.number_at)
    ]


def _together(scene: Scene, a: Cell, b: Cell) -> bool:
    """Whether two cells share a card, or there are none."""
    return not scene.card.any() or scene.card[a] == scene.card[b] > 0


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
    config: GlyphsConfig, rng: np.random.Generator, board: "_Board"
) -> tuple[list[Cell], list[Cell], Sequence[Cell | None]]:
    """Cells of the shapes, the numbers and the letters, group by group.

    Groups come in random order, so pairing them in order is fair: the first shapes are stacked in
    pairs, and with `beside` the last half has another group's number on its left.
    """
    n, before = config.groups, config.digits
    alone = n // 2 if config.beside else n
    stacked = (alone - alone % 2) * (config.max_hops == 3)
    shape_at: list[Cell] = []
    number_at: list[Cell | None] = [None] * n
    for _ in range(stacked // 2):
        row, col = board.place(height=2, width=1, card=True)
        shape_at += [(row, col), (row + 1, col)]
    if config.beside:
        shift = int(rng.integers(1, n))
        pairs = [board.place(1, before + 1, card=True) for _ in range(n - alone)]
        for i, (row, col) in enumerate(pairs):
            number_at[(alone + i + shift) % n] = (row, col)
    numbers = [at or board.place(height=1, width=before) for at in number_at]
    shape_at += [board.place(1, 1) for _ in range(alone - stacked)]
    if config.beside:
        shape_at += [(row, col + before) for row, col in pairs]
    letter_at = [board.place(1, 1) if config.letters else None for _ in range(n)]
    return shape_at, numbers, letter_at


def _spare(
    config: GlyphsConfig, rng: np.random.Generator, board: "_Board", colours: Sequence[str]
) -> Iterator[tuple[Cell, str, str]]:
    """0 to `tally` letters more of each colour, at (cell, colour, letter): they may repeat."""
    for colour in colours if config.tally else ():
        for _ in range(int(rng.integers(0, config.tally + 1))):
            yield board.place(1, 1), colour, LETTERS[int(rng.integers(len(LETTERS)))]


class _Board:
    """Cells taken so far; objects stay within one quadrant, so "where" has one answer."""

    def __init__(self, config: GlyphsConfig, rng: np.random.Generator):
        self._grid = config.grid
        self._dense, self._cards = config.dense, config.cards
        self._rng = rng
        self._taken: dict[Cell, None] = {}
        self.cards: list[list[Cell]] = []

    def place(self, height: int, width: int, card: bool = False) -> Cell:
        """The first cell of a free place, which is taken; `card`: its cells lie on one card."""
        row, col = self._place(height, width)
        if card and self._cards:
            cells = [(row + i, col + j) for i in range(height) for j in range(width)]
            self.cards.append(cells)
        return row, col

    def _place(self, height: int, width: int) -> Cell:
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


def _label(
    config: GlyphsConfig,
    groups: tuple[Group, ...],
    spare: tuple[tuple[Cell, str, str], ...],
    cards: Mapping[int, Sequence[Cell]],
) -> Scene:
    glyph = np.zeros((config.grid, config.grid), np.uint8)
    colour = np.zeros((config.grid, config.grid), np.uint8)
    for group in groups:
        code = 1 + config.colours.index(group.colour)
        marks = list(zip(group.number_cells, group.number, strict=True))
        marks.append((group.shape_at, group.shape))
        marks += [(cell, group.letter) for cell in group.letter_cells]
        for cell, name in marks:
            glyph[cell] = _CODE[name]
            colour[cell] = code
    for cell, name, letter in spare:
        glyph[cell], colour[cell] = _CODE[letter], 1 + config.colours.index(name)
    card = np.zeros((config.grid, config.grid), np.uint8)
    for tint, cells in cards.items():
        for cell in cells:
            card[cell] = 1 + tint
    return Scene(groups, glyph, colour, card, spare)
