"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): outliers of the class token's attention stay."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.class_token import check_class_token, head_attention, whole_attention
from focus_jax.compress.method import (
    Aux,
    Context,
    Dims,
    Method,
    TileTokens,
    Views,
    VisionStage,
    patch_centres,
)
from focus_jax.compress.select import (
    Selection,
    keep_count,
    keep_slots,
    listed,
    places,
    take,
    thin,
    top_k_mask,
)

Attention = Literal["whole", "heads"]
Similarity = Literal["cosine", "dot"]
Merge = Literal["sum", "average"]
Order = Literal["score", "raster"]


class Statistics(NamedTuple):
    """What is counted in each tile. `top`: how many of the highest stay; `step`: of the samples."""

    attention: Float[Array, "B M N"]
    quartiles: Float[Array, "B M 2"]
    threshold: Float[Array, "B M"]
    outliers: Int[Array, "B M"]
    ratio: Float[Array, "B M"]
    top: Int[Array, "B M"]
    step: Int[Array, "B M"]


class Chosen(NamedTuple):
    """Which patches stay, in output order, and what is left.

    `sample`: the evenly spaced patches, those among the highest included. `complement`: what the
    summary token is made of. `overflow`: patches that found no slot.
    """

    kept: Selection
    sample: Bool[Array, "B M N"]
    complement: Bool[Array, "B M N"]
    overflow: Int[Array, "B M"]


class Neighbours(NamedTuple):
    """Which of E columns are near each kept patch; `source`: the patch that a column holds."""

    near: Bool[Array, "B M K E"]
    source: Int[Array, "B M E"]


