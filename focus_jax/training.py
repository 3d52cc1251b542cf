"""Training: stages in order, one optimiser step as one compiled program, resumable anywhere."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from focus_jax.alignment import fit_projector
from focus_jax.checkpoint import Checkpoints, load_params
from focus_jax.compress.baselines import full
from focus_jax.compress.method import Context, Method
from focus_jax.data.loader import LoaderIterator
from focus_jax.experiment import Experiment, TrainConfig, TrainStage, to_json
from focus_jax.models import params as names
from focus_jax.models.vlm import VLM, dims_of
from focus_jax.objectives import OBJECTIVES, WORD_SLOTS
from focus_jax.sharding import make_mesh, put_batch, put_replicated
from focus_jax.tracker import Tracker
from focus_jax.workdir import data_source, make_train_loader, open_workdir

Leaves = dict[str, Array]


class NonFiniteLoss(FloatingPointError):
    """A step's loss or gradient was not finite."""


class State(NamedTuple):
    """What a stage's steps change: learning parameters by name, and the optimiser's moments."""

    learning: Leaves
    optimiser: optax.OptState


def learns(name: str, stage: TrainStage) -> bool:
    """Whether a parameter (canonical name) learns in this stage."""
    return any(name.startswith(prefix) for prefix in stage.train)


def canonical_name(name: str) -> str:
    """`decoder.layers.q.kernel` for `decoder.stages.1.q.kernel`."""
    match = names.STAGE.match(name)
    return names.LAYERS + match[3] if match else name


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


