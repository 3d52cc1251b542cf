"""Fixed-budget primitives against slow loops and hand-made cases."""

import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from focus_jax.compress import select

B, V, D = 3, 9, 2
few = settings(max_examples=40, deadline=None, derandomize=True)

# Few distinct values, so that ties are common; -0.0 must tie with 0.0.
scores = hnp.arrays(np.float32, (B, V), elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, 0.5, 2.0]))
masks = hnp.arrays(np.bool_, (B, V))
counts = hnp.arrays(np.int32, (B,), elements=st.integers(0, V + 2))


def filled(selection):
    """The indices in the filled slots, row by row; the empty ones must be at the end and 0."""
    index, valid = np.asarray(selection.index), np.asarray(selection.valid)
    assert (valid[..., :-1] >= valid[..., 1:]).all()
    assert (index[~valid] == 0).all()
    return [row[v].tolist() for row, v in zip(index, valid, strict=True)]


def slow_top_k(score, valid, k):
    ranked = sorted(np.flatnonzero(valid).tolist(), key=lambda i: (-score[i], i))
    return sorted(ranked[:k])


# ------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(30, 0.1, 3), (31, 0.1, 4), (576, 1 / 3, 192), (0, 0.5, 0), (7, 1e-9, 1), (7, 1.0, 7)],
)
def test_keep_slots_by_hand(count, share, expected):
    assert select.keep_slots(count, share) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 4000), st.integers(1, 1000))
def test_keep_slots_is_the_exact_ceiling_or_floor(count, thousandths):
    exact = Fraction(thousandths, 1000) * count
    assert select.keep_slots(count, thousandths / 1000) == math.ceil(exact)
    floor = select.keep_slots(count, thousandths / 1000, floor=True)
    assert floor == max(math.floor(exact), min(count, 1))


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.39, 1 / 3, 0.7, 1.0, 65535 / 65536, 1e-9])
def test_keep_count_agrees_with_keep_slots(share, floor):
    count = np.r_[0:700, 2340, 2880, 2928, 65_535].astype(np.int32)
    kept = np.asarray(select.keep_count(jnp.asarray(count), share, floor))
    assert kept.tolist() == [select.keep_slots(int(c), share, floor) for c in count]


def test_keep_count_takes_a_sampled_share():
    count = jnp.asarray([0, 1, 30, 31, 2880])
    kept = jax.jit(select.keep_count)(count, jnp.float32(0.1))
    assert kept.tolist() == [0, 1, 3, 4, 288]
    kept = jax.jit(select.keep_count, static_argnums=2)(count, jnp.float32(0.1), True)
    assert kept.tolist() == [0, 1, 3, 3, 288]


# ---------------------------------------------------------------------------- selection

top_k = jax.jit(select.top_k_in_order, static_argnums=2)


@few
@given(scores, masks, st.sampled_from([1, 4, V, V + 3]))
def test_top_k_matches_a_loop(score, valid, k):
    chosen = top_k(score, valid, k)
    assert chosen.index.shape == chosen.valid.shape == (B, k)
    assert filled(chosen) == [slow_top_k(s, v, k) for s, v in zip(score, valid, strict=True)]


@few
@given(scores, masks, counts)
def test_top_k_with_a_count_per_row(score, valid, count):
    chosen = filled(top_k(score, valid, 4, count))
    rows = zip(score, valid, count, strict=True)
    assert chosen == [slow_top_k(s, v, min(4, c)) for s, v, c in rows]


ranked = jax.jit(select.top_k, static_argnums=2)


@few
@given(scores, masks, counts, st.sampled_from([1, 4, V + 3]))
def test_top_k_by_score_matches_a_loop(score, valid, count, k):
    rows = zip(score, valid, count, strict=True)
    want = [
        sorted(np.flatnonzero(v).tolist(), key=lambda i: (-s[i], i))[: min(k, c)]
        for s, v, c in rows
    ]
    chosen = ranked(score, valid, k, count)
    assert chosen.index.shape == chosen.valid.shape == (B, k)
    assert filled(chosen) == want


def test_top_k_ranks_nan_last_but_above_invalid():
    score = jnp.asarray([[jnp.nan, 1.0, -jnp.inf, jnp.inf, 5.0]])
    valid = jnp.asarray([[True, True, True, True, False]])
    assert filled(select.top_k_in_order(score, valid, 2)) == [[1, 3]]
    assert filled(select.top_k_in_order(score, valid, 3)) == [[0, 1, 3]]
    assert filled(select.top_k_in_order(score, valid, 5)) == [[0, 1, 2, 3]]


def test_top_k_ties_zeros_of_either_sign():
    score = jnp.asarray([-1.0, -0.0, 0.0, -0.0, 0.0])
    assert filled(select.top_k_in_order(score[None], jnp.ones((1, 5), bool), 2)) == [[1, 2]]


