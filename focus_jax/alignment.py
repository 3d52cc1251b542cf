"""The projector fitted in closed form: what each patch shows, as the decoder's words for it.

Stands for the pre-training that aligns a vision tower with a language model. Gradient descent
needs thousands of steps here, because tower features share one large common component; ridge
regression on the projector's last layer needs none.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from focus_jax.data.cells import at_cells, tiles_alone
from focus_jax.models.vlm import VLM
from focus_jax.sharding import pinned


class Moments(NamedTuple):
    """Sums over cells, inputs x and targets y; `batches` counts what was added up."""

    xx: Float[Array, "F F"]
    xy: Float[Array, "F D"]
    yy: Float[Array, ""]
    y: Float[Array, " D"]
    batches: Float[Array, ""]


def tower_features(vlm: VLM, pixels: UInt8[Array, "B M S S 3"]) -> Float[Array, "B C F"]:
    """The tower's features of an image's C cells, each from the view that shows it by itself.

    A thumbnail's patch shows several at once, which no one cell's words describe.
    """
    tiles = tiles_alone(pixels)
    features = vlm.vision(tiles.reshape(-1, *tiles.shape[2:]))["features"]
    return at_cells(features.reshape(*tiles.shape[:2], *features.shape[1:]))


def hidden_features(vlm: VLM, pixels: UInt8[Array, "B M S S 3"]) -> Float[Array, "B C F"]:
    """What the projector's last layer sees of each cell, and a constant."""
    features = tower_features(vlm, pixels)
    if vlm.projector.linear_2 is not None:
        features = jax.nn.gelu(vlm.projector.linear_1(features), approximate=False)
    return jnp.pad(features, [(0, 0), (0, 0), (0, 1)], constant_values=1.0)


def cell_weights(filled: Bool[Array, "B C"]) -> Float[Array, "B C"]:
    """Filled and empty cells weigh the same in total, 1 together."""
    return jnp.where(filled, 0.5 / jnp.maximum(filled.sum(), 1), 0.5 / (~filled).sum())


def unexplained(vlm: VLM, batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Share of the variance of cells' words that the projector's tokens do not tell.

    The same target as `fit_projector`'s, for tower and projector to go on from it by gradients.
    """
    told = vlm.projector(tower_features(vlm, batch["pixels"])).astype(jnp.float32)
    y = jax.lax.stop_gradient(vlm.decoder.embedded(batch["cell_words"]).sum(-2))
    weight = cell_weights(batch["cell_filled"])
    mean = jnp.einsum("bn,bnd->d", weight, y)
    spread = (weight * ((y - mean) ** 2).sum(-1)).sum()
    return (weight * ((told - y) ** 2).sum(-1)).sum() / spread


def moments(vlm: VLM, batch: Mapping[str, Array]) -> Moments:
    """One batch's sums; filled and empty cells weigh the same in total."""
    x = hidden_features(vlm, batch["pixels"])
    y = vlm.decoder.embedded(batch["cell_words"]).sum(-2)
    weight = cell_weights(batch["cell_filled"])
    flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
    x, y, weight = flat(x), flat(y), flat(weight)[:, None]
    sums = Moments(
        x.T @ (weight * x), x.T @ (weight * y), (weight * y * y).sum(), (weight * y).sum(0),
        jnp.ones(()),
    )  # fmt: skip
    return jax.tree.map(lambda a: pinned(vlm.layout, a), sums)  # whole on every device


def fit_projector(
    vlm: VLM, batches: Iterable[Mapping[str, Any]], steps: int, ridge: float = 1e-5
) -> tuple[dict[str, Array], float]:
    """(leaves of the projector's last layer, share of the targets' variance left unexplained)."""
    step = jax.jit(moments)
    total: Any = None
    for _, batch in zip(range(steps), batches, strict=False):
        part = step(vlm, {k: batch[k] for k in ("pixels", "cell_words", "cell_filled")})
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    xx, xy, yy, y, _ = (np.asarray(a, np.float64) / float(total.batches) for a in total)
    weights = np.linalg.solve(xx + ridge * np.trace(xx) / len(xx) * np.eye(len(xx)), xy)
    left = yy - 2 * (weights * xy).sum() + (weights * (xx @ weights)).sum()
    name = "linear_1" if vlm.projector.linear_2 is None else "linear_2"
    dtype = vlm.projector.linear_1.kernel[...].dtype
    leaves = {
        f"projector.{name}.kernel": jnp.asarray(weights[:-1], dtype),
        f"projector.{name}.bias": jnp.asarray(weights[-1], dtype),
    }
    return leaves, float(left / (yy - (y**2).sum()))
