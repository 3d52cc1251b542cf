"""FocusLLaVA on the embedded job: both samplers in place during joint training."""

from dataclasses import replace

import glyphs_base

from focus_jax.experiment import Experiment, TrainStage

JOINT = TrainStage(
    "joint", "answers", steps=150, learning_rate=5e-4, muon=0.005,
    train=("vision.", "decoder.", "projector.", "samplers."), batch=16, questions=6,
)  # fmt: skip


def get_config() -> Experiment:
    base = glyphs_base.get_config()
    stages = (*base.train.stages, JOINT)
    return replace(base, name="glyphs_focus", train=replace(base.train, stages=stages))
