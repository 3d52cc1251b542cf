"""Scales of regions against slow Python: demotion and allocation within a budget of tokens."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from focus_jax.compress import scales

B, R = 3, 5
COST = (1, 4, 16)
few = settings(max_examples=40, deadline=None, derandomize=True)

choices = hnp.arrays(np.int32, (B, R), elements=st.integers(-1, 2))
margins = hnp.arrays(np.float32, (B, R), elements=st.sampled_from([0.0, 0.1, 0.2, 0.9]))


def slow_demote(choice, margin, cost, budget):
    """One region, one scale at a time, in rounds over the ranking."""
    choice, steps = choice.tolist(), 0
    ranking = sorted(range(len(choice)), key=lambda r: (margin[r], r))

    def spent():
        return sum(cost[s] for s in choice if s >= 0)

    while spent() > budget:
        for region in [r for r in ranking if choice[r] > 0]:
            if spent() > budget:
                choice[region] -= 1
                steps += 1
    return choice, steps


@few
@given(choices, margins, st.sampled_from([5, 8, 17, 40, 100]))
def test_demotion_matches_a_loop(choice, margin, budget):
    fitted, demoted = jax.jit(scales.demote_to_budget, static_argnums=(2, 3))(
        choice, margin, COST, budget
    )
    for row in range(B):
        expected, steps = slow_demote(choice[row], margin[row], COST, budget)
        assert fitted[row].tolist() == expected
        assert int(demoted[row]) == steps


def slow_allocate(loss, cost, budget, available, min_gain):
    steps = np.diff(cost)
    upgrades = []
    for r in np.flatnonzero(available):
        blocks = []  # (first scale, last scale, slope), pooled while a later slope is higher
        for s in range(len(steps)):
            first, last = s, s + 1
            while True:
                slope = float(
                    (loss[r, first] - loss[r, last]) / np.float32(cost[last] - cost[first])
                )
                if not blocks or blocks[-1][2] > slope:
                    break
                first = blocks.pop()[0]
            blocks.append((first, last, slope))
        for first, last, slope in blocks:
            upgrades += [(-slope, int(r), s) for s in range(first, last)]
    choice = np.where(available, 0, -1)
    room, limit = budget - cost[0] * int(available.sum()), math.inf
    for worth, r, s in sorted(upgrades):
        if -worth <= min_gain or max(steps[: s + 1]) >= limit:
            continue
        assert choice[r] == s  # never on a step that was not taken
        if steps[s] <= room:
            choice[r] += 1
            room -= steps[s]
        else:
            limit = steps[s]
    return choice.tolist()


losses = hnp.arrays(
    np.float32, (B, R, 3), elements=st.sampled_from([0.0, 0.5, 1.0, 3.0, 9.0, 27.0])
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    losses,
    hnp.arrays(np.bool_, (B, R)),
    st.sampled_from([5, 10, 19, 30, 44, 80]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([COST, (0, 6, 8)]),
)
def test_allocation_matches_a_loop(loss, available, budget, min_gain, cost):
    choice = jax.jit(scales.allocate, static_argnums=(1, 2, 4))(
        loss, cost, budget, available, min_gain
    )
    for row in range(B):
        expected = slow_allocate(loss[row], cost, budget, available[row], min_gain)
        assert choice[row].tolist() == expected
    spent = np.where(choice >= 0, np.asarray(cost)[choice], 0).sum(-1)
    assert (spent <= budget).all()


def test_allocation_by_hand():
    # Region 1 loses most at the coarsest scale; region 2 is flat; region 3 is not there.
    loss = jnp.asarray([[4.0, 1.0, 0.0], [40.0, 20.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    available = jnp.asarray([True, True, True, False])
    allocate = partial(scales.allocate, loss, COST, available=available)
    assert allocate(budget=100).tolist() == [2, 2, 0, -1]
    assert allocate(budget=9).tolist() == [1, 1, 0, -1]
    assert allocate(budget=6).tolist() == [0, 1, 0, -1]
    # 12 for the finest scale of region 1 do not fit any more, 3 for region 0 do.
    assert allocate(budget=17).tolist() == [1, 1, 0, -1]
    assert scales.allocate(loss[:, :1], (1,), 4, available).tolist() == [0, 0, 0, -1]


def test_vmap_equals_the_batched_call():
    rng = np.random.default_rng(1)
    choice, margin = jnp.asarray(rng.integers(0, 3, (B, R))), jnp.asarray(rng.random((B, R)))
    loss = jnp.asarray(rng.random((B, R, 3)))

    def both(choice, margin, loss):
        return (
            scales.demote_to_budget(choice, margin, COST, 20),
            scales.allocate(loss, COST, 20, choice > 0),
        )

    arrays = (choice, margin, loss)
    batched, mapped = jax.jit(both)(*arrays), jax.jit(jax.vmap(both))(*arrays)
    jax.tree.map(np.testing.assert_array_equal, batched, mapped)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: scales.demote_to_budget(m.astype(int), x, COST, 2), "raise the budget"),
        (lambda x, m: scales.demote_to_budget(m.astype(int), x, (4, 1), 99), "ascending"),
        (lambda x, m: scales.allocate(x[None], COST, 99, m[None, :, 0]), "cost 3"),
    ],
)
def test_wrong_static_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((3, 4)), jnp.ones((3, 4), bool))
