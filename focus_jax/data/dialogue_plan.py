"""Which dialogues share a batch: few static shapes, little padding, every one once an epoch.

A shape is a number of images, of views of each, and of tokens. Rows of one shape come together by
groups, one group an optimiser step. A shape with fewer rows than a group is not made: its rows go
to the cheapest larger one, and so does what is left of a shape at the end of an epoch. What is left
of the largest is filled up with the first rows of the next epoch, which then has fewer: so an epoch
may end inside a group, each holds every row once, and groups are a function of (seed, number)
alone. Rows of text alone stand by themselves but for what is left of them.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from focus_jax.data.preprocess import ImageConfig, layout_of

# Purposes of random draws: each has its own stream for a seed.
_ORDER, _GROUPS, _SUBSTITUTE = range(3)
# Threads read ahead over the end of an epoch, so several orders are in use.
_EPOCHS = 4
# Fills the last group of the last epoch.
NOBODY = -1


class Shape(NamedTuple):
    """Images of a row, views of each (0 and 0: text alone), tokens."""

    images: int
    tiles: int
    text: int

    def covers(self, other: "Shape") -> bool:
        """Whether a row of the other shape fits in."""
        return all(a >= b for a, b in zip(self, other, strict=True))


class Group(NamedTuple):
    """The rows of one optimiser step, by their numbers; `NOBODY` where there is none."""

    shape: Shape
    rows: Int[np.ndarray, " G"]
    epoch: int


class Padding(NamedTuple):
    """Shares of an epoch's tokens and views that are padding."""

    text: float
    tiles: float


def needs_of(
    sizes: Int[np.ndarray, "N 3"],
    lengths: Int[np.ndarray, " N"],
    buckets: Sequence[int],
    images: ImageConfig,
) -> Int[np.ndarray, "N 3"]:
    """The smallest shape of each row, as (images, tiles, text); `sizes` of a `DialogueSource`.

    Text longer than the last bucket will be cut. Of several images only the largest one's size is
    known, so each has room for the most views that there are.
    """
    counts, photos = sizes[:, 0], sizes[:, 1:]
    text = np.array(buckets)[np.minimum(np.searchsorted(buckets, lengths), len(buckets) - 1)]
    found, inverse = np.unique(photos[counts == 1], axis=0, return_inverse=True)
    tiles = np.where(counts > 1, most_tiles(images), 0)
    tiles[counts == 1] = np.array([tiles_of(size, images) for size in found.tolist()], int)[
        inverse.ravel()
    ]
    return np.stack([counts, tiles, text], axis=1).astype(np.int64)


def tiles_of(size: Sequence[int], images: ImageConfig) -> int:
    """Views of a photo of (width, height) pixels, thumbnail included."""
    rows, cols = layout_of((size[0], size[1]), images).grid
    return rows * cols + (images.layout == "anyres")


