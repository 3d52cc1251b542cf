"""Where a model parts from transformers': each module here on the input that it had there.

So the error of one module is not taken for that of those behind it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from focus_jax.config import ModelConfig
from focus_jax.data.images import Tiles
from focus_jax.hf_reference import (
    DECODER,
    HEAD,
    MERGED,
    NEWLINE,
    PACKED,
    PIXELS,
    PROJECTOR,
    TOWER_FEATURES,
    Reference,
)
from focus_jax.models.attention import Rows
from focus_jax.models.decoder import Decoder
from focus_jax.models.vlm import VLM


class Ours(NamedTuple):
    """What this model computes of a prompt; rows stand in the order of the merged sequence.

    `ids`: image tokens in the places of visual rows, which `visual` marks. `features`: what stands
    for all images, packed, newlines included. `merged`: what enters the decoder. `tokens`: greedy,
    the stop token included.
    """

    ids: Int[np.ndarray, " S"]
    visual: Bool[np.ndarray, " S"]
    features: Float[np.ndarray, "V D"]
    merged: Float[np.ndarray, "S D"]
    logits: Float[np.ndarray, "S W"]
    tokens: Int[np.ndarray, " N"]


class Step(NamedTuple):
    """What came out of one module here and there.

    `whole`: of all that is in front as well, which shows what no module alone can: order, places.
    """

    module: str
    ours: Float[np.ndarray, "..."]
    theirs: Float[np.ndarray, "..."]
    whole: bool = False

    def apart(self) -> float:
        """The greatest difference, in root mean squares of the reference's row."""
        if self.ours.shape != self.theirs.shape:
            return np.inf
        difference = np.abs(self.ours - self.theirs).max(axis=-1, initial=0.0)
        scale = np.sqrt(np.mean(np.square(self.theirs, dtype=np.float64), axis=-1))
        worst = (difference / np.maximum(scale, 1e-6)).max(initial=0.0)
        return float(worst) if np.isfinite(worst) else np.inf

    def difference(self) -> float | None:
        """The greatest absolute difference; None where shapes differ or there is no number."""
        if self.ours.shape != self.theirs.shape:
            return None
        worst = np.abs(self.ours - self.theirs).max(initial=0.0)
        return float(worst) if np.isfinite(worst) else None


class Bars(NamedTuple):
    """How far `Step.apart` may go: a module alone, and all that is in front as well."""

    alone: float
    whole: float


def first_mismatch(steps: Iterator[Step], bars: Bars) -> Step | None:
    """The first step beyond its bar; None where roundings add up and no module stands out."""
    beyond = (s for s in steps if s.apart() > (bars.whole if s.whole else bars.alone))
    return next(beyond, None)


def steps(vlm: VLM, tiles: Sequence[Tiles], ours: Ours, theirs: Reference) -> Iterator[Step]:
    """Every module, in the order in which transformers runs them; token ids must be equal."""
    if tiles:
        yield from tower_steps(vlm, tiles, theirs)
        yield from connector_steps(vlm, ours, theirs)
    embedded, merged = theirs.seen[MERGED][0], ours.merged
    text = ~ours.visual
    yield Step(f"{DECODER}.embed_tokens", merged[text], embedded[text])
    yield Step(MERGED, merged, embedded, whole=True)
    yield from decoder_steps(vlm, theirs)


def pixels_step(cfg: ModelConfig, tiles: Sequence[Tiles], theirs: Reference) -> Step:
    """All tiles as the tower takes them, in float32."""
    pixels = np.concatenate([one.pixels for one in tiles]).astype(np.float32)
    mean, std = (np.asarray(x, np.float32) for x in (cfg.vision.pixel_mean, cfg.vision.pixel_std))
    ours = (pixels / np.float32(255) - mean) / std
    given = theirs.seen[PIXELS].transpose(0, 2, 3, 1)
    return Step(PIXELS, ours.reshape(len(ours), -1), given.reshape(len(given), -1))


