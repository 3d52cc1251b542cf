"""The vision-language model: executes whatever compression method it is given."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from focus_jax.compress.method import (
    Aux,
    Context,
    Cut,
    Dims,
    LayerView,
    Method,
    Views,
    VisualTokens,
    block_key,
    empty_aux,
    merge_aux,
    stitch,
)
from focus_jax.compress.plan import Sizes
from focus_jax.config import ModelConfig
from focus_jax.models.blocked_attention import ROWS
from focus_jax.models.decoder import Cache, Decoder, observed_attention, rotary, rotate
from focus_jax.models.projector import Projector
from focus_jax.models.streams import (
    Packed,
    Streams,
    last_of_prompt,
    pack,
    renumber,
    select_visual,
    spread,
    unpack,
)
from focus_jax.models.vision import VisionTower


class Inputs(NamedTuple):
    """One batch. Tile 0 is the thumbnail where M > 1; questions stand behind the image.

    `origin`: (row, col) of a tile's first patch in the stitched grid. `instruction`: the user's
    own words. `label`: supervised tokens (all False for a prompt). `row_valid`: rows of a tile
    that belong to the unpadded grid; without it, those with a valid patch. `image_at`: I images in
    one prompt, each with M / I tiles, at rising places: how many of the question's tokens (Q = 1)
    stand before each. A sample with fewer images has no valid patch in the others.
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


class StageCache(NamedTuple):
    """One decoder stage's keys and values, its valid rows, and the next token's position."""

    kv: Cache
    length: Int[Array, " B"]
    position: Int[Array, " B"]

    @property
    def size(self) -> int:
        """Rows that it has room for."""
        return jax.tree.leaves(self.kv)[0].shape[-2]

    def with_room(self, rows: int) -> "StageCache":
        """The same with more room behind; copies it."""
        grow = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rows), (0, 0)])  # noqa: E731
        return self._replace(kv=jax.tree.map(grow, self.kv))


class Output(NamedTuple):
    """Final hidden rows of the questions, flat [B*Q T D], and what was asked for on the way."""

    hidden: Float[Array, "BQ T D"]
    streams: Streams
    caches: tuple[StageCache, ...]
    visual: VisualTokens
    aux: Aux
    importance: tuple[tuple[Array, Array], ...]


