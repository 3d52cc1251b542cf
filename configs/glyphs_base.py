"""The parts of the embedded job, trained from nothing: they stand for pre-trained ones.

`language` teaches the decoder to answer from scenes told in words, `vision` fits the projector
so that each patch is told in those words. What follows (glyphs_full, glyphs_focus) is LLaVA's joint
training.
"""

from focus_jax.config import tiny
from focus_jax.data.glyph_config import GlyphsConfig
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

# Three colours an image, each with a number and a shape; four kinds of one hop, two of two.
GLYPHS = GlyphsConfig(
    groups=3, jitter=0, light=0.0, train=8000, validation=256, test=256,
    kinds=(
        "digit_of_colour", "shape_of_colour", "colour_of_number", "colour_of_shape",
        "number_matching_shape", "shape_matching_number",
    ),
)  # fmt: skip

LANGUAGE = TrainStage(
    "language", "words", steps=360, learning_rate=3e-3, train=("decoder.",),
    samplers=False, batch=32, questions=8,
)  # fmt: skip
VISION = TrainStage(
    "vision", "fit", steps=30, learning_rate=0.0, samplers=False, batch=16, questions=1,
    clutter=0.5,
)  # fmt: skip

# The tower keeps random features, of which a router trained for 200 steps predicts the loss of
# pooling too poorly, so regions are ranked by the measured loss.
# 256 patches: 112 slots enter, 16 remain from the middle layer on: 64 in the mean.
COMPRESS = CompressConfig(
    vision=VisionSampler(region=4, scales=(4, 2, 1), budget=112, pooling="avg", gate="measured"),
    text=TextSampler(layer=2, keep=0.14, queries="last"),
)


def get_config() -> Experiment:
    return Experiment(
        name="glyphs_base",
        model=tiny(),
        compress=COMPRESS,
        data=DataConfig(glyphs=GLYPHS, text_length=8),
        train=TrainConfig(stages=(LANGUAGE, VISION)),
        eval=EvalConfig(batch=32, max_new_tokens=2),
    )