def tower_steps(vlm: VLM, tiles: Sequence[Tiles], theirs: Reference) -> Iterator[Step]:
    """The tower up to the layer whose output is used."""
    tower, seen, dtype = vlm.vision, theirs.seen, vlm.vision.dtype
    [name] = (key.removesuffix(".embeddings") for key in seen if key.endswith(".embeddings"))
    pixels = jnp.asarray(np.concatenate([one.pixels for one in tiles]))
    # The embedding comes out behind its norm here: the norm alone tells which of the two it is.
    norm = f"{name}.pre_layrnorm"
    alone = call(tower.pre_norm, as_(seen[f"{name}.embeddings"], dtype))
    yield Step(norm, single(alone), seen[norm])
    yield Step(f"{name}.embeddings", single(tower_embedding(tower, pixels)), seen[norm])
    entering = seen[norm]
    for i in range(tower.cfg.depth):
        layer, left = f"{name}.encoder.layers.{i}", seen[f"{name}.encoder.layers.{i}"]
        block = jax.tree.map(lambda a, i=i: a[i], tower.layers)
        yield Step(layer, single(call(block, as_(entering, dtype))), left)
        entering = left
    yield Step(name, single(call(tower, pixels)["features"]), seen[TOWER_FEATURES], whole=True)


def connector_steps(vlm: VLM, ours: Ours, theirs: Reference) -> Iterator[Step]:
    """Projector, newline, and how the rows of all tiles are packed."""
    seen = theirs.seen
    features = as_(seen[TOWER_FEATURES], vlm.vision.dtype)
    yield Step(PROJECTOR, single(call(vlm.projector, features)), seen[PROJECTOR])
    if vlm.image_newline is not None:
        yield Step(NEWLINE, single(vlm.image_newline[...])[None], seen[NEWLINE])
    yield Step(PACKED, ours.features, theirs.features, whole=True)


def decoder_steps(vlm: VLM, theirs: Reference) -> Iterator[Step]:
    """Each layer of a decoder that has one stage, the last norm, the head."""
    decoder, seen, dtype = vlm.decoder, theirs.seen, jnp.dtype(vlm.cfg.compute_dtype)
    entering = seen[MERGED]
    for i in range(decoder.cfg.layers):
        name = f"{DECODER}.layers.{i}"
        out = first_stage(only_layer(decoder, i), as_(entering, dtype))
        yield Step(name, single(out), seen[name])
        entering = seen[name]
    last = as_(entering, dtype)
    yield Step(f"{DECODER}.norm", single(call(decoder.norm, last)), seen[f"{DECODER}.norm"])
    yield Step(HEAD, single(head(decoder, last))[0], theirs.logits)


# Compiled once for all layers of a model.
call = jax.jit(lambda module, x: module(x))
tower_embedding = jax.jit(lambda tower, pixels: tower.embed(pixels))
head = jax.jit(lambda decoder, x: decoder.logits(x))


@jax.jit
def first_stage(decoder: Decoder, x: Float[Array, "1 S D"]) -> Float[Array, "1 S D"]:
    """One stage on rows that count from 0."""
    size = x.shape[1]
    return decoder.run(0, x, jnp.arange(size)[None], Rows(jnp.array([size])))[0]


def only_layer(decoder: Decoder, layer: int) -> Decoder:
    """A decoder whose one stage has only this layer."""
    [stage], alone = decoder.stages, jax.tree.map(lambda a: a, decoder)
    if isinstance(stage, nnx.List):
        alone.stages = nnx.List([nnx.List([stage[layer]])])
    else:
        alone.stages = nnx.List([jax.tree.map(lambda a: a[layer : layer + 1], stage)])
    return alone


def as_(x: np.ndarray, dtype: jnp.dtype) -> Array:
    return jnp.asarray(x, dtype)


def single(x: Array) -> Float[np.ndarray, "*S"]:
    """On the host in float32."""
    return np.asarray(x).astype(np.float32)