def make_optimiser(cfg: TrainConfig, stage: TrainStage) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine, learning rates by part, accumulation."""
    warmup = max(1, round(stage.warmup * stage.steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, warmup, max(stage.steps, warmup + 1),
        stage.final * stage.learning_rate,
    )  # fmt: skip

    def by_part(updates: Leaves, params: Any = None) -> Leaves:
        return {name: u * part_scale(canonical_name(name), stage) for name, u in updates.items()}

    chain = optax.chain(
        optax.clip_by_global_norm(stage.clip),
        optax.adamw(schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay),
        optax.stateless(by_part),
    )
    if stage.accumulate == 1:
        return chain
    steps = optax.MultiSteps(chain, stage.accumulate)
    return optax.GradientTransformation(steps.init, steps.update)


def part_scale(name: str, stage: TrainStage) -> float:
    """The factor on the learning rate of one parameter: that of the longest prefix."""
    fitting = [(len(prefix), factor) for prefix, factor in stage.scale if name.startswith(prefix)]
    return max(fitting)[1] if fitting else 1.0


Step = Callable[..., tuple[State, dict[str, Array]]]


def make_step(
    structure: VLM, stage: TrainStage, optimiser: optax.GradientTransformation, seed: int
) -> Step:
    """One optimiser step, compiled; the state is donated.

    step(state, frozen, batch, number, progress) -> (state, metrics). `number` is the global step.
    """
    objective = OBJECTIVES[str(stage.objective)]

    def loss(learning: Leaves, frozen: Leaves, batch: Any, ctx: Context):
        out = objective(names.with_leaves(structure, {**frozen, **learning}), batch, ctx)
        return out.value, out.metrics

    def step(state: State, frozen: Leaves, batch: Any, number: Array, progress: Array):
        ctx = Context(jax.random.fold_in(jax.random.key(seed), number), True, progress)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state.learning, frozen, batch, ctx
        )
        updates, moments = optimiser.update(grads, state.optimiser, state.learning)
        learning = optax.apply_updates(state.learning, updates)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads), **metrics}
        return State(learning, moments), metrics

    return jax.jit(step, donate_argnums=0)


class Run:
    """A training run in a workdir: `train()` goes on from wherever the last one stopped."""

    def __init__(self, cfg: Experiment, workdir: str | Path, quiet: bool = False):
        if not cfg.train.stages:
            raise ValueError(f"experiment {cfg.name!r} has no training stages: set train.stages")
        told = any(stage.objective == "words" for stage in cfg.train.stages)
        if told and cfg.data.glyphs.filled > WORD_SLOTS:
            raise ValueError(
                f"objective 'words' tells {WORD_SLOTS} cells of an image, and data.glyphs fills "
                f"{cfg.data.glyphs.filled}: lower its groups or digits"
            )
        self.cfg, self.quiet = cfg, quiet
        # Before anything is written: a method that does not fit leaves no workdir behind.
        self.method = cfg.compress.value().check(dims_of(cfg.model, cfg.model.max_tiles))
        self.mesh: Mesh = make_mesh(cfg.train.devices)
        self.workdir, self.tokenizer, self.cfg = open_workdir(cfg, workdir)
        self.source = data_source(self.cfg, "train")
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", self.cfg.train.keep)
        self.seconds: dict[str, float] = {}

    # ------------------------------------------------------------------ parameters

    def fresh(self, method: Method) -> Callable[[], VLM]:
        return lambda: names.initialise(self.cfg.model, method, self.cfg.train.seed)

    def first_tree(self) -> Leaves:
        """The canonical parameters that training starts from, samplers included."""
        fresh = names.canonical(names.named_leaves(self.fresh(self.method)()))
        if not self.cfg.train.init_from:
            return fresh
        tree, _ = load_params(self.cfg.train.init_from)
        init = self.fresh(self.method) if self.cfg.train.init_samplers else None
        return names.canonical(
            names.named_leaves(names.with_method(self.cfg.model, tree, self.method, init))
        )

    def stored_tree(self) -> Leaves:
        """The canonical parameters of the newest checkpoint."""
        shapes = names.named_leaves(names.abstract(self.cfg.model, self.method))
        return load_params(self.checkpoints.directory, names.canonical(shapes))[0]

    def stage_method(self, stage: TrainStage) -> Method:
        return self.method if stage.samplers else full()

    def state_of(self, stage: TrainStage, tree: Leaves) -> tuple[VLM, State, Leaves, Any]:
        """(model structure, state, frozen leaves, optimiser) of a stage that starts from `tree`."""
        model = names.with_method(self.cfg.model, tree, self.stage_method(stage))
        leaves = put_replicated(names.named_leaves(model), self.mesh)
        check_prefixes(stage, {canonical_name(name) for name in leaves})
        learning = {k: v for k, v in leaves.items() if learns(canonical_name(k), stage)}
        if not learning:
            raise ValueError(
                f"stage {stage.name!r}: no parameter learns with train={stage.train}; names begin "
                f"with {sorted({name.split('.')[0] for name in leaves})}"
            )
        frozen = {k: v for k, v in leaves.items() if k not in learning}
        optimiser = make_optimiser(self.cfg.train, stage)
        # A copy: the state is donated, and the tree may still hold the same buffers.
        learning = jax.tree.map(jnp.copy, learning)
        state = State(learning, optimiser.init(learning))
        return model, put_replicated(state, self.mesh), frozen, optimiser

    # ------------------------------------------------------------------ running

    def train(self) -> Leaves:
        """Run all stages; returns the canonical parameters."""
        first, resumed = self.find_stage()
        done = sum(stage.steps for stage in self.cfg.train.stages[:first])
        # Frozen parts and the samplers of later stages come from the checkpoint too.
        tree = self.first_tree() if resumed is None else self.stored_tree()
        start = resumed or done
        with (
            self.checkpoints,
            Tracker(
                self.workdir, self.cfg.train.steps, self.cfg.name, start, self.quiet
            ) as tracker,
        ):
            for index in range(first, len(self.cfg.train.stages)):
                tree = self.run_stage(index, done, tree, resumed, tracker)
                done += self.cfg.train.stages[index].steps
                resumed = None
        return tree

    def find_stage(self) -> tuple[int, int | None]:
        """(stage to run, global step to resume from or None) from the newest checkpoint."""
        latest = self.checkpoints.latest()
        if latest is None:
            return 0, None
        done = 0
        for index, stage in enumerate(self.cfg.train.stages):
            if latest < done + stage.steps:
                return index, latest
            done += stage.steps
        return len(self.cfg.train.stages), latest

    def run_stage(
        self, index: int, done: int, tree: Leaves, resumed: int | None, tracker: Tracker
    ) -> Leaves:
        """One stage; `done` steps were taken before it. Returns the canonical parameters."""
        stage = self.cfg.train.stages[index]
        if stage.objective == "fit":
            return self.fit_stage(index, done, tree, tracker)
        model, state, frozen, optimiser = self.state_of(stage, tree)
        loader = make_train_loader(self.cfg, self.source, self.tokenizer, stage, index)
        with closing(iter(loader)) as batches:
            start = done
            if resumed is not None and resumed > done:
                start, state = resumed, self.restore(state, tree, batches)
            step = make_step(model, stage, optimiser, self.cfg.train.seed)
            watch = Watch(tracker, stage.name, self.cfg.train.log_every)
            for number in range(start + 1, done + stage.steps + 1):
                progress = np.float32((number - done) / stage.steps)
                seen = []
                for micro in range(stage.accumulate):
                    batch = next(batches)
                    unique = np.int32((number - 1) * stage.accumulate + micro)
                    state, metrics = step(
                        state, frozen, put_batch(for_device(batch), self.mesh), unique, progress
                    )
                    seen.append((metrics, batch["index"]))
                watch.see(number, seen)
                last = number == done + stage.steps
                if number % self.cfg.train.save_every == 0 or last:
                    watch.flush()
                    self.save(number, state, frozen, tree, batches, index)
        self.seconds[stage.name] = watch.seconds_per_step
        return self.joined(state, frozen, tree)

    def fit_stage(self, index: int, done: int, tree: Leaves, tracker: Tracker) -> Leaves:
        """The projector in closed form; starts anew when it was interrupted."""
        stage = self.cfg.train.stages[index]
        model = names.with_method(self.cfg.model, tree, full())
        loader = make_train_loader(self.cfg, self.source, self.tokenizer, stage, index)
        with closing(iter(loader)) as batches:
            leaves, unexplained = fit_projector(model, batches, stage.steps)
            tree = {**tree, **leaves}
            number = done + stage.steps
            tracker.log(number, {"unexplained": unexplained})
            self.save(number, State({}, ()), {}, tree, batches, index)
        return tree

    def joined(self, state: State, frozen: Leaves, tree: Leaves) -> Leaves:
        """The canonical tree after a stage: what it did not touch comes from before it."""
        return {**tree, **names.canonical({**frozen, **state.learning})}

    # ------------------------------------------------------------------ checkpoints

    def stored(self, state: State, params: Leaves) -> dict[str, Any]:
        moments = jax.tree_util.tree_flatten_with_path(state.optimiser)[0]
        return {
            "params": params,
            "optimiser": {jax.tree_util.keystr(path): leaf for path, leaf in moments},
        }

    def save(
        self,
        number: int,
        state: State,
        frozen: Leaves,
        tree: Leaves,
        batches: LoaderIterator,
        index: int,
    ) -> None:
        meta = {"config": to_json(self.cfg), "stage": index}
        self.checkpoints.save(
            number,
            self.stored(state, self.joined(state, frozen, tree)),
            batches.get_state(),
            meta,
        )

    def restore(self, state: State, tree: Leaves, batches: LoaderIterator) -> State:
        """The state of the newest checkpoint; the data go on behind the last batch it saw."""
        stored, data, _ = self.checkpoints.restore(None, self.stored(state, tree))
        batches.set_state(data)
        flat, structure = jax.tree_util.tree_flatten_with_path(state.optimiser)
        moments = [stored["optimiser"][jax.tree_util.keystr(path)] for path, _ in flat]
        bounds = stage_bounds(state.learning)
        learning = names.staged(stored["params"], bounds)
        state = State(
            {k: learning[k] for k in state.learning}, jax.tree.unflatten(structure, moments)
        )
        return put_replicated(state, self.mesh)


def stage_bounds(leaves: Mapping[str, Array]) -> tuple[int, ...]:
    """The layers at which the stages of named leaves begin, the first left out."""
    sizes: dict[int, int] = {}
    for name, leaf in leaves.items():
        if match := names.STAGE.match(name):
            sizes[int(match[1])] = leaf.shape[0]
    edges = np.cumsum([sizes[i] for i in sorted(sizes)])[:-1]
    return tuple(int(edge) for edge in edges)


# Strings and bookkeeping of a batch stay on the host.
HOST_ONLY = ("index", "question", "kind", "glyph", "colour", "row_valid")


def for_device(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that the objectives read."""
    return {name: array for name, array in batch.items() if name not in HOST_ONLY}


