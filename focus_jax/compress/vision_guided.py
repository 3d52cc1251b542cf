"""FocusLLaVA's vision-guided sampler: each region is pooled at the scale that it needs."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.baselines import tile_tokens
from focus_jax.compress.method import (
    Aux,
    Context,
    Dims,
    TileTokens,
    Views,
    VisionStage,
    block_key,
    patch_centres,
    uniform_draws,
)
from focus_jax.compress.region_controls import crowding, evenly, in_turn
from focus_jax.compress.scales import allocate, demote_to_budget
from focus_jax.compress.select import pack, take, take_values

Gate = Literal[
    "distortion", "measured", "switch", "straight_through", "random", "uniform", "oracle"
]
CONTROLS = ("random", "uniform", "oracle")


class Regions(NamedTuple):
    """Patches grouped by region: R regions of P = region**2 patches, row-major inside."""

    features: Float[Array, "B M R P C"]
    valid: Bool[Array, "B M R P"]


class Router(nnx.Module):
    """LayerNorm and a small MLP over a region's statistics -> one number a scale.

    `saliency`: a linear score for each patch, when pooling weights are learned.
    """

    def __init__(self, width: int, hidden: int, outputs: int, saliency: bool, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(3 * width, rngs=rngs)
        self.up = nnx.Linear(3 * width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, outputs, rngs=rngs)
        self.saliency = nnx.Linear(width, 1, rngs=rngs) if saliency else None

    def __call__(self, regions: Regions) -> Float[Array, "B M R S"]:
        x, seen = regions.features.astype(jnp.float32), regions.valid[..., None]
        count = jnp.maximum(seen.sum(-2), 1)
        mean = jnp.where(seen, x, 0).sum(-2) / count
        top = jnp.where(seen, x, -jnp.inf).max(-2)
        top = jnp.where(jnp.isfinite(top), top, 0)
        variance = (jnp.where(seen, x - mean[..., None, :], 0) ** 2).sum(-2) / count
        stats = jnp.concatenate([mean, top, jnp.sqrt(variance + 1e-6)], axis=-1)
        return self.down(jax.nn.gelu(self.up(self.norm(stats))))


@dataclass(frozen=True)
class VisionGuided(VisionStage):
    """Coarse sampler of FocusLLaVA; only the idea is the paper's, the numbers are decided here.

    `region` patches a side; `scales` are pooling sizes, coarse to fine, each dividing the region;
    `budget` tokens a tile. `gate`:
    - `distortion` (default): the router regresses, for each region and scale, the information
      that pooling loses (after the projector, gradient stopped); scales are allocated by marginal
      loss per token under the budget.
    - `measured`: the same allocation from the measured loss; nothing is learned.
    - `switch`: softmax router, the best scale, tokens times its probability (paper-like).
    - `straight_through`: the same choice, gradient of the soft gate, tokens unchanged.
    The paper-like gates demote the least certain regions until the budget holds; how many is the
    metric `vision/demoted`. `noise` scales Gumbel noise on their logits in training, annealed to
    nothing over the run. `balance` weighs the Switch load loss (alpha), `target` a pull of the
    expected tokens towards the budget. `min_gain`: smallest marginal loss worth a token.
    `teach`: while training, `distortion` allocates by the measured loss that its router learns to
    predict, so that an untrained router does not starve the decoder.
    Three more gates are the controls of a study, allocated at the same budget without a router and
    whatever `min_gain`:
    - `random`: regions by a draw, each refined to the finest scale in its turn.
    - `uniform`: every region alike, scale by scale; the rest evenly over the tile.
    - `oracle`: by what the patches hold (`Context.content`), see `region_controls.crowding`.
    """

    region: int = 4
    scales: tuple[int, ...] = (4, 2, 1)
    budget: int = 225
    pooling: Literal["max", "avg", "saliency"] = "max"
    gate: Gate = "distortion"
    thumbnail: Literal["same", "full"] = "same"
    hidden: int = 64
    router_weight: float = 1.0
    balance: float = 0.01
    target: float = 0.0
    noise: float = 0.3
    min_gain: float = 0.0
    teach: bool = True
    learned: ClassVar[bool] = True

    @property
    def cost(self) -> tuple[int, ...]:
        """Tokens of a region at each scale."""
        return tuple((self.region // p) ** 2 for p in self.scales)

    def check(self, dims: Dims) -> None:
        name = "vision-guided sampler"
        if self.region < 1 or dims.rows % self.region or dims.cols % self.region:
            raise ValueError(
                f"{name}: region={self.region} does not divide the tile of "
                f"{dims.rows}x{dims.cols} patches: choose a divisor"
            )
        if any(p < 1 or self.region % p for p in self.scales):
            raise ValueError(f"{name}: scales={self.scales} must all divide region={self.region}")
        if list(self.scales) != sorted(set(self.scales), reverse=True):
            raise ValueError(f"{name}: scales={self.scales} must fall, coarse to fine")
        least = self.regions(dims) * self.cost[0]
        if not least <= self.budget <= dims.patches:
            raise ValueError(
                f"{name}: budget={self.budget} tokens a tile is outside {least}..{dims.patches} "
                f"({self.regions(dims)} regions at the coarsest scale .. the whole grid)"
            )

    def regions(self, dims: Dims) -> int:
        return dims.patches // self.region**2

    def band(self, dims: Dims) -> int:
        return self.region

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        first = dims.patches if self.keeps_thumbnail(dims) else self.budget
        return (first,) + (self.budget,) * (dims.tiles - 1)

    def keeps_thumbnail(self, dims: Dims) -> bool:
        return self.thumbnail == "full" and dims.tiles > 1

    @property
    def learns(self) -> bool:
        """Whether it has parameters, which a checkpoint must hold."""
        return self.gate not in ("measured", *CONTROLS) or self.pooling == "saliency"

    def init(self, dims: Dims, rngs: nnx.Rngs) -> nnx.Module | None:
        if not self.learns:
            return None
        return Router(
            dims.vision_width, self.hidden, len(self.scales), self.pooling == "saliency", rngs=rngs
        )

    def flops(self, dims: Dims) -> float:
        """Router, or for `measured` the projection of every scale that it compares."""
        if self.gate in CONTROLS:
            return 0.0
        c, regions = dims.vision_width, self.regions(dims) * dims.tiles
        routed = 2.0 * regions * self.hidden * (3 * c + len(self.scales))
        if self.gate != "measured":
            return routed
        tokens = regions * (sum(self.cost) + self.region**2)
        return 2.0 * tokens * (c * dims.width + dims.width**2)

    def apply(
        self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context
    ) -> tuple[list[TileTokens], Aux]:
        if not self.keeps_thumbnail(dims):
            tokens, aux = self.sample(views, dims, module, project, ctx)
            return [tokens], aux
        thumbnail = views_of(views, slice(0, 1))
        rest = views_of(views, slice(1, None))
        if ctx.content is not None:
            ctx = ctx._replace(content=ctx.content[:, 1:])
        tokens, aux = self.sample(rest, dims, module, project, ctx)
        return [tile_tokens(thumbnail, dims), tokens], aux

    def sample(
        self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context
    ) -> tuple[TileTokens, Aux]:
        """Choose scales and pack the pooled tokens of each tile into the budget."""
        regions = to_regions(views, dims, self.region)
        pooled = [self.pool(regions, p, module) for p in self.scales]
        choice, gate, aux = self.route(regions, pooled, dims, module, project, ctx)
        tokens, full_count = self.pack(pooled, choice, gate, dims)
        counts = [(choice == s).mean() for s in range(len(self.scales))]
        metrics = {
            f"vision/share_scale_{p}": c for p, c in zip(self.scales, counts, strict=True)
        } | {"vision/tokens": full_count.astype(jnp.float32).mean()}
        cost = jnp.asarray((*self.cost, 0))[choice]
        return tokens, Aux(
            aux.losses, aux.metrics | metrics, aux.maps | {"vision/tokens_per_region": cost}
        )

    def pool(self, regions: Regions, side: int, module: Any) -> tuple[Array, Array]:
        """Tokens [B M R S C] of one scale and which of them have a valid patch."""
        cells = split_cells(regions, self.region, side)
        x, seen = cells.features, cells.valid[..., None]
        if side == 1:
            return x[..., 0, :] * seen[..., 0, :], cells.valid[..., 0]
        if self.pooling == "max":
            out = jnp.where(seen, x, jnp.finfo(x.dtype).min).max(-2)
        elif self.pooling == "avg":
            out = jnp.where(seen, x, 0).sum(-2) / jnp.maximum(seen.sum(-2), 1)
        else:
            score = jnp.where(seen, module.saliency(x), -jnp.inf)
            score = score - jax.lax.stop_gradient(jnp.maximum(score.max(-2, keepdims=True), -1e9))
            weight = jnp.exp(score)
            out = (weight * x).sum(-2) / jnp.maximum(weight.sum(-2), 1e-9)
        valid = cells.valid.any(-1)
        return jnp.where(valid[..., None], out, 0).astype(x.dtype), valid

    def route(
        self, regions: Regions, pooled: list, dims: Dims, module: Any, project: Any, ctx: Context
    ) -> tuple[Int[Array, "B M R"], Array | None, Aux]:
        """The scale of each region (-1: nothing there), a factor for its tokens, the losses."""
        available = regions.valid.any(-1)
        if self.gate in CONTROLS:
            loss = self.control_loss(regions, dims, ctx)
            return allocate(loss, self.cost, self.budget, available), None, Aux({}, {}, {})
        if self.gate == "measured":
            loss = distortion(regions, pooled, self.region, self.scales, project)
            choice = allocate(loss, self.cost, self.budget, available, self.min_gain)
            return choice, None, Aux({}, {}, {})
        if self.gate == "distortion":
            return self.route_by_distortion(regions, pooled, module, project, ctx, available)
        return self.route_by_gate(regions, module, ctx, available)

    def control_loss(self, regions: Regions, dims: Dims, ctx: Context) -> Float[Array, "B M R S"]:
        """What a region loses at each scale, as a control has it. ValueError without content."""
        shape = regions.valid.shape[:3]
        if self.gate == "random":
            return in_turn(1.0 - uniform_draws(block_key(ctx, "regions"), shape), self.cost)
        if self.gate == "uniform":
            loss = evenly(dims.rows // self.region, dims.cols // self.region, self.cost)
            return jnp.broadcast_to(jnp.asarray(loss), (*shape, len(self.cost)))
        if ctx.content is None:
            raise ValueError(
                "vision-guided sampler: gate=oracle allocates by what the patches hold, and the "
                "inputs have no content: use batches with the tables of glyphs "
                "(make_loader(..., glyphs=...), objectives.inputs_of), or another gate"
            )
        content = by_region(ctx.content[..., None], dims, self.region)
        held = Regions(jnp.where(regions.valid[..., None], content, 0.0), regions.valid)
        cells = [split_cells(held, self.region, p).features[..., 0] for p in self.scales]
        return crowding([cell.sum(-1) for cell in cells], self.scales)

    def route_by_distortion(self, regions, pooled, module, project, ctx, available):
        guess = module(jax.lax.stop_gradient(regions))[..., :-1]
        guess = jax.nn.softplus(guess)
        loss = jnp.concatenate([guess, jnp.zeros_like(guess[..., :1])], axis=-1)
        loss = jax.lax.stop_gradient(loss)
        if not ctx.train:
            choice = allocate(loss, self.cost, self.budget, available, self.min_gain)
            return choice, None, Aux({}, {}, {})
        measured = distortion(regions, pooled, self.region, self.scales, project)
        ranked = measured if self.teach else loss
        choice = allocate(ranked, self.cost, self.budget, available, self.min_gain)
        target = measured[..., :-1]
        error = masked_mean((guess - target) ** 2, available[..., None])
        spread = masked_mean(
            (target - masked_mean(target, available[..., None])) ** 2, available[..., None]
        )
        unexplained = error / jnp.maximum(jax.lax.stop_gradient(spread), 1e-9)
        losses = {"router": self.router_weight * unexplained}
        return choice, None, Aux(losses, {"vision/router_unexplained": unexplained}, {})

    def route_by_gate(self, regions, module, ctx, available):
        logits = module(regions)
        if ctx.train and self.noise > 0:
            level = self.noise * jnp.maximum(1.0 - ctx.progress, 0.0)
            logits = logits + level * jax.random.gumbel(block_key(ctx, "gumbel"), logits.shape)
        soft = jax.nn.softmax(logits, axis=-1)
        top = jnp.where(available, jnp.argmax(logits, axis=-1), -1)
        here = jnp.take_along_axis(logits, jnp.maximum(top, 0)[..., None], -1)[..., 0]
        coarser = jnp.take_along_axis(logits, jnp.maximum(top - 1, 0)[..., None], -1)[..., 0]
        choice, demoted = demote_to_budget(top, here - coarser, self.cost, self.budget)
        chosen = jnp.take_along_axis(soft, jnp.maximum(choice, 0)[..., None], -1)[..., 0]
        gate = chosen if self.gate == "switch" else 1.0 - jax.lax.stop_gradient(chosen) + chosen
        losses = self.gate_losses(soft, top, available) if ctx.train else {}
        metrics = {"vision/demoted": demoted.astype(jnp.float32).mean()}
        return choice, gate, Aux(losses, metrics, {})

    def gate_losses(self, soft: Array, top: Array, available: Array) -> dict[str, Array]:
        """Switch load balance over scales; a pull of the expected tokens towards the budget."""
        scales = len(self.scales)
        f = masked_mean(jax.nn.one_hot(top, scales), available[..., None], axes=(0, 1, 2))
        p = masked_mean(soft, available[..., None], axes=(0, 1, 2))
        expected = (soft @ jnp.asarray(self.cost, soft.dtype) * available).sum(-1)
        miss = ((expected - self.budget) / self.budget) ** 2
        return {
            "balance": self.balance * scales * (jax.lax.stop_gradient(f) * p).sum(),
            "target": self.target * miss.mean(),
        }

    def pack(
        self, pooled: list, choice: Array, gate: Array | None, dims: Dims
    ) -> tuple[TileTokens, Array]:
        """Candidates of all scales in region raster order, the chosen ones moved to the front."""
        valid = [ok & (choice == s)[..., None] for s, (_, ok) in enumerate(pooled)]
        candidates = jnp.concatenate([x for x, _ in pooled], axis=-2)
        if gate is not None:
            candidates = candidates * gate[..., None, None].astype(candidates.dtype)
        mask = jnp.concatenate(valid, axis=-1)
        b, m, r, k = mask.shape
        selection, _ = pack(mask.reshape(b, m, r * k), self.budget)
        centre, side = candidate_places(dims, self.region, self.scales)
        spread = lambda a: jnp.broadcast_to(jnp.asarray(a), (b, m, *a.shape))  # noqa: E731
        tokens = TileTokens(
            take(candidates.reshape(b, m, r * k, -1), selection),
            selection.valid,
            take(spread(centre), selection),
            take_values(spread(side), selection, 0.0),
        )
        return tokens, selection.valid.sum(-1)


def views_of(views: Views, tiles: slice) -> Views:
    """Some of the tiles, without what the stage asked for by name."""
    return jax.tree.map(lambda a: a[:, tiles], views._replace(named={}))


def masked_mean(x: Array, mask: Array, axes: tuple[int, ...] | None = None) -> Array:
    """Mean of `x` where `mask` (broadcast) holds, 0 where nowhere."""
    mask = jnp.broadcast_to(mask, x.shape)
    return jnp.where(mask, x, 0).sum(axes) / jnp.maximum(mask.sum(axes), 1)


def to_regions(views: Views, dims: Dims, region: int) -> Regions:
    """Group a tile's patches by region, regions and patches row-major."""
    valid = by_region(views.patch_valid[..., None], dims, region)[..., 0]
    return Regions(by_region(views.features, dims, region), valid)


