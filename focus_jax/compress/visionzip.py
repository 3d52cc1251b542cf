"""VisionZip (arXiv 2412.04467): patches that the class token looks at, and the rest merged."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from focus_jax.compress.class_token import check_class_token, head_attention
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
    listed,
    merge_by_assignment,
    pack,
    places,
    take,
    top_k,
    top_k_in_order,
)

Metric = Literal["keys", "whole_keys", "features"]
Merge = Literal["add", "average"]
Order = Literal["raster", "score"]


class Dominant(NamedTuple):
    """The patches that stay as they are, in output order."""

    score: Float[Array, "B M N"]
    kept: Selection


class Contextual(NamedTuple):
    """The rest: `targets` in raster order, and the target that every other patch joins (-1: none).

    `metric`: the unit vectors that are compared.
    """

    metric: Float[Array, "B M N K"]
    targets: Selection
    assignment: Int[Array, "B M N"]


@dataclass(frozen=True)
class VisionZip(VisionStage):
    """Keep the patches with the most attention from the class token, and merge the others.

    1. Attention of the class token at tower layer `layer`, summed over heads.
    2. `dominant` tokens stay: the class token itself and the `dominant` - 1 patches with the most,
       in `order`.
    3. Of the R patches left, in raster order, every max(1, R // `contextual`)-th is a target, the
       first `contextual` of them. Every other joins its nearest target by cosine of `metric`: keys
       of that layer averaged over heads, all of the keys, or the features.
    4. A contextual token is its target plus the mean of what joined it (`merge` add); `average`
       is the mean of all of them, which the paper's words "merge by averaging" allow as well.

    Order: class token, dominant, contextual; tiles one behind another, thumbnail first. Padding is
    never dominant, target or member, and weighs nothing in the attention; with fewer patches than
    slots the rest stays empty.

    Maps: `visionzip/score` [B M N], `visionzip/index` [B M D-1], `visionzip/target` [B M R], -1
    where a slot is empty.
    """

    dominant: int = 54
    contextual: int = 10
    metric: Metric = "keys"
    merge: Merge = "add"
    order: Order = "raster"
    layer: int = -2
    tile_newline: bool = False  # type: ignore[misc]  # a field here, constant elsewhere

    def requests(self) -> tuple[str, ...]:
        keys = (f"keys@{self.layer}",) if self.contextual and self.metric != "features" else ()
        return (f"cls_attention@{self.layer}", *keys)

    def check(self, dims: Dims) -> None:
        check_class_token("visionzip", dims)
        if not 2 <= self.dominant <= dims.patches + 1:
            raise ValueError(
                f"visionzip: dominant={self.dominant} counts the class token and at least one "
                f"patch: use 2..{dims.patches + 1} for tiles of {dims.patches} patches"
            )
        most = dims.patches + 1 - self.dominant
        if not 0 <= self.contextual <= most:
            raise ValueError(
                f"visionzip: contextual={self.contextual} must lie in 0..{most}, the patches that "
                f"dominant={self.dominant} leaves: lower one of them"
            )

    def band(self, dims: Dims) -> int:
        return 0

    def tile_slots(self, dims: Dims) -> tuple[int, ...]:
        return (self.dominant + self.contextual,) * dims.tiles

    def flops(self, dims: Dims) -> float:
        """Keys and class query, attention, similarities to the targets, the merge."""
        n, c = dims.patches, dims.vision_width
        scores = (n + 2) * c * c + (n + 1) * c
        # At most: keys averaged over heads are compared at the width of one.
        merge = 2 * n * self.contextual * c
        return 2.0 * dims.tiles * (scores + merge)

    def apply(
        self, views: Views, dims: Dims, module: Any, project: Any, ctx: Context
    ) -> tuple[list[TileTokens], Aux]:
        valid = views.patch_valid
        patches = jnp.asarray(patch_centres(dims.rows, dims.cols))
        centre = jnp.broadcast_to(patches, (*valid.shape, 2))
        first = self.dominate(views)
        present = valid.any(-1)[..., None]
        whole = views.named["class_token"]
        whole = jnp.where(present[..., None], whole, 0).astype(views.features.dtype)
        middle = jnp.broadcast_to(patches.mean(0), (*present.shape, 2))
        parts = [
            TileTokens(whole, present, middle, jnp.where(present, float(dims.rows), 0.0)),
            tokens_at(take(views.features, first.kept), first.kept, centre),
        ]
        maps = {"visionzip/score": first.score, "visionzip/index": shown(first.kept)}
        if self.contextual:
            rest = self.gather(views, first)
            merged = self.merged(views.features, rest)
            parts.append(tokens_at(merged, rest.targets, centre))
            maps["visionzip/target"] = shown(rest.targets)
        joined = (jnp.concatenate(column, axis=2) for column in zip(*parts, strict=True))
        return [TileTokens(*joined)], Aux({}, {}, maps)

    def dominate(self, views: Views) -> Dominant:
        """The patches that the class token looks at most."""
        attention = head_attention(views.named[f"cls_attention@{self.layer}"], views.patch_valid)
        score = attention.sum(axis=2)
        chosen = top_k_in_order if self.order == "raster" else top_k
        return Dominant(score, chosen(score, views.patch_valid, self.dominant - 1))

    def gather(self, views: Views, first: Dominant) -> Contextual:
        """Targets among the patches that are left, and who joins them."""
        n = views.patch_valid.shape[-1]
        left = views.patch_valid & ~places(first.kept, n).any(-2)
        count = left.sum(-1, keepdims=True, dtype=jnp.int32)
        step = jnp.maximum(count // self.contextual, 1)
        rank = jnp.cumsum(left, axis=-1, dtype=jnp.int32) - 1
        is_target = left & (rank % step == 0) & (rank < step * self.contextual)
        targets, _ = pack(is_target, self.contextual)
        metric = self.compared(views)
        closeness = jnp.einsum(
            "bmnk,bmtk->bmnt", metric, take(metric, targets), precision=lax.Precision.HIGHEST
        )
        closeness = jnp.where(targets.valid[:, :, None], closeness, -jnp.inf)
        joins = jnp.where(left & ~is_target, jnp.argmax(closeness, axis=-1), -1)
        return Contextual(metric, targets, joins)

    def compared(self, views: Views) -> Float[Array, "B M N K"]:
        """Unit vectors of the patches, fp32; no gradient."""
        if self.metric == "features":
            vectors = lax.stop_gradient(views.features).astype(jnp.float32)
        else:
            vectors = self.keys(views)[:, :, 1:]
        norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors / jnp.maximum(norm, 1e-12)

    def keys(self, views: Views) -> Float[Array, "B M S K"]:
        """Keys of class token and patches, averaged over heads unless all of them count."""
        keys = lax.stop_gradient(views.named[f"keys@{self.layer}"]).astype(jnp.float32)
        heads = views.named[f"cls_attention@{self.layer}"].shape[2]
        if self.metric == "whole_keys":
            return keys
        return keys.reshape(*keys.shape[:3], heads, -1).mean(axis=3)

    def merged(self, features: Float[Array, "B M N C"], rest: Contextual) -> Array:
        """Contextual tokens [B M R C]."""
        assignment = rest.assignment
        once = jnp.ones(assignment.shape, jnp.float32)
        if self.merge == "add":
            joined = merge_by_assignment(features, assignment, once, self.contextual, mean=True)
            return take(features, rest.targets) + joined
        held = places(rest.targets, features.shape[2])
        assignment = jnp.where(held.any(-2), jnp.argmax(held, axis=-2), assignment)
        return merge_by_assignment(features, assignment, once, self.contextual, mean=True)

    def trace(self, views: Views) -> dict[str, Array]:
        """All choices by the names of the official variables, [B M ...], for comparisons.

        Indices count the class token as 0 and patches from 1; -1 where there is none (always
        behind). `assignment`: of the tokens in `merged_indices`, which target each joins.
        ValueError without contextual tokens.
        """
        if not self.contextual:
            raise ValueError("visionzip: contextual=0 merges nothing; trace a stage that does")
        first = self.dominate(views)
        rest = self.gather(views, first)
        member = rest.assignment >= 0
        order = jnp.argsort(~member, axis=-1)
        group = jnp.where(member, rest.assignment, self.contextual)
        counts = (group[..., None] == jnp.arange(self.contextual)).sum(-2)
        patches = jnp.broadcast_to(1 + jnp.arange(member.shape[-1]), member.shape)
        ranked = top_k(first.score, views.patch_valid, self.dominant - 1)
        out = {"cls_attention_sum": first.score}
        if self.metric != "features":
            out["metric"] = self.keys(views)
        return out | {
            "all_indices": with_class(ranked),
            "dominant_indices": with_class(first.kept),
            "target_indices": jnp.where(rest.targets.valid, rest.targets.index + 1, -1),
            "merged_indices": listed(member, patches),
            "assignment": jnp.take_along_axis(rest.assignment, order, axis=-1),
            "counts": counts,
        }


def tokens_at(features: Array, held: Selection, centre: Float[Array, "B M N 2"]) -> TileTokens:
    """Tokens that stand where the patches of a selection are."""
    return TileTokens(features, held.valid, take(centre, held), held.valid.astype(jnp.float32))


def shown(selection: Selection) -> Int[Array, "B M K"]:
    """Indices, -1 where a slot is empty."""
    return jnp.where(selection.valid, selection.index, -1)


def with_class(selection: Selection) -> Int[Array, "B M K"]:
    """Indices that count the class token as 0, itself in front."""
    index = jnp.where(selection.valid, selection.index + 1, -1)
    return jnp.pad(index, [(0, 0), (0, 0), (1, 0)])


def visionzip(
    dominant: int = 54,
    contextual: int = 10,
    metric: Metric = "keys",
    merge: Merge = "add",
    order: Order = "raster",
    layer: int = -2,
    tile_newline: bool = False,
) -> Method:
    """VisionZip: dominant tokens (the class token among them) and contextual ones; 64 in all.

    Officially also 108 + 20 and 162 + 30. The rest as in `VisionZip`.
    """
    stage = VisionZip(
        dominant=dominant, contextual=contextual, metric=metric, merge=merge, order=order,
        layer=layer, tile_newline=tile_newline,
    )  # fmt: skip
    return Method("visionzip", stage)


METHODS = (visionzip,)