Seen = list[tuple[dict[str, Array], np.ndarray]]


class Watch:
    """Looks at a step's metrics one step late, so that the device never waits for the host.

    Logs their means over the step's batches. Raises NonFiniteLoss naming the step and its images.
    """

    def __init__(self, tracker: Tracker, stage: str, every: int):
        self.tracker, self.stage, self.every = tracker, stage, every
        self.pending: tuple[int, Seen] | None = None
        self.times: list[float] = []
        self.last = 0.0

    def see(self, number: int, batches: Seen) -> None:
        """Take in a step's (metrics, image numbers), one pair for each of its batches."""
        self.flush()
        self.pending = (number, batches)

    def flush(self) -> None:
        """Check and log the pending step."""
        if self.pending is None:
            return
        number, batches = self.pending
        self.pending = None
        rows = [{name: float(value) for name, value in metrics.items()} for metrics, _ in batches]
        now = time.perf_counter()
        if self.last:
            self.times.append(now - self.last)
        self.last = now
        for values, (_, index) in zip(rows, batches, strict=True):
            self.check(number, values, index)
        if number % self.every == 0:
            means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            self.tracker.log(number, {**means, "seconds_per_step": self.seconds_per_step})

    def check(self, number: int, values: Mapping[str, float], index: np.ndarray) -> None:
        """NonFiniteLoss unless a batch's loss and gradient are finite."""
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        raise NonFiniteLoss(
            f"step {number} (stage {self.stage!r}): loss {values['loss']}, gradient norm "
            f"{values['gradient_norm']}; images {index.tolist()}. The last checkpoint is from "
            "before it: lower the learning rate or look at these images, then start again"
        )

    @property
    def seconds_per_step(self) -> float:
        """Median time of a step so far, the first (compilation) left out."""
        return float(np.median(self.times)) if self.times else 0.0