def test_top_k_takes_integers_bfloat16_and_any_leading_axes():
    score = jnp.asarray([[[3, 1, 2], [0, 0, 0]]], jnp.int32)
    valid = jnp.ones(score.shape, bool)
    for values in (score, score.astype(jnp.bfloat16)):
        chosen = select.top_k_in_order(values, valid, 2)
        assert chosen.index.tolist() == [[[0, 2], [0, 1]]]
    single = select.top_k_in_order(score[0, 0], valid[0, 0], 2)
    assert single.index.tolist() == [0, 2]


@few
@given(scores, masks, st.sampled_from([1, 4, V, V + 3]))
def test_top_k_as_a_mask_is_the_same_set(score, valid, k):
    mask = np.asarray(jax.jit(select.top_k_mask, static_argnums=2)(score, valid, k))
    want = [slow_top_k(s, v, k) for s, v in zip(score, valid, strict=True)]
    assert [np.flatnonzero(row).tolist() for row in mask] == want


def test_top_k_mask_ranks_nan_last_but_above_invalid():
    score = jnp.asarray([jnp.nan, 1.0, -jnp.inf, jnp.inf, 5.0])
    valid = jnp.asarray([True, True, True, True, False])
    for k, want in ((2, [1, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3])):
        assert np.flatnonzero(select.top_k_mask(score, valid, k)).tolist() == want


@few
@given(masks, counts)
def test_thin_spreads_what_it_keeps(mask, count):
    """Between two kept entries stand as many others as between any two, give or take one."""
    for row, marked, wanted in zip(jax.jit(select.thin)(mask, count), mask, count, strict=True):
        assert not (row & ~marked).any()
        ranks = np.flatnonzero(np.asarray(row)[marked])
        assert len(ranks) == min(wanted, marked.sum())
        gaps = np.diff([-1, *ranks])
        if len(gaps):
            assert gaps.max() - gaps.min() <= 1 and ranks[-1] == marked.sum() - 1


@few
@given(masks, st.sampled_from([2, V]))
def test_places_and_lists(valid, budget):
    selection, _ = select.pack(valid, budget)
    held = np.asarray(select.places(selection, V))
    assert [np.flatnonzero(row.any(0)).tolist() for row in held] == filled(selection)
    assert (held.sum(-1) == np.asarray(selection.valid)).all()
    for row, marked in zip(select.listed(valid), valid, strict=True):
        found = np.flatnonzero(marked).tolist()
        assert row.tolist() == found + [-1] * (V - len(found))


def test_listed_values_may_repeat():
    mask = jnp.asarray([True, False, True, True])
    assert select.listed(mask, jnp.asarray([7, 1, 3, 7])).tolist() == [3, 7, 7, -1]


@few
@given(masks, st.sampled_from([2, V, V + 3]))
def test_pack_matches_a_loop(valid, budget):
    selection, overflow = jax.jit(select.pack, static_argnums=1)(valid, budget)
    assert filled(selection) == [np.flatnonzero(v)[:budget].tolist() for v in valid]
    assert overflow.tolist() == [max(int(v.sum()) - budget, 0) for v in valid]


def slow_greedy(start, pair, valid, count):
    """Each choice adds its row of `pair` to the scores."""
    chosen, score = [], start.astype(np.float64)
    while len(chosen) < min(count, int(valid.sum())):
        left = [i for i in np.flatnonzero(valid).tolist() if i not in chosen]
        chosen.append(max(left, key=lambda i: (score[i], -i)))
        score = score + pair[chosen[-1]]
    return sorted(chosen)


@partial(jax.jit, static_argnums=3)
def greedy(start, pair, valid, k, count=None):
    def add(score, step, chosen):
        rows = jnp.take_along_axis(pair, chosen[:, None, None], axis=1)[:, 0]
        return score + rows, score + rows

    return select.greedy_in_order(start, add, start, valid, k, count)


@few
@given(
    scores,
    hnp.arrays(np.float32, (B, V, V), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])),
    masks,
    st.sampled_from([1, 4, V, V + 3]),
    counts,
)
def test_greedy_matches_a_loop(start, pair, valid, k, count):
    chosen = greedy(start, pair, valid, k, count)
    assert chosen.index.shape == chosen.valid.shape == (B, k)
    for row, got in enumerate(filled(chosen)):
        assert got == slow_greedy(start[row], pair[row], valid[row], min(k, count[row]))
    whole = filled(greedy(start, pair, valid, k))
    assert whole == [slow_greedy(*one, k) for one in zip(start, pair, valid, strict=True)]


