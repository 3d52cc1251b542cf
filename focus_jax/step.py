"""One optimiser step as one compiled program: which parameters learn, how, and from what."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, UInt32
from optax.contrib import MuonDimensionNumbers, muon

from focus_jax.compress.baselines import full
from focus_jax.compress.method import Context
from focus_jax.config import LoraConfig, ModelConfig
from focus_jax.experiment import Experiment, TrainConfig, TrainStage
from focus_jax.gradient_norms import gradient_norms
from focus_jax.models import params as names
from focus_jax.models.attention import check_heads
from focus_jax.models.lora import PREFIX, is_lora
from focus_jax.models.vlm import VLM, dims_of
from focus_jax.nans import unrolled
from focus_jax.objectives import OBJECTIVES
from focus_jax.sharding import Layout, replicated

Leaves = dict[str, Array]


class State(NamedTuple):
    """What a stage's steps change: learning parameters by name, and the optimiser's moments."""

    learning: Leaves
    optimiser: optax.OptState


def learns(name: str, stage: TrainStage) -> bool:
    """Whether a parameter (canonical name) learns in this stage."""
    return any(name.startswith(prefix) for prefix in stage.train)


def check_prefixes(stage: TrainStage, parameters: set[str]) -> None:
    """ValueError for a prefix without parameters; `samplers.` may await a method that has some."""
    for field, prefixes in (("train", stage.train), ("scale", [p for p, _ in stage.scale])):
        for prefix in prefixes:
            fits = any(name.startswith(prefix) for name in parameters)
            if not fits and not names.is_sampler(prefix):
                raise ValueError(
                    f"stage {stage.name!r}: {field} names {prefix!r}, and no parameter begins so; "
                    f"names begin with {sorted({name.split('.')[0] for name in parameters})}"
                )


def check_lora(stage: TrainStage, lora: LoraConfig) -> None:
    """ValueError for a stage that trains kernels together with their low-rank updates."""
    for target in lora.targets if lora.rank else ():
        kernel = f"decoder.layers.{target}.kernel"
        if learns(kernel, stage):
            [prefix, *_] = [p for p in stage.train if kernel.startswith(p)]
            raise ValueError(
                f"stage {stage.name!r}: train names {prefix!r}, by which {kernel} would learn "
                f"beside its low-rank update (model.lora.rank={lora.rank}): name {PREFIX!r} in its "
                "place, or set model.lora.rank to 0"
            )


def make_optimiser(cfg: TrainConfig, stage: TrainStage) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine, learning rates by part; Muon if asked.

    Beside Muon, all other leaves are under AdamW with Nesterov momentum: optax gives both the same.
    """
    warmup = max(1, round(stage.warmup * stage.steps))

    def schedule(peak: float) -> optax.Schedule:
        steps = max(stage.steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, stage.final * peak)

    def by_part(updates: Leaves, params: Any = None) -> Leaves:
        return {
            name: u * part_scale(names.canonical_name(name), stage) for name, u in updates.items()
        }

    rate = schedule(stage.learning_rate)
    inner = optax.adamw(rate, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay)
    if stage.muon:
        inner = muon(
            schedule(stage.muon), weight_decay=cfg.weight_decay, adam_learning_rate=rate,
            adam_b1=cfg.b1, adam_b2=cfg.b2, adam_weight_decay=cfg.weight_decay,
            muon_weight_dimension_numbers=stacked_kernels,
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(stage.clip), inner, optax.stateless(by_part))


