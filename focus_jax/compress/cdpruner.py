"""CDPruner: a set of visual tokens that is diverse and relevant to the instruction."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.baselines import Full, check_share
from focus_jax.compress.divprune import cosines, pair_flops, rows_of, unit_rows
from focus_jax.compress.method import Aux, Context, Cut, Dims, LayerView, Method
from focus_jax.compress.select import Selection, greedy_in_order, keep_count, keep_slots

Relevance = Literal["embedding", "negative_embedding"]
Sharing = Literal["per_question", "pooled"]

# A row this near to the span of the chosen ones (squared distance of unit vectors) adds nothing
# that float32 can tell from rounding.
EXHAUSTED = 1e-5


@dataclass(frozen=True)
class CDPruner(Cut):
    """Keep the most probable set of a determinantal point process, found greedily.

    Its kernel is diag(r) S diag(r): S are cosines of visual rows, r the relevance of each to the
    instruction, min-max normalised to [0, 1] (1 for all where they are equal, as without an
    instruction: pure diversity). Each step adds the token that enlarges the determinant most.
    Tokens without a gain, because they are no longer distinguishable from combinations of the
    chosen ones (`EXHAUSTED`) or have relevance 0, come last, the most relevant first. Ties go to
    the lowest index. `keep` of the valid tokens that entered the decoder stay, in their order.

    `relevance` names its source. "embedding": the cosine to the mean of the instruction's rows (at
    layer 0 its embeddings). That is a stand-in: the paper has CLIP's text tower and projection,
    which LLaVA checkpoints lack. The official code takes the negative of that cosine, CLIP's
    patches being unlike the text that they show; "negative_embedding" does so here. For another
    source override `rating`, or call `most_probable`. `sharing`: a set for each question of an
    image, or one from the mean of their ratings.
    """

    keep: float = 0.25
    relevance: Relevance = "embedding"
    sharing: Sharing = "per_question"

    @property
    def shared(self) -> bool:  # type: ignore[override]
        return self.sharing == "pooled"

    def check(self, dims: Dims, entering: int) -> None:
        super().check(dims, entering)
        check_share("cdpruner", self.keep)

    def slots(self, entering: int, train: bool = False) -> int:
        return keep_slots(entering, self.keep)

    def rating(self, layer: LayerView) -> Float[Array, "B Q V"]:
        """How relevant each visual token is to each question, on any scale."""
        text = unit_rows(instruction_mean(layer))
        cosine = jnp.einsum(
            "bvd,bqd->bqv", unit_rows(layer.visual), text, precision=jax.lax.Precision.HIGHEST
        )
        return cosine if self.relevance == "embedding" else -cosine

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        rating = jax.lax.stop_gradient(self.rating(layer)).astype(jnp.float32)
        if self.shared:
            rating = rating.mean(axis=1, keepdims=True)
        valid = jnp.broadcast_to(layer.visual_valid[:, None], rating.shape)
        count = jnp.broadcast_to(keep_count(layer.entered, self.keep)[:, None], rating.shape[:2])
        relevance = min_max(rating, valid)
        cosine = cosines(layer.visual, layer.visual_valid)
        selection = most_probable(cosine, relevance, valid, slots, count)
        return selection, Aux(
            {}, {}, {"cdpruner/score": relevance, "cdpruner/index": selection.index}
        )

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        """Pairs of rows, rows with the questions, and a Cholesky row a step over all slots.

        The slots are taken to be `keep` of those at the cut.
        """
        sets, slots = 1 if self.shared else questions, self.slots(visual)
        rating = 2.0 * questions * visual * dims.width
        return pair_flops(dims, visual) + rating + 2.0 * sets * slots**2 * visual


def instruction_mean(layer: LayerView) -> Float[Array, "B Q D"]:
    """Mean of the instruction's rows in fp32, without gradient; 0 for a question without any."""
    token = jax.lax.stop_gradient(layer.token).astype(jnp.float32)
    token = jnp.where(layer.instruction[..., None], token, 0)
    count = layer.instruction.sum(-1)[..., None]
    return token.sum(-2) / jnp.maximum(count, 1)


def min_max(score: Float[Array, "B Q V"], valid: Bool[Array, "B Q V"]) -> Float[Array, "B Q V"]:
    """Valid scores stretched to [0, 1], 1 where all are equal; 0 where not valid."""
    low = score.min(-1, keepdims=True, where=valid, initial=jnp.inf)
    high = score.max(-1, keepdims=True, where=valid, initial=-jnp.inf)
    flat = high <= low
    share = (score - low) / jnp.where(flat, 1, high - low)
    return jnp.where(valid, jnp.where(flat, 1, share), 0)


def most_probable(
    cosine: Float[Array, "B V V"],
    relevance: Float[Array, "B Q V"],
    valid: Bool[Array, "B Q V"],
    slots: int,
    count: Int[Array, "B Q"],
) -> Selection:
    """The greedy MAP set of the process with kernel diag(relevance) cosine diag(relevance).

    Incremental Cholesky (Chen, Zhang, Zhou 2018, arXiv 1709.05135): O(V slots) a step. The factor
    is that of the cosines alone, a row a step in a fixed buffer; relevance, in [0, 1], only scales
    a token's gain by its square, and numerical exhaustion then does not depend on it.
    """

    def gain(residual: Array) -> Array:
        gains = (residual > EXHAUSTED) & (relevance > 0)
        return jnp.where(gains, residual * relevance**2, relevance - 2)

    def add(state, step, chosen):
        factor, residual = state
        at = chosen[..., None]
        own = jnp.take_along_axis(factor, at[..., None], axis=-1)[..., 0]
        left = jnp.take_along_axis(residual, at, axis=-1)
        known = jnp.einsum("bqk,bqkv->bqv", own, factor, precision=jax.lax.Precision.HIGHEST)
        row = (rows_of(cosine, chosen) - known) * jax.lax.rsqrt(jnp.maximum(left, EXHAUSTED))
        factor = jax.lax.dynamic_update_index_in_dim(factor, row, step, axis=-2)
        residual = residual - row**2
        return (factor, residual), gain(residual)

    b, q, v = relevance.shape
    # Exactly 1 where there is a row: rounding must not rank tokens of equal relevance.
    present = jnp.diagonal(cosine, axis1=-2, axis2=-1) > 0
    residual = jnp.broadcast_to(present.astype(jnp.float32)[:, None], relevance.shape)
    factor = jnp.zeros((b, q, min(slots, v), v))
    return greedy_in_order(gain(residual), add, (factor, residual), valid, slots, count)


def cdpruner(
    keep: float = 0.25,
    relevance: Relevance = "embedding",
    layer: int = 0,
    renumber: bool = False,
    sharing: Sharing = "per_question",
) -> Method:
    """CDPruner (Zhang et al. 2025, arXiv 2506.10967), from the paper's math.

    keep: share of the visual tokens that stay. relevance: "embedding" or "negative_embedding", both
    without CLIP's text tower (see the class). Officially each tile has a budget of its own and the
    survivors get contiguous positions (`renumber`); here the image has one budget, and the kept
    tokens keep their positions, so that rotary distances still tell where a patch lies.
    """
    cut = CDPruner(layer=layer, keep=keep, relevance=relevance, renumber=renumber, sharing=sharing)
    return Method("cdpruner", Full(), (cut,))


METHODS = (cdpruner,)