@dataclass(frozen=True)
class PruMerge(VisionStage):
    """Keep the patches that the class token looks at unusually much, and merge others into them.

    1. Attention a of the class token at layer `layer` of the tower (`attention`).
    2. The n patches above Q3 + `iqr` (Q3 - Q1) stay, highest first; or, with `ratio`, the highest
       floor(N ratio), at least one. Without a summary token at least one stays in any case.
    3. `spatial` > 0 adds evenly spaced patches, about `spatial` for each of the n: with
       s = floor(N / n), or floor(1 / ratio), every max(1, s // spatial)-th from the first (with
       `ratio`: from the middle of the first step), the very last patch never.
    4. Each kept patch gains its `neighbours` nearest by `similarity` of that layer's keys, kept
       ones included: x_i + sum of a_j x_j (`merge` sum).
    5. `summary` adds a last token: the sum of a_j x_j over what was not kept.

    Statistics are those of each tile's own valid patches; padding takes part in nothing. `budget`
    slots a tile: the highest come first, then samples, thinned evenly where they do not all fit;
    `prumerge/overflow` is how many patches a tile found no slot for, on average. A tile without
    outliers is its summary token alone, in PruMerge+ too, whose samples go by their number.
    Tokens stand in `order`, the summary last; tiles one behind another, thumbnail first.

    Defaults are the official code's. The paper's text differs: `attention` heads (mean of the
    heads' own softmax), `similarity` dot, `merge` average (weights a, the kept one's too, summing
    to 1), no `summary`. `strict` follows the code where we mean to differ: quartiles and counts
    over all images and tiles of a batch; with `ratio`, samples stay although they are among the
    highest already (twice, each its twin's nearest neighbour), and for each of those the first
    patch that was not kept takes part in nothing. The code itself cannot run PruMerge+ without
    outliers or with more than a third of the patches; both run here.

    Maps: `prumerge/score` [B M N], `prumerge/index` [B M K], -1 where a slot is empty.
    """

    budget: int = 64
    ratio: float | None = None
    spatial: int = 0
    iqr: float = 1.5
    neighbours: int = 32
    attention: Attention = "whole"
    similarity: Similarity = "cosine"
    merge: Merge = "sum"
    summary: bool = True
    order: Order = "score"
    layer: int = -1
    strict: bool = False
    tile_newline: bool = False  # type: ignore[misc]  # a field here, constant elsewhere

    @property
    def scored_by(self) -> str:
        return f"{'cls_query' if self.attention == 'whole' else 'cls_attention'}@{self.layer}"

    def requests(self) -> tuple[str, ...]:
        return self.scored_by, f"keys@{self.layer}"

    def check(self, dims: Dims) -> None:
        check_class_token("prumerge", dims)
        if not 1 <= self.budget <= dims.patches:
            raise ValueError(
                f"prumerge: budget={self.budget} slots a tile is outside 1..{dims.patches}, the "
                "patches of one: choose fewer"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(
                f"prumerge: ratio={self.ratio} is a share of the patches: use 0 < ratio <= 1, or "
                "leave it out to count outliers"
            )
        if not 0 <= self.neighbours < dims.patches:
            raise ValueError(
                f"prumerge: neighbours={self.neighbours} must lie in 0..{dims.patches - 1}, the "
                "other patches of a tile"
            )
        for name, value in (("spatial", self.spatial), ("iqr", self.iqr)):
            if value < 0:
                raise ValueError(f"prumerge: {name}={value} must not be negative")

    def band(self, dims: Dims) -> int:
        return 0

    def kept_slots(self, dims: Dims) -> int:
        """Slots for kept patches: the budget, or what a fixed ratio can fill of it."""
        if self.ratio is None:
            return self.budget
        first, step = fixed_samples(self.ratio, self.spatial)
        samples = len(range(first, dims.patches - 1, step)) if self.spatial else 0
        return min(self.budget, keep_slots(dims.patches, self.ratio, floor=True) + samples)

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        return (self.kept_slots(dims) + self.summary,) * dims.tiles

    def flops(self, dims: Dims) -> float:
        """Keys and class query, attention, similarities of the kept patches, the merge."""
        kept, n, c = self.kept_slots(dims), dims.patches, dims.vision_width
        scores = (n + 2) * c * c + (n + 1) * c
        similarities = kept * n * c if self.neighbours else 0
        merge = (kept + self.summary) * n * c
        twins = kept * kept * n if self.neighbours and self.keeps_twins else 0
        return 2.0 * dims.tiles * (scores + similarities + merge + twins)

    @property
    def keeps_twins(self) -> bool:
        """Whether a patch may be kept twice."""
        return self.strict and self.ratio is not None and self.spatial > 0

    def apply(
        self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context
    ) -> tuple[list[TileTokens], Aux]:
        statistics = self.count(views)
        chosen = self.choose(statistics, views.patch_valid, self.kept_slots(dims))
        near = self.find(views, chosen)
        weight = self.weights(statistics.attention, chosen, near)
        rows = jnp.where(views.patch_valid[..., None], views.features, 0).astype(jnp.float32)
        merged = jnp.einsum("bmkn,bmnc->bmkc", weight, rows, precision=lax.Precision.HIGHEST)
        present = views.patch_valid.any(-1)
        tiles = jnp.maximum(present.sum(), 1).astype(jnp.float32)
        metrics = {
            "prumerge/kept": chosen.kept.valid.sum() / tiles,
            "prumerge/overflow": chosen.overflow.sum() / tiles,
        }
        index = jnp.where(chosen.kept.valid, chosen.kept.index, -1)
        maps = {"prumerge/score": statistics.attention, "prumerge/index": index}
        tokens = self.place(merged.astype(views.features.dtype), chosen, present, dims)
        return [tokens], Aux({}, metrics, maps)

    def count(self, views: Views) -> Statistics:
        """Attention, its quartiles and outliers, and what follows from them."""
        valid, scores = views.patch_valid, views.named[self.scored_by]
        if self.attention == "whole":
            attention = whole_attention(scores, views.named[f"keys@{self.layer}"], valid)
        else:
            attention = head_attention(scores, valid).mean(axis=2)
        axes: Any = (0, 1, 2) if self.strict else -1
        shape, here = valid.shape[:2], valid.sum(-1, dtype=jnp.int32)
        seen = jnp.where(valid, attention, jnp.nan)
        low, high = jnp.nanquantile(seen, jnp.asarray([0.25, 0.75]), axis=axes)
        threshold = jnp.broadcast_to(high + self.iqr * (high - low), shape)
        unusual = valid & (attention > threshold[..., None])
        outliers = jnp.broadcast_to(unusual.sum(axes, dtype=jnp.int32), shape)
        patches = jnp.broadcast_to(valid.sum(axes, dtype=jnp.int32), shape)
        if self.ratio is None:
            ratio = outliers / jnp.maximum(patches, 1)
            top = here * outliers // jnp.maximum(patches, 1)
            step = patches // jnp.maximum(outliers, 1) // max(self.spatial, 1)
        else:
            ratio = jnp.full(shape, self.ratio)
            top = keep_count(here, self.ratio, floor=True)
            step = jnp.full(shape, fixed_samples(self.ratio, self.spatial)[1])
        if self.ratio is None and self.strict:
            tops, steps = official_counts(valid.shape[-1], valid.size, self.spatial)
            unpadded = patches == valid.size  # the official code knows no padding
            top = jnp.where(unpadded, jnp.asarray(tops)[outliers], top)
            step = jnp.where(unpadded, jnp.asarray(steps)[outliers], step)
        if not self.summary:
            top = jnp.maximum(top, jnp.minimum(here, 1))
        quartiles = jnp.stack([jnp.broadcast_to(q, shape) for q in (low, high)], axis=-1)
        return Statistics(
            attention, jnp.nan_to_num(quartiles), jnp.nan_to_num(threshold), outliers, ratio, top,
            jnp.maximum(step, 1),
        )  # fmt: skip

    def samples(self, s: Statistics, valid: Bool[Array, "B M N"]) -> Bool[Array, "B M N"]:
        """Evenly spaced among the valid patches."""
        if not self.spatial:
            return jnp.zeros_like(valid)
        first = fixed_samples(self.ratio, self.spatial)[0] if self.ratio else 0
        asked = (s.outliers > 0) | (self.ratio is not None)
        rank = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
        last = valid.sum(-1, keepdims=True, dtype=jnp.int32) - 1
        here = (rank >= first) & (rank < last) & ((rank - first) % s.step[..., None] == 0)
        return valid & here & asked[..., None]

    def choose(self, s: Statistics, valid: Bool[Array, "B M N"], slots: int) -> Chosen:
        """The highest, then samples, in `slots` slots."""
        n = valid.shape[-1]
        rank = jnp.argsort(jnp.argsort(jnp.where(valid, -s.attention, jnp.inf), axis=-1), axis=-1)
        top = rank < s.top[..., None]
        sample = self.samples(s, valid)
        added = sample if self.keeps_twins else sample & ~top
        thinned = thin(added, jnp.maximum(slots - s.top, 0))
        never = jnp.iinfo(jnp.int32).max
        key = jnp.concatenate(
            [jnp.where(top, rank, never), jnp.where(thinned, n + jnp.arange(n), never)], axis=-1
        )
        index = jnp.argsort(key, axis=-1)[..., :slots] % n
        wanted = s.top + added.sum(-1, dtype=jnp.int32)
        filled = jnp.arange(slots) < wanted[..., None]
        if self.order == "raster":
            index = jnp.sort(jnp.where(filled, index, never), axis=-1)
        kept = Selection(jnp.where(filled, index, 0), filled)
        return Chosen(kept, sample, self.rest(kept, valid), jnp.maximum(wanted - slots, 0))

    def rest(self, kept: Selection, valid: Bool[Array, "B M N"]) -> Bool[Array, "B M N"]:
        """Valid patches that were not kept, less (strict) the first ones, one for each twin."""
        held = places(kept, valid.shape[-1]).any(-2)
        left = valid & ~held
        if not self.keeps_twins:
            return left
        twins = kept.valid.sum(-1) - held.sum(-1)
        return left & (jnp.cumsum(left, axis=-1) > twins[..., None])

    def find(self, views: Views, chosen: Chosen) -> Neighbours:
        """The nearest of each kept patch, itself left out.

        Columns are the patches, and behind them, where patches may be kept twice, the slots.
        """
        kept, (b, m, n) = chosen.kept, views.patch_valid.shape
        own = places(kept, n)
        source = jnp.broadcast_to(jnp.arange(n), (b, m, n))
        if not self.neighbours:
            return Neighbours(jnp.zeros_like(own), source)
        keys = lax.stop_gradient(views.named[f"keys@{self.layer}"])[:, :, 1:].astype(jnp.float32)
        if self.similarity == "cosine":
            keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        close = jnp.einsum(
            "bmkc,bmnc->bmkn", take(keys, kept), keys, precision=lax.Precision.HIGHEST
        )
        pool = (own.any(-2) | chosen.complement)[:, :, None] & ~own & kept.valid[..., None]
        if self.keeps_twins:
            same = (kept.index[..., None] == kept.index[..., None, :]) & kept.valid[..., None, :]
            twin = jnp.tril(same, -1).any(-1) & kept.valid  # an earlier slot holds the patch
            others = jnp.broadcast_to(twin[..., None, :], same.shape) & kept.valid[..., None]
            others &= ~jnp.eye(same.shape[-1], dtype=bool)
            first = pool | (own & twin[..., None])  # a twin's first copy is another token
            pool = jnp.concatenate([first, others], axis=-1)
            again = jnp.broadcast_to(kept.index[..., None, :], same.shape)
            close = jnp.concatenate([close, jnp.take_along_axis(close, again, -1)], axis=-1)
            source = jnp.concatenate([source, kept.index], axis=-1)
        return Neighbours(top_k_mask(close, pool, self.neighbours), source)

    def weights(
        self, attention: Float[Array, "B M N"], chosen: Chosen, found: Neighbours
    ) -> Float[Array, "B M S N"]:
        """How much of each patch every token is made of; the summary's row comes last."""
        n = attention.shape[-1]
        own = places(chosen.kept, n)
        times = found.near[..., :n].astype(jnp.float32)
        if self.keeps_twins:
            slots = found.near[..., n:].astype(jnp.float32)
            times += jnp.einsum("bmkj,bmjn->bmkn", slots, own.astype(jnp.float32))
        seen = attention[:, :, None]
        weight = times * seen + own * (seen if self.merge == "average" else 1.0)
        if self.summary:
            left = jnp.where(chosen.complement, attention, 0)[:, :, None]
            weight = jnp.concatenate([weight, left], axis=-2)
        if self.merge == "average":
            mass = weight.sum(-1, keepdims=True)
            weight = weight / jnp.where(mass > 0, mass, 1)
        return weight

    def place(
        self, features: Float[Array, "B M S C"], chosen: Chosen, present: Bool[Array, "B M"],
        dims: Dims,
    ) -> TileTokens:  # fmt: skip
        """A kept token stands where its patch is, the summary in the middle of the whole tile."""
        patches = jnp.asarray(patch_centres(dims.rows, dims.cols))
        centre = take(jnp.broadcast_to(patches, (*present.shape, *patches.shape)), chosen.kept)
        valid, side = chosen.kept.valid, chosen.kept.valid.astype(jnp.float32)
        if self.summary:
            # Where all was kept it would be a token of zeros, which the official code appends.
            there = present if self.strict else chosen.complement.any(-1)
            middle = jnp.broadcast_to(patches.mean(0), (*present.shape, 1, 2))
            valid = jnp.concatenate([valid, there[..., None]], axis=-1)
            centre = jnp.concatenate([centre, middle], axis=-2)
            whole = jnp.where(there, float(dims.rows), 0.0)
            side = jnp.concatenate([side, whole[..., None]], axis=-1)
        return TileTokens(features, valid, centre, side)

    def trace(self, views: Views, dims: Dims) -> dict[str, Array]:
        """All choices by the names of the official variables, [B M ...], for comparisons.

        Indices are patches of a tile, -1 where there is none (always behind). `sample_indices` and
        `kept_indices` in output order, `complement_indices` and `neighbour_indices` [B M K E]
        ascending, the latter with a patch as often as it counts.
        """
        s = self.count(views)
        chosen = self.choose(s, views.patch_valid, self.kept_slots(dims))
        found = self.find(views, chosen)
        return {
            "cls_attn": s.attention,
            "threshold": s.threshold,
            "q1_q3": s.quartiles,
            "outlier_count": s.outliers,
            "reduction_ratio": s.ratio,
            "n_topk": s.top,
            "sample_indices": listed(chosen.sample),
            "kept_indices": jnp.where(chosen.kept.valid, chosen.kept.index, -1),
            "complement_indices": listed(chosen.complement),
            "neighbour_indices": listed(found.near, found.source[:, :, None])[
                ..., : self.neighbours
            ],
        }


def official_counts(
    patches: int, everywhere: int, spatial: int
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " K"]]:
    """How many of the highest stay and the step of samples, for 0, 1, ... outliers of a batch.

    In the official code's binary fractions: int(N (k / P)) is not always N k // P.
    """
    shares = [k / everywhere for k in range(1, everywhere + 1)]
    tops = [0, *(int(patches * share) for share in shares)]
    steps = [everywhere, *(int(int(1 / share) / max(spatial, 1)) for share in shares)]
    return np.asarray(tops, np.int32), np.asarray(steps, np.int32)


