"""The embedded job's language model, trained from nothing: scenes told in words, easy ones first.

It stands for a pre-trained one. What it makes lies beside this file, in `glyphs_language/`; to make
it again:

    python train.py --config configs/glyphs_language.py --workdir runs/language
    python -m focus_jax export runs/language configs/glyphs_language --part decoder --dtype bfloat16
"""

from dataclasses import replace

from focus_jax.config import tiny
from focus_jax.data.glyph_config import GlyphsConfig
from focus_jax.experiment import (
    CompressConfig,
    DataConfig,
    Experiment,
    TextSampler,
    TrainConfig,
    TrainStage,
    VisionSampler,
)

# Four colours an image, each with a number, a shape and up to two letters, crowded in few places;
# a shape stands on another one, two have a number on their left. Twelve kinds of one to three hops.
GLYPHS = GlyphsConfig(
    groups=4, beside=True, cards=True, tally=2, max_hops=3, dense=0.8, jitter=0, light=0.0,
    train=8000, validation=256, test=256, questions=12,
    kinds=(
        "digit_of_colour", "shape_of_colour", "colour_of_shape", "quadrant_of_shape",
        "count_of_colour", "number_matching_shape", "shape_matching_number",
        "number_left_of_shape", "shape_above_shape", "colour_above_shape",
        "number_above_shape", "shape_matching_left",
    ),
)  # fmt: skip
# What shares a colour; then also what shares a card; nothing crowded, nothing to count.
COLOURS = replace(
    GLYPHS, groups=3, beside=False, tally=0, max_hops=2, dense=0.0, questions=8,
    kinds=(
        "digit_of_colour", "shape_of_colour", "colour_of_number", "colour_of_shape",
        "number_matching_shape", "shape_matching_number",
    ),
)  # fmt: skip
CARDS = replace(
    GLYPHS, tally=0, dense=0.0, questions=8,
    kinds=(
        "digit_of_colour", "shape_of_colour", "colour_of_shape", "number_matching_shape",
        "shape_matching_number", "number_left_of_shape", "colour_left_of_shape",
        "shape_above_shape",
    ),
)  # fmt: skip

FIRST = TrainStage(
    "colours", "words", steps=80, learning_rate=3e-3, muon=0.02, final=0.7, train=("decoder.",),
    samplers=False, batch=32, questions=8, glyphs=COLOURS,
)  # fmt: skip
SECOND = replace(FIRST, name="cards", steps=200, final=0.5, glyphs=CARDS)
# One kind more than is asked later: it teaches what questions of three hops are made of.
LANGUAGE = replace(
    FIRST, name="language", steps=500, learning_rate=1.5e-3, muon=0.01, final=0.02,
    glyphs=replace(GLYPHS, questions=13, kinds=(*GLYPHS.kinds, "colour_left_of_shape")),
)  # fmt: skip


def get_config() -> Experiment:
    return Experiment(
        name="glyphs_language",
        model=tiny(),
        compress=CompressConfig(VisionSampler(enabled=False), TextSampler(layer=2, enabled=False)),
        data=DataConfig(glyphs=GLYPHS, text_length=13),
        train=TrainConfig(stages=(FIRST, SECOND, LANGUAGE), save_every=200),
    )
