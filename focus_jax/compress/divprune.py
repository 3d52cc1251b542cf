"""DivPrune: the visual tokens that are most unlike each other stay."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.baselines import Full, check_share
from focus_jax.compress.method import Aux, Context, Cut, Dims, LayerView, Method
from focus_jax.compress.select import Selection, greedy_in_order, keep_count, keep_slots

FARTHEST = 2.0  # the largest cosine distance


@dataclass(frozen=True)
class DivPrune(Cut):
    """Keep a set of visual tokens whose smallest cosine distance is large (max-min diversity).

    First comes the token whose smallest distance to any other is largest, then, one at a time, the
    token with the largest smallest distance to the chosen ones; ties go to the lowest index. They
    stay in their order. `keep` of the valid tokens that entered the decoder stay. At layer 0 the
    rows are projected patches, at a later layer hidden rows.
    """

    keep: float = 0.25

    def check(self, dims: Dims, entering: int) -> None:
        super().check(dims, entering)
        check_share("divprune", self.keep)

    def slots(self, entering: int, train: bool = False) -> int:
        return keep_slots(entering, self.keep)

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        cosine = cosines(layer.visual, layer.visual_valid)
        count = keep_count(layer.entered, self.keep)[:, None]
        selection, nearest = farthest_apart(cosine, layer.visual_valid[:, None], slots, count)
        return selection, Aux(
            {}, {}, {"divprune/score": nearest, "divprune/index": selection.index}
        )

    def flops(
        self, dims: Dims, visual: int, text: int, width: int, kv_width: int,
        prefix: int = 0, questions: int = 1,
    ) -> float:  # fmt: skip
        """One product of all pairs of rows; the choices only compare."""
        return pair_flops(dims, visual)


def farthest_apart(
    cosine: Float[Array, "B V V"],
    valid: Bool[Array, "B Q V"],
    slots: int,
    count: Int[Array, "B Q"],
) -> tuple[Selection, Float[Array, "B Q V"]]:
    """The greedy max-min set in order, and each token's smallest distance to any other.

    A token without another has the largest distance that there is.
    """
    pair = valid[..., None, :] & ~jnp.eye(valid.shape[-1], dtype=bool)
    nearest = (1 - cosine)[:, None].min(axis=-1, where=pair, initial=FARTHEST)

    def add(apart, step, chosen):
        apart = jnp.minimum(apart, 1 - rows_of(cosine, chosen))
        return apart, apart

    far = jnp.full(valid.shape, FARTHEST)
    return greedy_in_order(nearest, add, far, valid, slots, count), nearest


def unit_rows(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Rows of length 1 in fp32, without gradient; a row of zeros stays one."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def cosines(x: Float[Array, "*B V D"], valid: Bool[Array, "*B V"]) -> Float[Array, "*B V V"]:
    """Cosine of each pair of rows in fp32, 0 where one is not valid or a row of zeros.

    One product of all pairs: a product for each chosen row has fewer operations, but reads all
    rows anew each time, and that is what takes the time.
    """
    unit = unit_rows(jnp.where(valid[..., None], x, 0))
    return jnp.einsum("...id,...jd->...ij", unit, unit, precision=jax.lax.Precision.HIGHEST)


def rows_of(pairs: Float[Array, "B V V"], chosen: Int[Array, "B Q"]) -> Float[Array, "B Q V"]:
    """The chosen tokens' rows of a matrix that all questions of an image share."""
    return jnp.take_along_axis(pairs, chosen[..., None], axis=1)


def pair_flops(dims: Dims, visual: int) -> float:
    """Operations of `cosines` for one image."""
    return 2.0 * visual**2 * dims.width


def divprune(keep: float = 0.25, layer: int = 0, renumber: bool = False) -> Method:
    """DivPrune (Alvar et al. 2025, arXiv 2503.02175), from the paper's math.

    keep: share of the visual tokens that stay. Text is not looked at. Positions are
    a choice made here: the kept tokens keep theirs, so that rotary distances still tell where a
    patch lies; with `renumber` they become contiguous.
    """
    return Method("divprune", Full(), (DivPrune(layer=layer, keep=keep, renumber=renumber),))


METHODS = (divprune,)
