"""Plans by analysis alone, for chips whose programs cannot be compiled here.

Arguments are exact. The rest follows from the sizes of the model and how a layout runs it: weights
gathered over `fsdp` layer by layer, forward and backward, gradients reduced and scattered, two
sums over `tensor` in each half of a layer. The compiler may do better or worse.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import jax.numpy as jnp

from focus_jax.compress.plan import StageRows
from focus_jax.config import ModelConfig
from focus_jax.models import params as names
from focus_jax.pods.compiled import Memory, argument_bytes
from focus_jax.pods.counts import Request, stages_of, times
from focus_jax.pods.hlo import Collective
from focus_jax.pods.programs import Job, program
from focus_jax.sharding import Layout
from focus_jax.step import learns


class Estimate(NamedTuple):
    """What a compiler would be asked: memory, operations beyond the model's, traffic."""

    memory: Memory
    recomputed: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]


class Weight(NamedTuple):
    """A kernel as a device uses it: whole but for its part along `tensor`."""

    name: str
    numbers: int
    learns: bool
    layers: int


def estimate(job: Job, layout: Layout, request: Request, forward_flops: float) -> Estimate:
    """`forward_flops`: of the decoder, on one device."""
    _, arguments = program(job, layout)
    argument = argument_bytes(arguments)
    weights = tuple(kernels(job, layout))
    rows = tuple(local_rows(job, layout, request))
    held = saved(job, layout, rows) + working(job, layout, rows) + in_use(job, layout, weights)
    train = job.what == "train"
    output = argument if train or job.what == "decode" else 0
    memory = Memory(argument, output, output, round(held))
    again = forward_flops * recomputed(job.cfg.model) if train else 0.0
    parts = job.stage.accumulate if train else 1
    once = (*gathers(job, layout, weights), *sums(job, layout, rows))
    collectives = tuple(one._replace(times=parts * one.times) for one in once)
    moved = sum(one.total for one in collectives)
    hbm = (2 if train else 1) * argument + 2 * moved + 2 * parts * held
    return Estimate(memory, again, hbm, collectives)


