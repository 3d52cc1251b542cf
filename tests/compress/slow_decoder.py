"""A decoder in NumPy that runs one question at a time, and batches of mixed sizes for the model.

Tests of cuts say in loops what a cut leaves of one sample; the model must give the same for each
question of each sample of a padded batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from focus_jax.compress.method import VisualTokens
from focus_jax.config import ModelConfig
from focus_jax.models.vlm import Inputs
from tests.models.tiny_models import SINGLE, random_inputs

DEEP = replace(SINGLE, decoder=replace(SINGLE.decoder, layers=5))  # 4 heads, 2 key heads
PREFIX, TEXT = 2, 7


@dataclass(frozen=True)
class Sample:
    """Rows of one question at a layer's entry: prefix, visual tokens, text.

    `asks`: rows (counted from the first text row) whose attention ranks. `before`: the sample at
    the entry of the layer before.
    """

    x: np.ndarray
    position: np.ndarray
    prefix: int
    visual: int
    asks: tuple[int, ...]
    before: "Sample | None" = None

    @property
    def image(self) -> slice:
        return slice(self.prefix, self.prefix + self.visual)

    def with_image(self, x: np.ndarray, position: np.ndarray | None) -> "Sample":
        """Other visual rows; without their positions all rows are counted anew."""
        first, behind = self.prefix, self.prefix + self.visual
        rows = np.concatenate([self.x[:first], x, self.x[behind:]])
        if position is None:
            places = np.arange(len(rows))
        else:
            old = self.position
            places = np.concatenate([old[:first], position, old[behind:]])
        return replace(self, x=rows, position=places, visual=len(x))

    def keep(self, index: list[int], renumber: bool = False) -> "Sample":
        """Some of the visual rows."""
        position = None if renumber else self.position[self.image][index]
        return self.with_image(self.x[self.image][index], position)


class SlowDecoder:
    """Llama's layers in float64, from a canonical tree."""

    def __init__(self, cfg: ModelConfig, tree: dict):
        self.cfg = cfg.decoder
        self.tree = {k: np.asarray(v, np.float64) for k, v in tree.items() if k[:7] == "decoder"}

    def weight(self, name: str, layer: int) -> np.ndarray:
        kind = "scale" if name.startswith("norm") else "kernel"
        return self.tree[f"decoder.layers.{name}.{kind}"][layer]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.tree["decoder.embed.embedding"][ids]

    def norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.cfg.norm_eps) * scale

    def rotated(self, x: np.ndarray, position: np.ndarray) -> np.ndarray:
        half = self.cfg.head_dim // 2
        angle = position[:, None] * self.cfg.rope_theta ** (-np.arange(half) / half)
        x = x.reshape(len(x), -1, 2, half).astype(complex)
        turned = (x[:, :, 0] + 1j * x[:, :, 1]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(self, layer: int, s: Sample) -> np.ndarray:
        """Causal softmax maps [H S S]."""
        y = self.norm(s.x, self.weight("norm_1", layer))
        q = self.rotated(y @ self.weight("q", layer), s.position)
        k = self.rotated(y @ self.weight("k", layer), s.position)
        k = k.repeat(q.shape[1] // k.shape[1], axis=1)
        logits = np.einsum("shd,jhd->hsj", q, k) / self.cfg.head_dim**0.5
        logits[:, ~np.tri(len(s.x), dtype=bool)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def scores(self, layer: int, s: Sample) -> np.ndarray:
        """What visual rows get from the asking rows: mean over heads and rows."""
        maps = self.attention(layer, s).mean(0)
        rows = [s.prefix + s.visual + row for row in s.asks]
        return maps[rows].mean(0)[s.image]

    def run_layer(self, layer: int, s: Sample) -> Sample:
        maps = self.attention(layer, s)
        y = self.norm(s.x, self.weight("norm_1", layer)) @ self.weight("v", layer)
        v = y.reshape(len(y), self.cfg.kv_heads, -1).repeat(len(maps) // self.cfg.kv_heads, 1)
        mixed = np.einsum("hsj,jhd->shd", maps, v).reshape(len(y), -1)
        x = s.x + mixed @ self.weight("out", layer)
        y = self.norm(x, self.weight("norm_2", layer))
        gate = y @ self.weight("gate", layer)
        inner = gate / (1 + np.exp(-gate)) * (y @ self.weight("up", layer))
        return replace(s, x=x + inner @ self.weight("down", layer), before=s)

    def run(self, s: Sample, cuts: dict[int, Callable[[Sample], Sample]]) -> Sample:
        """All layers, a cut before some of them."""
        for layer in range(self.cfg.layers):
            s = self.run_layer(layer, cuts.get(layer, lambda s: s)(s))
        return s


def highest(score: np.ndarray, count: int) -> list[int]:
    """The places of the highest scores, rising."""
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:count])


def mixed_batch(
    valid: tuple[int, int], cfg: ModelConfig = DEEP, seed: int = 0
) -> tuple[Inputs, VisualTokens]:
    """Two samples with two questions; prefixes, images and questions of several lengths.

    What is not valid is large, so that it shows where it is not left out.
    """
    rng = np.random.default_rng(seed)
    slots = max(valid)
    seen = np.arange(slots) < np.asarray(valid)[:, None]
    rows = rng.standard_normal((2, slots, cfg.decoder.width)).astype(np.float32)
    rows[~seen] *= 50
    visual = VisualTokens(
        features=jnp.asarray(rows), valid=jnp.asarray(seen), centre=jnp.zeros((2, slots, 2)),
        side=jnp.ones((2, slots)), view=jnp.zeros((2, slots), jnp.int32),
        newline=jnp.zeros((2, slots), bool),
    )  # fmt: skip
    inputs = random_inputs(cfg, batch=2, questions=2, text=TEXT, prefix=PREFIX, seed=seed)
    lengths = np.asarray([[7, 5], [6, 7]])[..., None]
    prefix_valid = jnp.asarray([[True, True], [False, True]])
    token_valid = jnp.asarray(np.arange(TEXT) < lengths)
    return inputs._replace(prefix_valid=prefix_valid, token_valid=token_valid), visual


def questions(
    decoder: SlowDecoder, inputs: Inputs, visual: VisualTokens
) -> Iterator[tuple[int, int, Sample]]:
    """(sample, question, its rows alone, without padding); the last token asks."""
    for b, q in np.ndindex(*inputs.tokens.shape[:2]):
        prefix = np.asarray(inputs.prefix[b])[np.asarray(inputs.prefix_valid[b])]
        image = np.asarray(visual.features[b], np.float64)[np.asarray(visual.valid[b])]
        text = np.asarray(inputs.tokens[b, q])[np.asarray(inputs.token_valid[b, q])]
        x = np.concatenate([decoder.embed(prefix), image, decoder.embed(text)])
        asks = (len(text) - 1,)
        yield b, q, Sample(x, np.arange(len(x)), len(prefix), len(image), asks)


def assert_text_equal(hidden, inputs: Inputs, b: int, q: int, want: Sample) -> None:
    """The model's text rows [B*Q T D] of a question are the sample's."""
    count = int(inputs.token_valid[b, q].sum())
    flat = b * inputs.tokens.shape[1] + q
    np.testing.assert_allclose(hidden[flat, :count], want.x[-count:], atol=2e-4)
