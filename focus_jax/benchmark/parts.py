"""The parts of a run as programs of their own: vision stage, cuts, prefill, decode."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from focus_jax.benchmark.job import PREFIX, Job
from focus_jax.benchmark.ours import (
    context,
    decode_many,
    our_model,
    prefill_once,
)
from focus_jax.compress.method import Dims, Method, Views, VisualTokens, block_key
from focus_jax.compress.plan import Plan, plan
from focus_jax.compress.stitch import stitch
from focus_jax.config import ModelConfig
from focus_jax.generate import Caches, Prefilled, run_begin
from focus_jax.models.params import LAYERS, abstract, canonical, named_leaves, with_method
from focus_jax.models.vision import request_layer
from focus_jax.models.vlm import VLM, Inputs, dims_of, sizes_of
from focus_jax.sampling import Sampling

Rows = Mapping[str, jax.Array]  # what the tower hands out, by name
TIMED = 5.0  # seconds of repeats


class Timed(NamedTuple):
    """The median of several runs in seconds, and what the last of them gave."""

    seconds: float
    result: Any


def timed(call: Callable[[], Any]) -> Timed:
    """Runs until five are done or `TIMED` seconds are over."""
    times: list[float] = []
    while True:
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        if len(times) == 5 or sum(times) >= TIMED:
            return Timed(median(times), result)
        del result  # only one is in memory


# ------------------------------------------------------------------------------- weights


@dataclass(frozen=True, eq=False)
class Weights:
    """A model's parameters once, as a canonical tree: models of all methods share its arrays."""

    cfg: ModelConfig
    tree: Mapping[str, Any]

    def cut_to(self, layers: int) -> "Weights":
        """The same with the first layers of the decoder only."""
        cfg = with_layers(self.cfg, layers)
        tree = {k: v[:layers] if k.startswith(LAYERS) else v for k, v in self.tree.items()}
        return Weights(cfg, tree)

    def model(self, method: Method) -> VLM:
        """The model for a method; learned samplers have fresh weights where the tree has none."""
        dims = dims_of(self.cfg, self.cfg.max_tiles)
        fresh = lambda: {"samplers": {"vision": method.vision.init(dims, nnx.Rngs(0))}}  # noqa: E731
        return with_method(self.cfg, self.tree, method, fresh)


def with_layers(cfg: ModelConfig, layers: int) -> ModelConfig:
    """Another depth of the decoder."""
    return replace(cfg, decoder=replace(cfg.decoder, layers=layers))


def load(job: Job) -> Weights:
    """The job's checkpoint, or its preset with random weights."""
    vlm = our_model(replace(job, side="full"))
    return Weights(vlm.cfg, canonical(named_leaves(vlm)))


# -------------------------------------------------------------------------- vision stage


def requested(cfg: ModelConfig, method: Method) -> list[tuple[str, str, int]]:
    """What a vision stage asks of the tower: (request, name, layer)."""
    asked = method.vision.requests()
    return [(r, r.partition("@")[0], request_layer(r, cfg.vision.layers)) for r in asked]


def tower_rows(vlm: VLM, pixels: Any, layers: tuple[int, ...]) -> dict[str, jax.Array]:
    """What the tower always gives, and `hidden@l` of the layers, for all tiles."""
    flat = pixels.reshape(-1, *pixels.shape[2:])
    return vlm.vision(flat, tuple(f"hidden@{layer}" for layer in layers))


def shrunk(vlm: VLM, pixels: Any) -> jax.Array:
    """The images that a stage with a grid of its own lets the tower see."""
    side = vlm.method.vision.grid * vlm.cfg.vision.patch_size
    shape = (*pixels.shape[:2], side, side, 3)
    return jax.image.resize(pixels.astype(jnp.float32), shape, "linear", antialias=True)


