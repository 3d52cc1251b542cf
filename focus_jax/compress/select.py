"""Fixed-budget primitives that every compression method shares.

Each function works on the last axis (or axes) of its arrays, leaves any leading axes `*B` alone,
and has an output shape known before the data: a count that depends on data is a budget with a
mask. All are safe under jit, vmap and grad; none needs a scatter of rows.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

_MAX_DENOMINATOR = 65_536  # share as a fraction: count * numerator must stay below 2**32
_ROUNDING = 1e-6  # relative slack for sums of float32 that should meet a bound exactly


class Selection(NamedTuple):
    """Slots `[*B, k]` filled from the front: source index (0 where empty), and which are filled."""

    index: Int[Array, "*B k"]  # type: ignore[assignment]  # hides tuple.index, which no one needs
    valid: Bool[Array, "*B k"]


# ------------------------------------------------------------------------------- counts


def keep_slots(count: int, share: float, floor: bool = False) -> int:
    """Slots for `share` of `count` tokens: the ceiling (or `floor`), at least 1 where there is one.

    `share` is read as the nearest fraction with a denominator up to 65,536, so that 0.1 of 30 is 3
    and 1/3 of 576 is 192. ValueError: share outside (0, 1], or a negative count.
    """
    if count < 0:
        raise ValueError(f"count is {count}; a number of tokens cannot be negative")
    numerator, denominator = _fraction(share)
    product = count * numerator
    kept = product // denominator if floor else -(-product // denominator)
    return max(kept, min(count, 1))


def keep_count(
    count: Int[Array, "*B"], share: float | Float[Array, "..."], floor: bool = False
) -> Int[Array, "*B"]:
    """`keep_slots` for an array of counts (each below 65,536), inside jit.

    A Python `share` gives exactly what `keep_slots` gives. An array `share` (a ratio sampled in a
    training step, assumed in (0, 1]) is computed in float32 with a slack of a few roundings.
    ValueError: a Python share outside (0, 1].
    """
    count = jnp.asarray(count)
    if isinstance(share, jax.Array):
        amount = count.astype(jnp.float32) * share.astype(jnp.float32)
        slack, whole = (1 + _ROUNDING, jnp.floor) if floor else (1 - _ROUNDING, jnp.ceil)
        kept = whole(amount * slack).astype(count.dtype)
    else:
        numerator, denominator = (jnp.uint32(part) for part in _fraction(share))
        product = count.astype(jnp.uint32) * numerator
        # Not (product + denominator - 1) // denominator: that sum can pass 2**32.
        rest = ((product % denominator != 0) & (not floor)).astype(jnp.uint32)
        kept = (product // denominator + rest).astype(count.dtype)
    return jnp.maximum(kept, jnp.minimum(count, 1))


def _fraction(share: float) -> tuple[int, int]:
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; give a share of the tokens in (0, 1]")
    fraction = Fraction(share).limit_denominator(_MAX_DENOMINATOR)
    return fraction.numerator, fraction.denominator


# ---------------------------------------------------------------------------- selection


def top_k(
    score: Num[Array, "*B V"],
    valid: Bool[Array, "*B V"],
    k: int,
    count: Int[Array, "*B"] | None = None,
) -> Selection:
    """`top_k_in_order` with the highest score first."""
    _check_slots("k", k)
    _check_same_shape(score, valid)
    ranked, index = highest(_rankable(score, valid), min(k, score.shape[-1]))
    taken = ranked > -jnp.inf
    if count is not None:
        taken &= jnp.arange(index.shape[-1]) < jnp.asarray(count)[..., None]
    slots = [(0, 0)] * (index.ndim - 1) + [(0, k - index.shape[-1])]
    return Selection(jnp.pad(jnp.where(taken, index, 0), slots), jnp.pad(taken, slots))


def top_k_in_order(
    score: Num[Array, "*B V"],
    valid: Bool[Array, "*B V"],
    k: int,
    count: Int[Array, "*B"] | None = None,
) -> Selection:
    """The `k` (or fewer: `count`) highest valid scores, in ascending original index.

    Ties go to the lowest index. A NaN or infinitely low score at a valid place ranks below every
    other valid one. With fewer valid entries than slots, the rest is empty; k > V is allowed.
    No gradient flows to `score`. ValueError: k < 1, or shapes that differ.
    """
    return _compact(*top_k(score, valid, k, count), k)


def highest(score: Float[Array, "*B V"], k: int) -> tuple[Array, Int[Array, "*B k"]]:
    """The `k` highest scores, falling, and where they stand; equal ones in their order.

    `lax.top_k` by sorting: a compiler that splits samples over devices sorts each where it lies,
    but gathers them all for its own top-k.
    """
    place = lax.broadcasted_iota(jnp.int32, score.shape, score.ndim - 1)
    falling, index = lax.sort((-score, place), dimension=-1, is_stable=True, num_keys=1)
    return -falling[..., :k], index[..., :k]


def top_k_mask(
    score: Num[Array, "*B V"], valid: Bool[Array, "*B V"], k: int
) -> Bool[Array, "*B V"]:
    """Marks the `k` highest valid scores (all valid ones where they are fewer).

    For wide rows that are only to be weighted: no index, no scatter. Ties, NaN and errors as in
    `top_k_in_order`.
    """
    _check_slots("k", k)
    _check_same_shape(score, valid)
    rankable = _rankable(score, valid)
    least = highest(rankable, min(k, score.shape[-1]))[0][..., -1:]
    above = rankable > least
    level = (rankable == least) & valid
    room = k - above.sum(-1, keepdims=True, dtype=jnp.int32)
    return above | (level & (jnp.cumsum(level, axis=-1, dtype=jnp.int32) <= room))


def pack(valid: Bool[Array, "*B V"], budget: int) -> tuple[Selection, Int[Array, "*B"]]:
    """The first `budget` valid entries in order, and how many valid entries found no room.

    ValueError: budget < 1.
    """
    _check_slots("budget", budget)
    index = jnp.broadcast_to(jnp.arange(valid.shape[-1], dtype=jnp.int32), valid.shape)
    selection = _compact(index, valid, budget)
    overflow = jnp.maximum(valid.sum(-1, dtype=jnp.int32) - budget, 0)
    return selection, overflow


def greedy_in_order(
    first: Float[Array, "*B V"],
    add: Callable[[Any, Int[Array, ""], Int[Array, "*B"]], tuple[Any, Float[Array, "*B V"]]],
    state: Any,
    valid: Bool[Array, "*B V"],
    k: int,
    count: Int[Array, "*B"] | None = None,
) -> Selection:
    """Valid entries chosen one at a time, the highest of those that are left; in original order.

    `first` ranks the first choice; `add(state, step, chosen)` notes a choice and gives the state
    and the float32 scores for the next one. `k` or fewer (`count`) are chosen, in min(k, V) steps
    whatever the counts. Ties, NaN and errors as in `top_k_in_order`; no gradient flows.
    """
    _check_slots("k", k)
    _check_same_shape(first, valid)
    place = jnp.arange(valid.shape[-1])
    room = jnp.full(valid.shape[:-1], k) if count is None else jnp.asarray(count)

    def choose(step, carry):
        state, score, taken = carry
        left = valid & ~taken
        chosen = jnp.argmax(_rankable(score, left), axis=-1).astype(jnp.int32)
        mark = (place == chosen[..., None]) & left & (step < room[..., None])
        return *add(state, step, chosen), taken | mark

    start = (state, first, jnp.zeros(valid.shape, bool))
    *_, taken = lax.fori_loop(0, min(k, valid.shape[-1]), choose, start)
    return pack(taken, k)[0]


def thin(mask: Bool[Array, "*B V"], count: Int[Array, "*B"]) -> Bool[Array, "*B V"]:
    """`count` of the marked entries, spread evenly over them; all where they are fewer.

    The product of both counts must stay below 2**31.
    """
    count = jnp.asarray(count, jnp.int32)[..., None]
    rank = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    found = jnp.maximum(rank[..., -1:], 1)
    return mask & (rank * count // found > (rank - 1) * count // found)


def places(selection: Selection, length: int) -> Bool[Array, "*B k V"]:
    """Which of `length` sources each slot holds; nothing in the row of an empty slot."""
    return (selection.index[..., None] == jnp.arange(length)) & selection.valid[..., None]


def listed(
    mask: Bool[Array, "*B V"], values: Int[Array, "*B V"] | None = None
) -> Int[Array, "*B V"]:
    """The `values` (by default the indices) of the marked entries, ascending; -1 behind them.

    For reports: values must not be negative.
    """
    shown = jnp.arange(mask.shape[-1], dtype=jnp.int32) if values is None else values
    absent = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(mask, shown, absent), axis=-1)
    return jnp.where(ordered == absent, -1, ordered)


def smallest_mass(
    score: Num[Array, "*B V"], valid: Bool[Array, "*B V"], p: float, budget: int
) -> tuple[Selection, Int[Array, "*B"]]:
    """The smallest set of highest scores that holds a share `p` of the valid mass, in order.

    Scores are masses: negative or NaN counts as 0. Ties go to the lowest index. At least one entry
    is kept where any is valid, also when the mass is 0. At most `budget` are kept; the second
    result is how many the set would have needed beyond it. ValueError: p not in (0, 1], budget < 1.
    """
    _check_slots("budget", budget)
    _check_same_shape(score, valid)
    if not 0 < p <= 1:
        raise ValueError(f"p is {p}; give a share of the mass in (0, 1]")
    mass = jnp.where(valid & (score > 0), score, 0).astype(jnp.float32)
    falling = -jnp.sort(-mass, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    # The slack lets three of ten equal scores meet p = 0.3 whatever way their sum was rounded.
    needed = before < p * (1 - _ROUNDING) * falling.sum(-1, keepdims=True)
    count = (needed & (falling > 0)).sum(-1, dtype=jnp.int32)
    count = jnp.maximum(count, valid.any(-1).astype(jnp.int32))
    return top_k_in_order(mass, valid, budget, count), jnp.maximum(count - budget, 0)


def uniform_2d(rows: int, cols: int, k: int) -> np.ndarray:
    """Row-major indices of `k` cells spread evenly over a grid: int32 [k], ascending, distinct.

    About sqrt(k * rows / cols) evenly spaced rows share the cells as equally as k allows, each row
    with evenly spaced columns; 144 of 24 x 24 is a stride of 2. ValueError: k below 1 or above
    rows * cols.
    """
    if not 1 <= k <= rows * cols:
        raise ValueError(f"k is {k}; a grid of {rows} x {cols} gives 1 to {rows * cols} cells")
    least, most = -(-k // cols), min(rows, k)
    lines = min(max(round((k * rows / cols) ** 0.5), least), most)
    cells: list[int] = []
    for line in range(lines):
        here = (line + 1) * k // lines - line * k // lines
        row = (2 * line + 1) * rows // (2 * lines)
        cells.extend(row * cols + (2 * j + 1) * cols // (2 * here) for j in range(here))
    return np.asarray(cells, np.int32)


def _rankable(score: Num[Array, "*B V"], valid: Bool[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Finite floats where valid and -inf elsewhere, so that every valid entry ranks first."""
    dtype = jnp.promote_types(score.dtype, jnp.float32)
    score = lax.stop_gradient(score).astype(dtype)
    low, high = jnp.finfo(dtype).min, jnp.finfo(dtype).max
    score = jnp.where(jnp.isnan(score), low, jnp.clip(score, low, high))
    score = jnp.where(score == 0, 0, score)  # top_k sees -0.0 below 0.0; here they tie
    return jnp.where(valid, score, -jnp.inf)


