"""Trainings and evaluations that are done once: what is finished is read back, not repeated."""

import json
from dataclasses import fields
from pathlib import Path

import jax

from focus_jax.evaluate.operations import step_flops, target_flops
from focus_jax.evaluate.runner import InitSamplers, Progress, Result, Trained, evaluate
from focus_jax.experiment import Experiment
from focus_jax.training import Run
from focus_jax.workdir import write_text

__all__ = [
    "evaluate_once", "fingerprint", "logged_seconds", "step_flops", "target_flops", "train_once",
    "write_json",
]  # fmt: skip
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

    The answers lie beside it as JSON lines. Of several processes the first one writes.
    """
    asked = {
        "step": run.step, "method": method or run.method(None).name, "split": split, "limit": limit,
        "config": fingerprint(run.config),
    }  # fmt: skip
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["asked"] == asked and stored["result"].keys() == REPORTED:
            return Result(**stored["result"])
    result = evaluate(
        run, method, split, limit=limit, out=path.with_suffix(".jsonl"),
        init_samplers=init_samplers, progress=progress,
    )  # fmt: skip
    if jax.process_index() == 0:
        write_json(path, {"asked": asked, "result": result.to_json()})
    return result


def fingerprint(cfg: Experiment) -> str:
    """What an evaluation depends on beside the step, as text: samplers, data, evaluation."""
    return repr((cfg.compress, cfg.data, cfg.eval))


def write_json(path: Path, value: object) -> None:
    """A JSON file, written whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2) + "\n")
