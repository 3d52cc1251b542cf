"""A program of its own: the same training steps on every mesh of 8 simulated devices, as JSON.

For each method and mesh: the loss of every step, whether one compilation served them all, and
the collectives of the compiled step.
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np

from focus_jax.compress.method import Method
from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
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
from focus_jax.models import params as names
from focus_jax.pods.hlo import read_program
from focus_jax.sharding import make_layout, put_batch
from focus_jax.step import (
    abstract_batch,
    first_state,
    make_optimiser,
    make_step,
    seed_words,
    split,
)

STEPS, BATCH, VOCAB, WIDTH, TOWER = 20, 8, 96, 64, 28
MESHES = {"one device": ("data", 1), "data": ("data", 0), "fsdp": ("fsdp", 0)}
MESHES |= {"fsdp + tensor": ("fsdp=4,tensor=2", 0)}
METHODS = {"full": "full", "focusllava": ""}

# 36 patches in regions of 2 x 2: 20 slots enter, 8 remain in the second half of the decoder. So few
# that scores are seldom nearly equal: rounding would then choose another token.
CONFIG = Experiment(
    name="sharded",
    model=ModelConfig(
        vision=VisionConfig(
            image_size=48, patch_size=8, width=TOWER, layers=2, heads=2, mlp_width=56
        ),
        decoder=DecoderConfig(
            vocab_size=VOCAB, width=WIDTH, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_width=320
        ),
        remat="dots",
    ),
    compress=CompressConfig(
        vision=VisionSampler(region=2, scales=(2, 1), budget=20, hidden=4),
        text=TextSampler(layer=2, keep=0.4),
    ),
    data=DataConfig(glyphs=GlyphsConfig(grid=6, groups=3), text_length=12, prefix_length=3),
)
# The tower is frozen: near-ties in max pooling would send gradients elsewhere.
STAGE = TrainStage(
    "joint", "answers", steps=STEPS, learning_rate=3e-4, batch=BATCH, questions=2,
    train=("decoder.", "projector.", "samplers."),
)  # fmt: skip


def batch(number: int) -> dict[str, np.ndarray]:
    """Noise of the right shapes, [1 B ...]."""
    rng = np.random.default_rng(number)
    out = {}
    for name, leaf in abstract_batch(CONFIG, STAGE, 1).items():
        high = {"pixels": 255, "tile_origin": 1}.get(name, 2 if leaf.dtype == bool else VOCAB)
        out[name] = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
    ends = np.arange(out["tokens"].shape[-1])
    out["token_valid"] = ends < rng.integers(6, 13, out["tokens"].shape[:2])[..., None]
    out["query_mask"] = (ends < 4) & out["token_valid"]
    out["label_mask"] = (ends >= 4) & out["token_valid"]
    out["prefix_valid"][:] = out["patch_valid"][:] = True
    return {name: array[None] for name, array in out.items()}


def train(
    method: Method,
    tree: dict,
    mesh: str,
    devices: int,
    config: ModelConfig = CONFIG.model,
    stage: TrainStage = STAGE,
) -> dict:
    """Losses of all steps on one mesh, and what its devices tell each other."""
    layout = make_layout(mesh, devices)
    model = names.with_method(config, tree, method, layout=layout)
    learning, frozen = split(names.named_leaves(model), stage)
    optimiser = make_optimiser(TrainConfig(), stage)
    state = first_state(learning, optimiser, layout)
    step, seed = make_step(model, stage, optimiser, layout), seed_words(0)

    def arguments(number: int) -> tuple:
        placed = put_batch(batch(number), layout, axis=1)
        return placed, seed, np.int32(number), np.float32(number / STEPS)

    program = step.lower(state, frozen, *arguments(0)).compile()
    losses = []
    for number in range(stage.steps):
        # A compiled program refuses a state that comes back in another layout.
        state, metrics = program(state, frozen, *arguments(number))
        losses.append(float(metrics["loss"]))
    found = read_program(program.as_text(), dict(layout.mesh.shape)).collectives
    return {
        "losses": losses,
        "collectives": [{**one._asdict(), "total": one.total} for one in found],
    }


def on_every_mesh(text: str) -> dict:
    """One method, by mesh; all start from the same parameters."""
    method = replace(CONFIG.compress, method=text).value()
    leaves = names.canonical(names.named_leaves(names.initialise(CONFIG.model, method, 0)))
    tree = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    return {name: train(method, tree, *mesh) for name, mesh in MESHES.items()}


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    json.dump({name: on_every_mesh(text) for name, text in METHODS.items()}, sys.stdout)
