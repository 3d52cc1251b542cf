"""A compression method as a value: a vision stage, and cuts inside the decoder."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from zlib import crc32

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.select import Selection

if TYPE_CHECKING:  # it needs Dims from here
    from focus_jax.compress.visual_compute import VisualCompute

Raters = Literal["", "text", "instruction"]


@dataclass(frozen=True)
class Dims:
    """The sizes a method needs of the model it is applied to.

    `rows`, `cols`: patches of one tile. `tiles` counts the thumbnail. `grids`: the (rows, cols) in
    which a stitched image's tiles may lie. `layers`, `heads`, `kv_heads`: of the decoder.
    `class_token`: whether the tower has one.
    """

    rows: int
    cols: int
    tiles: int
    grids: tuple[tuple[int, int], ...]
    vision_width: int
    width: int
    layers: int
    newline: bool
    class_token: bool = True
    heads: int = 0
    kv_heads: int = 0

    @property
    def patches(self) -> int:
        return self.rows * self.cols

    def fitting(self) -> tuple[tuple[int, int], ...]:
        """The grids that this many tiles can hold; () for a single view or without newlines."""
        if not self.newline or self.tiles == 1:
            return ()
        grids = tuple(g for g in self.grids if g[0] * g[1] < self.tiles)
        if not grids:
            raise ValueError(
                f"no grid of tiles among {self.grids} fits {self.tiles} tiles with the thumbnail"
            )
        return grids

    def newlines(self, band: int) -> int:
        """The most newlines when a row of the stitched grid is `band` patches high.

        A single view has one, at its end; `band` 0, an output without a grid, has none.
        """
        if not band:
            return 0
        lines = max((rows for rows, _ in self.fitting()), default=0) * (self.rows // band)
        return lines or int(self.newline)

    def stitched(self, tile_slots: tuple[int, ...], band: int) -> int:
        """Slots for the tokens of all tiles and their newlines: what the largest grid needs.

        A grid of fewer tiles may have more rows; its newlines then stand in free slots.
        """
        if not band:
            return sum(tile_slots)
        needs = (
            sum(tile_slots[: 1 + rows * cols]) + rows * (self.rows // band)
            for rows, cols in self.fitting()
        )
        return max(needs, default=sum(tile_slots) + int(self.newline))


class Context(NamedTuple):
    """What a run gives to samplers: a key for what is random, training progress in [0, 1].

    `key`: one for the batch, or at inference one for each sample [B], whose draws then do not
    depend on the batch. `content`: how much each patch holds, for controls alone: no method may
    look at it. `VLM.see` sets it, laid out as `Views`.
    """

    key: Array
    train: bool = False
    progress: float | Float[Array, ""] = 1.0
    content: Float[Array, "B M N"] | None = None


class Views(NamedTuple):
    """The tower's tokens of B images of M tiles, before the projector.

    `origin` is the (row, col) of a tile's first patch in the stitched grid; tile 0 is the
    thumbnail where M > 1. `row_valid`: rows of a tile that belong to the unpadded grid, even where
    none of their patches does. `named` holds the arrays that the stage asked for, each [B M ...],
    and `class_token` [B M 1 C] beside the features, where the tower has one.
    """

    features: Float[Array, "B M N C"]
    patch_valid: Bool[Array, "B M N"]
    row_valid: Bool[Array, "B M R"]
    origin: Int[Array, "B M 2"]
    named: dict[str, Array]


class TileTokens(NamedTuple):
    """Tokens of one group of tiles, still apart: K slots a tile, in raster order of the tile.

    `centre` (row, col) and `side` are in patches of the tile.
    """

    features: Float[Array, "B M K C"]
    valid: Bool[Array, "B M K"]
    centre: Float[Array, "B M K 2"]
    side: Float[Array, "B M K"]


class VisualTokens(NamedTuple):
    """The visual stream of B images: V slots, valid ones first, in reading order.

    `centre` is in patches of the stitched grid (of the thumbnail for view 0 where M > 1), `side`
    is how many patches wide a token is, `newline` marks slots that hold `image_newline`.
    """

    features: Float[Array, "B V C"]
    valid: Bool[Array, "B V"]
    centre: Float[Array, "B V 2"]
    side: Float[Array, "B V"]
    view: Int[Array, "B V"]
    newline: Bool[Array, "B V"]


class Aux(NamedTuple):
    """What a stage reports: losses (weighted, summed into training), metrics, maps (pictures)."""

    losses: dict[str, Float[Array, ""]]
    metrics: dict[str, Float[Array, ""]]
    maps: dict[str, Array]


class LayerView(NamedTuple):
    """The arrays of the decoder layer at whose entry a cut stands; questions share the image.

    Queries and keys are rotated, after the layer's own norm. A cut that looks back gets those of
    the layer before, from that layer's own input. `visual` and `token` are the rows as they stand
    at the cut: the embeddings at layer 0. `instruction` marks the user's own words, `prompt` all
    that is not supervised, `last` the last token of the prompt, `starts` the token before each
    supervised span (of a prompt: its last), `raters` what the cut's `rate` chose. `after`: how many
    of the question's tokens stand before a visual token. `entered` counts the valid visual tokens
    that entered the decoder.
    """

    q: Float[Array, "B Q T H K"]
    k: Float[Array, "B Q T G K"]
    k_prefix: Float[Array, "B P G K"]
    k_visual: Float[Array, "B V G K"]
    visual: Float[Array, "B V D"]
    token: Float[Array, "B Q T D"]
    token_valid: Bool[Array, "B Q T"]
    prefix_valid: Bool[Array, "B P"]
    visual_valid: Bool[Array, "B V"]
    after: Int[Array, "B V"]
    instruction: Bool[Array, "B Q T"]
    prompt: Bool[Array, "B Q T"]
    last: Bool[Array, "B Q T"]
    starts: Bool[Array, "B Q T"]
    raters: Bool[Array, "B Q T"]
    entered: Int[Array, " B"]


class Entry(NamedTuple):
    """What stands at the decoder's entry, before any layer: where a cut may choose its raters."""

    visual: Float[Array, "B V D"]
    visual_valid: Bool[Array, "B V"]
    token: Float[Array, "B Q T D"]
    asking: Bool[Array, "B Q T"]


