"""TrimTokenator: the visual tokens nearest to the text, and of these the most diverse."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.baselines import Full, check_share
from focus_jax.compress.cdpruner import instruction_mean
from focus_jax.compress.divprune import cosines, pair_flops, rows_of
from focus_jax.compress.method import Aux, Context, Cut, Dims, LayerView, Method
from focus_jax.compress.select import Selection, greedy_in_order, keep_count, keep_slots

Sharing = Literal["per_question", "pooled"]


@dataclass(frozen=True)
class TrimTokenator(Cut):
    """Keep visual tokens that are near to the instruction's rows and unlike each other.

    1. Alignment: minus the mean squared distance to the instruction's rows. `candidates` of the
       valid tokens that entered the decoder go on (all of them where there is no instruction).
       The paper does not give this share; 0.8 is a choice made here.
    2. Diversity: the candidate with the lowest mean cosine to the candidates is first, then, one at
       a time, the one with the lowest mean cosine to those chosen, until `keep` of the valid tokens
       that entered are chosen; they stay in their order.

    Ties go to the lowest index. `sharing`: a set for each question of an image, or one from the
    mean of their alignments. At a later layer than 0 the rows are hidden rows.
    """

    keep: float = 0.25
    candidates: float = 0.8
    sharing: Sharing = "per_question"

    @property
    def shared(self) -> bool:  # type: ignore[override]
        return self.sharing == "pooled"

    def check(self, dims: Dims, entering: int) -> None:
        super().check(dims, entering)
        check_share("trimtokenator", self.keep)
        if not self.keep <= self.candidates <= 1:
            raise ValueError(
                f"trimtokenator: candidates={self.candidates} is the share of the visual tokens "
                f"that keep={self.keep} is chosen from: use keep <= candidates <= 1"
            )

    def slots(self, entering: int, train: bool = False) -> int:
        return keep_slots(entering, self.keep)

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        score = alignment(layer)
        asked = layer.instruction.any(-1)
        if self.shared:
            score, asked = score.mean(axis=1, keepdims=True), asked.any(-1, keepdims=True)
        valid = jnp.broadcast_to(layer.visual_valid[:, None], score.shape)
        near = keep_count(layer.entered, self.candidates)[:, None]
        chosen_from = jnp.where(asked[..., None], highest(score, valid, near), valid)
        count = jnp.broadcast_to(keep_count(layer.entered, self.keep)[:, None], score.shape[:2])
        cosine = cosines(layer.visual, layer.visual_valid)
        selection = least_alike(cosine, chosen_from, slots, count)
        return selection, Aux(
            {}, {}, {"trimtokenator/score": score, "trimtokenator/index": selection.index}
        )

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        """Pairs of rows, and each set's mean cosines; alignment and choices are no products."""
        sets = 1 if self.shared else questions
        return pair_flops(dims, visual) + 2.0 * sets * visual**2


def alignment(layer: LayerView) -> Float[Array, "B Q V"]:
    """Minus the mean squared distance of each visual row to the instruction's rows, in fp32.

    Mean of |v - t|^2 = |v - mean t|^2 + mean of |t - mean t|^2: one distance, not one a text row.
    0 for a question without instruction, and for padding.
    """
    mean, asks = instruction_mean(layer), layer.instruction
    visual, token = jax.lax.stop_gradient((layer.visual, layer.token))
    distance = square_distance(visual[:, None], mean[:, :, None])
    spread = jnp.where(asks, square_distance(token, mean[:, :, None]), 0)
    spread = spread.sum(-1, keepdims=True) / jnp.maximum(asks.sum(-1, keepdims=True), 1)
    seen = layer.visual_valid[:, None] & asks.any(-1, keepdims=True)
    return jnp.where(seen, -(distance + spread), 0)


def square_distance(a: Float[Array, "*#B D"], b: Float[Array, "*#B D"]) -> Float[Array, "*B"]:
    """Squared Euclidean distance of rows, in fp32."""
    return ((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2).sum(-1)


def highest(
    score: Float[Array, "B Q V"], valid: Bool[Array, "B Q V"], count: Int[Array, "B #Q"]
) -> Bool[Array, "B Q V"]:
    """Marks the `count` highest valid scores."""
    order = jnp.argsort(jnp.where(valid, -score, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return valid & (rank < count[..., None])


def least_alike(
    cosine: Float[Array, "B V V"],
    candidates: Bool[Array, "B Q V"],
    slots: int,
    count: Int[Array, "B Q"],
) -> Selection:
    """The greedy set of candidates with the lowest mean cosine to those before them, in order.

    Sums rank as means do: all of a step have one divisor, and a row's cosine with itself is 1.
    """
    among = candidates.astype(jnp.float32)
    alike = jnp.einsum("bvw,bqw->bqv", cosine, among, precision=jax.lax.Precision.HIGHEST)

    def add(total, step, chosen):
        total = total + rows_of(cosine, chosen)
        return total, -total

    return greedy_in_order(-alike, add, jnp.zeros_like(alike), candidates, slots, count)


def trimtokenator(
    keep: float = 0.25,
    candidates: float = 0.8,
    layer: int = 0,
    renumber: bool = False,
    sharing: Sharing = "per_question",
) -> Method:
    """TrimTokenator (arXiv 2509.00320), from the paper's math; no official code is known.

    keep: share of the visual tokens that stay, chosen from the share `candidates` nearest to the
    instruction. Positions are a choice made here: the kept tokens keep theirs, so that rotary
    distances still tell where a patch lies; with `renumber` they become contiguous.
    """
    cut = TrimTokenator(
        layer=layer, keep=keep, candidates=candidates, renumber=renumber, sharing=sharing
    )
    return Method("trimtokenator", Full(), (cut,))


METHODS = (trimtokenator,)
