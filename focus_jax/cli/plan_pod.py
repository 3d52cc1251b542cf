"""`python -m focus_jax plan --topology`: does a step fit a slice of a pod, how fast can it be."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from focus_jax.cli.arguments import Parser, positive
from focus_jax.evaluate.study import write_json
from focus_jax.experiment import Experiment, TrainStage
from focus_jax.methods import split_methods
from focus_jax.pods.plan import PodPlan, plan_pod
from focus_jax.pods.programs import Job
from focus_jax.pods.report import lines, table, write_page
from focus_jax.pods.settings import Setting, setting
from focus_jax.pods.sweep import batches, best_first, meshes
from focus_jax.pods.topology import Topology, parse_topology

PLANS = Path("benchmarks/plans")
WRITTEN = ("--json", "--dump-hlo")  # where things are written changes no plan


def add_flags(out: Parser, of: Any) -> None:
    """The flags of plans for pods; `of`: the group of what is planned."""
    of.add_argument(
        "--markdown", type=Path, metavar="PAGE", help="write the plans of --plans into this page"
    )
    pod = out.add_argument_group("plans for a slice of a pod, compiled without having it")
    pod.add_argument("--topology", metavar="CHIP:SHAPE", help="e.g. v5e:16x16, v5p:4x4x8, h100:8")
    pod.add_argument(
        "--mesh", action="append", metavar="AXES", help="e.g. fsdp=64,tensor=4; a sweep takes more"
    )
    pod.add_argument("--what", choices=("train", "prefill", "decode"), default="train")
    pod.add_argument("--stage", metavar="NAME", help="of training; default: the last")
    pod.add_argument(
        "--batch", type=positive, action="append", metavar="N",
        help="images of a whole step; a sweep takes more",
    )  # fmt: skip
    pod.add_argument("--accumulate", type=positive, metavar="N", help="batches of a step")
    pod.add_argument("--sweep", action="store_true", help="try meshes and batches, best first")
    pod.add_argument("--dump-hlo", type=Path, metavar="FILE", help="write the program here")
    pod.add_argument(
        "--plans", type=Path, default=PLANS, metavar="DIR", help=f"for --markdown: {PLANS}"
    )


def check_flags(flags: Namespace) -> None:
    """ValueError for flags that mean nothing without the topology that they are for."""
    if flags.topology is None:
        for name in ("mesh", "batch", "accumulate", "stage", "dump_hlo", "sweep"):
            if getattr(flags, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is for plans of a pod: say which with --topology")
    elif flags.config is None:
        raise ValueError("--topology plans an experiment's step: name it with --config")


def run(flags: Namespace, cfg: Experiment, argv: Sequence[str]) -> int:
    """Print a table for each plan, or one line each for a sweep. Exit 0 whether they fit or not."""
    # Nothing runs: accelerators that may be here stay with whoever uses them, and libtpu, which
    # would look for some, is only asked to compile.
    jax.config.update("jax_platforms", "cpu")
    topology = parse_topology(flags.topology)
    usual = setting(cfg, topology.name)
    if usual.remat and not any(flag.startswith("--model.remat") for flag in argv):
        cfg = replace(cfg, model=replace(cfg.model, remat=usual.remat))
    if flags.dump_hlo and (flags.sweep or len(methods(flags, cfg)) > 1):
        raise ValueError("--dump-hlo writes one program: leave out --sweep and name one method")
    plans = list(made(flags, cfg, topology, usual))
    if not plans:
        raise ValueError("no mesh and batch of the sweep fit together: name some with --mesh")
    plans = best_first(plans) if flags.sweep else plans
    command = shlex.join(["python", "-m", "focus_jax", "plan", *without(argv, *WRITTEN)])
    values = [{**plan.to_json(), "command": command} for plan in plans]
    if flags.json:
        write_json(flags.json, values[0] if len(values) == 1 else values)
    print(lines(values) if flags.sweep else "\n".join(map(table, values)), end="")
    return 0


def made(
    flags: Namespace, cfg: Experiment, topology: Topology, usual: Setting
) -> Iterator[PodPlan]:
    """The plans that flags ask for, one after another."""
    for method in methods(flags, cfg):
        job = job_of(flags, with_settings(flags, cfg, method))
        for mesh, batch in candidates(flags, job, topology, usual):
            print(f"{topology.name} {mesh} batch {batch} {method}", file=sys.stderr, flush=True)
            try:
                own = with_batch(job, batch, flags.accumulate or usual.accumulate)
                yield plan_pod(own, topology, mesh, dump=flags.dump_hlo)
            except ValueError as error:
                if not flags.sweep:
                    raise
                print(f"left out: {error}", file=sys.stderr)


def candidates(
    flags: Namespace, job: Job, topology: Topology, usual: Setting
) -> list[tuple[str, int]]:
    """Meshes with images of a step. ValueError for several of either without a sweep."""
    if flags.sweep:
        some = flags.mesh or list(meshes(topology, job))
        return [(mesh, batch) for mesh in some for batch in flags.batch or batches(job)]
    for name in ("mesh", "batch"):
        if len(getattr(flags, name) or ()) > 1:
            raise ValueError(f"several --{name} are for a sweep: add --sweep, or name one")
    mesh = flags.mesh[0] if flags.mesh else usual.mesh
    return [(mesh, flags.batch[0] if flags.batch else job.images)]


def with_batch(job: Job, images: int, parts: int) -> Job:
    """The job with so many images a step, in equal parts one after another."""
    if job.what != "train":
        return replace(job, stage=replace(job.stage, batch=images))
    parts = max(parts, job.stage.accumulate)
    if images % parts:
        raise ValueError(f"--batch {images} does not divide into --accumulate {parts} batches")
    return replace(job, stage=replace(job.stage, batch=images // parts, accumulate=parts))


def methods(flags: Namespace, cfg: Experiment) -> list[str]:
    """Methods to plan by their names; "" for the config's own."""
    return split_methods(flags.method) if flags.method else [cfg.compress.method]


