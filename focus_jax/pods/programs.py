"""The programs that a plan compiles: a training step, a prompt, one new token; shapes alone."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from focus_jax.compress.baselines import full
from focus_jax.compress.method import Method
from focus_jax.experiment import Experiment, TrainStage
from focus_jax.generate import Caches, append, prefill, room_for
from focus_jax.models import params as names
from focus_jax.models.vlm import VLM, dims_of
from focus_jax.objectives import inputs_of
from focus_jax.sharding import Layout
from focus_jax.step import abstract_batch, abstract_step, with_shardings

What = Literal["train", "prefill", "decode"]


@dataclass(frozen=True)
class Job:
    """What is planned: a program of an experiment, with a whole job's batch.

    `stage` gives a training step its batch, questions and learning parts; prompts and tokens take
    its batch alone.
    """

    cfg: Experiment
    what: What
    stage: TrainStage
    tiles: int

    @property
    def method(self) -> Method:
        """The method in place: a stage may train without one."""
        bare = self.what == "train" and not self.stage.samplers
        return full() if bare else self.cfg.compress.value()

    @property
    def images(self) -> int:
        """Images of one run of the program."""
        return self.stage.batch * (self.stage.accumulate if self.what == "train" else 1)

    @property
    def questions(self) -> int:
        """Questions of an image."""
        return self.stage.questions if self.what == "train" else 1


def program(job: Job, layout: Layout) -> tuple[Any, tuple[Any, ...]]:
    """(a jitted function, its arguments as shapes with shardings).

    ValueError when the batch does not divide over the mesh, or the method does not fit the model.
    """
    if job.what == "train":
        return abstract_step(job.cfg, job.stage, layout, job.tiles)
    job.method.check(dims_of(job.cfg.model, job.tiles))
    layout.check_batch(job.stage.batch)
    vlm, inputs, key = prompt(job, layout)
    run = partial(prefill, room=room_for(job.cfg.eval.max_new_tokens))
    if job.what == "prefill":
        return jax.jit(run), (vlm, inputs, key)
    shapes = jax.eval_shape(run, vlm, inputs, key).caches
    token = jax.ShapeDtypeStruct((job.stage.batch,), jnp.int32, sharding=layout.sharding("batch"))
    caches = with_shardings(shapes, jax.tree.map(lambda a: cache_place(a, layout), shapes))
    return jax.jit(one_token, donate_argnums=2), (vlm, token, caches)


def prompt(job: Job, layout: Layout) -> tuple[VLM, Any, Any]:
    """Shapes of the model with weights in the compute dtype, a batch of prompts, and a key."""
    model = replace(job.cfg.model, param_dtype=job.cfg.model.compute_dtype, remat="none")
    structure = names.abstract(model, job.method, layout)
    leaves = names.named_leaves(structure)
    vlm = names.with_leaves(structure, with_shardings(leaves, names.stored(leaves, layout)))
    alone = replace(job.stage, questions=1)
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding("batch"))
        for name, leaf in abstract_batch(job.cfg, alone, job.tiles).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    return vlm, inputs_of(batch), with_shardings(key, layout.sharding())


def one_token(vlm: VLM, token: Int[Array, " B"], caches: Caches) -> tuple[Int[Array, " B"], Caches]:
    """One turn of `generate.decode`: the next token behind `token`, greedily."""
    rows: Float[Array, "B 1 D"] = vlm.decoder.embed(token)[:, None]
    rows, caches = append(vlm, rows, jnp.ones_like(token, bool)[:, None], caches)
    return jnp.argmax(vlm.decoder.logits(rows[:, 0]), -1).astype(jnp.int32), caches


def cache_place(leaf: Any, layout: Layout) -> Any:
    """Where a cache's array lies: samples over the batch's axes, key heads over their own.

    Keys and values are [L BG S K], samples and heads in one axis; the rest is [B ...].
    """
    if leaf.ndim != 4:
        return layout.sharding("batch")
    both = (layout.mesh_axes("batch") or ()) + (layout.mesh_axes("kv_heads") or ())
    ways = prod(layout.mesh.shape[axis] for axis in both)
    fits = leaf.shape[1] % ways == 0
    spec = jax.sharding.PartitionSpec(None, both if fits else layout.mesh_axes("batch"))
    return jax.sharding.NamedSharding(layout.mesh, spec)