def sampled(vlm: VLM, inputs: Inputs, rows: Rows, key: Any) -> VisualTokens:
    """What `VLM.see` does between tower and projector, the arrays that a stage asks for included.

    `rows` are what the tower gives, with the hidden rows of each requested layer.
    """
    stage, (b, m) = vlm.method.vision, inputs.pixels.shape[:2]
    asked = {
        request: vlm.vision.hand_out(name, layer, rows[f"hidden@{layer}"])
        for request, name, layer in requested(vlm.cfg, vlm.method)
    }
    named = {name: a.reshape(b, m, *a.shape[1:]) for name, a in {**rows, **asked}.items()}
    grid, dims = vlm.cfg.vision.grid, dims_of(vlm.cfg, m)
    row_valid = inputs.patch_valid.reshape(b, m, grid, grid).any(-1)
    features = named.pop("features")
    views = Views(features, inputs.patch_valid, row_valid, inputs.origin, named)
    ctx = context(block_key(context(key), "vision"))
    groups, _ = stage.apply(views, dims, vlm.samplers.get("vision"), vlm.projector, ctx)
    return stitch(groups, views, dims, stage.band(dims), stage.tile_newline)


def projected(vlm: VLM, tokens: VisualTokens) -> VisualTokens:
    """Tokens of the tower's width in the decoder's, newlines in their places."""
    features = vlm.projector(tokens.features)
    if vlm.image_newline is not None:
        line = vlm.image_newline[...].astype(features.dtype)
        features = jnp.where(tokens.newline[..., None], line, features)
    return tokens._replace(features=features)


# ------------------------------------------------------------------------------ counting


def planned(method: Method, cfg: ModelConfig, tiles: int, text: int) -> Plan:
    """The plan of the prompt that is timed, for one image."""
    dims, words = dims_of(cfg, tiles), text - PREFIX
    return plan(method, dims, sizes_of(cfg), words, prefix_tokens=PREFIX, head_tokens=1)


def prefill_flops(table: Plan, method: Method, dims: Dims) -> float:
    """Operations behind the tower: decoder, head and the cuts' scores."""
    flops = table.flops
    return flops.decoder + flops.head + flops.samplers - method.vision.flops(dims)


class Counted(NamedTuple):
    """What the compiler says of a prefill for one image, its attention without loops."""

    flops: float
    cache_bytes: float


def counted(method: Method, cfg: ModelConfig, inputs: Inputs) -> Counted:
    """Compiled from shapes alone. The compiler counts the body of a loop once, hence no loops."""
    cfg = replace(cfg, attention="xla")
    vlm, slots = abstract(cfg, method), method.vision.slots(dims_of(cfg, inputs.pixels.shape[1]))
    lowered = jax.jit(prefill_once, static_argnames="room").lower(
        vlm, inputs, visual_shapes(cfg, slots), jax.random.key(0), room=1
    )
    analysis = lowered.compile().cost_analysis() or {}
    return Counted(float(analysis["flops"]), cache_bytes(lowered.out_info.caches, 1))


def visual_shapes(cfg: ModelConfig, slots: int) -> VisualTokens:
    """One image's visual tokens without values."""
    flat = (1, slots)

    def make() -> VisualTokens:
        return VisualTokens(
            features=jnp.zeros((*flat, cfg.decoder.width), cfg.compute_dtype),
            valid=jnp.zeros(flat, bool), centre=jnp.zeros((*flat, 2)), side=jnp.zeros(flat),
            view=jnp.zeros(flat, jnp.int32), newline=jnp.zeros(flat, bool),
        )  # fmt: skip

    return jax.eval_shape(make)


def cache_bytes(caches: Caches, room: int) -> float:
    """Bytes of the keys and values themselves, without the rows that are kept free behind them."""
    leaves = jax.tree.leaves([cache.kv for cache in caches])
    each = (a.size // a.shape[-2] * (a.shape[-2] - room) * a.dtype.itemsize for a in leaves)
    return float(sum(each))


# -------------------------------------------------------------------------------- decode


def decode_rate(vlm: VLM, prompt: Prefilled, size: int) -> float:
    """Tokens a second of all rows together, by `generate.decode`; takes the caches over.

    The first step compiles; the median of two halves of the others counts.
    """
    key, rules = jax.random.key(0), Sampling(max_new_tokens=size).rules()
    state = run_begin(prompt.logits, prompt.caches, rules, key, size=size, greedy=True)
    done, rates = 1, []
    for until in sorted({2, (size + 2) // 2, size}):
        start, limit = time.perf_counter(), jnp.asarray(until, jnp.int32)
        state = jax.block_until_ready(decode_many(vlm, state, limit, rules, key))
        rates.append(len(prompt.logits) * (until - done) / (time.perf_counter() - start))
        done = until
    return median(rates[1:] or rates)