def stacked_kernels(leaves: Leaves) -> dict[str, Any]:
    """Which axes of the decoder's stacked kernels [L, in, out] Muon makes orthogonal; None: Adam's.

    The optimiser asks with leaves that it has masked, too.
    """

    def axes(name: str, leaf: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        kernel = name.startswith("decoder.") and name.endswith(".kernel") and leaf.ndim == 3
        return MuonDimensionNumbers(1, 2) if kernel else None

    return {name: axes(name, leaf) for name, leaf in leaves.items()}


def part_scale(name: str, stage: TrainStage) -> float:
    """The factor on the learning rate of one parameter: that of the longest prefix."""
    fitting = [(len(prefix), factor) for prefix, factor in stage.scale if name.startswith(prefix)]
    return max(fitting)[1] if fitting else 1.0


# ----------------------------------------------------------------------------- the state


def split(leaves: Leaves, stage: TrainStage) -> tuple[Leaves, Leaves]:
    """(those that learn in this stage, the frozen ones). ValueError where none learns."""
    learning = {k: v for k, v in leaves.items() if learns(names.canonical_name(k), stage)}
    if not learning:
        raise ValueError(
            f"stage {stage.name!r}: no parameter learns with train={stage.train}; names begin "
            f"with {sorted({name.split('.')[0] for name in leaves})}"
        )
    return learning, {k: v for k, v in leaves.items() if k not in learning}


def state_shardings(state: State, layout: Layout) -> State:
    """Where a state (or its shapes) is kept: moments beside their parameters."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        owners = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not owners or owners[-1] not in state.learning:
            return replicated(layout.mesh)  # counters
        return layout.stored(names.canonical_name(owners[-1]), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def first_state(learning: Leaves, optimiser: optax.GradientTransformation, layout: Layout) -> State:
    """The state that a stage starts from; a copy, for the step donates it."""
    make = lambda own: State(jax.tree.map(jnp.copy, own), optimiser.init(own))  # noqa: E731
    shardings = state_shardings(jax.eval_shape(make, learning), layout)
    return jax.jit(make, out_shardings=shardings)(learning)


# ------------------------------------------------------------------------------ the step

Step = Callable[..., tuple[State, dict[str, Array]]]
Metrics = dict[str, Array]


def make_step(
    structure: VLM,
    stage: TrainStage,
    optimiser: optax.GradientTransformation,
    layout: Layout,
) -> Step:
    """One optimiser step, compiled, the same program for every seed; the state is donated.

    step(state, frozen, batches, seed, number, progress) -> (state, metrics). `batches`: arrays
    [A B ...], of which gradients and metrics are averaged. `seed`: the run's, as `seed_words` has
    it. `number` is that of the step's first batch in the run. Gradients are kept as the parameters
    are, as soon as they are made.
    """
    objective = OBJECTIVES[str(stage.objective)]

    def loss(learning: Leaves, frozen: Leaves, batch: Any, ctx: Context) -> tuple[Array, Metrics]:
        leaves = to_compute({**frozen, **learning}, structure.cfg, layout)
        out = objective(names.with_leaves(structure, leaves), batch, ctx)
        return out.value, out.metrics

    def gradients(
        learning: Leaves, frozen: Leaves, seed: Array, batch: Any, number: Array, progress: Array
    ) -> tuple[Leaves, Metrics]:
        key = jax.random.wrap_key_data(seed)
        ctx = Context(jax.random.fold_in(key, number), True, progress)
        run = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = run(learning, frozen, batch, ctx)
        places = names.stored(grads, layout)
        grads = {k: jax.lax.with_sharding_constraint(g, places[k]) for k, g in grads.items()}
        return grads, {"loss": value, **gradient_norms(grads), **metrics}

    def step(
        state: State, frozen: Leaves, batches: Any, seed: Array, number: Array, progress: Array
    ) -> tuple[State, Metrics]:
        own = partial(gradients, state.learning, frozen, seed)
        grads, metrics = averaged(own, batches, number, progress)
        updates, moments = optimiser.update(grads, state.optimiser, state.learning)
        learning = optax.apply_updates(state.learning, updates)
        return State(learning, moments), metrics

    learning, _ = split(names.named_leaves(structure), stage)
    shape = jax.eval_shape(lambda own: State(own, optimiser.init(own)), learning)
    shardings = (state_shardings(shape, layout), replicated(layout.mesh))
    return jax.jit(unrolled(step), donate_argnums=0, out_shardings=shardings)


def seed_words(seed: int) -> UInt32[np.ndarray, " W"]:
    """A seed as the step takes it: the words of its key."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def averaged(
    gradients: Callable, batches: Any, number: Array, progress: Array
) -> tuple[Leaves, Metrics]:
    """The mean of `gradients(batch, number, progress)` over the first axis of `batches`."""
    count = jax.tree.leaves(batches)[0].shape[0]
    first = jax.tree.map(lambda a: a[0], batches)
    if count == 1:
        return gradients(first, number, progress)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        own, at = batch
        return jax.tree.map(jnp.add, total, gradients(own, number + at, progress)), None

    # From zero, and not from the first batch: outside of a loop, a compiler may run two at once.
    shapes = jax.eval_shape(gradients, first, number, progress)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(add, zero, (batches, jnp.arange(count)))
    return jax.tree.map(lambda a: a / count, total)


