"""Recorded compression of a tower's tokens: PruMerge and VisionZip on small CLIP networks."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from focus_jax import hf, hf_config
from focus_jax.compress.method import Context, Dims, Method, Views
from focus_jax.compress.prumerge import PruMerge, prumerge, prumerge_plus
from focus_jax.compress.stitch import stitch
from focus_jax.compress.visionzip import VisionZip, visionzip
from focus_jax.config import DecoderConfig, ModelConfig
from focus_jax.golden.case import Recorded
from focus_jax.models.params import named_leaves, with_leaves
from focus_jax.models.vision import VisionTower

GIVEN = "pixel_values"
VARIANTS: dict[str, Callable[..., Method]] = {"plain": prumerge, "plus": prumerge_plus}
# What several images share: official code gives it once.
SHARED = (
    "threshold", "q1_q3", "outlier_count", "reduction_ratio", "n_topk", "sample_indices",
)  # fmt: skip


# ------------------------------------------------------------------------------------ tower


def tower(directory: Path, feature_layer: int = -2) -> VisionTower:
    """A case's CLIP, for pixels that are normalised already."""
    vision = replace(
        hf_config.tower_config(directory), feature_layer=feature_layer, pixel_mean=(0.0,) * 3,
        pixel_std=(1 / 255,) * 3,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=2, width=4, layers=1, heads=1, kv_heads=1, head_dim=4, mlp_width=4
    )
    cfg = ModelConfig(vision=vision, decoder=decoder)
    shape: Any = nnx.eval_shape(lambda: VisionTower(cfg, rngs=nnx.Rngs(0)))
    wanted = {f"vision.{name}": leaf for name, leaf in named_leaves(shape).items()}
    tree = hf.load(cfg, hf.tower_entries(directory), wanted, directory, None, workers=1)
    filled: Any = with_leaves(shape, {n.removeprefix("vision."): a for n, a in tree.items()})
    return filled


@partial(jax.jit, static_argnames="requests")
def look(
    vision: VisionTower, pixels: Float[Array, "B 3 S S"], requests: tuple[str, ...]
) -> dict[str, Array]:
    """What the tower hands out of images, channels first."""
    return vision(pixels.transpose(0, 2, 3, 1), requests)


def seen(case: Recorded, layer: int, feature_layer: int, asked: tuple[str, ...]) -> Views:
    """A case's images, one tile each; beside what was `asked`, queries and input of a layer."""
    requests = tuple(sorted({*asked, f"queries@{layer}", f"hidden@{layer}"}))
    pixels = jnp.asarray(case.array("pixel_values"))
    named = look(tower(case.directory, feature_layer), pixels, requests)
    named = {name: a[:, None] for name, a in named.items()}
    features = named.pop("features")
    b, _, n, _ = features.shape
    side = isqrt(n)
    valid, rows = jnp.ones((b, 1, n), bool), jnp.ones((b, 1, side), bool)
    return Views(features, valid, rows, jnp.zeros((b, 1, 2), jnp.int32), named)


def dims_of(views: Views) -> Dims:
    """Square tiles, and a decoder that does not matter."""
    m, n, c = views.features.shape[1:]
    side = isqrt(n)
    return Dims(side, side, m, (), c, c, layers=1, newline=False)


@partial(jax.jit, static_argnames=("stage", "dims"))
def tokens_of(stage: PruMerge | VisionZip, views: Views, dims: Dims) -> tuple[Array, Array]:
    """The tokens of each image before the projector [B V C], and which there are [B V]."""
    groups, _ = stage.apply(views, dims, None, None, Context(jax.random.key(0)))
    out = stitch(groups, views, dims, stage.band(dims), stage.tile_newline)
    return out.features, out.valid


# ---------------------------------------------------------------------------------- methods


def replay_prumerge(case: Recorded) -> dict[str, np.ndarray]:
    """PruMerge or PruMerge+ as officially, statistics over the whole batch."""
    knobs = case.knobs
    layer, variant = knobs["qk_layer"], knobs["variant"]
    if variant not in VARIANTS:
        raise ValueError(f"PruMerge variant {variant!r}: known are {', '.join(VARIANTS)}")
    asked = (f"cls_query@{layer}", f"keys@{layer}")
    views = seen(case, layer, knobs["select_layer"], asked)
    dims = dims_of(views)
    method = VARIANTS[variant](
        budget=dims.patches, ratio=None if knobs["if_adaptive"] else knobs["reduction_ratio"],
        neighbours=knobs["neighbours"], layer=layer, strict=True,
    )  # fmt: skip
    stage = method.check(dims).vision
    assert isinstance(stage, PruMerge)
    found = by_image(jax.jit(PruMerge.trace, static_argnums=(0, 2))(stage, views, dims))
    for name in ("sample_indices", "kept_indices", "complement_indices"):
        found[name] = trimmed(found[name])
    # Rows of empty slots say nothing.
    found["neighbour_indices"] = found["neighbour_indices"][:, : found["kept_indices"].shape[1]]
    found |= {name: shared(found[name]) for name in SHARED}
    return found | tower_arrays(views, layer) | {"tokens": rows_of(*tokens_of(stage, views, dims))}


def replay_visionzip(case: Recorded) -> dict[str, np.ndarray]:
    """VisionZip as officially, which does not count the class token as dominant."""
    knobs = case.knobs
    method = visionzip(dominant=knobs["dominant_num"] + 1, contextual=knobs["contextual_num"])
    last = hf_config.tower_config(case.directory).layers - 1
    views = seen(case, last, -2, method.vision.requests())
    dims = dims_of(views)
    stage = method.check(dims).vision
    assert isinstance(stage, VisionZip)
    found = by_image(jax.jit(VisionZip.trace, static_argnums=0)(stage, views))
    for name in ("all_indices", "dominant_indices", "target_indices", "merged_indices"):
        found[name] = trimmed(found[name])
    found["assignment"] = found["assignment"][:, : found["merged_indices"].shape[1]]
    return found | tower_arrays(views, last) | {"tokens": rows_of(*tokens_of(stage, views, dims))}


def tower_arrays(views: Views, layer: int) -> dict[str, np.ndarray]:
    """Input, queries and keys of a layer, by the names of a case."""
    names = {"hidden_minus2": "hidden", f"q{layer}": "queries", f"k{layer}": "keys"}
    named: Mapping[str, Any] = views.named
    return {
        theirs: np.asarray(named[f"{ours}@{layer}"][:, 0])
        for theirs, ours in names.items()
        if f"{ours}@{layer}" in named
    }


# ----------------------------------------------------------------------------------- shapes


def by_image(named: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Without the axis of an image's only tile."""
    return {name: np.asarray(a)[:, 0] for name, a in named.items()}


def trimmed(index: Int[np.ndarray, "B K"]) -> Int[np.ndarray, "B M"]:
    """Without the slots at the end that hold -1 in every image."""
    return index[:, : int((index >= 0).sum(-1).max(initial=0))]


def shared(values: np.ndarray) -> np.ndarray:
    """What all images have in common, once; as it is where they differ."""
    return values[0] if (values == values[:1]).all() else values


def rows_of(tokens: Float[Array, "B S C"], there: Bool[Array, "B S"]) -> Float[np.ndarray, "B V C"]:
    """The valid tokens, which stand first; NaN where an image has fewer than another."""
    valid = np.asarray(there)
    count = int(valid.sum(-1).max(initial=0))
    return np.where(valid[..., None], tokens, np.nan)[:, :count]
