"""DivPrune against plain loops, and what holds for any max-min set."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_jax.compress.divprune import DivPrune, cosines, divprune, farthest_apart
from tests.compress.layer_views import VALID, kept, one_sample, random_layer, slow_cosines
from tests.compress.views import RUN, dims
from tests.quick import compiled

few = settings(max_examples=25, deadline=None, derandomize=True)
V, D = 10, 4


def slow_set(rows, count: int) -> tuple[list[int], list[float]]:
    """The greedy set of so many rows, and each row's smallest distance to another."""
    distance = 1 - slow_cosines(rows)
    every = range(len(rows))
    nearest = [min((distance[i, j] for j in every if j != i), default=2.0) for i in every]
    chosen: list[int] = []
    while len(chosen) < min(count, len(rows)):
        score = [min(distance[i, c] for c in chosen) for i in every] if chosen else nearest
        chosen.append(max((i for i in every if i not in chosen), key=lambda i: (score[i], -i)))
    return sorted(chosen), nearest


def run(cut, layer, slots: int):
    return compiled(lambda layer: cut.select(layer, slots, RUN))(layer)


@compiled
def choose(rows, valid, count):
    cosine = cosines(rows, valid)
    return farthest_apart(cosine, valid[:, None], V, count[:, None])[0]


def chosen(rows, count: int) -> list[int]:
    """The set of one image without padding."""
    rows = jnp.asarray(rows, jnp.float32)[None]
    return kept(choose(rows, jnp.ones(rows.shape[:2], bool), jnp.asarray([count])), 0)


def test_each_sample_keeps_its_own_share():
    layer, cut = random_layer(), DivPrune(keep=0.4)
    slots = cut.slots(max(VALID))
    selection, aux = run(cut, layer, slots)
    assert cut.shared
    assert selection.index.shape == (3, 1, 5)
    for b, valid in enumerate(VALID):
        want, nearest = slow_set(layer.visual[b, :valid], int(np.ceil(0.4 * valid)))
        assert kept(selection, b) == want
        np.testing.assert_allclose(aux.maps["divprune/score"][b, 0, :valid], nearest, atol=1e-5)
    alone, _ = run(cut, one_sample(layer, 1), cut.slots(VALID[1]))
    assert kept(alone, 0) == kept(selection, 1)
    np.testing.assert_array_equal(aux.maps["divprune/index"], selection.index)


def test_keep_one_keeps_all_and_more_slots_change_nothing():
    layer = random_layer()
    selection, _ = run(DivPrune(keep=1.0), layer, 12)
    assert [kept(selection, b) for b in range(3)] == [list(range(n)) for n in VALID]
    cut = DivPrune(keep=0.4)
    few_slots, many = (run(cut, layer, slots)[0] for slots in (5, 12))
    assert [kept(few_slots, b) for b in range(3)] == [kept(many, b) for b in range(3)]


def test_later_layers_count_what_entered():
    """Behind another cut a row may hold fewer tokens than its share of those that entered."""
    layer = random_layer((7, 4))
    layer = layer._replace(entered=jnp.asarray([20, 20]))
    selection, _ = run(DivPrune(layer=3, keep=0.25), layer, 5)
    assert [len(kept(selection, b)) for b in range(2)] == [5, 4]


def test_ties_and_copies_by_hand():
    a, b, c = np.eye(3)
    assert chosen([a, 2 * a, b, 5 * b, c], 3) == [0, 2, 4]  # c has no copy: it is first
    assert chosen([a, a, a], 2) == [0, 1]
    assert chosen([-a, a, b], 2) == [0, 1]  # a tie, then the opposite
    assert chosen([a, 0 * a, a], 2) == [0, 1]  # a row of zeros is at distance 1 from any


@few
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_no_set_is_much_more_diverse(seed, count):
    """Greedy max-min is within a factor of two in a metric: chords, squares of which are 2 x."""
    rows = np.random.default_rng(seed).standard_normal((V, D))
    distance = 1 - slow_cosines(rows)
    apart = lambda s: min(distance[i, j] for i, j in combinations(s, 2))  # noqa: E731
    best = max(apart(s) for s in combinations(range(V), count))
    assert apart(chosen(rows, count)) >= best / 4 - 1e-6


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, V - 1))
def test_sets_grow_and_do_not_depend_on_lengths_or_order(seed, count):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((V, D))
    want = chosen(rows, count)
    assert want == slow_set(rows, count)[0]
    assert set(want) < set(chosen(rows, count + 1))
    assert chosen(rows * rng.uniform(0.1, 10, (V, 1)), count) == want
    order = rng.permutation(V)
    again = chosen(rows[order], count)
    assert again == slow_set(rows[order], count)[0]
    nearest = np.sort((1 - slow_cosines(rows) + 9 * np.eye(V)).min(1))
    # The two that are farthest from all others may be each other's nearest: the first one starts.
    if nearest[-1] > nearest[-2] + 1e-6:
        assert sorted(order[again].tolist()) == want


def test_vmap_and_gradient():
    layer, cut = random_layer(), DivPrune(keep=0.4)
    whole, _ = run(cut, layer, 5)
    single = lambda one: cut.select(jax.tree.map(lambda a: a[None], one), 5, RUN)[0]  # noqa: E731
    mapped = compiled(jax.vmap(single))(layer)
    np.testing.assert_array_equal(mapped.index[:, 0], whole.index)

    def loss(visual):
        selection, aux = cut.select(layer._replace(visual=visual), 5, RUN)
        return aux.maps["divprune/score"].sum() + selection.valid.sum()

    assert (compiled(jax.grad(loss))(layer.visual) == 0).all()


def test_method_and_its_operations():
    method = divprune(keep=0.3, layer=2, renumber=True)
    assert method.cuts == (DivPrune(layer=2, keep=0.3, renumber=True),)
    assert method.stage_slots(dims()) == (64, 20)
    assert divprune().cuts[0].renumber is False
    layer = random_layer((64,), width=256)
    program = compiled(lambda layer: DivPrune().select(layer, 16, RUN)).lower(layer).compile()
    planned = DivPrune().flops(dims(width=256), 64, 5, 8, 4)
    assert program.cost_analysis()["flops"] == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"keep": 0.0}, "keep=0.0"), ({"keep": 1.01}, "keep=1.01"), ({"layer": 6}, "layer 6")],
)
def test_errors_name_the_number(change, named):
    with pytest.raises(ValueError, match=named):
        divprune(**change).check(dims())