class Merged(NamedTuple):
    """Visual tokens that a cut made of those that leave; they stand behind the kept ones."""

    features: Float[Array, "B Q R D"]
    valid: Bool[Array, "B Q R"]


class Kept(NamedTuple):
    """What a cut leaves: indices [B Q k] of the visual slots that stay, in order, and new ones."""

    selection: Selection
    merged: Merged | None = None


@dataclass(frozen=True)
class VisionStage:
    """What happens to the tower's tokens before the projector. Text is never seen here.

    `selects`: False where every patch is a token. `grid`: run the tower on an image resized to this
    many patches a side (0: as it comes). `tile_newline`: where the output has no grid, a newline
    closes each tile.
    """

    learned: ClassVar[bool] = False
    selects: ClassVar[bool] = True
    grid: ClassVar[int] = 0
    tile_newline: ClassVar[bool] = False

    def requests(self) -> tuple[str, ...]:
        """Names that the tower must hand out (`name@layer`)."""
        return ()

    def check(self, dims: Dims) -> None:
        """ValueError where the stage cannot stand on these sizes."""

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        """Slots of each tile."""
        raise NotImplementedError

    def band(self, dims: Dims) -> int:
        """Height in patches of a row of the stitched grid that one newline closes.

        0: the output has no grid; tiles stand one behind another, each in its own order.
        """
        return 1

    def cell(self, dims: Dims) -> float | None:
        """Patches along a side of a token where tokens are a regular grid, else None."""
        return None

    def init(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module | None:
        """The learned part, or None."""
        return None

    def flops(self, dims: Dims) -> float:
        """Floating-point operations for one image, the projector not counted."""
        return 0.0

    def apply(
        self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context
    ) -> tuple[list[TileTokens], Aux]:
        """Tokens of the tiles in groups (thumbnail apart where it is treated apart)."""
        raise NotImplementedError

    def slots(self, dims: Dims) -> int:
        """V: slots that enter the decoder, newlines included."""
        band, lines = self.band(dims), dims.tiles * (self.tile_newline and dims.newline)
        return dims.stitched(self.tile_slots(dims), band) + (0 if band else lines)


@dataclass(frozen=True)
class Cut:
    """A selection of visual tokens at the entry of decoder layer `layer`.

    `shared`: one selection for all questions of an image (text is not looked at, or pooled).
    `renumber`: positions become contiguous after the cut; otherwise the kept ones keep theirs.
    `look_back`: scores come from the layer before. `raters`: which text rows `rate` may choose
    from ("": it chooses none).
    """

    layer: int = 0
    shared: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = False
    look_back: ClassVar[bool] = False
    raters: ClassVar[Raters] = ""
    renumber: bool = False

    def check(self, dims: Dims, entering: int) -> None:
        """ValueError where the cut cannot stand on these sizes."""
        if not 0 <= self.layer < dims.layers:
            raise ValueError(
                f"{type(self).__name__}: layer {self.layer} is outside the decoder's "
                f"{dims.layers} layers: use {int(self.look_back)}..{dims.layers - 1}"
            )

    def slots(self, entering: int, train: bool = False) -> int:
        """Slots after the cut when `entering` slots entered the decoder; 0: withdrawal."""
        raise NotImplementedError

    def merged_slots(self, entering: int, train: bool = False) -> int:
        """How many of the slots hold merged tokens."""
        return 0

    def rate(self, entry: Entry) -> Bool[Array, "B Q T"]:
        """Text rows that will judge visual tokens, chosen among `entry.asking`."""
        return entry.asking

    def apply(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Kept, Aux]:
        """What stays in `slots` slots, merged tokens included."""
        selection, aux = self.select(layer, slots, ctx)
        return Kept(selection), aux

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        """Indices [B Q slots] (Q = 1 when shared) of the visual slots that stay, in order."""
        raise NotImplementedError

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        """Operations of the scores for one sample: `questions` of `text` tokens behind an image.

        `width`: of all query heads together, `kv_width`: of all key heads.
        """
        return 0.0


@dataclass(frozen=True)
class Method:
    """A value that the one model executes. Frozen and hashable: a static argument to jit.

    `compute`: how much of a decoder layer visual rows get; None: all of it.
    """

    name: str
    vision: VisionStage
    cuts: tuple[Cut, ...] = ()
    compute: "VisualCompute | None" = None

    def __post_init__(self) -> None:
        layers = [cut.layer for cut in self.cuts]
        if sorted(set(layers)) != layers:
            raise ValueError(f"method {self.name!r}: cut layers {layers} must rise strictly")
        for cut in self.cuts:
            if cut.look_back and cut.layer < 1:
                raise ValueError(
                    f"method {self.name!r}: {type(cut).__name__} at layer {cut.layer} ranks by the "
                    "layer before it: use layer 1 or later"
                )
            if cut.merged_slots(MANY) and not cut.renumber:
                raise ValueError(
                    f"method {self.name!r}: {type(cut).__name__} makes new tokens, which have no "
                    "position to keep: set renumber=True"
                )
        for first, second in pairwise(self.cuts):
            if withdraws(first):
                raise ValueError(
                    f"method {self.name!r}: {type(first).__name__} withdraws all visual tokens "
                    f"before layer {first.layer}, which leaves none to {type(second).__name__} at "
                    f"layer {second.layer}: put the withdrawal last"
                )
        if len({cut.raters for cut in self.cuts if cut.raters}) > 1:
            raise ValueError(f"method {self.name!r}: its cuts choose raters in different ways")

    @property
    def bounds(self) -> tuple[int, ...]:
        """Decoder layers at which a new stage begins (a cut at layer 0 begins none).

        A cut that looks back needs the rows at the entry of the layer before it.
        """
        begins = {cut.layer for cut in self.cuts}
        begins |= {cut.layer - 1 for cut in self.cuts if cut.look_back}
        return tuple(sorted(begins - {0}))

    def cut_before(self, stage: int) -> Cut | None:
        """The cut at the entry of decoder stage `stage`."""
        begins = (0, *self.bounds)
        if not 0 <= stage < len(begins):
            return None
        return next((cut for cut in self.cuts if cut.layer == begins[stage]), None)

    @property
    def rater(self) -> Cut | None:
        """The first cut that chooses raters at the decoder's entry."""
        return next((cut for cut in self.cuts if cut.raters), None)

    def entry_stage(self, stages: int) -> int:
        """The first decoder stage whose entry the cuts look at; `stages` where there is no cut."""
        if self.rater is not None:
            return 0
        cuts = ((i, self.cut_before(i)) for i in range(stages))
        return next((i - cut.look_back for i, cut in cuts if cut is not None), stages)

    def check(self, dims: Dims) -> "Method":
        """This method, or a ValueError that says why it cannot run on these sizes."""
        self.vision.check(dims)
        entering = self.vision.slots(dims)
        for cut in self.cuts:
            cut.check(dims, entering)
        if self.compute is not None:
            self.compute.check(dims)
        return self

    def stage_slots(self, dims: Dims, train: bool = False, images: int = 1) -> tuple[int, ...]:
        """Visual slots of each decoder stage, for so many images of `dims` in a prompt."""
        entering = current = images * self.vision.slots(dims)
        out = []
        for stage in range(len(self.bounds) + 1):
            cut = self.cut_before(stage)
            current = current if cut is None else min(cut.slots(entering, train), current)
            out.append(current)
        return tuple(out)


MANY = 1 << 12  # visual tokens: more than one image's, so that a share of them is not 0


def withdraws(cut: Cut) -> bool:
    """Whether no visual token is ever left behind a cut, in training neither."""
    return cut.slots(MANY) == 0 and cut.slots(MANY, train=True) == 0


def compose(*methods: Method) -> Method:
    """One method that does what all of them do: `compose(prumerge_plus(), fastv())`.

    ValueError for two vision stages, two kinds of visual compute, cuts at one layer, or a cut that
    another one leaves nothing to.
    """
    name = "+".join(method.name for method in methods)
    visions = [m.vision for m in methods if m.vision.selects]
    computes = [m.compute for m in methods if m.compute is not None]
    for what, found in (("vision stages", visions), ("kinds of visual compute", computes)):
        if len(found) > 1:
            kinds = ", ".join(type(part).__name__ for part in found)
            raise ValueError(f"method {name!r} has {len(found)} {what} ({kinds}): one can stand")
    cuts = sorted((cut for m in methods for cut in m.cuts), key=lambda cut: cut.layer)
    vision = visions[0] if visions else methods[0].vision
    return Method(name, vision, tuple(cuts), computes[0] if computes else None)


def empty_aux() -> Aux:
    """Nothing to report."""
    return Aux({}, {}, {})


def merge_aux(*parts: Aux) -> Aux:
    """All that several parts report; names must differ."""
    whole = Aux({}, {}, {})
    for part in parts:
        for old, new in zip(whole, part, strict=True):
            if old.keys() & new.keys():
                raise ValueError(f"two samplers report {sorted(old.keys() & new.keys())}")
            old.update(new)
    return whole


def patch_centres(rows: int, cols: int) -> np.ndarray:
    """(row, col) of each patch of a tile, float32 [N 2]."""
    return np.moveaxis(np.mgrid[:rows, :cols], 0, -1).reshape(-1, 2).astype(np.float32)


def block_key(ctx: Context, name: str) -> Array:
    """A key of its own for each named use; as many as there are in `ctx`."""
    fold = jax.vmap(jax.random.fold_in, (0, None)) if ctx.key.ndim else jax.random.fold_in
    return fold(ctx.key, crc32(name.encode()))


def uniform_draws(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform numbers in [0, 1) from one key, or from one for each sample.

    With keys [B] the first axis is the samples, or the images of all samples one behind another.
    """
    if not key.ndim:
        return jax.random.uniform(key, shape)
    own = (shape[0] // key.shape[0], *shape[1:])
    return jax.vmap(lambda one: jax.random.uniform(one, own))(key).reshape(shape)
