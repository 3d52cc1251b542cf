"""FastV: half of the visual tokens leave early, ranked by what the last prompt token looked at."""

from dataclasses import dataclass
from typing import ClassVar

from focus_jax.compress.baselines import Full, check_share
from focus_jax.compress.method import Aux, Context, Cut, Dims, LayerView, Method
from focus_jax.compress.select import Selection, keep_count, keep_slots
from focus_jax.compress.text_guided import most_attended, score_flops


@dataclass(frozen=True)
class FastV(Cut):
    """Keep the visual tokens with the most attention in the layer before the cut.

    Score: the softmax row of the prompt's last token over all that it sees, in layer `layer` - 1,
    mean over heads, in fp32. `keep` of the tokens that entered stay, rounded down (never to 0), in
    their order; positions stay unless `renumber`.
    """

    layer: int = 2
    keep: float = 0.5
    shared: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = True
    look_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("fastv", self.keep)

    def slots(self, entering: int, train: bool = False) -> int:
        return keep_slots(entering, self.keep, floor=True)

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        count = keep_count(layer.entered, self.keep, floor=True)
        selection, score = most_attended(layer, "last", count, slots)
        return selection, Aux({}, {}, {"fastv/score": score, "fastv/index": selection.index})

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        columns = prefix + visual + text
        return score_flops(dims, "last", columns, visual, text, width, kv_width, prefix, questions)


def fastv(layer: int = 2, keep: float = 0.5, renumber: bool = False) -> Method:
    """FastV (Chen et al. 2024, arXiv 2403.06764), as its official code ranks and drops.

    layer: tokens vanish before this layer (K; the paper's 2, the official variant with a cache 3).
    keep: share that stays, 1 - R; official int(n (1 - R)). Where the official code with a cache
    keeps the keys of layer K - 1 twice, which changes no value, there is one copy here.
    """
    return Method("fastv", Full(), (FastV(layer=layer, keep=keep, renumber=renumber),))


METHODS = (fastv,)
