"""Visual compute: how much of a decoder layer the visual rows get, and which rows that makes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from focus_jax.compress.method import Dims, Method

if TYPE_CHECKING:  # it needs the costs from here
    from focus_jax.compress.plan import Sizes

HeadMask = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class VisualCompute:
    """Which part of the decoder's layers visual rows pass through, after YOPO.

    `window`: a visual token attends to the visual tokens at most (window - 1) / 2 rows and columns
    away in its own view, later ones included; None: to all before it. `heads`: the heads kept for
    visual tokens, [layers][heads], or a share: that part of each layer's key heads, the lowest
    ones, behind `whole` first layers that keep all. `layers`: from this layer on nobody reads the
    values of visual tokens. `ffn`: visual rows use the first 1/ffn of the feed-forward neurons.

    `mode`: `masked` computes everything and clears what is not used; `efficient` does not compute
    it. `mass`: what becomes of the attention that a cleared visual key had drawn. `official`: it
    is lost, weights no longer sum to 1, and keys of every head must still be computed.
    `renormalise`: such keys are not there. Visual tokens then leave by a cut rather than by
    `layers`. Newlines of a stitched image count as text throughout.

    Keys and values are a key head's: heads that share one are kept or dropped together.
    """

    window: int | None = None
    heads: HeadMask | float | None = None
    layers: int | None = None
    ffn: float = 1.0
    mode: Literal["masked", "efficient"] = "efficient"
    mass: Literal["official", "renormalise"] = "official"
    whole: int = 2

    @property
    def half(self) -> int | None:
        """How many rows and columns away a neighbour may be."""
        return None if self.window is None else (self.window - 1) // 2

    @property
    def active(self) -> bool:
        """Whether anything is spared at all."""
        off = (self.window, self.heads, self.layers) == (None, None, None)
        return not off or self.ffn != 1

    def neurons(self, mlp_width: int) -> int:
        """Feed-forward neurons of visual rows."""
        return int(mlp_width / self.ffn)

    def check(self, dims: Dims) -> None:
        """ValueError naming the first field that does not fit the model."""
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise ValueError(
                f"visual compute: window={self.window} must be odd and at least 1, as it reaches "
                "equally far to both sides: use 5, or None to switch it off"
            )
        if self.layers is not None and not 0 <= self.layers <= dims.layers:
            raise ValueError(
                f"visual compute: layers={self.layers} is outside 0..{dims.layers}, the layers "
                "of this decoder: use one of these, or None to switch it off"
            )
        if self.layers is not None and self.mass == "renormalise":
            raise ValueError(
                f"visual compute: with mass='renormalise' visual tokens leave by a cut: use "
                f"layers=None and the cut Withdraw(layer={self.layers})"
            )
        if self.ffn < 1:
            raise ValueError(f"visual compute: ffn={self.ffn} divides the width: use 1 or more")
        if self.whole < 0:
            raise ValueError(f"visual compute: whole={self.whole} counts layers: use 0 or more")
        self.alive(dims)

    def alive(self, dims: Dims) -> np.ndarray:
        """Which key heads see and show visual tokens, bool [layers key_heads].

        ValueError: a mask of another shape, a share outside (0, 1], or heads of one key head of
        which only some are kept.
        """
        layers, groups = dims.layers, dims.kv_heads
        out = np.ones((layers, groups), bool)
        if self.heads is None:
            return out
        if isinstance(self.heads, tuple):
            return grouped(self.heads, dims)
        if not 0 < self.heads <= 1:
            raise ValueError(
                f"visual compute: heads={self.heads} is a share of each layer's heads: use "
                "0 < share <= 1, or None for all"
            )
        out[self.whole :, max(round(self.heads * groups), 1) :] = False
        return out

    def read(self, layer: int) -> bool:
        """Whether anybody reads the values of visual tokens in a layer."""
        return self.layers is None or layer < self.layers


def grouped(mask: HeadMask, dims: Dims) -> np.ndarray:
    """A mask of heads as one of key heads, bool [layers key_heads]; ValueError if it cannot be."""
    widths = sorted({len(row) for row in mask})
    if len(mask) != dims.layers or widths != [dims.heads]:
        found = f"[{len(mask)}, {'/'.join(map(str, widths))}]"
        raise ValueError(
            f"visual compute: a head mask of {found} does not fit a decoder of {dims.layers} "
            f"layers with {dims.heads} heads: give one bool for each head of each layer, such as "
            "save_head_mask(path, np.ones((layers, heads), bool)) with the dropped ones False"
        )
    groups = np.asarray(mask, bool).reshape(dims.layers, dims.kv_heads, -1)
    mixed = np.argwhere(groups.any(-1) != groups.all(-1))
    if len(mixed):
        layer, group = mixed[0]
        share = dims.heads // dims.kv_heads
        raise ValueError(
            f"visual compute: layer {layer} keeps some of heads {group * share}.."
            f"{(group + 1) * share - 1}, which share one key head: keep or drop them together"
        )
    return np.asarray(groups.all(-1))


class Heads(NamedTuple):
    """Key heads of one layer: `order` has those first that visual rows compute.

    `live`: which of the computed ones count (where layers are stacked, some are padding). `read`:
    whose values of visual rows anybody reads; () where no values are computed.
    """

    order: tuple[int, ...]
    live: tuple[bool, ...]
    read: tuple[bool, ...]

    @property
    def computed(self) -> int:
        return len(self.live)


def heads_of(
    compute: VisualCompute, dims: Dims, first: int, last: int, stacked: bool
) -> tuple[Heads, ...]:
    """Key heads of the layers first .. last - 1.

    Layers that are stacked run one program: each computes as many heads as the layer that keeps the
    most. The masked mode computes all. Where all are computed, they stand in their own order.
    """
    alive = compute.alive(dims)[first:last]
    read = np.asarray([compute.read(layer) for layer in range(first, last)])
    computed = np.maximum(alive.sum(-1), 1)  # a product needs a head, even one that does not count
    values = read
    if stacked:
        computed, values = np.full_like(computed, computed.max()), np.full_like(read, read.any())
    if compute.mode == "masked":
        computed, values = np.full_like(computed, alive.shape[1]), np.ones_like(read)
    out = []
    for i, row in enumerate(alive):
        order = np.argsort(~row, kind="stable") if computed[i] < len(row) else np.arange(len(row))
        live = row[order[: computed[i]]]
        shown = live & read[i] if values[i] else live[:0]
        out.append(Heads(*(tuple(a.tolist()) for a in (order, live, shown))))
    return tuple(out)


def in_part(method: Method, slots: int) -> bool:
    """Whether visual rows pass through parts of the layers of a stage with so many slots."""
    return method.compute is not None and method.compute.active and slots > 0


def lacking_heads(method: Method, dims: Dims, stage: int) -> np.ndarray | None:
    """Key heads of a stage's layers for which visual rows do not exist, bool [L key_heads].

    None where all exist: officially they do, and draw attention.
    """
    if method.compute is None or method.compute.mass == "official":
        return None
    edges = (0, *method.bounds, dims.layers)
    lacks = ~method.compute.alive(dims)[edges[stage] : edges[stage + 1]]
    return lacks if lacks.any() else None


# -------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Layout:
    """The rows of a decoder stage with visual compute, known before the data.

    `newlines` slots of the images stand with the text, the `visual` others apart. `unit`: patches
    from a token to the next. `causal`: there is no window. Where `blocks` > 0, visual rows meet
    their neighbours block by block: squares of `side` x `side` cells against what is within `half`
    cells around; `views` canvases of `rows` x `cols` cells hold the tokens.
    """

    newlines: int
    visual: int
    unit: float
    half: int = 0
    causal: bool = False
    blocks: int = 0
    side: int = 0
    rows: int = 0
    cols: int = 0
    views: int = 1

    @property
    def aligned(self) -> bool:
        """Whether a visual row stands in each cell of the blocks: then in that order."""
        return self.blocks * self.side**2 == self.visual

    @property
    def reach(self) -> int:
        """Cells along a side of what a block attends to."""
        return self.side + 2 * self.half

    def pairs(self, block: int = 0) -> int:
        """Visual rows times the visual keys that they meet; `block` as in `Sizes`."""
        if self.blocks:
            return self.blocks * self.side**2 * self.reach**2
        return blocked_pairs(self.visual, block if self.causal else 0)


def blocked_pairs(rows: int, block: int) -> int:
    """Rows times the keys that they meet, in blocks that see those up to their own end (0: all)."""
    ends = [min(first + block, rows) for first in range(0, rows, block)] if block else [rows]
    return sum((last - first) * last for first, last in pairwise([0, *ends]))


def layout(method: Method, dims: Dims, images: int, slots: int) -> Layout:
    """The rows of a stage with `slots` visual slots, when `images` images of `dims` entered.

    Blocks are taken where they make fewer pairs than all rows with all.
    """
    compute, stage = method.compute, method.vision
    assert compute is not None
    band, entering = stage.band(dims), stage.tile_slots(dims)
    lines = dims.newlines(band) if band else dims.tiles * (stage.tile_newline and dims.newline)
    newlines, visual = min(images * lines, slots), min(images * sum(entering), slots)
    cell, half = stage.cell(dims), compute.half
    whole = Layout(newlines, visual, cell or 1.0, half or 0, causal=half is None)
    if half is None or cell is None:
        return whole
    across, down = round(dims.cols / cell), round(dims.rows / cell)
    side = block_side(gcd(across, down), 2 * half + 1)
    up, wide = extent(dims)
    blocks = images * dims.tiles * (across // side) * (down // side)
    banded = Layout(
        newlines, visual, cell, half, False, blocks, side, up * down, wide * across,
        2 * images,
    )  # fmt: skip
    return banded if banded.pairs() < whole.pairs() else whole


def find_layout(
    method: Method, models: Sequence[Dims], entering: int, slots: int
) -> tuple[Layout, Dims]:
    """The layout of a stage of `slots` slots when `entering` slots entered the decoder.

    `models`: the sizes for each number of tiles that an image may have; which of them it is follows
    from the count, and where several images of one size count as fewer of another, the layout has
    room for both. ValueError when no number of images has so many slots.
    """
    found = []
    for dims in models:
        images, rest = divmod(entering, method.vision.slots(dims))
        if images and not rest:
            found.append((layout(method, dims, images, slots), dims))
    if not found:
        each = [method.vision.slots(dims) for dims in models]
        raise ValueError(
            f"visual compute: {entering} visual slots are no whole images of {each} slots: hand in "
            "the visual tokens of whole images"
        )
    rooms, dims = [room for room, _ in found], found[0][1]
    rooms = [room for room in rooms if room.blocks == 0] or rooms
    widest = {f.name: max(getattr(room, f.name) for room in rooms) for f in fields(Layout)}
    return Layout(**widest), dims


def block_side(cells: int, window: int) -> int:
    """The largest divisor of a tile's side within two windows: halos cost, so do small products."""
    return max(n for n in range(1, cells + 1) if cells % n == 0 and n <= 2 * window)


