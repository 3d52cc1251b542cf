"""Trainings and evaluations that are done once: what is finished is read back, not repeated."""

import json
from dataclasses import fields, replace
from pathlib import Path

from focus_jax.compress.method import Dims, Method
from focus_jax.compress.plan import plan
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.evaluate.runner import InitSamplers, Progress, Result, Trained, evaluate
from focus_jax.experiment import Experiment, TrainStage
from focus_jax.models.vlm import dims_of, sizes_of
from focus_jax.training import Run, learns
from focus_jax.workdir import write_text

REPORTED = {field.name for field in fields(Result)}


def train_once(cfg: Experiment, workdir: str | Path, quiet: bool = False) -> float | None:
    """Train, go on with training, or find it finished; seconds of a step of the last stage.

    Raises ValueError when the workdir holds another experiment's run.
    """
    run = Run(cfg, workdir, quiet=quiet)
    if run.checkpoints.latest() != cfg.train.steps:
        run.train()
    return run.seconds.get(cfg.train.stages[-1].name) or logged_seconds(run.workdir)


def logged_seconds(workdir: Path) -> float | None:
    """The last `seconds_per_step` among a run's metrics; None where none was logged."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line).get("seconds_per_step") for line in lines]
    return next((seconds for seconds in reversed(found) if seconds), None)


def evaluate_once(
    path: Path,
    run: Trained,
    method: str | None,
    split: str,
    limit: int = 0,
    init_samplers: InitSamplers = "",
    progress: Progress | None = None,
) -> Result:
    """The result at `path` when it is this evaluation's; otherwise evaluate and write it there.

    The answers lie beside it as JSON lines.
    """
    asked = {
        "step": run.step, "method": method or run.method(None).name, "split": split, "limit": limit,
        "config": fingerprint(run.config),
    }  # fmt: skip
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["asked"] == asked and stored["result"].keys() == REPORTED:
            return Result(**stored["result"])
    path.parent.mkdir(parents=True, exist_ok=True)
    result = evaluate(
        run, method, split, limit=limit, out=path.with_suffix(".jsonl"),
        init_samplers=init_samplers, progress=progress,
    )  # fmt: skip
    write_json(path, {"asked": asked, "result": result.to_json()})
    return result


def fingerprint(cfg: Experiment) -> str:
    """What an evaluation depends on beside the step, as text: samplers, data, evaluation."""
    return repr((cfg.compress, cfg.data, cfg.eval))


def write_json(path: Path, value: object) -> None:
    """A JSON file, written whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2) + "\n")


def step_flops(cfg: Experiment, stage: TrainStage, method: Method) -> float:
    """Operations of one training step for one image with its questions, by the plan.

    Backward counts twice forward, where something learns: a frozen tower is run forward only.
    """
    dims = dims_of(cfg.model, 1)
    cost = plan(
        method, dims, sizes_of(cfg.model), cfg.data.text_length, train=True,
        prefix_tokens=cfg.data.prefix_length, questions=stage.questions,
    ).flops  # fmt: skip
    tower = cost.tower * (3 if learns("vision.", stage) else 1)
    return tower + 3 * (cost.total - cost.tower) + target_flops(method, dims)


def target_flops(method: Method, dims: Dims) -> float:
    """The router's target, made in training alone: every scale projected, without a gradient."""
    vision = method.vision
    if not isinstance(vision, VisionGuided) or vision.gate != "distortion":
        return 0.0
    return replace(vision, gate="measured").flops(dims)
