"""The smallest experiment with shapes that a small slice divides: a config program for tests."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import micro

from focus_jax.experiment import Experiment


def get_config() -> Experiment:
    config = micro.get_config()
    (joint,) = config.train.stages
    align = replace(joint, name="align", train=("projector.", "samplers."), batch=8)
    stages = (align, replace(joint, batch=8))
    return replace(config, train=replace(config.train, stages=stages))