def extent(dims: Dims) -> tuple[int, int]:
    """Tiles down and across of the largest stitched image that these tiles can make."""
    grids = [g for g in dims.grids if g[0] * g[1] < dims.tiles]
    return max((g[0] for g in grids), default=1), max((g[1] for g in grids), default=1)


# ------------------------------------------------------------------------------- costs


def layer_flops(
    compute: VisualCompute, sizes: "Sizes", rows: Layout, text: int, heads: Heads
) -> float:
    """Products of one layer of an efficient stage, of one sample.

    `text` rows, newlines included, stand apart from the visual ones of `rows`.
    """
    d, size, share = sizes.width, sizes.head_dim, sizes.heads // sizes.kv_heads
    inner, kv = sizes.heads * size, sizes.kv_heads * size
    part = heads.computed * size  # width of the key heads that visual rows compute
    keys, values = (kv if compute.mass == "official" else part), part * bool(heads.read)
    weights = d * (2 * part * share + keys + values)
    weights += 3 * d * compute.neurons(sizes.mlp_width)
    visual = 2.0 * rows.visual * weights + 4.0 * rows.visual * text * part * share
    visual += 2.0 * rows.pairs(sizes.block) * (part + values) * share
    own = 2.0 * text * (d * (2 * inner + 2 * kv) + 3 * d * sizes.mlp_width)
    own += 4.0 * text**2 * inner + 2.0 * text * rows.visual * (keys + values) * share
    return visual + own