def test_greedy_tells_its_state_which_step_it_is():
    def add(log, step, chosen):
        return log.at[step].set(chosen), -jnp.abs(jnp.arange(4.0) - chosen)

    seen = []

    def watched(log, step, chosen):
        log, score = add(log, step, chosen)
        jax.debug.callback(lambda *a: seen.append([int(x) for x in a]), step, chosen)
        return log, score

    chosen = select.greedy_in_order(
        jnp.asarray([0.0, 0, 3, 0]), watched, jnp.zeros(4, jnp.int32), jnp.ones(4, bool), 3
    )
    jax.effects_barrier()
    assert chosen.index.tolist() == [0, 1, 2]
    assert sorted(seen) == [[0, 2], [1, 1], [2, 0]]  # the nearest to the last one, ties from below


def slow_smallest_mass(mass, valid, p):
    """The shortest prefix of the ranking whose mass reaches p of the total, in exact fractions."""
    ranked = sorted(np.flatnonzero(valid).tolist(), key=lambda i: (-mass[i], i))
    total = sum(Fraction(float(mass[i])) for i in ranked)
    for size in range(1, len(ranked) + 1):
        if sum(Fraction(float(mass[i])) for i in ranked[:size]) >= Fraction(p) * total:
            return sorted(ranked[:size]), size
    return [], 0


@few
@given(
    hnp.arrays(np.float32, (B, V), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 4.0])),
    masks,
    st.sampled_from([0.25, 0.5, 0.875, 1.0]),
)
def test_smallest_mass_matches_a_loop(mass, valid, p):
    chosen, overflow = jax.jit(select.smallest_mass, static_argnums=(2, 3))(mass, valid, p, 4)
    for row, (m, v) in enumerate(zip(mass, valid, strict=True)):
        expected, size = slow_smallest_mass(m, v, p)
        if size <= 4:
            assert filled(chosen)[row] == expected
        else:
            assert filled(chosen)[row] == slow_top_k(m, v, 4)
        assert int(overflow[row]) == max(size - 4, 0)


