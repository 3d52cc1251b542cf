"""Strided: every n-th visual token goes on from one decoder layer."""

from dataclasses import dataclass

import jax.numpy as jnp

from focus_jax.compress.baselines import Full
from focus_jax.compress.method import Aux, Context, Cut, Dims, LayerView, Method
from focus_jax.compress.select import Selection, pack


@dataclass(frozen=True)
class Strided(Cut):
    """The first of every `step` visual tokens stays; text is not looked at."""

    step: int = 4

    def check(self, dims: Dims, entering: int) -> None:
        super().check(dims, entering)
        if self.step < 1:
            raise ValueError(f"strided: step={self.step} is a distance of tokens: use 1 or more")

    def slots(self, entering: int, train: bool = False) -> int:
        return -(-entering // self.step)

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        place = jnp.arange(layer.visual_valid.shape[-1])
        stays = layer.visual_valid & (place % self.step == 0)
        selection, _ = pack(stays[:, None], slots)
        return selection, Aux({}, {}, {"strided/index": selection.index})


def strided(layer: int = 2, step: int = 4, renumber: bool = False) -> Method:
    """One of every `step` visual tokens goes on from `layer`."""
    return Method("strided", Full(), (Strided(layer=layer, step=step, renumber=renumber),))


METHODS = (strided,)
