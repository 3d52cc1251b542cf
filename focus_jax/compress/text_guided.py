"""FocusLLaVA's text-guided sampler: the visual tokens that the instruction attends to stay."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.method import (
    Aux,
    Context,
    Cut,
    Dims,
    LayerView,
    block_key,
    uniform_draws,
)
from focus_jax.compress.select import (
    Selection,
    keep_count,
    keep_slots,
    smallest_mass,
    top_k_in_order,
)

Asking = Literal["last", "instruction", "peak", "starts", "raters"]
Rank = Literal["most", "least", "random"]


@dataclass(frozen=True)
class TextGuided(Cut):
    """Keep the visual tokens with the most attention from the instruction, at one layer.

    The paper states the idea; the rest is decided here. Score: attention probability from the
    layer's own queries and keys, reduced over heads (`heads`) and over the asking rows
    (`queries`: the prompt's last token, the mean over the instruction, or `peak`, the most that
    one of the instruction's tokens gives). `normalise`: the softmax runs over all that a row may
    see, or over the visual columns alone.
    `mode` top_k keeps `keep` of the valid tokens that entered the decoder; top_p the smallest set
    with `mass` of the score, within the same slots. `train_keep` (low, high) samples the share at
    each training step; slots are then those of `high`, the mask those of the sample.
    `sharing`: a selection for each question of an image, or one from the mean of their scores.
    `rank`: which end of the scores stays. `least` and `random` are controls of a study, which keep
    as many: the lowest scores, or (without any score) a draw for each question and step.
    """

    keep: float = 0.25
    queries: Literal["last", "instruction", "peak"] = "instruction"
    heads: Literal["mean", "max"] = "mean"
    normalise: Literal["all", "visual"] = "all"
    mode: Literal["top_k", "top_p"] = "top_k"
    mass: float = 0.9
    train_keep: tuple[float, float] | None = None
    sharing: Literal["per_question", "pooled"] = "per_question"
    rank: Rank = "most"
    reads_attention: ClassVar[bool] = True

    @property
    def shared(self) -> bool:  # type: ignore[override]
        return self.sharing == "pooled"

    def check(self, dims: Dims, entering: int) -> None:
        super().check(dims, entering)
        low, high = self.train_keep or (self.keep, self.keep)
        if not 0 < self.keep <= 1 or not 0 < low <= high <= 1:
            raise ValueError(
                f"text-guided sampler: keep={self.keep}, train_keep={self.train_keep} are shares "
                "of the visual tokens: use 0 < low <= high <= 1"
            )
        if not 0 < self.mass <= 1:
            raise ValueError(f"text-guided sampler: mass={self.mass} must be in (0, 1]")
        if self.rank == "random" and self.mode == "top_p":
            raise ValueError(
                "text-guided sampler: rank=random has no scores of which top_p could count the "
                "mass: use mode=top_k"
            )

    def slots(self, entering: int, train: bool = False) -> int:
        share = self.train_keep[1] if train and self.train_keep else self.keep
        return keep_slots(entering, share)

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        score = self.score(layer, ctx)
        valid = jnp.broadcast_to(layer.visual_valid[:, None], score.shape)
        share: float | Array = self.keep
        if ctx.train and self.train_keep:
            low, high = self.train_keep
            share = jax.random.uniform(block_key(ctx, "keep"), minval=low, maxval=high)
        count = jnp.broadcast_to(keep_count(layer.entered, share)[:, None], score.shape[:2])
        metrics = {}
        if self.mode == "top_p":
            within, over = smallest_mass(score, valid, self.mass, slots)
            needed = within.valid.sum(-1, dtype=jnp.int32) + over
            # The row's own share, not the slots, which depend on how images were bucketed.
            metrics["text/over_budget"] = jnp.maximum(needed - count, 0).astype(jnp.float32).mean()
            count = jnp.minimum(needed, count)
        ranked = -score if self.rank == "least" else score
        selection = top_k_in_order(ranked, valid, slots, count)
        metrics["text/kept"] = selection.valid.sum(-1).astype(jnp.float32).mean()
        return selection, Aux({}, metrics, {"text/score": score})

    def score(self, layer: LayerView, ctx: Context) -> Float[Array, "B Q V"]:
        """Attention scores, or draws in [0, 1) for `random`; Q = 1 when shared. No gradient."""
        if self.rank == "random":
            questions = 1 if self.shared else layer.q.shape[1]
            shape = (layer.q.shape[0], questions, layer.visual_valid.shape[1])
            return uniform_draws(block_key(ctx, "rank"), shape)
        score = jax.lax.stop_gradient(
            attention_score(layer, self.queries, self.heads, self.normalise)
        )
        return score.mean(axis=1, keepdims=True) if self.shared else score

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        if self.rank == "random":
            return 0.0
        columns = visual + (prefix + text if self.normalise == "all" else 0)
        return score_flops(
            dims, self.queries, columns, visual, text, width, kv_width, prefix, questions
        )


def score_flops(
    dims: Dims, queries: Asking, columns: int, visual: int, text: int, width: int, kv_width: int,
    prefix: int, questions: int,
) -> float:  # fmt: skip
    """Operations of `attention_score` with so many columns for one sample; sizes as in `Cut.flops`.

    The layer's queries of the questions and keys of all rows, then asking rows x columns.
    """
    asking = 1 if queries == "last" else text
    keys = prefix + visual + questions * text
    projections = 2.0 * dims.width * (questions * text * width + keys * kv_width)
    return projections + 2.0 * questions * asking * columns * width


def most_attended(
    layer: LayerView, queries: Asking, count: Int[Array, " B"], slots: int
) -> tuple[Selection, Float[Array, "B Q V"]]:
    """Each question's `count` visual tokens with the highest score, in order; and the scores.

    The score is the mean over heads and asking rows, softmax over all that a row sees; no gradient
    flows through it. `slots` may be 0.
    """
    score = jax.lax.stop_gradient(attention_score(layer, queries))
    valid = jnp.broadcast_to(layer.visual_valid[:, None], score.shape)
    count = jnp.broadcast_to(count[:, None], score.shape[:2])
    kept = top_k_in_order(score, valid, max(slots, 1), count)
    return Selection(*(a[..., :slots] for a in kept)), score


def attention_score(
    layer: LayerView,
    queries: Asking = "instruction",
    heads: Literal["mean", "max"] = "mean",
    normalise: Literal["all", "visual"] = "all",
) -> Float[Array, "B Q V"]:
    """Attention probability that each visual token gets from a question's asking rows, fp32.

    `queries` names the rows (fields of `LayerView`): their mean counts; with "peak" the most that
    one row of the instruction gives. Only text rows x columns are computed, never the full map.
    Rows that do not ask, and samples without any, give 0.
    """
    rows: Bool[Array, "B Q T"] = layer.instruction if queries == "peak" else getattr(layer, queries)
    q, at = layer.q, jnp.broadcast_to(jnp.arange(rows.shape[-1]), rows.shape)
    if queries == "last":  # one row a question
        at = jnp.argmax(rows, axis=-1)[..., None]
        q, rows = jnp.take_along_axis(q, at[..., None, None], axis=2), rows.any(-1, keepdims=True)
    b, qs, t, h, d = q.shape
    q = q.reshape(b, qs, t, layer.k_visual.shape[2], -1, d).astype(jnp.float32) * d**-0.5
    visual = jnp.einsum("bqtgrd,bvgd->bqtgrv", q, layer.k_visual.astype(jnp.float32))
    before = layer.after[:, None, None] <= at[..., None]  # the row stands behind the image
    seen = layer.visual_valid[:, None, None] & before
    visual = jnp.where(seen[:, :, :, None, None], visual, -jnp.inf)
    top = visual.max(-1, keepdims=True)
    others = other_logits(layer, q, at) if normalise == "all" else None
    if others is not None:
        top = jnp.maximum(top, others.max(-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    exp = jnp.exp(visual - top)
    total = exp.sum(-1, keepdims=True)
    if others is not None:
        total = total + jnp.exp(others - top).sum(-1, keepdims=True)
    weights = (exp / jnp.maximum(total, 1e-30)).reshape(b, qs, t, h, -1)
    if queries == "peak":
        each = weights.max(3) if heads == "max" else weights.mean(3)
        return jnp.where(rows[..., None], each, 0.0).max(2)
    share = (rows / jnp.maximum(rows.sum(-1, keepdims=True), 1)).astype(jnp.float32)
    if heads == "max":
        return jnp.einsum("bqtv,bqt->bqv", weights.max(3), share)
    # Rows before heads: devices that hold different heads then add [B Q V] and no more.
    return jnp.einsum("bqthv,bqt->bqhv", weights, share).mean(2)


def other_logits(layer: LayerView, q: Array, at: Int[Array, "B Q R"]) -> Array:
    """Logits of the rows `at` on prefix and question columns, -inf where not visible."""
    prefix = jnp.einsum("bqtgrd,bpgd->bqtgrp", q, layer.k_prefix.astype(jnp.float32))
    prefix = jnp.where(layer.prefix_valid[:, None, None, None, None], prefix, -jnp.inf)
    own = jnp.einsum("bqtgrd,bqjgd->bqtgrj", q, layer.k.astype(jnp.float32))
    causal = jnp.arange(layer.k.shape[2]) <= at[..., None]
    causal = causal & layer.token_valid[:, :, None]
    own = jnp.where(causal[:, :, :, None, None], own, -jnp.inf)
    return jnp.concatenate([prefix, own], axis=-1)