def to_compute(leaves: Leaves, cfg: ModelConfig, layout: Layout) -> Leaves:
    """Kernels in the compute dtype before they are gathered, so that half the bytes travel.

    The layers would cast them to it anyhow; norms, biases and samplers keep their own.
    """
    dtype = jnp.dtype(cfg.compute_dtype)

    def cast(name: str, leaf: Array) -> Array:
        kernel = name.endswith(("kernel", "embedding")) and not names.is_sampler(name)
        kernel = kernel or is_lora(names.canonical_name(name))
        if not kernel or leaf.dtype.itemsize <= dtype.itemsize:
            return leaf
        place = layout.stored(names.canonical_name(name), leaf.shape)
        return jax.lax.with_sharding_constraint(leaf.astype(dtype), place)

    return {name: cast(name, leaf) for name, leaf in leaves.items()}


# --------------------------------------------------------------------- without any values


def abstract_step(
    cfg: Experiment, stage: TrainStage, layout: Layout, tiles: int
) -> tuple[Step, tuple[Any, ...]]:
    """A stage's step and the shapes of its arguments, with shardings: for compiling it alone."""
    check_lora(stage, cfg.model.lora)
    method = cfg.compress.value() if stage.samplers else full()
    method.check(dims_of(cfg.model, tiles))
    layout.check_batch(stage.batch)
    check_heads(cfg.model, layout)
    structure = names.abstract(cfg.model, method, layout)
    optimiser = make_optimiser(cfg.train, stage)
    learning, frozen = split(names.named_leaves(structure), stage)
    state = jax.eval_shape(lambda own: State(own, optimiser.init(own)), learning)
    batches = {
        name: jax.ShapeDtypeStruct(
            (stage.accumulate, *leaf.shape), leaf.dtype, sharding=layout.sharding(None, "batch")
        )
        for name, leaf in abstract_batch(cfg, stage, tiles).items()
    }
    whole = replicated(layout.mesh)
    arguments = (
        with_shardings(state, state_shardings(state, layout)),
        with_shardings(frozen, names.stored(frozen, layout)),
        batches,
        with_shardings(seed_words(0), whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    )
    step = make_step(structure, stage, optimiser, layout)
    return step, arguments


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes with a place each."""
    return jax.tree.map(
        lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), shapes, shardings
    )


def abstract_batch(
    cfg: Experiment, stage: TrainStage, tiles: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what objective `answers` reads of a batch."""
    vision, b, q = cfg.model.vision, stage.batch, stage.questions
    t, p, side = cfg.data.text_length, cfg.data.prefix_length, vision.image_size
    shapes = {
        "pixels": ((b, tiles, side, side, 3), np.uint8),
        "patch_valid": ((b, tiles, vision.patches), bool),
        "tile_origin": ((b, tiles, 2), np.int32),
        "prefix": ((b, p), np.int32),
        "prefix_valid": ((b, p), bool),
        "tokens": ((b, q, t), np.int32),
        "token_valid": ((b, q, t), bool),
        "query_mask": ((b, q, t), bool),
        "label_mask": ((b, q, t), bool),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
