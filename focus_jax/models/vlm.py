"""The vision-language model: executes whatever compression method it is given."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from focus_jax.compress.method import (
    Aux,
    Context,
    Cut,
    Dims,
    Entry,
    LayerView,
    Method,
    Views,
    VisualTokens,
    block_key,
    empty_aux,
    merge_aux,
)
from focus_jax.compress.plan import Sizes
from focus_jax.compress.stitch import stitch
from focus_jax.compress.visual_compute import find_layout, in_part, lacking_heads
from focus_jax.config import ModelConfig
from focus_jax.models import visual_compute
from focus_jax.models.blocked_attention import ROWS
from focus_jax.models.decoder import Cache, Decoder, observed_attention, rotary, rotate
from focus_jax.models.neighbours import joined_view
from focus_jax.models.projector import Projector
from focus_jax.models.split_rows import is_visual
from focus_jax.models.streams import (
    Packed,
    Streams,
    before_spans,
    last_of_prompt,
    pack,
    renumber,
    select_visual,
    spread,
    unpack,
)
from focus_jax.models.vision import VisionTower
from focus_jax.sharding import Layout, pinned


class Inputs(NamedTuple):
    """One batch. Tile 0 is the thumbnail where M > 1; questions stand behind the image.

    `origin`: (row, col) of a tile's first patch in the stitched grid. `instruction`: the user's
    own words. `label`: supervised tokens (all False for a prompt). `row_valid`: rows of a tile
    that belong to the unpadded grid; without it, those with a valid patch. `image_at`: I images in
    one prompt, each with M / I tiles, at rising places: how many of the question's tokens (Q = 1)
    stand before each. A sample with fewer images has no valid patch in the others. M = 0 is text
    alone, with I = 0. `content`: how much each patch holds (1 for a glyph, 0 for none), which the
    controls of a study may look at and no method does.
    """

    pixels: UInt8[Array, "B M S S 3"]
    patch_valid: Bool[Array, "B M N"]
    origin: Int[Array, "B M 2"]
    prefix: Int[Array, "B P"]
    prefix_valid: Bool[Array, "B P"]
    tokens: Int[Array, "B Q T"]
    token_valid: Bool[Array, "B Q T"]
    instruction: Bool[Array, "B Q T"]
    label: Bool[Array, "B Q T"]
    row_valid: Bool[Array, "B M R"] | None = None
    image_at: Int[Array, "B I"] | None = None
    content: Float[Array, "B M N"] | None = None


class StageCache(NamedTuple):
    """One decoder stage's keys and values, its valid rows, and the next token's position.

    `visual` marks the rows that some key heads do not have (visual compute, renormalised); all
    heads have room for them.
    """

    kv: Cache
    length: Int[Array, " B"]
    position: Int[Array, " B"]
    visual: Bool[Array, "B S"] | None = None

    @property
    def size(self) -> int:
        """Rows that it has room for."""
        return jax.tree.leaves(self.kv)[0].shape[-2]

    def with_room(self, rows: int) -> "StageCache":
        """The same with more room behind; copies it."""
        grow = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rows), (0, 0)])  # noqa: E731
        seen = None if self.visual is None else jnp.pad(self.visual, [(0, 0), (0, rows)])
        return self._replace(kv=jax.tree.map(grow, self.kv), visual=seen)


class Output(NamedTuple):
    """Final hidden rows of the questions, flat [B*Q T D], and what was asked for on the way."""

    hidden: Float[Array, "BQ T D"]
    streams: Streams
    caches: tuple[StageCache, ...]
    visual: VisualTokens
    aux: Aux
    importance: tuple[tuple[Array, Array], ...]


class Decoded(NamedTuple):
    """Streams behind some decoder stages; `entry` is what the last of them ran on."""

    streams: Streams
    caches: tuple[StageCache, ...]
    aux: Aux
    importance: tuple[tuple[Array, Array], ...]
    entry: Streams | None


def dims_of(cfg: ModelConfig, tiles: int) -> Dims:
    """What a method needs to know of a model, for images of `tiles` tiles."""
    return Dims(
        rows=cfg.vision.grid, cols=cfg.vision.grid, tiles=tiles, grids=cfg.grids,
        vision_width=cfg.vision.width, width=cfg.decoder.width, layers=cfg.decoder.layers,
        newline=cfg.image_newline, class_token=cfg.vision.class_token,
        heads=cfg.decoder.heads, kv_heads=cfg.decoder.kv_heads,
    )  # fmt: skip


def sizes_of(cfg: ModelConfig) -> Sizes:
    """What a plan needs to know of a model."""
    vision, decoder = cfg.vision, cfg.decoder
    return Sizes(
        patch_size=vision.patch_size, image_size=vision.image_size, tower_width=vision.width,
        tower_layers=vision.layers, tower_depth=vision.depth, tower_heads=vision.heads,
        tower_mlp=vision.mlp_width, tower_activation=vision.activation,
        stem=vision.stem_widths if vision.stem == "conv" else (),
        projector_layers=2 if cfg.projector == "mlp2x_gelu" else 1, width=decoder.width,
        layers=decoder.layers, heads=decoder.heads, kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim, mlp_width=decoder.mlp_width, vocab_size=decoder.vocab_size,
        compute_bytes=jnp.dtype(cfg.compute_dtype).itemsize,
        block=ROWS if cfg.attention == "blocked" else 0, last_row=not cfg.stacked,
    )  # fmt: skip


class VLM(nnx.Module):
    """Tower, projector, decoder in stages, and the learned parts of the method (`samplers`)."""

    def __init__(
        self, cfg: ModelConfig, method: Method, *, rngs: nnx.Rngs, layout: Layout | None = None
    ):
        dims = dims_of(cfg, cfg.max_tiles)
        method.check(dims)
        self.cfg, self.method, self.layout = cfg, method, layout
        self.vision = VisionTower(cfg, rngs=rngs, layout=layout)
        self.projector = Projector(
            cfg.projector, cfg.vision.width, cfg.decoder.width,
            dtype=jnp.dtype(cfg.compute_dtype), param_dtype=jnp.dtype(cfg.param_dtype), rngs=rngs,
            layout=layout,
        )  # fmt: skip
        self.image_newline = (
            nnx.Param(
                (jax.random.normal(rngs.params(), (cfg.decoder.width,)) * 0.02).astype(
                    cfg.param_dtype
                )
            )
            if cfg.image_newline
            else None
        )
        self.decoder = Decoder(cfg, method.bounds, rngs=rngs, layout=layout)
        sampler = method.vision.init(dims, rngs)
        self.samplers = nnx.Dict({} if sampler is None else {"vision": sampler})

    # ---------------------------------------------------------------- visual tokens

    def see(self, inputs: Inputs, ctx: Context) -> tuple[VisualTokens, Aux]:
        """Tower, vision stage, projector: visual tokens in the decoder's width.

        Images of one prompt are seen apart from each other and stand one behind another. Text alone
        passes no tower and no sampler, which then report nothing.
        """
        stage, (b, m) = self.method.vision, inputs.pixels.shape[:2]
        if not m:
            return no_visual(b, self.cfg), empty_aux()
        views = self.look(inputs)
        dims = dims_of(self.cfg, views.features.shape[1])
        module = self.samplers.get("vision")
        content = inputs.content
        if content is not None:
            content = content.reshape(views.patch_valid.shape)
        ctx = ctx._replace(key=block_key(ctx, "vision"), content=content)
        groups, aux = stage.apply(views, dims, module, self.projector, ctx)
        tokens = stitch(groups, views, dims, stage.band(dims), stage.tile_newline)
        features = self.projector(tokens.features)
        if self.image_newline is not None:
            line = self.image_newline[...].astype(features.dtype)
            features = jnp.where(tokens.newline[..., None], line, features)
        images = tokens.valid.shape[0] // b
        number = jnp.arange(tokens.valid.shape[0], dtype=jnp.int32) % images
        view = joined_view(number[:, None], tokens.view)
        features = pinned(self.layout, features, "batch", "vision")
        tokens = tokens._replace(features=features, view=view)
        return jax.tree.map(lambda a: a.reshape(b, -1, *a.shape[2:]), tokens), aux

    def look(self, inputs: Inputs) -> Views:
        """The tower's tokens of every image: B is the batch times the images of a prompt."""
        stage, (b, m) = self.method.vision, inputs.pixels.shape[:2]
        pixels = inputs.pixels.reshape(b * m, *inputs.pixels.shape[2:])
        if stage.grid:
            side = stage.grid * self.cfg.vision.patch_size
            pixels = jax.image.resize(
                pixels.astype(jnp.float32), (b * m, side, side, 3), "linear", antialias=True
            )
        images = 1 if inputs.image_at is None else inputs.image_at.shape[1]

        def by_image(a: Array, lead: int) -> Array:
            return a.reshape(b * images, m // images, *a.shape[lead:])

        out = {k: by_image(a, 1) for k, a in self.vision(pixels, stage.requests()).items()}
        patch_valid, row_valid = inputs.patch_valid, inputs.row_valid
        if row_valid is None:
            grid = self.cfg.vision.grid
            row_valid = patch_valid.reshape(b, m, grid, grid).any(-1)
        return Views(
            features=out.pop("features"), patch_valid=by_image(patch_valid, 2),
            row_valid=by_image(row_valid, 2), origin=by_image(inputs.origin, 2), named=out,
        )  # fmt: skip

    # ---------------------------------------------------------------- streams and cuts

    def begin(
        self, inputs: Inputs, visual: VisualTokens, places: Int[Array, "B V"] | None = None
    ) -> Streams:
        """Embed the text and give every token its position (contiguous without `places`)."""
        b, v = visual.valid.shape
        zeros = partial(jnp.zeros, dtype=jnp.int32)
        at = zeros((b, 1)) if inputs.image_at is None or not v else inputs.image_at
        instruction = inputs.instruction & inputs.token_valid
        streams = renumber(
            Streams(
                prefix=self.decoder.embedded(inputs.prefix),
                prefix_valid=inputs.prefix_valid,
                prefix_position=zeros(inputs.prefix.shape),
                visual=visual.features,
                visual_valid=visual.valid,
                visual_position=zeros((b, v)),
                slot=jnp.broadcast_to(jnp.arange(v, dtype=jnp.int32), (b, v)),
                after=jnp.repeat(at, v // at.shape[1], axis=1),
                centre=visual.centre,
                view=visual.view,
                newline=visual.newline,
                token=self.decoder.embedded(inputs.tokens),
                token_valid=inputs.token_valid,
                token_position=zeros(inputs.tokens.shape),
                instruction=instruction,
                prompt=inputs.token_valid & ~inputs.label,
                last=last_of_prompt(inputs.token_valid, inputs.label),
                starts=before_spans(inputs.token_valid, inputs.label),
                raters=instruction,
                entered=visual.valid.sum(-1, dtype=jnp.int32),
            )
        )
        streams = self.rated(streams)
        return streams if places is None else spread(streams, places)

    def rated(self, s: Streams) -> Streams:
        """Streams at the decoder's entry with the raters that the method's cuts choose."""
        cut = self.method.rater
        if cut is None or not s.visual.shape[1]:
            return s
        asking = s.prompt if cut.raters == "text" else s.instruction
        return s._replace(raters=cut.rate(Entry(s.visual, s.visual_valid, s.token, asking)))

    def layer_view(self, s: Streams, stage: int, now: Streams | None = None) -> LayerView:
        """Queries and keys of the stage's first layer, for a cut at its entry.

        For a cut that looks back, `s` is what that layer ran on and `now` what stands at the cut.
        """
        now = s if now is None else now
        layer, cfg = self.decoder.first_layer(stage), self.decoder.cfg
        b, q, t, d = s.token.shape

        def project(hidden: Array, position: Array, linear: Any) -> Array:
            axis = "heads" if linear is layer.q else "kv_heads"
            rows = layer.heads(linear(layer.normed(layer.norm_1, hidden)), axis)
            return rotate(rows, rotary(cfg, position))

        token, at = s.token.reshape(b, q * t, d), s.token_position.reshape(b, q * t)
        by_question = lambda a: a.reshape(b, q, t, *a.shape[2:])  # noqa: E731
        return LayerView(
            q=by_question(project(token, at, layer.q)),
            k=by_question(project(token, at, layer.k)),
            k_prefix=project(s.prefix, s.prefix_position, layer.k),
            k_visual=project(s.visual, s.visual_position, layer.k),
            visual=now.visual, token=now.token, token_valid=s.token_valid,
            prefix_valid=s.prefix_valid, visual_valid=s.visual_valid, after=s.after,
            instruction=s.instruction, prompt=s.prompt, last=s.last, starts=s.starts,
            raters=s.raters, entered=s.entered,
        )  # fmt: skip

    def cut(
        self, s: Streams, stage: int, entering: int, ctx: Context, before: Streams | None = None
    ) -> tuple[Streams, Aux]:
        """Apply the method's cut at the entry of `stage`, if there is one and anything to cut.

        `before`: the streams that the stage before it ran on, for a cut that looks back.
        """
        cut: Cut | None = self.method.cut_before(stage)
        if cut is None or not s.visual.shape[1]:
            return s, empty_aux()
        slots = min(cut.slots(entering, ctx.train), s.visual.shape[1])
        ctx = ctx._replace(key=block_key(ctx, f"cut{cut.layer}"))
        if not cut.look_back:
            view = self.layer_view(s, stage)
        elif before is not None:
            view = self.layer_view(before, stage - 1, now=s)
        else:
            raise ValueError(f"the cut at layer {cut.layer} looks back: run the stage before it")
        kept, aux = cut.apply(view, slots, ctx)
        s = select_visual(s, kept)
        named = Aux(*({f"{k}@{cut.layer}": v for k, v in part.items()} for part in aux))
        return (renumber(s) if cut.renumber else s), named

    # ---------------------------------------------------------------- running

    def __call__(
        self,
        inputs: Inputs,
        ctx: Context,
        keep: int = 0,
        observe: bool = False,
        visual: VisualTokens | None = None,
        places: Int[Array, "B V"] | None = None,
    ) -> Output:
        """Run the whole model.

        keep: rows of room behind the prompt in the caches that come back (0: no caches).
        observe: also the attention that each visual slot gets from the asking rows, per layer.
        visual: tokens in the decoder's width that stand for the image (no tower then).
        places: positions of the visual tokens behind the prefix, rising, gaps allowed.
        """
        aux = empty_aux()
        if visual is None:
            visual, aux = self.see(inputs, ctx)
        s = self.begin(inputs, visual, places)
        every = range(len(self.decoder.stages))
        out = self.decode(s, every, s.visual.shape[1], ctx, keep, observe)
        b, q, t, d = out.streams.token.shape
        hidden = out.streams.token.reshape(b * q, t, d)
        aux = merge_aux(aux, out.aux)
        return Output(hidden, out.streams, out.caches, visual, aux, out.importance)

    def decode(
        self,
        s: Streams,
        stages: range,
        entering: int,
        ctx: Context,
        keep: int = 0,
        observe: bool = False,
        before: Streams | None = None,
    ) -> Decoded:
        """Run decoder stages, each behind its cut; `entering` slots entered the decoder.

        `before`: what the stage before these ran on (`Decoded.entry`), for a cut that looks back.
        """
        aux, caches, importance = empty_aux(), [], []
        ran = before
        for stage in stages:
            s, more = self.cut(s, stage, entering, ctx, ran)
            aux, ran = merge_aux(aux, more), s
            packed = pack(s)
            watch = watcher(s, packed) if observe else None
            hidden, kv, seen = self.run_stage(stage, s, packed, entering, bool(keep), watch)
            if kv is not None:
                caches.append(make_cache(kv, packed, keep, self.partly_absent(stage, s, packed)))
            s = unpack(s, packed, hidden)
            if seen is not None:
                importance.append((seen_by_visual(seen, packed, s), s.slot))
        return Decoded(s, tuple(caches), aux, tuple(importance), ran)

    def last_row(
        self, s: Streams, stages: range, entering: int, ctx: Context, room: int
    ) -> tuple[Float[Array, "B D"], tuple[StageCache, ...]]:
        """Run decoder stages up to the last for what follows a prompt: one row a sample."""
        out = self.decode(s, stages[:-1], entering, ctx, room)
        s, _ = self.cut(out.streams, stages[-1], entering, ctx, out.entry)
        packed, stage = pack(s), stages[-1]
        if in_part(self.method, s.visual.shape[1]):
            rows, kv, _ = self.run_stage(stage, s, packed, entering, keep=True)
            at = (packed.rows.length - 1).reshape(-1, 1, 1)
            hidden = jnp.take_along_axis(rows, at, axis=1)[:, 0]
        else:
            hidden, kv = self.decoder.run_last(stage, packed.hidden, packed.position, packed.rows)
        absent = self.partly_absent(stage, s, packed)
        return hidden, (*out.caches, make_cache(kv, packed, room, absent))

    # ---------------------------------------------------------------- visual compute

    def run_stage(
        self, stage: int, s: Streams, packed: Packed, entering: int, keep: bool = False, watch=None
    ) -> tuple[Float[Array, "B S D"], Any, Array | None]:
        """One stage by `Decoder.run`, or by the method's visual compute where tokens are left."""
        if not in_part(self.method, s.visual.shape[1]):
            return self.decoder.run(stage, packed.hidden, packed.position, packed.rows, keep, watch)
        rows, dims = find_layout(self.method, every_dims(self.cfg), entering, s.visual.shape[1])
        return visual_compute.run(
            self.decoder, self.method, stage, packed, s, rows, dims, keep, watch
        )

    def lacking(self, stage: int) -> Bool[np.ndarray, "L G"] | None:
        """Key heads of a stage's layers that do without visual rows; None where there is none."""
        return lacking_heads(self.method, dims_of(self.cfg, 1), stage)

    def partly_absent(self, stage: int, s: Streams, packed: Packed) -> Bool[Array, "B S"] | None:
        """The packed rows that some key heads do without."""
        if self.lacking(stage) is None or not s.visual.shape[1]:
            return None
        return is_visual(packed, s)


def no_visual(batch: int, cfg: ModelConfig) -> VisualTokens:
    """The visual stream of text alone: V = 0."""
    some = (batch, 0)
    return VisualTokens(
        features=jnp.zeros((*some, cfg.decoder.width), cfg.compute_dtype),
        valid=jnp.zeros(some, bool), centre=jnp.zeros((*some, 2)), side=jnp.zeros(some),
        view=jnp.zeros(some, jnp.int32), newline=jnp.zeros(some, bool),
    )  # fmt: skip


def every_dims(cfg: ModelConfig) -> list[Dims]:
    """The sizes for each number of tiles that an image may have."""
    least = min((rows * cols for rows, cols in cfg.grids), default=cfg.max_tiles) + 1
    return [dims_of(cfg, tiles) for tiles in (1, *range(least, cfg.max_tiles + 1))]


def make_cache(
    kv: Cache, packed: Packed, room: int, visual: Bool[Array, "B S"] | None = None
) -> StageCache:
    """Room for new rows behind the packed ones; the next position follows the last valid row."""
    length = packed.rows.length
    valid = jnp.arange(packed.position.shape[1]) < length[:, None]
    position = jnp.where(valid, packed.position, -1).max(-1) + 1
    return StageCache(kv, length, position, visual).with_room(room)


def watcher(s: Streams, packed: Packed):
    """An observer for `Decoder.run`: head-mean attention from the asking rows to every row."""
    b, q, t = s.token_valid.shape
    if q > 1:
        raise ValueError("observe needs one question a sample: flatten the questions first")
    asking = s.instruction | s.last
    weight = asking / jnp.maximum(asking.sum(-1, keepdims=True), 1)
    lead = jnp.zeros((b, s.prefix.shape[1] + s.visual.shape[1]))
    weight = jnp.concatenate([lead, weight.reshape(b, t)], axis=1)
    weight = jnp.take_along_axis(weight, packed.order, axis=1)
    return lambda queries, keys, mask: observed_attention(queries, keys, mask, weight)


def seen_by_visual(seen: Array, packed: Packed, s: Streams) -> Float[Array, "L B V"]:
    """Attention of packed rows back in the order of the visual stream."""
    inverse = jnp.argsort(packed.order, axis=1)
    p, v = s.prefix.shape[1], s.visual.shape[1]
    return jnp.take_along_axis(seen, inverse[None], axis=2)[:, :, p : p + v]