def with_settings(flags: Namespace, cfg: Experiment, method: str) -> Experiment:
    """The experiment with a method and a text length."""
    text = flags.text or cfg.data.text_length
    return replace(
        cfg,
        compress=replace(cfg.compress, method=method),
        data=replace(cfg.data, text_length=text),
    )


def job_of(flags: Namespace, cfg: Experiment) -> Job:
    """What is planned. ValueError for a stage or tiles that the experiment does not have."""
    tiles = flags.tiles or cfg.model.max_tiles
    if tiles > cfg.model.max_tiles:
        raise ValueError(
            f"--tiles {tiles}: the model takes up to {cfg.model.max_tiles}, thumbnail included"
        )
    stage = stage_of(flags.stage, cfg)
    return Job(cfg, flags.what, replace(stage, questions=flags.questions or stage.questions), tiles)


def stage_of(name: str | None, cfg: Experiment) -> TrainStage:
    """A stage by its name, or the last."""
    stages = {stage.name: stage for stage in cfg.train.stages}
    if not stages:
        raise ValueError(f"experiment {cfg.name!r} has no training stages: set train.stages")
    if name is None:
        name = cfg.train.stages[-1].name
    if name not in stages:
        raise ValueError(f"--stage {name}: the experiment's stages are {', '.join(stages)}")
    if stages[name].objective == "fit":
        raise ValueError(f"stage {name!r} is solved in closed form: it has no step to plan")
    return stages[name]


def without(argv: Sequence[str], *names: str) -> list[str]:
    """Arguments but for these flags and their values."""
    out, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] not in names:
            out.append(word)
        skip = word in names
    return out


def page(flags: Namespace) -> int:
    """Write the page of plans."""
    count = write_page(flags.markdown, flags.plans)
    print(f"{flags.markdown}: {count} plans")
    return 0
