"""The smallest experiment that has every part: a config program for tests."""

from dataclasses import replace

from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
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

# 4 x 4 patches in regions of 2 x 2: 8 slots enter, 4 remain in the second of two layers.
MODEL = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=8, layers=1, heads=2, mlp_width=8),
    decoder=DecoderConfig(
        vocab_size=64, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp_width=16
    ),
)
GLYPHS = GlyphsConfig(grid=4, groups=2, questions=4, train=8, validation=3, test=3)


def get_config() -> Experiment:
    joint = TrainStage("joint", "answers", steps=2, learning_rate=1e-3, batch=2, questions=2)
    return Experiment(
        name="micro",
        model=MODEL,
        compress=CompressConfig(
            vision=VisionSampler(region=2, scales=(2, 1), budget=8, hidden=4),
            text=TextSampler(layer=1, keep=0.5),
        ),
        data=DataConfig(glyphs=GLYPHS),
        train=TrainConfig(stages=(joint,), log_every=1),
        eval=EvalConfig(batch=8),
    )


def get_tiled() -> Experiment:
    """The same with images of twice the side: a thumbnail and 2 x 2 tiles."""
    base = get_config()
    return replace(
        base,
        name="micro_tiled",
        model=replace(base.model, max_tiles=5, image_newline=True, grids=((2, 2),)),
        data=replace(base.data, glyphs=replace(base.data.glyphs, grid=8)),
    )
