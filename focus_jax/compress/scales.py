"""Scales of regions within a budget of tokens: demotion, and allocation by what a token saves.

Shapes are known before the data, as in `select.py`.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def demote_to_budget(
    choice: Int[Array, "*B R"], margin: Float[Array, "*B R"], cost: tuple[int, ...], budget: int
) -> tuple[Int[Array, "*B R"], Int[Array, "*B"]]:
    """Scales made coarser until they fit the budget, and the number of single-scale steps taken.

    Scale 0 is the coarsest; `cost[s]` tokens, ascending; choice -1 is a region that costs nothing.
    Regions are ranked once by margin (smallest first, ties lowest index, NaN last). In a round each
    region above the coarsest scale goes down by one scale in that order, until the sum fits; when
    a whole round was not enough, the next begins from the smallest margin again.
    ValueError: costs not ascending, or a budget below R * cost[0].
    """
    _check_costs(cost, budget, choice.shape[-1])
    order = jnp.argsort(margin, axis=-1, stable=True)
    ranked = jnp.take_along_axis(choice, order, axis=-1)
    steps = jnp.zeros(choice.shape[:-1], jnp.int32)
    for _ in range(len(cost) - 1):
        price = _look_up(cost, ranked)
        excess = price.sum(-1, keepdims=True) - budget
        saving = jnp.where(ranked > 0, price - _look_up(cost, ranked - 1), 0)
        saved_before = jnp.cumsum(saving, axis=-1) - saving
        down = (ranked > 0) & (saved_before < excess)
        ranked = ranked - down.astype(ranked.dtype)
        steps += down.sum(-1, dtype=jnp.int32)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1), steps


def allocate(
    loss: Float[Array, "*B R S"],
    cost: tuple[int, ...],
    budget: int,
    available: Bool[Array, "*B R"],
    min_gain: float = 0.0,
) -> Int[Array, "*B R"]:
    """A scale for each region, by marginal loss saved per token; -1 where not available.

    `loss[..., s]` is what a region loses at scale s, 0 the coarsest; `cost[s]` its tokens,
    ascending. Available regions start at scale 0. A step up is worth the loss it saves per extra
    token; a later step that is worth more shares its worth with the steps it stands on (the concave
    envelope of the region's curve), so that a gain which only the finest scale brings is seen from
    the coarsest. Steps worth more than `min_gain` are taken from the most valuable down
    (ties: lowest region) while the budget lasts; after one that does not fit, only steps cheaper
    than it (as must be those that they stand on) may still fill the room. NaN is worth nothing.
    ValueError: costs not ascending, loss without one entry per cost, a budget below R * cost[0].
    """
    regions, scales = loss.shape[-2:]
    _check_costs(cost, budget, regions)
    if scales != len(cost):
        raise ValueError(f"loss has {scales} scales and cost {len(cost)}; give one cost per scale")
    if scales == 1:
        return jnp.where(available, 0, -1)
    step = np.diff(np.asarray(cost))
    worth = _envelope(loss.astype(jnp.float32), cost)
    wanted = (worth > min_gain) & available[..., None]
    flat = (*loss.shape[:-2], regions * (scales - 1))
    order = jnp.argsort(-worth.reshape(flat), axis=-1, stable=True)
    room = budget - cost[0] * available.sum(-1, keepdims=True, dtype=jnp.int32)
    wanted = jnp.take_along_axis(wanted.reshape(flat), order, axis=-1)
    taken = _fill_room(wanted, order % (scales - 1), step, room)
    taken = jnp.take_along_axis(taken, jnp.argsort(order, axis=-1), axis=-1)
    choice = taken.reshape(*flat[:-1], regions, scales - 1).sum(-1, dtype=jnp.int32)
    return jnp.where(available, choice, -1)


def _envelope(loss: Float[Array, "*B R S"], cost: tuple[int, ...]) -> Float[Array, "*B R S-1"]:
    """Slopes of the concave envelope of saved loss over cost: falling isotonic regression."""

    def slope(i: int, j: int) -> Array:
        value = (loss[..., i] - loss[..., j]) / np.float32(cost[j] - cost[i])
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    last = len(cost) - 1
    worth = []
    for s in range(last):
        best = [
            jnp.stack([slope(i, j) for j in range(s + 1, last + 1)]).max(0) for i in range(s + 1)
        ]
        worth.append(jnp.stack(best).min(0))
    return jnp.stack(worth, axis=-1)


def _fill_room(
    wanted: Bool[Array, "*B U"],
    level: Int[Array, "*B U"],
    step: np.ndarray,
    room: Int[Array, "*B 1"],
) -> Bool[Array, "*B U"]:
    """Which of the steps, in their order, are taken within the room: one pass per step price.

    Each pass takes a prefix of what is still allowed and stops at the first that does not fit;
    from there on only steps cheaper than that one are allowed.
    """
    price = _look_up(step.tolist(), level)
    # A step is barred with the dearest step below it in its region: it would stand on nothing.
    dearest = _look_up(np.maximum.accumulate(step).tolist(), level)
    place = jnp.arange(level.shape[-1], dtype=jnp.int32)
    taken = jnp.zeros_like(wanted)
    limit = jnp.full_like(room, jnp.iinfo(jnp.int32).max)
    start = jnp.zeros_like(room)
    for _ in range(len(set(step.tolist()))):
        allowed = wanted & (dearest < limit) & (place >= start)
        spent = jnp.cumsum(jnp.where(allowed, price, 0), axis=-1)
        taken |= allowed & (spent <= room)
        blocked = allowed & (spent > room)
        room = room - jnp.where(allowed & ~blocked, price, 0).sum(-1, keepdims=True)
        stop = jnp.argmax(blocked, axis=-1, keepdims=True)
        cheaper = jnp.take_along_axis(price, stop, axis=-1)
        # With nothing blocked all is decided: a limit of 0 ends the search.
        limit = jnp.where(blocked.any(-1, keepdims=True), cheaper, 0)
        start = stop
    return taken


def _look_up(table: Sequence[int], key: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """`table[key]`, 0 for a key outside it; selects, because a gather from a constant has no
    sharding that fits a batch spread over devices."""
    return sum(
        (jnp.where(key == i, value, 0) for i, value in enumerate(table)), jnp.zeros_like(key)
    )


def _check_costs(cost: tuple[int, ...], budget: int, regions: int) -> None:
    if not cost or cost[0] < 0 or any(b <= a for a, b in pairwise(cost)):
        raise ValueError(f"cost is {cost}; give tokens per scale, coarsest first, ascending")
    if budget < regions * cost[0]:
        raise ValueError(
            f"budget is {budget}, but {regions} regions need {regions * cost[0]} tokens at the "
            f"coarsest scale; raise the budget or coarsen the scales"
        )
