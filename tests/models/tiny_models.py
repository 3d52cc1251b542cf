"""Small models with NumPy's weights (nothing is compiled to make them), and random inputs."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from focus_jax.compress.baselines import full
from focus_jax.compress.method import Context, Method
from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
from focus_jax.models.params import abstract, canonical, named_leaves, staged, with_leaves
from focus_jax.models.vlm import VLM, Inputs
from tests.quick import compiled

# Tiles of 8x8 patches: regions of 4 make 2x2 of them.
SINGLE = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=2, width=16, layers=2, heads=2, mlp_width=24),
    decoder=DecoderConfig(
        vocab_size=50, width=24, layers=3, heads=4, kv_heads=2, head_dim=6, mlp_width=32
    ),
)
TILED = replace(SINGLE, max_tiles=5, image_newline=True)

RUN = Context(jax.random.key(0))

shape_of = cache(abstract)


def random_tree(cfg: ModelConfig, method: Method | None = None, seed: int = 0) -> dict:
    """A canonical tree: kernels of unit gain, everything else around its usual value."""
    rng = np.random.default_rng(seed)
    out = {}
    stacked = replace(cfg, stacked=True)
    for name, leaf in canonical(named_leaves(shape_of(stacked, method or full()))).items():
        value = rng.standard_normal(leaf.shape, dtype=np.float32)
        if name.endswith("kernel"):
            value *= np.prod(leaf.shape[1:-1] if len(leaf.shape) == 3 else leaf.shape[:-1]) ** -0.5
        elif name.endswith(("bias", "scale")):
            value = 0.1 * value + name.endswith("scale")
        out[name] = jnp.asarray(value, leaf.dtype)
    return out


def random_model(
    cfg: ModelConfig, method: Method | None = None, seed: int = 0, tree: dict | None = None
) -> VLM:
    """A model with random weights, those of `tree` in their place where given."""
    method = method or full()
    leaves = random_tree(cfg, method, seed) | (tree or {})
    return with_leaves(shape_of(cfg, method), staged(leaves, method.bounds, cfg.stacked))


def random_inputs(
    cfg: ModelConfig,
    tiles: int = 1,
    batch: int = 2,
    questions: int = 1,
    text: int = 6,
    prefix: int = 2,
    seed: int = 0,
) -> Inputs:
    """Everything valid; 5 tiles lie 2x2, others in a row. The last half of the text asks."""
    rng = np.random.default_rng(seed)
    side, grid = cfg.vision.image_size, cfg.vision.grid
    across = 2 if tiles == 5 else max(tiles - 1, 1)
    origin = [(0, 0)] + [(i // across * grid, i % across * grid) for i in range(tiles - 1)]
    asked = np.zeros((batch, questions, text), bool)
    asked[..., text // 2 :] = True
    tokens = rng.integers(0, cfg.decoder.vocab_size, (batch, questions, text))
    return Inputs(
        pixels=jnp.asarray(rng.integers(0, 256, (batch, tiles, side, side, 3)), jnp.uint8),
        patch_valid=jnp.ones((batch, tiles, grid**2), bool),
        origin=jnp.broadcast_to(jnp.asarray(origin, jnp.int32), (batch, tiles, 2)),
        prefix=jnp.asarray(rng.integers(0, cfg.decoder.vocab_size, (batch, prefix)), jnp.int32),
        prefix_valid=jnp.ones((batch, prefix), bool),
        tokens=jnp.asarray(tokens, jnp.int32),
        token_valid=jnp.ones((batch, questions, text), bool),
        instruction=jnp.asarray(asked),
        label=jnp.zeros((batch, questions, text), bool),
    )


@compiled
def logits(model: VLM, inputs: Inputs):
    """Scores of all question rows: [B*Q T W]."""
    return model.decoder.logits(model(inputs, RUN).hidden)
