"""Training: stages in order, one optimiser step as one compiled program, resumable anywhere."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from focus_jax.alignment import fit_projector
from focus_jax.checkpoint import Checkpoints, load_params
from focus_jax.compress.baselines import full
from focus_jax.compress.method import Method
from focus_jax.data.batches import Batch
from focus_jax.data.dialogue_loader import DialogueLoader
from focus_jax.data.iterator import LoaderIterator
from focus_jax.data.loader import Loader
from focus_jax.dialogues import has_dialogues
from focus_jax.distributed import from_first
from focus_jax.experiment import Experiment, TrainStage, to_json
from focus_jax.models import params as names
from focus_jax.models.attention import check_heads
from focus_jax.models.lora import has_lora, is_lora
from focus_jax.models.vlm import VLM, dims_of
from focus_jax.objectives import WORD_SLOTS
from focus_jax.preemption import Preempted, Preemption
from focus_jax.sharding import make_layout, put_batch
from focus_jax.starting import check_model, read_start
from focus_jax.step import (
    Leaves,
    State,
    check_lora,
    check_prefixes,
    first_state,
    make_optimiser,
    make_step,
    seed_words,
    split,
    state_shardings,
    with_shardings,
)
from focus_jax.throughput import Loads
from focus_jax.tracing import check_steps
from focus_jax.watch import Outlets, Watch, Watching, outlets
from focus_jax.workdir import make_train_loader, open_workdir, train_sources


class Run:
    """A training run in a workdir: `train()` goes on from wherever the last one stopped."""

    def __init__(
        self,
        cfg: Experiment,
        workdir: str | Path,
        quiet: bool = False,
        watching: Watching | None = None,
    ):
        if not cfg.train.stages:
            raise ValueError(f"experiment {cfg.name!r} has no training stages: set train.stages")
        check_told(cfg)
        self.cfg, self.quiet, self.watching = cfg, quiet, watching or Watching()
        check_steps(self.watching.profile, cfg.train.steps)
        # Before anything is written: a method that does not fit leaves no workdir behind.
        self.method = cfg.compress.value().check(dims_of(cfg.model, cfg.model.max_tiles))
        self.layout = make_layout(cfg.train.mesh, cfg.train.devices, cfg.train.rules)
        check_heads(cfg.model, self.layout)
        for stage in cfg.train.stages:
            self.layout.check_batch(stage.batch)
            check_lora(stage, cfg.model.lora)
        if cfg.train.init_from and not (Path(workdir) / "checkpoints").exists():
            check_model(cfg.train.init_from, cfg.model, vocabulary=has_dialogues(cfg))
        self.workdir, self.tokenizer, self.cfg = open_workdir(cfg, workdir)
        self.sources = train_sources(self.cfg)
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", self.cfg.train.keep)
        self.preemption = Preemption()
        self.seconds: dict[str, float] = {}
        self.tree: Leaves = {}  # canonical parameters between stages

    # ------------------------------------------------------------------ parameters

    def first_tree(self) -> Leaves:
        """The canonical parameters that training starts from, samplers included.

        Of what `train.init_from` lacks, low-rank updates are fresh, and samplers if asked for.
        """
        cfg, method = self.cfg, self.method
        if not cfg.train.init_from:
            fresh = names.initialise(cfg.model, method, cfg.train.seed, self.layout)
            return names.canonical(names.named_leaves(fresh))
        make = partial(names.fresh_leaves, cfg.model, method, cfg.train.seed, layout=self.layout)
        wanted = self.template()
        tree = read_start(cfg.train.init_from, cfg.model, self.layout, cfg.train.seed)
        init = make if cfg.train.init_samplers else None
        samplers = names.samplers_of(tree, wanted, method, init)
        tree = {name: leaf for name, leaf in tree.items() if not names.is_sampler(name)}
        if not has_lora(tree):
            tree |= make(filter(is_lora, wanted))
        tree |= samplers
        names.check_same(wanted, tree)
        return {name: tree[name].astype(leaf.dtype) for name, leaf in wanted.items()}

    def stored_tree(self) -> Leaves:
        """The canonical parameters of the newest checkpoint."""
        return load_params(self.checkpoints.directory, self.template())[0]

    def template(self) -> Leaves:
        """The shapes of the canonical parameters, and where each is kept."""
        shapes = names.canonical(names.named_leaves(names.abstract(self.cfg.model, self.method)))
        return with_shardings(shapes, names.stored(shapes, self.layout))

    def loader(self, stage: TrainStage, index: int) -> Loader | DialogueLoader:
        return make_train_loader(self.cfg, self.sources, self.tokenizer, stage, index, self.layout)

    def stage_method(self, stage: TrainStage) -> Method:
        return self.method if stage.samplers else full()

    def state_of(self, stage: TrainStage, tree: Leaves) -> tuple[VLM, State, Leaves, Any]:
        """(model structure, state, frozen leaves, optimiser) of a stage that starts from `tree`."""
        method = self.stage_method(stage)
        model = names.with_method(self.cfg.model, tree, method, layout=self.layout)
        leaves = names.named_leaves(model)
        check_prefixes(stage, {names.canonical_name(name) for name in leaves})
        learning, frozen = split(leaves, stage)
        optimiser = make_optimiser(self.cfg.train, stage)
        # Its shapes alone: the model would keep the parameters that the steps replace.
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model)
        return shapes, first_state(learning, optimiser, self.layout), frozen, optimiser

    # ------------------------------------------------------------------ running

    def train(self) -> Leaves:
        """Run all stages; returns the canonical parameters.

        Raises Preempted behind a checkpoint when SIGTERM asks one of the processes to stop.
        """
        first, resumed = self.find_stage()
        done = sum(stage.steps for stage in self.cfg.train.stages[:first])
        # Frozen parts and the samplers of later stages come from the checkpoint too.
        self.tree = self.first_tree() if resumed is None else self.stored_tree()
        start = resumed or done
        with (
            self.checkpoints,
            self.preemption,
            outlets(
                self.watching, self.workdir, self.cfg.train.steps, self.cfg.name, start, self.quiet
            ) as out,
        ):
            for index in range(first, len(self.cfg.train.stages)):
                self.tree = self.run_stage(index, done, resumed, out)
                done += self.cfg.train.stages[index].steps
                resumed = None
        return self.tree

    def find_stage(self) -> tuple[int, int | None]:
        """(stage to run, global step to resume from or None) from the newest checkpoint."""
        latest = from_first(self.checkpoints.latest() or 0)
        if not latest:
            return 0, None
        done = 0
        for index, stage in enumerate(self.cfg.train.stages):
            if latest < done + stage.steps:
                return index, latest
            done += stage.steps
        return len(self.cfg.train.stages), latest

    def run_stage(self, index: int, done: int, resumed: int | None, out: Outlets) -> Leaves:
        """One stage; `done` steps were taken before it. Returns the canonical parameters."""
        stage = self.cfg.train.stages[index]
        if stage.objective == "fit":
            return self.fit_stage(index, done, self.tree, out)
        model, state, frozen, optimiser = self.state_of(stage, self.tree)
        # What the stage does not have; the rest would be held twice.
        own = {names.canonical_name(name) for name in (*state.learning, *frozen)}
        self.tree = tree = {name: leaf for name, leaf in self.tree.items() if name not in own}
        loader = self.loader(stage, index)
        with closing(iter(loader)) as batches:
            start = done
            if resumed is not None and resumed > done:
                start, state = resumed, self.restore(state, batches)
            step = make_step(model, stage, optimiser, self.layout)
            seed = seed_words(self.cfg.train.seed)
            load_of = Loads(self.cfg, stage, self.stage_method(stage), self.layout)
            devices = self.layout.mesh.local_devices
            watch = Watch(out, stage.name, self.cfg.train.log_every, devices)
            for number in range(start + 1, done + stage.steps + 1):
                progress = np.float32((number - done) / stage.steps)
                with watch.step(number):
                    with watch.waiting():
                        batch = next_batches(batches, stage.accumulate)
                        placed = put_batch(for_device(batch), self.layout, axis=1)
                    unique, load = np.int32((number - 1) * stage.accumulate), load_of(batch)
                    with watch.running(load):
                        state, metrics = step(state, frozen, placed, seed, unique, progress)
                    watch.see(number, metrics, batch["index"], load)
                self.checkpoints.check()
                stop = self.preemption.reached(number)
                last = number == done + stage.steps
                if number % self.cfg.train.save_every == 0 or last or stop:
                    with watch.aside():
                        self.save(number, state, frozen, tree, batches, index)
                if stop:
                    self.stop(number)
        self.seconds[stage.name] = watch.seconds_per_step
        return self.joined(state, frozen, tree)

    def fit_stage(self, index: int, done: int, tree: Leaves, out: Outlets) -> Leaves:
        """The projector in closed form; starts anew when it was interrupted."""
        stage = self.cfg.train.stages[index]
        model = names.with_method(self.cfg.model, tree, full(), layout=self.layout)
        loader = self.loader(stage, index)
        with closing(iter(loader)) as batches:
            placed = (put_batch(for_device(batch), self.layout) for batch in batches)
            leaves, unexplained = fit_projector(model, placed, stage.steps)
            tree = {**tree, **names.place(leaves, self.layout)}
            number = done + stage.steps
            out.tracker.log(number, {"unexplained": unexplained})
            out.heartbeat.update(number, stage=stage.name)
            self.save(number, State({}, ()), {}, tree, batches, index)
            if self.preemption.reached(number):
                self.stop(number)
        return tree

    def stop(self, number: int) -> None:
        """Raise Preempted once the checkpoint of this step is written; a run that is done ends."""
        if number < self.cfg.train.steps:
            self.checkpoints.wait()
            raise Preempted(
                f"stopped by SIGTERM at step {number} of {self.cfg.train.steps}, behind a "
                "checkpoint: start again to go on"
            )

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

    def restore(self, state: State, batches: LoaderIterator) -> State:
        """The state of the newest checkpoint; the data go on behind the last batch it saw."""
        stored, data, _ = self.checkpoints.restore(None, self.stored(state, self.template()))
        batches.set_state(data)
        flat, structure = jax.tree_util.tree_flatten_with_path(state.optimiser)
        moments = [stored["optimiser"][jax.tree_util.keystr(path)] for path, _ in flat]
        bounds = stage_bounds(state.learning)
        learning = names.staged(stored["params"], bounds)
        state = State(
            {k: learning[k] for k in state.learning}, jax.tree.unflatten(structure, moments)
        )
        return jax.device_put(state, state_shardings(state, self.layout))


def check_told(cfg: Experiment) -> None:
    """ValueError for a stage `words` whose scenes, its own or the data's, fill too many cells."""
    for stage in cfg.train.stages:
        if stage.objective != "words":
            continue
        glyphs = stage.glyphs or cfg.data.glyphs
        if glyphs.filled > WORD_SLOTS:
            whose = "its own glyphs" if stage.glyphs else "data.glyphs"
            raise ValueError(
                f"stage {stage.name!r}: objective 'words' tells {WORD_SLOTS} cells of an image, and"
                f" {whose} fill {glyphs.filled}: lower their groups, digits or tally"
            )


def next_batches(batches: Iterator[Batch], count: int) -> dict[str, np.ndarray]:
    """The next `count` batches as one, [count B ...]."""
    own = [next(batches) for _ in range(count)]
    return {name: np.stack([batch[name] for batch in own]) for name in own[0]}


def stage_bounds(leaves: Mapping[str, Array]) -> tuple[int, ...]:
    """The layers at which the stages of named leaves begin, the first left out."""
    sizes: dict[int, int] = {}
    for name, leaf in leaves.items():
        if match := names.STAGE.match(name):
            sizes[int(match[1])] = leaf.shape[0]
    edges = np.cumsum([sizes[i] for i in sorted(sizes)])[:-1]
    return tuple(int(edge) for edge in edges)


# Strings and bookkeeping of a batch stay on the host.
HOST_ONLY = ("index", "question", "kind", "glyph", "colour", "row_valid", "evidence")


def for_device(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that the objectives read."""
    return {name: array for name, array in batch.items() if name not in HOST_ONLY}
