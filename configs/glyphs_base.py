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

LANGUAGE = TrainStage(
    "language", "words", steps=400, learning_rate=3e-3, train=("decoder.",),
    samplers=False, batch=32, questions=8,
)  # fmt: skip
VISION = TrainStage(
    "vision", "fit", steps=30, learning_rate=0.0, samplers=False, batch=16, questions=1,
    clutter=0.5,
)  # fmt: skip

# 256 patches: 112 slots enter, 16 remain from the middle layer on: 64 in the mean.
COMPRESS = CompressConfig(
    vision=VisionSampler(region=4, scales=(4, 2, 1), budget=112),
    text=TextSampler(layer=2, keep=0.14, queries="last"),
)


def get_config() -> Experiment:
    return Experiment(
        name="glyphs_base",
        model=tiny(),
        compress=COMPRESS,
        data=DataConfig(glyphs=GlyphsConfig(groups=3, jitter=0, light=0.0, train=8000)),
        train=TrainConfig(stages=(LANGUAGE, VISION)),
        eval=EvalConfig(),
    )
