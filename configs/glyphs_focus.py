"""FocusLLaVA on the embedded job: both samplers in place during joint training."""

from dataclasses import replace

import glyphs_base

from focus_jax.experiment import Experiment, TrainConfig, TrainStage

JOINT = TrainStage(
    "joint", "answers", steps=200, learning_rate=6e-4,
    train=("decoder.", "projector.", "samplers."), batch=16, questions=4,
)  # fmt: skip


def get_config() -> Experiment:
    stages = (glyphs_base.LANGUAGE, glyphs_base.VISION, JOINT)
    return replace(glyphs_base.get_config(), name="glyphs_focus", train=TrainConfig(stages=stages))
