"""What the experiments on glyphs take for granted: local tokens, texts that fit, known words."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from focus_jax.config import tiny
from focus_jax.data.glyphs import KINDS, make_example, vocabulary
from focus_jax.data.sources import FreshSource
from focus_jax.data.tokenizer import load_tokenizer
from focus_jax.experiment import load_program
from focus_jax.models.projector import Projector
from focus_jax.models.vision import VisionTower
from focus_jax.objectives import WORD_SLOTS
from focus_jax.workdir import glyph_tokenizer, make_train_loader
from tests.quick import compiled

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("glyphs_*.py"))
BASE = load_program(CONFIGS[0].with_name("glyphs_base.py"))
LANGUAGE = CONFIGS[0].with_name("glyphs_language")
IMAGES = 16


def test_a_patch_tells_of_its_own_pixels_alone():
    vision = replace(BASE.model.vision, image_size=48)
    assert vision.feature_layer == 0
    cfg = replace(BASE.model, vision=vision)

    @compiled
    def tokens(key, pixels):
        rngs = nnx.Rngs(params=key)
        features = VisionTower(cfg, rngs=rngs)(pixels)["features"]
        kw = {"dtype": np.float32, "param_dtype": np.float32}
        return Projector(cfg.projector, vision.width, 32, **kw, rngs=rngs)(features)

    rng = np.random.default_rng(0)
    before = rng.integers(0, 256, (1, 48, 48, 3), dtype=np.uint8)
    row, col, side = 1, 4, vision.patch_size
    after = before.copy()
    after[:, row * side : (row + 1) * side, col * side : (col + 1) * side] ^= 255
    one, two = (np.asarray(tokens(jax.random.key(0), image)) for image in (before, after))
    changed = (one != two).any(-1)[0]
    assert np.flatnonzero(changed).tolist() == [row * vision.grid + col]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_scenes_of_every_stage_fit_its_batches(path):
    """A loader names texts that are too long, and words that the tokenizer lacks."""
    config = load_program(path)
    tokenizer = glyph_tokenizer(config.data)
    for scenes in dict.fromkeys(stage.glyphs for stage in config.train.stages):
        glyphs = scenes or config.data.glyphs
        assert glyphs.filled <= WORD_SLOTS  # Objective `words` tells all of them.
        stage = replace(
            config.train.stages[0], glyphs=scenes, clutter=0.0, batch=IMAGES,
            questions=glyphs.questions,
        )  # fmt: skip
        sources = {"": FreshSource(glyphs, 0, IMAGES)}
        batches = iter(make_train_loader(config, sources, tokenizer, stage, 0))
        batch = next(batches)
        batches.close()
        assert batch["label_mask"].any(-1).all()
        assert not (batch["tokens"] == tokenizer.unk_token_id).any()
        assert len(set(batch["kind"].ravel().tolist())) == len(glyphs.asked_kinds)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_stored_language_model_reads_the_words_of_every_stage(path):
    """Rows of its embedding are looked up by number: each word must have the same in both."""
    config = load_program(path)
    stored, own = load_tokenizer(LANGUAGE), glyph_tokenizer(config.data)
    assert stored.get_vocab() == own.get_vocab() and stored.padding_side == own.padding_side
    for name in ("pad", "bos", "eos", "unk"):
        assert getattr(stored, f"{name}_token_id") == getattr(own, f"{name}_token_id")
    for scenes in dict.fromkeys(stage.glyphs for stage in config.train.stages):
        glyphs = scenes or config.data.glyphs
        asked = [q for i in range(IMAGES) for q in make_example(glyphs, 0, i)["questions"]]
        texts = [f"USER: {q['question']} ASSISTANT: {q['answer']}</s>" for q in asked]
        assert {q["kind"] for q in asked} == set(glyphs.asked_kinds) <= set(KINDS)
        for text in (*vocabulary(glyphs), *texts):
            ids = stored(text)["input_ids"]
            assert ids == own(text)["input_ids"] and stored.unk_token_id not in ids


def test_the_stored_language_model_has_the_decoders_sizes():
    stored = json.loads((LANGUAGE / "config.json").read_text(encoding="utf-8"))
    own = replace(tiny().decoder, vocab_size=len(load_tokenizer(LANGUAGE)))
    sizes = {
        "vocab_size": own.vocab_size,
        "hidden_size": own.width,
        "num_hidden_layers": own.layers,
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.kv_heads,
        "head_dim": own.head_dim,
        "intermediate_size": own.mlp_width,
        "max_position_embeddings": own.max_position,
        "rms_norm_eps": own.norm_eps,
        "rope_theta": own.rope_theta,
        "tie_word_embeddings": own.tie_embeddings,
    }
    assert {name: stored[name] for name in sizes} == sizes
    assert BASE.model.decoder == tiny().decoder and stored["model_type"] == "llama"