def by_region(x: Array, dims: Dims, region: int) -> Array:
    """[B M N C] -> [B M R P C]."""
    b, m = x.shape[:2]
    up, across = dims.rows // region, dims.cols // region
    x = x.reshape(b, m, up, region, across, region, -1)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, m, up * across, region**2, -1)


def split_cells(regions: Regions, region: int, side: int) -> Regions:
    """Cells of `side` x `side` patches inside regions: [B M R S side**2 (C)], both row-major."""
    b, m, r = regions.valid.shape[:3]
    up = region // side

    def group(a: Array) -> Array:
        a = a.reshape(b, m, r, up, side, up, side, -1)
        return a.transpose(0, 1, 2, 3, 5, 4, 6, 7).reshape(b, m, r, up * up, side * side, -1)

    return Regions(group(regions.features), group(regions.valid)[..., 0])


def distortion(
    regions: Regions, pooled: list, region: int, scales: tuple[int, ...], project: Any
) -> Float[Array, "B M R S"]:
    """Information lost by each scale: squared distance of pooled to patch features, projected.

    Summed over a region's valid patches, as a share of its patches, and divided by the mean squared
    norm of the image's projected patches: without a unit, 1 is the loss of all. No gradient.
    """
    fine = project(regions.features).astype(jnp.float32)
    norm = masked_mean((fine**2).sum(-1), regions.valid, axes=(1, 2, 3))
    losses = []
    for side, (tokens, _) in zip(scales, pooled, strict=True):
        spread = split_cells(Regions(fine, regions.valid), region, side)
        coarse = project(tokens).astype(jnp.float32)[..., None, :]
        gap = ((spread.features - coarse) ** 2).sum(-1)
        losses.append(jnp.where(spread.valid, gap, 0).sum((-1, -2)) / region**2)
    loss = jnp.stack(losses, axis=-1) / jnp.maximum(norm, 1e-9)[:, None, None, None]
    return jax.lax.stop_gradient(loss)


def candidate_places(
    dims: Dims, region: int, scales: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Centre [R*K 2] and side [R*K] of each candidate token, in patches of its tile."""
    corner = patch_centres(dims.rows // region, dims.cols // region) * region
    inside = [patch_centres(region // p, region // p) * p + (p - 1) / 2 for p in scales]
    sides = [np.full(len(cells), p, np.float32) for p, cells in zip(scales, inside, strict=True)]
    centre = corner[:, None] + np.concatenate(inside)[None]
    side = np.broadcast_to(np.concatenate(sides), centre.shape[:2])
    return centre.reshape(-1, 2).astype(np.float32), side.reshape(-1).copy()