def _compact(index: Int[Array, "*B M"], taken: Bool[Array, "*B M"], k: int) -> Selection:
    """Taken indices in ascending order at the front of `k` slots."""
    absent = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(taken, index.astype(jnp.int32), absent), axis=-1)[..., :k]
    slots = [(0, 0)] * (ordered.ndim - 1) + [(0, k - ordered.shape[-1])]
    ordered = jnp.pad(ordered, slots, constant_values=absent)
    valid = ordered < absent
    return Selection(jnp.where(valid, ordered, 0), valid)


# --------------------------------------------------------------------------- moving rows


def take(x: Shaped[Array, "*B V D"], selection: Selection) -> Shaped[Array, "*B k D"]:
    """Rows of `x` at the selected indices, zero at empty slots.

    Each source row may stand in at most one filled slot (in any order): the gradient is then a
    gather as well, where a scatter-add of rows would be slow on TPU and CPU. Reverse mode only.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return _gather_rows(x, selection.index, selection.valid)
    return _take(x.shape[-2], x, selection.index, selection.valid)


def take_values(
    values: Shaped[Array, "*B V"], selection: Selection, fill: float | int | bool
) -> Shaped[Array, "*B k"]:
    """Entries of `values` (positions, flags, ...) at the selected indices, `fill` at empty slots.

    The gradient of a float `values` is the plain one: use `take` for wide rows.
    """
    gathered = jnp.take_along_axis(values, selection.index, axis=-1, mode="clip")
    return jnp.where(selection.valid, gathered, jnp.asarray(fill, values.dtype))


@jax.custom_vjp
def permute(x: Shaped[Array, "*B S D"], order: Int[Array, "*B S"]) -> Shaped[Array, "*B S D"]:
    """Rows of `x` in the given order; the gradient is a gather by the inverse permutation.

    `order` must hold each of 0 .. S-1 once (not checked). Reverse mode only.
    """
    return jnp.take_along_axis(x, order[..., None], axis=-2, mode="clip")


def _permute_forward(x, order):
    return permute(x, order), order


def _permute_backward(order, gradient):
    return permute(gradient, jnp.argsort(order, axis=-1)), None


permute.defvjp(_permute_forward, _permute_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(length, x, index, valid):
    return _gather_rows(x, index, valid)


def _take_forward(length, x, index, valid):
    return _gather_rows(x, index, valid), (index, valid)


def _take_backward(length, residual, gradient):
    index, valid = residual
    slot = _slot_of_row(index, valid, length)
    slots = index.shape[-1]
    return _gather_rows(gradient, jnp.minimum(slot, slots - 1), slot < slots), None, None


_take.defvjp(_take_forward, _take_backward)


def _gather_rows(x, index, valid):
    rows = jnp.take_along_axis(x, index[..., None], axis=-2, mode="clip")
    return jnp.where(valid[..., None], rows, jnp.zeros((), x.dtype))


def _slot_of_row(index, valid, length):
    """The slot `[*B, length]` that each source row went to, or the number of slots for none."""

    def one(index, valid):
        slots = index.shape[0]
        target = jnp.where(valid, index, length)  # out of range: dropped
        nowhere = jnp.full(length, slots, jnp.int32)
        return nowhere.at[target].set(jnp.arange(slots, dtype=jnp.int32), mode="drop")

    for _ in range(index.ndim - 1):
        one = jax.vmap(one)
    return one(index, valid)


def merge_by_assignment(
    x: Float[Array, "*B V D"],
    assign: Int[Array, "*B V"],
    weight: Float[Array, "*B V"],
    k: int,
    mean: bool = False,
) -> Float[Array, "*B k D"]:
    """Weighted sum of the rows assigned to each of `k` slots; with `mean`, divided by the weights.

    `assign` is a slot in [0, k); anything else sends the row nowhere, whatever it holds. A slot
    without weight is 0. Accumulates in float32, by a one-hot product. ValueError: k < 1.
    """
    _check_slots("k", k)
    placed = (assign >= 0) & (assign < k)
    share = jax.nn.one_hot(assign, k, dtype=jnp.float32)
    share *= jnp.where(placed, weight, 0).astype(jnp.float32)[..., None]
    rows = jnp.where(placed[..., None], x, 0).astype(jnp.float32)
    merged = jnp.einsum("...vk,...vd->...kd", share, rows, precision=lax.Precision.HIGHEST)
    if mean:
        mass = share.sum(-2)[..., None]
        merged = jnp.where(mass == 0, 0, merged / jnp.where(mass == 0, 1, mass))
    return merged.astype(x.dtype)


# -------------------------------------------------------------------------------- checks


def _check_slots(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; a selection needs at least 1 slot")


def _check_same_shape(score, valid) -> None:
    if score.shape != valid.shape:
        raise ValueError(f"score {score.shape} and valid {valid.shape} must have one shape")