def test_smallest_mass_is_not_one_too_many_by_rounding():
    mass = jnp.full((1, 10), 0.1)
    chosen, _ = select.smallest_mass(mass, jnp.ones((1, 10), bool), 0.3, 10)
    assert filled(chosen) == [[0, 1, 2]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_uniform_2d_is_exact_distinct_and_even(rows, cols, data):
    k = data.draw(st.integers(1, rows * cols))
    cells = select.uniform_2d(rows, cols, k)
    assert len(cells) == k
    assert (np.diff(cells) > 0).all() and cells[0] >= 0 and cells[-1] < rows * cols
    per_row = np.bincount(cells // cols, minlength=rows)
    used = per_row[per_row > 0]
    assert used.max() - used.min() <= 1
    gaps = np.diff(np.flatnonzero(per_row))
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    for row in np.flatnonzero(per_row):
        gaps = np.diff(cells[cells // cols == row] % cols)
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_uniform_2d_is_a_stride_where_one_fits():
    grid = np.zeros((24, 24), bool)
    grid.flat[select.uniform_2d(24, 24, 144)] = True
    assert grid[1::2, 1::2].all() and grid.sum() == 144
    assert select.uniform_2d(3, 4, 12).tolist() == list(range(12))


# --------------------------------------------------------------------------- moving rows


def random_selection(rng, k=5):
    score, valid = rng.normal(size=(B, V)), rng.random((B, V)) < 0.5
    valid[0] = False
    return select.top_k_in_order(jnp.asarray(score), jnp.asarray(valid), k)


@pytest.mark.parametrize("k", [3, 5, V + 2])
def test_take_and_its_gradient_match_the_plain_gather(k):
    rng = np.random.default_rng(k)
    selection = random_selection(rng, k)
    x, weight = jnp.asarray(rng.normal(size=(B, V, D))), jnp.asarray(rng.normal(size=(B, k, D)))

    def plain(x):
        rows = jnp.take_along_axis(x, selection.index[..., None], axis=1)
        return jnp.where(selection.valid[..., None], rows, 0)

    np.testing.assert_array_equal(select.take(x, selection), plain(x))
    loss = lambda gather: lambda x: (weight * jnp.sin(gather(x))).sum()  # noqa: E731
    ours = jax.jit(jax.grad(loss(partial(select.take, selection=selection))))(x)
    np.testing.assert_allclose(ours, jax.grad(loss(plain))(x), rtol=1e-6)


def test_take_accepts_slots_in_any_order_and_hides_what_is_not_selected():
    x = jnp.asarray([[1.0], [jnp.nan], [3.0]])
    selection = select.Selection(jnp.asarray([2, 0, 0]), jnp.asarray([True, True, False]))
    assert select.take(x, selection).ravel().tolist() == [3, 1, 0]
    weight = jnp.asarray([[10.0], [20.0], [30.0]])
    gradient = jax.grad(lambda x: (select.take(x, selection) * weight).sum())(x)
    assert gradient.ravel().tolist() == [20, 0, 10]


def test_take_under_vmap_of_grad_equals_the_batched_one():
    rng = np.random.default_rng(0)
    selection, x = random_selection(rng), jnp.asarray(rng.normal(size=(B, V, D)))
    square = lambda x, selection: (select.take(x, selection) ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(
        jax.vmap(jax.grad(square))(x, selection), jax.grad(square)(x, selection), rtol=1e-6
    )


def test_no_scatter_of_rows_in_the_gradient():
    selection, x = random_selection(np.random.default_rng(0)), jnp.ones((B, V, D))
    text = str(jax.make_jaxpr(jax.grad(lambda x: select.take(x, selection).sum()))(x))
    scatters = [line for line in text.splitlines() if "= scatter" in line]
    assert scatters and all(f":i32[{B},{V}] = scatter" in line for line in scatters)


def test_take_moves_integers():
    x = jnp.arange(6).reshape(3, 2)
    selection = select.Selection(jnp.asarray([1, 0]), jnp.asarray([True, False]))
    assert select.take(x, selection).tolist() == [[2, 3], [0, 0]]
    assert select.take_values(x[:, 0], selection, -7).tolist() == [2, -7]
    assert select.take_values(x[:, 0] > 0, selection, True).tolist() == [True, True]


def test_permute_and_its_gradient():
    rng = np.random.default_rng(0)
    order = np.argsort(rng.random((B, V)), axis=-1)
    x, weight = rng.normal(size=(2, B, V, D)).astype(np.float32)
    moved, back = jax.vjp(lambda x: select.permute(x, jnp.asarray(order)), jnp.asarray(x))
    for row in range(B):
        np.testing.assert_array_equal(moved[row], x[row][order[row]])
    expected = np.zeros_like(x)
    for row in range(B):
        expected[row][order[row]] = weight[row]
    np.testing.assert_array_equal(back(jnp.asarray(weight))[0], expected)


@pytest.mark.parametrize("mean", [False, True])
def test_merge_matches_a_loop(mean):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(B, V, D)), rng.random((B, V))
    assign = rng.integers(-1, 3, (B, V))
    assign[1] = -1
    expected, mass = np.zeros((B, 4, D)), np.zeros((B, 4, 1))
    for b, v in np.ndindex(B, V):
        if assign[b, v] >= 0:
            expected[b, assign[b, v]] += weight[b, v] * x[b, v]
            mass[b, assign[b, v]] += weight[b, v]
    x[1] = np.nan  # rows sent nowhere must not matter
    if mean:
        expected = np.divide(expected, mass, out=np.zeros_like(expected), where=mass > 0)
    arrays = (jnp.asarray(a, jnp.float32) for a in (x, weight))
    x, weight = arrays
    merged = select.merge_by_assignment(x, jnp.asarray(assign), weight, 4, mean=mean)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(
        lambda w: select.merge_by_assignment(x, jnp.asarray(assign), w, 4, mean=mean).sum()
    )(weight)
    assert np.isfinite(gradient).all()


def test_vmap_equals_the_batched_call():
    rng = np.random.default_rng(1)
    score, valid = jnp.asarray(rng.normal(size=(B, V))), jnp.asarray(rng.random((B, V)) < 0.7)

    def everything(score, valid):
        return (
            select.top_k_in_order(score, valid, 4, select.keep_count(valid.sum(-1), 0.5)),
            select.pack(valid, 4),
            select.smallest_mass(jnp.abs(score), valid, 0.5, 4),
        )

    arrays = (score, valid)
    batched, mapped = jax.jit(everything)(*arrays), jax.jit(jax.vmap(everything))(*arrays)
    jax.tree.map(np.testing.assert_array_equal, batched, mapped)


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: select.keep_slots(3, 0.0), "share is 0.0"),
        (lambda x, m: select.keep_slots(-1, 0.5), "count is -1"),
        (lambda x, m: select.keep_count(jnp.asarray([3]), 1.5), "share is 1.5"),
        (lambda x, m: select.top_k_in_order(x, m, 0), "k is 0"),
        (lambda x, m: select.top_k_in_order(x, m[:2], 1), "one shape"),
        (lambda x, m: select.pack(m, 0), "budget is 0"),
        (lambda x, m: select.greedy_in_order(x, None, x, m, 0), "k is 0"),
        (lambda x, m: select.greedy_in_order(x, None, x, m[:2], 1), "one shape"),
        (lambda x, m: select.smallest_mass(x, m, 0.0, 2), "p is 0.0"),
        (lambda x, m: select.merge_by_assignment(x[..., None], m.astype(int), x, 0), "k is 0"),
        (lambda x, m: select.uniform_2d(2, 2, 5), "k is 5"),
    ],
)
def test_wrong_static_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((3, 4)), jnp.ones((3, 4), bool))