def recomputed(model: ModelConfig) -> float:
    """The share of a layer's products that its backward pass makes again."""
    cfg = model.decoder
    heads = cfg.width * (2 * cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
    share = heads / (heads + 3 * cfg.width * cfg.mlp_width)
    return {"full": 1.0, "mlp": share}.get(model.remat, 0.0)


def width(model: ModelConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return jnp.dtype(model.compute_dtype).itemsize


def kernels(job: Job, layout: Layout) -> Iterator[Weight]:
    """All matrices of the model."""
    model = job.cfg.model
    for name, leaf in names.named_leaves(names.abstract(model, job.method)).items():
        canonical = names.canonical_name(name)
        if leaf.ndim < 2 or names.is_sampler(canonical):
            continue
        shape = layout.used(canonical, leaf.shape).shard_shape(leaf.shape)
        layers = leaf.shape[0] if ".layers." in canonical else 1
        own = job.what == "train" and learns(canonical, job.stage)
        yield Weight(canonical, prod(shape), own, layers)


def local_rows(job: Job, layout: Layout, request: Request) -> Iterator[StageRows]:
    """Decoder stages with the rows of one device's samples; one row a sample when decoding."""
    own = job.stage.batch // layout.ways("batch")
    train = job.what == "train"
    for stage in stages_of(job.cfg.model, job.method, request, train):
        rows = 1 if job.what == "decode" else stage.rows
        yield stage._replace(rows=rows, samples=stage.samples * own)


# --------------------------------------------------------------------------------- memory


def saved(job: Job, layout: Layout, rows: tuple[StageRows, ...]) -> float:
    """Bytes that the forward pass keeps for the backward one, over all layers."""
    if job.what != "train":
        return 0.0
    each = kept_numbers(job.cfg.model, layout.ways("heads"), layout.ways("mlp"))
    return width(job.cfg.model) * sum(s.layers * s.samples * s.rows * each for s in rows)


def kept_numbers(model: ModelConfig, heads: int, mlp: int) -> float:
    """Numbers of one row and layer: its input, and what the remat policy keeps beside it."""
    cfg = model.decoder
    inner = (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim / heads
    own = cfg.width + cfg.heads * cfg.head_dim / heads  # its input, and attention's output
    if model.remat == "full":
        return own
    if model.remat == "mlp":
        return own + 2 * cfg.mlp_width / mlp
    dots = own + 2 * cfg.width + inner + 2 * cfg.mlp_width / mlp
    return dots if model.remat != "none" else dots + 4 * cfg.width + inner + 2 * cfg.mlp_width / mlp


def working(job: Job, layout: Layout, rows: tuple[StageRows, ...]) -> float:
    """Bytes of the layer at work: its inputs, products and, in training, their gradients."""
    cfg = job.cfg.model.decoder
    inner = (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim / layout.ways("heads")
    each = 4 * cfg.width + inner + 3 * cfg.mlp_width / layout.ways("mlp")
    most = max(s.samples * s.rows for s in rows)
    return (2 if job.what == "train" else 1) * width(job.cfg.model) * most * each


def in_use(job: Job, layout: Layout, weights: tuple[Weight, ...]) -> float:
    """Bytes of gathered weights, two layers' at a time and the largest matrix outside of them; and
    of gradients, which are kept as masters are.
    """
    size = width(job.cfg.model)
    layer = sum(w.numbers / w.layers for w in weights if ".layers." in w.name)
    gradients = 4 * sum(w.numbers for w in weights if w.learns) / layout.ways("embed")
    outside = max(w.numbers for w in weights if ".layers." not in w.name)
    return size * (2 * layer + outside) + gradients


# ------------------------------------------------------------------------------ collectives


def gathers(job: Job, layout: Layout, weights: tuple[Weight, ...]) -> Iterator[Collective]:
    """Weights on their way to where they are used, and gradients back."""
    size, ways = width(job.cfg.model), layout.ways("embed")
    axes = layout.mesh_axes("embed") or ()
    extra = tuple(a for a in layout.mesh_axes("batch") or () if a not in axes)
    for weight in weights:
        once = weight.numbers // weight.layers
        if ways > 1:
            passes = 2 if job.what == "train" and backward(job, weight) else 1
            yield made("all-gather", once * size, ways, axes, passes * weight.layers, weight.name)
        if not weight.learns:
            continue
        if ways > 1:
            yield made("reduce-scatter", once * size, ways, axes, weight.layers, weight.name)
        if extra:
            over = prod(layout.mesh.shape[a] for a in extra)
            part = once * size // ways
            yield made("all-reduce", part, over, extra, weight.layers, weight.name)


def backward(job: Job, weight: Weight) -> bool:
    """Whether gradients pass a weight."""
    by = times(job.stage)
    part = weight.name.partition(".")[0]
    return by[{"vision": "tower"}.get(part, part)] > 1


def sums(job: Job, layout: Layout, rows: tuple[StageRows, ...]) -> Iterator[Collective]:
    """Two sums a layer over `tensor`, forward and backward, and again where it is recomputed."""
    axes, ways = layout.mesh_axes("mlp") or (), layout.ways("mlp")
    if ways == 1:
        return
    passes = 1
    if job.what == "train":
        passes = 3 if job.cfg.model.remat == "full" else 2
    for i, stage in enumerate(rows):
        payload = stage.samples * stage.rows * job.cfg.model.decoder.width * width(job.cfg.model)
        runs = 2 * passes * stage.layers
        yield made("all-reduce", payload, ways, axes, runs, f"decoder stage {i}")


def made(
    kind: str, payload: int, size: int, axes: tuple[str, ...], runs: int, name: str
) -> Collective:
    """A collective that is supposed rather than seen."""
    return Collective(kind, (), payload, size, axes, runs, name)
