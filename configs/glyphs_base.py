"""The parts of the embedded job that stand for pre-trained ones; what follows is joint training.

The decoder comes from glyphs_language.py. `vision` and `describe` teach a fresh tower and projector
to tell each patch in the decoder's words; `align` teaches the router what pooling loses (LLaVA's
first stage).
"""

from dataclasses import replace
from pathlib import Path

from glyphs_language import GLYPHS

from focus_jax.config import tiny
from focus_jax.experiment import (
    CompressConfig,
    DataConfig,
    EvalConfig,
    Experiment,
    TextSampler,
    TrainConfig,
    TrainStage,
    VisionSampler,
)

DECODER = Path(__file__).with_name("glyphs_language")

SCENES = replace(GLYPHS, train=5000, validation=128, test=192)

VISION = TrainStage(
    "vision", "fit", steps=30, learning_rate=0.0, samplers=False, batch=16, questions=1,
    clutter=0.5,
)  # fmt: skip
DESCRIBE = replace(
    VISION, name="describe", objective="describe", steps=200, learning_rate=3e-3,
    train=("vision.", "projector."),
)  # fmt: skip
ALIGN = TrainStage(
    "align", "route", steps=150, learning_rate=3e-3, train=("samplers.",), batch=32, questions=1
)

# 256 patches: 96 slots enter, 15 remain from the middle layer on.
COMPRESS = CompressConfig(
    vision=VisionSampler(region=4, scales=(4, 2, 1), budget=96, pooling="avg"),
    text=TextSampler(layer=2, keep=0.15, queries="instruction"),
)


def get_config() -> Experiment:
    model = tiny()
    # Patches alone: a token carries nothing of its neighbours. The layer serves the methods that
    # ask for its attention.
    vision = replace(model.vision, width=192, mlp_width=384, feature_layer=0)
    return Experiment(
        name="glyphs_base",
        model=replace(model, vision=vision),
        compress=COMPRESS,
        data=DataConfig(glyphs=SCENES, text_length=13),
        train=TrainConfig(stages=(VISION, DESCRIBE, ALIGN), init_from=f"decoder={DECODER}"),
        eval=EvalConfig(batch=32, max_new_tokens=2),
    )