def dims_of(cfg: ModelConfig, tiles: int) -> Dims:
    """What a method needs to know of a model, for images of `tiles` tiles."""
    return Dims(
        rows=cfg.vision.grid, cols=cfg.vision.grid, tiles=tiles, grids=cfg.grids,
        vision_width=cfg.vision.width, width=cfg.decoder.width, layers=cfg.decoder.layers,
        newline=cfg.image_newline,
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

    def __init__(self, cfg: ModelConfig, method: Method, *, rngs: nnx.Rngs):
        dims = dims_of(cfg, cfg.max_tiles)
        method.check(dims)
        self.cfg, self.method = cfg, method
        self.vision = VisionTower(cfg, rngs=rngs)
        self.projector = Projector(
            cfg.projector, cfg.vision.width, cfg.decoder.width,
            dtype=jnp.dtype(cfg.compute_dtype), param_dtype=jnp.dtype(cfg.param_dtype), rngs=rngs,
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
        self.decoder = Decoder(cfg, method.bounds, rngs=rngs)
        sampler = method.vision.init(dims, rngs)
        self.samplers = nnx.Dict({} if sampler is None else {"vision": sampler})

    # ---------------------------------------------------------------- visual tokens

    def see(self, inputs: Inputs, ctx: Context) -> tuple[VisualTokens, Aux]:
        """Tower, vision stage, projector: visual tokens in the decoder's width.

        Images of one prompt are seen apart from each other and stand one behind another.
        """
        stage, b = self.method.vision, inputs.pixels.shape[0]
        views = self.look(inputs)
        dims = dims_of(self.cfg, views.features.shape[1])
        module = self.samplers.get("vision")
        groups, aux = stage.apply(
            views, dims, module, self.projector, ctx._replace(key=block_key(ctx, "vision"))
        )
        tokens = stitch(groups, views, dims, stage.band(dims))
        features = self.projector(tokens.features)
        if self.image_newline is not None:
            line = self.image_newline[...].astype(features.dtype)
            features = jnp.where(tokens.newline[..., None], line, features)
        tokens = tokens._replace(features=features)
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
        at = zeros((b, 1)) if inputs.image_at is None else inputs.image_at
        streams = renumber(
            Streams(
                prefix=self.decoder.embed(inputs.prefix),
                prefix_valid=inputs.prefix_valid,
                prefix_position=zeros(inputs.prefix.shape),
                visual=visual.features,
                visual_valid=visual.valid,
                visual_position=zeros((b, v)),
                slot=jnp.broadcast_to(jnp.arange(v, dtype=jnp.int32), (b, v)),
                after=jnp.repeat(at, v // at.shape[1], axis=1),
                token=self.decoder.embed(inputs.tokens),
                token_valid=inputs.token_valid,
                token_position=zeros(inputs.tokens.shape),
                instruction=inputs.instruction & inputs.token_valid,
                last=last_of_prompt(inputs.token_valid, inputs.label),
                entered=visual.valid.sum(-1, dtype=jnp.int32),
            )
        )
        return streams if places is None else spread(streams, places)

    def layer_view(self, s: Streams, stage: int) -> LayerView:
        """Queries and keys of the stage's first layer, for a cut at its entry."""
        layer, cfg = self.decoder.first_layer(stage), self.decoder.cfg
        b, q, t, d = s.token.shape

        def project(hidden: Array, position: Array, linear: Any) -> Array:
            return rotate(layer.heads(linear(layer.norm_1(hidden))), rotary(cfg, position))

        token, at = s.token.reshape(b, q * t, d), s.token_position.reshape(b, q * t)
        by_question = lambda a: a.reshape(b, q, t, *a.shape[2:])  # noqa: E731
        return LayerView(
            q=by_question(project(token, at, layer.q)),
            k=by_question(project(token, at, layer.k)),
            k_prefix=project(s.prefix, s.prefix_position, layer.k),
            k_visual=project(s.visual, s.visual_position, layer.k),
            visual=s.visual, token_valid=s.token_valid, prefix_valid=s.prefix_valid,
            visual_valid=s.visual_valid, after=s.after, instruction=s.instruction, last=s.last,
            entered=s.entered,
        )  # fmt: skip

    def cut(self, s: Streams, stage: int, entering: int, ctx: Context) -> tuple[Streams, Aux]:
        """Apply the method's cut at the entry of `stage`, if there is one."""
        cut: Cut | None = self.method.cut_before(stage)
        if cut is None:
            return s, empty_aux()
        slots = min(cut.slots(entering, ctx.train), s.visual.shape[1])
        ctx = ctx._replace(key=block_key(ctx, f"cut{cut.layer}"))
        selection, aux = cut.select(self.layer_view(s, stage), slots, ctx)
        s = select_visual(s, selection)
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
        s, caches, more, importance = self.decode(s, every, s.visual.shape[1], ctx, keep, observe)
        b, q, t, d = s.token.shape
        hidden = s.token.reshape(b * q, t, d)
        return Output(hidden, s, caches, visual, merge_aux(aux, more), importance)

    def decode(
        self,
        s: Streams,
        stages: range,
        entering: int,
        ctx: Context,
        keep: int = 0,
        observe: bool = False,
    ) -> tuple[Streams, tuple[StageCache, ...], Aux, tuple[tuple[Array, Array], ...]]:
        """Run decoder stages, each behind its cut; `entering` slots entered the decoder."""
        aux, caches, importance = empty_aux(), [], []
        for stage in stages:
            s, more = self.cut(s, stage, entering, ctx)
            aux = merge_aux(aux, more)
            packed = pack(s)
            watch = watcher(s, packed) if observe else None
            hidden, kv, seen = self.decoder.run(
                stage, packed.hidden, packed.position, packed.rows, bool(keep), watch
            )
            s = unpack(s, packed, hidden)
            if kv is not None:
                caches.append(make_cache(kv, packed, keep))
            if seen is not None:
                importance.append((seen_by_visual(seen, packed, s), s.slot))
        return s, tuple(caches), aux, tuple(importance)

    def last_row(
        self, s: Streams, stages: range, entering: int, ctx: Context, room: int
    ) -> tuple[Float[Array, "B D"], tuple[StageCache, ...]]:
        """Run decoder stages up to the last for what follows a prompt: one row a sample."""
        s, caches, *_ = self.decode(s, stages[:-1], entering, ctx, room)
        s, _ = self.cut(s, stages[-1], entering, ctx)
        packed = pack(s)
        hidden, kv = self.decoder.run_last(stages[-1], packed.hidden, packed.position, packed.rows)
        return hidden, (*caches, make_cache(kv, packed, room))


def make_cache(kv: Cache, packed: Packed, room: int) -> StageCache:
    """Room for new rows behind the packed ones; the next position follows the last valid row."""
    length = packed.rows.length
    valid = jnp.arange(packed.position.shape[1]) < length[:, None]
    position = jnp.where(valid, packed.position, -1).max(-1) + 1
    return StageCache(kv, length, position).with_room(room)


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
