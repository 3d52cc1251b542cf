"""What a glyph data set contains: sizes, question kinds, and the limits that keep it fair."""

from dataclasses import dataclass

from focus_jax.data.glyph_art import COLOURS, LETTERS, MIN_CELL, SHAPES

# Kinds of question and their hops. A kind's number in a record is its place in this table.
HOPS = {
    "digit_of_colour": 1,
    "shape_of_colour": 1,
    "colour_of_number": 1,
    "colour_of_shape": 1,
    "quadrant_of_shape": 1,
    "number_matching_shape": 2,
    "shape_matching_number": 2,
    "quadrant_matching_shape": 2,
    "number_above_shape": 3,
    "quadrant_above_shape": 3,
    "letter_of_colour": 1,
    "colour_of_letter": 1,
    "letter_matching_shape": 2,
    "count_of_colour": 1,
    "number_left_of_shape": 2,
    "shape_matching_left": 3,
    "colour_left_of_shape": 2,
    "shape_above_shape": 2,
    "colour_above_shape": 2,
}
KINDS = tuple(HOPS)
LEFT_KINDS = ("number_left_of_shape", "shape_matching_left", "colour_left_of_shape")
ABOVE_KINDS = (
    "number_above_shape", "quadrant_above_shape", "shape_above_shape", "colour_above_shape",
)  # fmt: skip
LETTER_KINDS = ("letter_of_colour", "colour_of_letter", "letter_matching_shape")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class GlyphsConfig:
    """Scenes of coloured glyphs on a grid, and the questions about them.

    An image is `grid` x `grid` cells of `cell` pixels. It shows `groups` colours out of the pool
    `colours`; each owns one number of `digits` digits, one shape and, with `letters`, one
    letter. `dense` is the share of objects placed beside another one. `clutter` fills that share
    of the empty cells with any glyphs, labelled but not asked about: the questions then have no
    single answer, so it serves the vision tower's training alone. Glyphs lie up to `jitter` bitmap
    pixels off their cell's centre; a share `light` of the grounds is light, the others dark.
    `max_hops` = 3 stacks shapes and asks about them. `beside` puts another colour's number to the
    left of every second shape and asks about it. `cards`: such pairs lie on a card, a ground of a
    tint of its own. `tally`: each colour has 0 to so many letters more, to be counted. `kinds` = ()
    means every kind that the other fields permit.
    """

    grid: int = 16
    cell: int = 8
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "cyan")
    groups: int = 5
    digits: int = 1
    letters: bool = False
    beside: bool = False
    cards: bool = False
    tally: int = 0
    dense: float = 0.0
    clutter: float = 0.0
    jitter: int = 1
    light: float = 0.5
    max_hops: int = 2
    questions: int = 8
    kinds: tuple[str, ...] = ()
    train: int = 12000
    validation: int = 512
    test: int = 640

    def __post_init__(self) -> None:
        self._check_canvas()
        self._check_groups()
        self._check_kinds()
        for split in SPLITS:
            _require(getattr(self, split) >= 1, f"{split}={getattr(self, split)}: give 1 or more")

    @property
    def image_size(self) -> int:
        """Side of the image in pixels."""
        return self.grid * self.cell

    @property
    def filled(self) -> int:
        """The most cells of an image that hold a glyph, clutter apart."""
        return self.groups * (self.digits + 1 + self.letters + self.tally)

    @property
    def most_cells(self) -> int:
        """The most cells that one question is about: three hops, or letters to be counted."""
        return max(2 + self.digits, self.tally)

    @property
    def permitted_kinds(self) -> tuple[str, ...]:
        """Kinds that the scene can answer, in the order of `KINDS`."""
        return tuple(
            kind
            for kind, hops in HOPS.items()
            if hops <= self.max_hops
            and (self.max_hops == 3 or kind not in ABOVE_KINDS)
            and (self.letters or kind not in LETTER_KINDS)
            and (self.beside or kind not in LEFT_KINDS)
            and (self.tally or kind != "count_of_colour")
        )

    @property
    def asked_kinds(self) -> tuple[str, ...]:
        """Kinds that this data set asks."""
        return self.kinds or self.permitted_kinds

    def size(self, split: str) -> int:
        """Number of images of a split."""
        _require(split in SPLITS, f"split={split!r}: choose one of {', '.join(SPLITS)}")
        return getattr(self, split)

    def _check_canvas(self) -> None:
        even = self.grid >= 4 and self.grid % 2 == 0
        _require(even, f"grid={self.grid}: quadrants need an even grid of 4 or more")
        _require(self.cell >= MIN_CELL, f"cell={self.cell}: glyphs need {MIN_CELL} pixels or more")
        _require(0.0 <= self.dense <= 1.0, f"dense={self.dense}: give a share from 0 to 1")
        _require(self.jitter in (0, 1), f"jitter={self.jitter}: give 0 or 1")
        _require(0.0 <= self.light <= 1.0, f"light={self.light}: give a share from 0 to 1")
        _require(0.0 <= self.clutter <= 1.0, f"clutter={self.clutter}: give a share from 0 to 1")

    def _check_groups(self) -> None:
        unknown = sorted(set(self.colours) - set(COLOURS))
        _require(not unknown, f"colours {unknown} are unknown: choose from {sorted(COLOURS)}")
        distinct = len(set(self.colours)) == len(self.colours)
        _require(distinct, f"colours={self.colours}: name each colour once")
        half = self.grid // 2
        _require(
            1 <= self.digits <= min(half, 6),
            f"digits={self.digits}: a number lies in one quadrant, so give 1 to {min(half, 6)}",
        )
        _require(
            not self.beside or self.digits < half,
            f"digits={self.digits}: with beside, a number and a shape lie in one quadrant, so give"
            f" less than {half}",
        )
        _require(
            not self.beside or self.groups >= 2,
            f"groups={self.groups}: beside puts another colour's number there, so give 2 or more",
        )
        _require(self.tally >= 0, f"tally={self.tally}: give 0 or more")
        _require(
            not (self.tally and self.letters),
            f"tally={self.tally} with letters: a colour's own letter would be one of those"
            " counted; choose one of the two",
        )
        most = min(len(self.colours), len(SHAPES), len(LETTERS) if self.letters else len(SHAPES))
        _require(
            1 <= self.groups <= most,
            f"groups={self.groups}: {len(self.colours)} colours permit 1 to {most}",
        )
        room = self.grid * self.grid // 4
        _require(
            self.filled <= room,
            f"{self.filled} glyphs on a grid of {self.grid}: at most {room} (a quarter of the"
            " cells); enlarge grid, or lower groups or digits",
        )

    def _capacity(self, kind: str) -> int:
        """Questions of one kind that every image has."""
        alone = self.groups // 2 if self.beside else self.groups
        if kind in ABOVE_KINDS:
            return alone // 2
        return self.groups - alone if kind in LEFT_KINDS else self.groups

    def _check_kinds(self) -> None:
        _require(self.max_hops in (1, 2, 3), f"max_hops={self.max_hops}: give 1, 2 or 3")
        wrong = [kind for kind in self.kinds if kind not in self.permitted_kinds]
        _require(
            not wrong,
            f"kinds {wrong} are not permitted here: choose from {self.permitted_kinds}"
            " (see max_hops, letters, beside and tally)",
        )
        _require(len(set(self.kinds)) == len(self.kinds), f"kinds={self.kinds}: name each once")
        capacity = sum(self._capacity(kind) for kind in self.asked_kinds)
        _require(
            1 <= self.questions <= capacity,
            f"questions={self.questions}: these kinds give 1 to {capacity} distinct questions"
            " per image",
        )
        above = [kind for kind in self.asked_kinds if kind in ABOVE_KINDS]
        least = 4 if self.beside else 2  # Half of them stand beside a number.
        _require(
            not above or self.groups >= least,
            f"groups={self.groups}: a shape above another one needs {least} or more"
            f"{' with beside' * self.beside}; raise groups, or leave out the kinds {above}",
        )


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(f"glyphs: {complaint}")