def most_tiles(images: ImageConfig) -> int:
    """The most views of a photo."""
    if images.layout != "anyres":
        return 1
    return 1 + max(width * height // images.size**2 for width, height in images.pinpoints)


class DialoguePlan:
    """Groups of `group` rows for as many epochs as there are (None: endless), from the rows' needs.

    `patches`: tokens of a view, by which shapes are weighed against one another. Raises ValueError
    for fewer rows than a group.
    """

    def __init__(
        self,
        needs: Int[np.ndarray, "N 3"],
        group: int,
        patches: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ):
        self.rows = len(needs)
        if group > self.rows:
            raise ValueError(
                f"loader: {group} dialogues a step (batch x accumulate) are more than the "
                f"{self.rows} of the data set: lower batch or accumulate"
            )
        self.size, self.epochs = group, epochs
        self._seed, self._shuffle = seed, shuffle
        self.shapes, self.home = few_shapes(needs, group, patches)
        places = range(len(self.shapes))
        self._next = [next_larger(self.shapes, place) for place in places]
        self._by_home = np.argsort(self.home, kind="stable")
        self._bounds = np.searchsorted(self.home[self._by_home], range(len(self.shapes) + 1))
        self._order = lru_cache(2 * _EPOCHS)(self._make_order)
        self._epoch = lru_cache(_EPOCHS)(self._make_epoch)
        self._lock = threading.Lock()  # an epoch is worked out by one thread, others wait

    @property
    def steps(self) -> int:
        """Groups of an epoch; the last may end in the next one."""
        return -(-self.rows // self.size)

    @property
    def total(self) -> int | None:
        """Groups of all epochs; None: endless."""
        return None if self.epochs is None else -(-self.epochs * self.rows // self.size)

    def group(self, number: int) -> Group:
        """Group `number`, counted over all epochs."""
        epoch = number * self.size // self.rows
        with self._lock:
            shapes, rows = self._epoch(epoch)
        place = number - -(-epoch * self.rows // self.size)
        return Group(self.shapes[shapes[place]], rows[place], epoch)

    def substitutes(self, epoch: int, row: int, count: int) -> list[int]:
        """Rows of the same shape, drawn at random, to stand for one that cannot be read."""
        rng = np.random.default_rng((self._seed, _SUBSTITUTE, epoch, row))
        first, last = self._bounds[self.home[row] :][:2]
        return self._by_home[rng.integers(first, last, count)].tolist()

    def padding(self, needs: Int[np.ndarray, "N 3"], lengths: Int[np.ndarray, " N"]) -> Padding:
        """What the first epoch pads; `lengths`: tokens of each row, uncut."""
        made, held = np.zeros(2, np.int64), np.zeros(2, np.int64)
        shapes, rows = self._epoch(0)
        for place, own in zip(shapes.tolist(), rows, strict=True):
            shape, own = self.shapes[place], own[own != NOBODY]
            made += (self.size * shape.text, self.size * shape.images * shape.tiles)
            held += (
                np.minimum(lengths[own], shape.text).sum(),
                (needs[own, 0] * needs[own, 1]).sum(),
            )
        text, tiles = 1 - held / np.maximum(made, 1)
        return Padding(float(text), float(tiles) if made[1] else 0.0)

    def counts(self) -> dict[Shape, int]:
        """Groups of each shape in the first epoch."""
        shapes, _ = self._epoch(0)
        return {
            shape: int((shapes == place).sum())
            for place, shape in enumerate(self.shapes)
            if (shapes == place).any()
        }

    def _make_order(self, epoch: int) -> Int[np.ndarray, " N"]:
        if not self._shuffle:
            return np.arange(self.rows)
        return np.random.default_rng((self._seed, _ORDER, epoch)).permutation(self.rows)

    def _make_epoch(self, epoch: int) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, "K G"]]:
        """Shape and rows of each group."""
        # The first rows of this epoch's order filled the last group of the epoch before.
        order = self._order(epoch)[-epoch * self.rows % self.size :]
        home = self.home[order]
        left: list[list[np.ndarray]] = [[] for _ in self.shapes]
        kinds: list[int] = []
        groups: list[np.ndarray] = []
        for place, following in enumerate(self._next):
            rows = np.concatenate([*left[place], order[home == place]])
            if following is None:
                rows = np.concatenate([rows, self._fill(epoch + 1)])
            whole = len(rows) // self.size
            kinds += [place] * whole
            groups += list(rows[: whole * self.size].reshape(whole, self.size))
            if following is not None:
                left[following].append(rows[whole * self.size :])
        return self._mixed(epoch, np.array(kinds), np.array(groups))

    def _fill(self, epoch: int) -> Int[np.ndarray, " F"]:
        """The rows of an epoch that stand in the last group of the one before."""
        count = -epoch * self.rows % self.size
        if self.epochs is not None and epoch >= self.epochs:
            return np.full(count, NOBODY)
        return self._order(epoch)[:count]

    def _mixed(
        self, epoch: int, kinds: np.ndarray, groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self._shuffle:
            return kinds, groups
        order = np.random.default_rng((self._seed, _GROUPS, epoch)).permutation(len(kinds))
        if epoch == 0:  # the dearest first: what does not fit in memory shows at once
            dearest = int(np.argmax(kinds[order]))
            order[[0, dearest]] = order[[dearest, 0]]
        return kinds[order], groups[order]


def few_shapes(
    needs: Int[np.ndarray, "N 3"], group: int, patches: int
) -> tuple[tuple[Shape, ...], Int[np.ndarray, " N"]]:
    """Shapes from the cheapest to one that covers all, and which of them each row has.

    All but the last have at least a group of rows.
    """
    found, inverse, counts = np.unique(needs, axis=0, return_inverse=True, return_counts=True)
    rows = {Shape(*need): int(count) for need, count in zip(found.tolist(), counts, strict=True)}
    rows.setdefault(Shape(*needs.max(axis=0).tolist()), 0)
    ascending = sorted(rows, key=lambda shape: cost(shape, patches))
    moved: dict[Shape, Shape] = {}
    for place, shape in enumerate(ascending[:-1]):
        if rows[shape] < group:
            covering = (s for s in ascending[place + 1 :] if s.covers(shape))
            moved[shape] = larger = next(covering)
            rows[larger] += rows[shape]
    kept = tuple(shape for shape in ascending if shape not in moved)
    place_of = {shape: place for place, shape in enumerate(kept)}
    homes = [place_of[last_of(moved, Shape(*need))] for need in found.tolist()]
    return kept, np.array(homes)[inverse.ravel()]


def last_of(moved: dict[Shape, Shape], shape: Shape) -> Shape:
    """Where a shape ends up."""
    while shape in moved:
        shape = moved[shape]
    return shape


def next_larger(shapes: Sequence[Shape], place: int) -> int | None:
    """The cheapest shape that covers the one at `place`; None for the largest."""
    larger = range(place + 1, len(shapes))
    return next((i for i in larger if shapes[i].covers(shapes[place])), None)


def cost(shape: Shape, patches: int) -> tuple[bool, int]:
    """Tokens of a row; text alone is cheaper than any image, whose tower it does without."""
    return shape.images > 0, shape.images * shape.tiles * patches + shape.text