def fixed_samples(ratio: float, spatial: int) -> tuple[int, int]:
    """First sample and step of a fixed ratio."""
    step = max(int(1 / ratio) // max(spatial, 1), 1)
    return step // 2, step


def prumerge(
    budget: int = 64, ratio: float | None = None, iqr: float = 1.5, neighbours: int = 32,
    attention: Attention = "whole", similarity: Similarity = "cosine", merge: Merge = "sum",
    summary: bool = True, order: Order = "score", layer: int = -1, strict: bool = False,
    tile_newline: bool = False,
) -> Method:  # fmt: skip
    """PruMerge: the outliers of the class token's attention, and a summary token.

    About 32 tokens of 576 on average, so that 64 slots hold twice the mean. `ratio` keeps a fixed
    share instead. The rest as in `PruMerge`.
    """
    stage = PruMerge(
        budget=budget, ratio=ratio, iqr=iqr, neighbours=neighbours,
        attention=attention, similarity=similarity, merge=merge, summary=summary, order=order,
        layer=layer, strict=strict, tile_newline=tile_newline,
    )  # fmt: skip
    return Method("prumerge", stage)


def prumerge_plus(
    budget: int = 192, ratio: float | None = None, spatial: int | None = None, iqr: float = 1.5,
    neighbours: int = 32,
    attention: Attention = "whole", similarity: Similarity = "cosine", merge: Merge = "sum",
    summary: bool = True, order: Order = "score", layer: int = -1, strict: bool = False,
    tile_newline: bool = False,
) -> Method:  # fmt: skip
    """PruMerge+: evenly spaced patches as well; `ratio=0.125` is what it is trained with.

    About 144 tokens of 576 on average. 192 slots hold all that up to 48 outliers ask for; with
    more, samples are thinned. `spatial`: samples for each of the highest; without it 3, and 1
    where `ratio` is fixed, as officially. The rest as in `PruMerge`.
    """
    if spatial is None:
        spatial = 3 if ratio is None else 1
    stage = PruMerge(
        budget=budget, ratio=ratio, spatial=spatial, iqr=iqr, neighbours=neighbours,
        attention=attention, similarity=similarity, merge=merge, summary=summary, order=order,
        layer=layer, strict=strict, tile_newline=tile_newline,
    )  # fmt: skip
    return Method("prumerge_plus", stage)


METHODS = (prumerge, prumerge_plus)
