"""SparseVLM: words that an image is about rate its tokens; part of what is pruned is recycled."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.baselines import Full
from focus_jax.compress.density_peaks import density_peaks
from focus_jax.compress.method import (
    Aux,
    Context,
    Cut,
    Dims,
    Entry,
    Kept,
    LayerView,
    Merged,
    Method,
)
from focus_jax.compress.select import merge_by_assignment, places, take, take_values, top_k
from focus_jax.compress.text_guided import most_attended, score_flops

# Tokens kept behind each pruning layer of LLaVA-1.5 (576 tokens), by the mean that they come to.
TABLE = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
RECYCLED, PER_CLUSTER = (3, 10), 10  # share of the pruned tokens; recycled tokens a cluster


@dataclass(frozen=True)
class SparseCut(Cut):
    """Keep what the raters look at; pruned tokens with the most attention merge into new ones.

    Score: attention rows of the raters in layer `layer` - 1 over all that they see, mean over heads
    and raters. `keep` are the counts of the cuts so far, this one last, for images of `of` tokens;
    other images keep the same share of the tokens that entered, rounded down, always fewer than
    stand here. Of P pruned tokens the best int(0.3 P) + 1 fall into int(that / 10) + 1 clusters,
    whose means stand behind the kept tokens.
    `raters`: words behind the image that may rate: all of the prompt, or the user's own.
    """

    layer: int = 3
    renumber: bool = True
    keep: tuple[int, ...] = (300,)
    of: int = 576
    raters: Literal["text", "instruction"] = "text"  # type: ignore[misc]
    shared: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = True
    look_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.keep or min(self.keep) < 1 or any(b >= a for a, b in pairwise(self.keep)):
            raise ValueError(f"sparsevlm: keep={self.keep} are counts of tokens and must fall")
        if self.keep[0] > self.of:
            raise ValueError(
                f"sparsevlm: keep={self.keep} does not fit images of={self.of} tokens: keep fewer, "
                "or say how many tokens the counts are meant for"
            )

    def check(self, dims: Dims, entering: int) -> None:
        super().check(dims, entering)
        if budget(entering, self.keep, self.of)[0] < 1:
            raise ValueError(
                f"sparsevlm: {self.keep[-1]} of {self.of} tokens is none of the {entering} that "
                "enter: keep more"
            )

    def slots(self, entering: int, train: bool = False) -> int:
        return sum(budget(entering, self.keep, self.of))

    def merged_slots(self, entering: int, train: bool = False) -> int:
        return budget(entering, self.keep, self.of)[1]

    def rate(self, entry: Entry) -> Bool[Array, "B Q T"]:
        score = rater_scores(entry)
        asked = jnp.maximum(entry.asking.sum(-1, keepdims=True), 1)
        above = entry.asking & (score > score.sum(-1, keepdims=True) / asked)
        # Equal scores have no row above their mean: then all rate.
        return jnp.where(above.any(-1, keepdims=True), above, entry.asking)

    def apply(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Kept, Aux]:
        kept_slots, merged_slots = budget_of_slots(slots, self.keep, self.of)
        present = layer.visual_valid.sum(-1, dtype=jnp.int32)
        kept = jnp.minimum(kept_count(present, layer.entered, self.keep[-1], self.of), kept_slots)
        selection, score = most_attended(layer, "raters", kept, kept_slots)
        pruned = layer.visual_valid[:, None] & ~places(selection, score.shape[-1]).any(-2)
        recycled, clusters = recycled_counts(pruned.sum(-1, dtype=jnp.int32))
        room = min(recycled_room(merged_slots), score.shape[-1])
        again = top_k(score, pruned, room, recycled)
        rows = jnp.broadcast_to(layer.visual[:, None], (*score.shape, layer.visual.shape[-1]))
        rows = take(rows, again)
        groups = density_peaks(rows, again.valid, clusters, merged_slots)
        weight = again.valid.astype(jnp.float32)
        merged = merge_by_assignment(rows, groups.assign, weight, merged_slots, mean=True)
        centres = take_values(again.index, groups.centre, -1)
        maps = {
            "score": score, "index": selection.index, "raters": layer.raters,
            "recycled": jnp.where(again.valid, again.index, -1), "centres": centres,
            "assignment": groups.assign, "merged": merged,
        }  # fmt: skip
        named = {f"sparsevlm/{name}": value for name, value in maps.items()}
        return Kept(selection, Merged(merged, groups.centre.valid)), Aux({}, {}, named)

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        columns = prefix + visual + text
        total = score_flops(
            dims, "raters", columns, visual, text, width, kv_width, prefix, questions
        )
        if len(self.keep) == 1:  # the raters, chosen once
            total += 2.0 * questions * text * visual * dims.width
        before = self.keep[:-1]
        entering = entering_of_slots(visual, before, self.of) if before else visual
        merged = budget(entering, self.keep, self.of)[1]
        room = min(recycled_room(merged), visual)
        return total + 2.0 * questions * (room * room + merged * room) * dims.width


def rater_scores(entry: Entry) -> Float[Array, "B Q T"]:
    """How much of each visual token's attention a word gets, on raw embeddings: means to 1.

    Softmax over the asking rows of the unscaled products with each visual token, mean over visual
    tokens, fp32; 0 for rows that do not ask.
    """
    logits = jnp.einsum(
        "bvd,bqtd->bqvt", entry.visual.astype(jnp.float32), entry.token.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    asking = entry.asking[:, :, None]
    logits = jax.lax.stop_gradient(jnp.where(asking, logits, -1e30))
    share = jnp.where(asking, jax.nn.softmax(logits, axis=-1), 0)
    seen = entry.visual_valid[:, None, :, None]
    count = jnp.maximum(entry.visual_valid.sum(-1), 1)[:, None, None]
    return jnp.where(seen, share, 0).sum(2) / count


# ------------------------------------------------------------------------------- counts


Counts = TypeVar("Counts", Int[Array, "*B"], Int[np.ndarray, "*B"])


def kept_count(present: Counts, entered: Counts, keep: int, of: int) -> Counts:
    """Tokens kept of those present: the share `keep` / `of` of what entered, fewer than there."""
    return (entered * keep // of).clip(max=present - 1).clip(min=0)


def recycled_counts(pruned: Counts) -> tuple[Counts, Counts]:
    """How many of the pruned tokens are recycled, and into how many clusters."""
    recycled = (pruned * RECYCLED[0] // RECYCLED[1] + 1) * (pruned > 0)
    return recycled, (recycled // PER_CLUSTER + 1) * (pruned > 0)


def recycled_room(clusters: int) -> int:
    """The most tokens that fall into so many clusters."""
    return PER_CLUSTER * clusters - 1


@cache
def budgets(most: int, keep: tuple[int, ...], of: int) -> Int[np.ndarray, "N 2"]:
    """Slots for kept and merged tokens behind the last of the cuts, if 0 .. `most` tokens entered.

    A count may fall by one where another token enters, and a row of a batch may have fewer than
    its slots: each entry is the most that any number up to its own needs.
    """
    entered: Int[np.ndarray, " N"] = np.arange(most + 1)
    present, kept, merged = entered, entered, entered
    for one in keep:
        kept = kept_count(present, entered, one, of)
        merged = recycled_counts(present - kept)[1]
        present = kept + merged
    return np.maximum.accumulate(np.stack([kept, merged], axis=1))


def budget(entering: int, keep: tuple[int, ...], of: int) -> tuple[int, int]:
    """Slots for kept and for merged tokens if `entering` slots entered the decoder."""
    kept, merged = budgets(entering, keep, of)[entering]
    return int(kept), int(merged)


def entering_of_slots(slots: int, keep: tuple[int, ...], of: int) -> int:
    """The fewest tokens whose budget is at least `slots`."""
    most = slots
    while True:
        enough = np.flatnonzero(budgets(most, keep, of).sum(1) >= slots)
        if enough.size:
            return int(enough[0])
        most *= 2


def budget_of_slots(slots: int, keep: tuple[int, ...], of: int) -> tuple[int, int]:
    """`budget` from its sum: both parts grow with the tokens that enter, so the sum tells them.

    Fewer slots than the budget (an earlier cut left no more) are taken from the kept ones.
    """
    merged = budget(entering_of_slots(slots, keep, of), keep, of)[1]
    return slots - merged, merged


def sparsevlm(
    retain: int = 192,
    layers: tuple[int, ...] = (2, 6, 15),
    keep: tuple[int, ...] = (),
    of: int = 576,
    raters: Literal["text", "instruction"] = "text",
) -> Method:
    """SparseVLM (Zhang et al. 2024, arXiv 2410.04417), version 1 of its official code.

    retain: 192, 128 or 64, the mean of kept tokens, which names the counts in `TABLE`. layers:
    tokens leave behind these, counted from 0, which rate them as well. keep: counts of one's own
    instead of the table's, for images `of` so many tokens. raters: officially all words behind the
    image. The official code adds noise of 1e-6 to densities, here ties go to the first token; it
    divides a cluster's sum by its count + 1e-6, here by its count.
    ValueError: a budget that is not in the table, other numbers of layers and counts, layers that
    do not rise, counts that do not fall or are above the tokens.
    """
    if not keep and retain not in TABLE:
        raise ValueError(
            f"sparsevlm: retain={retain} is not among {', '.join(map(str, TABLE))}: choose one of "
            "them, or give keep, a count for each layer"
        )
    keep = keep or TABLE[retain]
    if len(layers) != len(keep):
        raise ValueError(
            f"sparsevlm: {len(layers)} layers {layers} and {len(keep)} counts keep={keep}: give "
            "one count for each layer"
        )
    cuts = tuple(
        SparseCut(layer=layer + 1, keep=keep[: i + 1], of=of, raters=raters)
        for i, layer in enumerate(layers)
    )
    return Method("sparsevlm", Full(), cuts)


METHODS = (sparsevlm,)