def layer_softmax(
    compute: VisualCompute, sizes: "Sizes", rows: Layout, text: int, heads: Heads
) -> int:
    """Entries of all softmaxes of such a layer."""
    share, part = sizes.heads // sizes.kv_heads, heads.computed
    keys = sizes.kv_heads if compute.mass == "official" else part
    own = text**2 * sizes.heads + text * rows.visual * keys * share
    return own + (rows.visual * text + rows.pairs(sizes.block)) * part * share


def rotated(compute: VisualCompute, sizes: "Sizes", heads: Heads) -> int:
    """Numbers of a visual row's queries and keys."""
    keys = sizes.kv_heads if compute.mass == "official" else heads.computed
    return (heads.computed * (sizes.heads // sizes.kv_heads) + keys) * sizes.head_dim


def published_macs(
    compute: VisualCompute, method: Method, dims: Dims, sizes: "Sizes", slots: int, layer: int
) -> float:
    """YOPO's own count of one layer, as multiply-adds: 4nd^2 + 2n^2d + 3ndI with reduced sizes.

    Kept heads reduce the first two terms, neighbours the n of the second (within a tile), kept
    neurons the third; nothing is counted from `layers` on, where the program still has work in all
    but `renormalise`.
    """
    if not compute.read(layer):
        return 0.0
    d = sizes.width
    share = compute.alive(dims)[layer].mean()
    pairs = float(slots**2)
    if compute.half is not None:
        pairs = min(pairs, slots * neighbours(method, dims, compute.half))
    linear = 4 * slots * d**2 * share + 3 * slots * d * compute.neurons(sizes.mlp_width)
    return linear + 2 * pairs * d * share


def neighbours(method: Method, dims: Dims, half: int) -> float:
    """Mean keys of a visual token within its tile: 22.6 of 24 x 24 in a window of 5."""
    cell = method.vision.cell(dims)
    if cell is None:
        return float((2 * half + 1) ** 2)

    def mean(count: int) -> float:
        at = np.arange(count)
        return float((np.minimum(at + half, count - 1) - np.maximum(at - half, 0) + 1).mean())

    return mean(round(dims.rows / cell)) * mean(round(dims.cols / cell))
