"""Baselines that every table needs: full, random, uniform, pool, downsample."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from focus_jax.compress.method import (
    Aux,
    Context,
    Dims,
    Method,
    TileTokens,
    Views,
    VisionStage,
    empty_aux,
    patch_centres,
    uniform_draws,
)
from focus_jax.compress.select import (
    Selection,
    keep_count,
    keep_slots,
    take,
    take_values,
    top_k_in_order,
    uniform_2d,
)


def check_share(name: str, share: float) -> None:
    """ValueError unless `share` is in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"{name}: keep={share} is a share of the visual tokens: use 0 < keep <= 1")


def tile_tokens(views: Views, dims: Dims, selection: Selection | None = None) -> TileTokens:
    """All patches of the tiles as tokens, or the selected ones [B M K]."""
    b, m, n, _ = views.features.shape
    centre = jnp.broadcast_to(jnp.asarray(patch_centres(dims.rows, dims.cols)), (b, m, n, 2))
    if selection is None:
        return TileTokens(views.features, views.patch_valid, centre, jnp.ones((b, m, n)))
    return TileTokens(
        take(views.features, selection),
        take_values(views.patch_valid, selection, False),
        take(centre, selection),
        selection.valid.astype(jnp.float32),
    )


@dataclass(frozen=True)
class Full(VisionStage):
    """Every patch is a token."""

    selects: ClassVar[bool] = False

    def cell(self, dims: Dims) -> float:
        return 1.0

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        return (dims.patches,) * dims.tiles

    def apply(self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context):
        return [tile_tokens(views, dims)], empty_aux()


@dataclass(frozen=True)
class Random(VisionStage):
    """A random share of each tile's patches, drawn anew for each image."""

    keep: float = 0.25

    def check(self, dims: Dims) -> None:
        check_share("random", self.keep)

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        return (keep_slots(dims.patches, self.keep),) * dims.tiles

    def apply(self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context):
        score = uniform_draws(ctx.key, views.patch_valid.shape)
        count = keep_count(views.patch_valid.sum(-1), self.keep)
        selection = top_k_in_order(score, views.patch_valid, self.tile_slots(dims)[0], count)
        return [tile_tokens(views, dims, selection)], empty_aux()


@dataclass(frozen=True)
class Uniform(VisionStage):
    """The same evenly spaced patches of every tile."""

    keep: float = 0.25

    def check(self, dims: Dims) -> None:
        check_share("uniform", self.keep)

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        return (keep_slots(dims.patches, self.keep),) * dims.tiles

    def apply(self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context):
        cells = uniform_2d(dims.rows, dims.cols, self.tile_slots(dims)[0])
        index = jnp.broadcast_to(jnp.asarray(cells), (*views.patch_valid.shape[:2], cells.size))
        valid = jnp.take_along_axis(views.patch_valid, index, axis=-1)
        return [tile_tokens(views, dims, Selection(index, valid))], empty_aux()


def area_weights(size: int, cells: int) -> np.ndarray:
    """Row i: how much of each of `size` patches lies in cell i of `cells`, float32 [cells size]."""
    edges = np.linspace(0, size, cells + 1)
    low, high = np.arange(size), np.arange(size) + 1
    overlap = np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None])
    return np.clip(overlap, 0, None).astype(np.float32)


@dataclass(frozen=True)
class Pool(VisionStage):
    """Average pooling of a tile's grid to `size` x `size` cells; padded patches weigh nothing."""

    size: int = 12

    def check(self, dims: Dims) -> None:
        if not 1 <= self.size <= min(dims.rows, dims.cols):
            raise ValueError(
                f"pool: size={self.size} does not fit a tile of {dims.rows}x{dims.cols} patches: "
                f"use 1..{min(dims.rows, dims.cols)}"
            )
        if dims.fitting() and (dims.rows % self.size or dims.cols % self.size):
            raise ValueError(
                f"pool: size={self.size} does not divide a tile of {dims.rows}x{dims.cols} "
                "patches, and rows of a stitched image end in newlines: choose a divisor"
            )

    def band(self, dims: Dims) -> int:
        return dims.rows // self.size

    def cell(self, dims: Dims) -> float:
        return dims.rows / self.size

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        return (self.size**2,) * dims.tiles

    def flops(self, dims: Dims) -> float:
        return 2.0 * dims.tiles * self.size**2 * dims.patches * dims.vision_width

    def apply(self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context):
        weight = np.kron(area_weights(dims.rows, self.size), area_weights(dims.cols, self.size))
        mass = jnp.einsum("kn,bmn->bmk", weight, views.patch_valid.astype(jnp.float32))
        kept = views.features * views.patch_valid[..., None]
        pooled = jnp.einsum("kn,bmnc->bmkc", weight.astype(kept.dtype), kept)
        pooled = pooled / jnp.maximum(mass, 1e-6)[..., None].astype(kept.dtype)
        return [grid_tokens(pooled, mass > 0, dims, self.size)], empty_aux()


def grid_tokens(features: Array, valid: Array, dims: Dims, size: int) -> TileTokens:
    """Tokens of a `size` x `size` grid laid over each tile."""
    scale = np.asarray([dims.rows / size, dims.cols / size], np.float32)
    centre = jnp.broadcast_to(
        jnp.asarray((patch_centres(size, size) + 0.5) * scale - 0.5), (*valid.shape, 2)
    )
    return TileTokens(features, valid, centre, jnp.full(valid.shape, scale[0]))


@dataclass(frozen=True)
class Downsample(VisionStage):
    """The tower sees each tile at `size` x `size` patches; every patch of that is a token."""

    size: int = 12

    @property
    def grid(self) -> int:  # type: ignore[override]
        return self.size

    def check(self, dims: Dims) -> None:
        Pool(self.size).check(dims)

    def band(self, dims: Dims) -> int:
        return dims.rows // self.size

    def cell(self, dims: Dims) -> float:
        return dims.rows / self.size

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        return (self.size**2,) * dims.tiles

    def apply(
        self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context
    ) -> tuple[list[TileTokens], Aux]:
        b, m = views.features.shape[:2]
        valid = views.patch_valid.reshape(b, m, dims.rows, dims.cols)
        covered = np.kron(area_weights(dims.rows, self.size), area_weights(dims.cols, self.size))
        mass = jnp.einsum("kn,bmn->bmk", covered, valid.reshape(b, m, -1).astype(jnp.float32))
        return [grid_tokens(views.features, mass > 0, dims, self.size)], empty_aux()


def full() -> Method:
    """All visual tokens in every layer."""
    return Method("full", Full())


def random(keep: float = 0.25) -> Method:
    """A random share of the visual tokens enters the decoder."""
    return Method("random", Random(keep))


def uniform(keep: float = 0.25) -> Method:
    """Every n-th visual token, in two dimensions."""
    return Method("uniform", Uniform(keep))


def pool(size: int = 12) -> Method:
    """Average-pooled grid."""
    return Method("pool", Pool(size))


def downsample(size: int = 12) -> Method:
    """A smaller image."""
    return Method("downsample", Downsample(size))


METHODS = (full, random, uniform, pool, downsample)
