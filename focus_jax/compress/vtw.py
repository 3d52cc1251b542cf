"""Visual tokens withdrawal (VTW): from one layer on the decoder goes on without any."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from focus_jax.compress.baselines import Full
from focus_jax.compress.method import Aux, Context, Cut, Dims, LayerView, Method
from focus_jax.compress.select import Selection


@dataclass(frozen=True)
class Withdraw(Cut):
    """All visual tokens leave before `layer`; text keeps its positions unless `renumber`."""

    layer: int = 16

    def slots(self, entering: int, train: bool = False) -> int:
        return 0

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        index = jnp.zeros((layer.visual.shape[0], 1, 0), jnp.int32)
        return Selection(index, index == 0), Aux({}, {}, {"vtw/index": index})


@dataclass(frozen=True)
class RandomWithdraw(Cut):
    """One of the layers up to `last` before which a sample's visual tokens may leave in training.

    There is such a cut at each layer of the span. What is still there leaves here with a chance of
    one in the cuts that are left, this one included: the layer is then uniform over the span, and
    each cut needs to know nothing of the others. Slots stay until `last`, the mask alone tells who
    left. At evaluation all leave before layer `at`.
    """

    layer: int = 8
    last: int = 24
    at: int = 16

    def check(self, dims: Dims, entering: int) -> None:
        super().check(dims, entering)
        if not self.layer <= self.last < dims.layers:
            raise ValueError(
                f"vtw: the last layer of training {self.last} must lie in {self.layer}.."
                f"{dims.layers - 1}"
            )

    def slots(self, entering: int, train: bool = False) -> int:
        gone = self.layer >= (self.last if train else self.at)
        return 0 if gone else entering

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        b, v = layer.visual_valid.shape
        if slots == 0:
            return Withdraw(self.layer).select(layer, slots, ctx)
        stays = layer.visual_valid
        if ctx.train:
            stays &= ~leaving(ctx.key, b, self.last - self.layer + 1)[:, None]
        index = jnp.broadcast_to(jnp.arange(v, dtype=jnp.int32), (b, v))
        selection = Selection(jnp.where(stays, index, 0)[:, None], stays[:, None])
        present = stays.any(-1).astype(jnp.float32).mean()
        maps = {"vtw/index": selection.index}
        return selection, Aux({}, {"vtw/present": present}, maps)


def leaving(key: Array, samples: int, cuts: int) -> Bool[Array, " B"]:
    """Which samples leave at the first of `cuts` cuts, each cut being as likely."""
    return jax.random.randint(key, (samples,), 0, cuts) == 0


def vtw(
    layer: int = 16, renumber: bool = False, train_layers: tuple[int, int] | None = None
) -> Method:
    """Visual tokens withdrawal (Lin et al. 2024, arXiv 2405.05803), as its official code does it.

    layer: all visual tokens leave before it (K; official 15 or 16 for 7B, found by a search on the
    divergence of the next token's distribution). Text keeps its positions and new tokens go on from
    them, as officially; `renumber` closes the gap. train_layers (a, b), a choice made here: in
    training each sample withdraws before a layer drawn uniformly from a..b, at evaluation before
    `layer`, which lies among them (serve with plain `vtw(layer)`: it has two stages, not one for
    each layer of the span). ValueError: a span that does not rise or misses `layer`.
    """
    if train_layers is None:
        return Method("vtw", Full(), (Withdraw(layer=layer, renumber=renumber),))
    first, last = train_layers
    if not 0 <= first <= layer <= last:
        raise ValueError(
            f"vtw: train_layers={train_layers} must be two layers (first, last) with "
            f"layer={layer} among them"
        )
    cuts = tuple(
        RandomWithdraw(layer=i, renumber=renumber, last=last, at=layer)
        for i in range(first, last + 1)
    )
    return Method("vtw", Full(), cuts)


METHODS = (vtw,)
