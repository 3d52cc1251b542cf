"""PyramidDrop: visual tokens leave in steps, each ranked anew where it stands."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from focus_jax.compress.baselines import Full, check_share
from focus_jax.compress.method import Aux, Context, Cut, Dims, LayerView, Method
from focus_jax.compress.select import Selection, keep_count, keep_slots
from focus_jax.compress.text_guided import Asking, most_attended, score_flops

Queries = Literal["starts", "last", "instruction"]


@dataclass(frozen=True)
class PyramidDrop(Cut):
    """Keep the visual tokens with the most attention in the layer at the cut.

    Score: softmax rows of that layer's own queries and keys over all that a row sees, mean over
    heads and asking rows, without a gradient. `queries`: "last" is the prompt's last token;
    "starts" the same, but in training the mean over the tokens just before all answers;
    "instruction" the user's own words. `keep` of the tokens that entered the decoder stay, rounded
    down (never to 0), in their order.
    """

    layer: int = 8
    renumber: bool = True
    keep: float = 0.5
    queries: Queries = "starts"
    shared: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("pyramiddrop", self.keep)

    def slots(self, entering: int, train: bool = False) -> int:
        return keep_slots(entering, self.keep, floor=True)

    def asking(self, train: bool) -> Asking:
        """A prompt has one start, its last token: one row to compute instead of all."""
        return "last" if self.queries == "starts" and not train else self.queries

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        count = keep_count(layer.entered, self.keep, floor=True)
        selection, score = most_attended(layer, self.asking(ctx.train), count, slots)
        maps = {"pyramiddrop/score": score, "pyramiddrop/index": selection.index}
        return selection, Aux({}, {}, maps)

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        columns, asking = prefix + visual + text, self.asking(train=False)
        return score_flops(dims, asking, columns, visual, text, width, kv_width, prefix, questions)


def pyramiddrop(
    layers: tuple[int, ...] = (8, 16, 24),
    keep: tuple[float, ...] = (0.5, 0.25, 0.125),
    queries: Queries = "starts",
    renumber: bool = True,
) -> Method:
    """PyramidDrop (Xing et al. 2024, arXiv 2410.17247), as its official code ranks and drops.

    layers: tokens vanish before these, counted from 0. keep: shares of the original count that are
    left behind each; official int(n share). Positions are renumbered, as officially. Grouped keys,
    padded batches and several images work here (not officially).
    ValueError: other numbers of layers and shares, layers that do not rise, shares that do not fall
    or are outside (0, 1].
    """
    if len(layers) != len(keep) or not layers:
        raise ValueError(
            f"pyramiddrop: {len(layers)} layers {layers} and {len(keep)} shares keep={keep}: give "
            "one share for each layer"
        )
    if any(b >= a for a, b in pairwise(keep)):
        raise ValueError(
            f"pyramiddrop: keep={keep} are shares of the original count and must fall from layer "
            "to layer"
        )
    cuts = tuple(
        PyramidDrop(layer=layer, renumber=renumber, keep=share, queries=queries)
        for layer, share in zip(layers, keep, strict=True)
    )
    return Method("pyramiddrop", Full(), cuts)


METHODS = (pyramiddrop,)
