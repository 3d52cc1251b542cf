"""Operations of a training step, by the plan."""

from dataclasses import replace

from focus_jax.compress.method import Dims, Method
from focus_jax.compress.plan import plan
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.experiment import Experiment, TrainStage
from focus_jax.models.vlm import dims_of, sizes_of
from focus_jax.step import learns


def step_flops(cfg: Experiment, stage: TrainStage, method: Method) -> float:
    """Operations of one training step for one image with its questions, by the plan.

    Backward counts twice forward, where something learns: a frozen tower is run forward only.
    """
    dims = dims_of(cfg.model, cfg.tiles)
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
