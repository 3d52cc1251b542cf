"""CDPruner against determinants computed one by one, and hand-made cases."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_jax.compress.cdpruner import CDPruner, cdpruner, min_max, most_probable
from focus_jax.compress.divprune import cosines
from tests.compress.layer_views import VALID, kept, one_sample, random_layer, slow_cosines
from tests.compress.views import RUN, dims
from tests.quick import compiled

few = settings(max_examples=25, deadline=None, derandomize=True)
V = 10


def slow_relevance(layer, b: int, valid: int) -> np.ndarray:
    """Normalised cosine of a sample's rows to each question's mean instruction row, [Q valid]."""
    out = []
    for q in range(layer.token.shape[1]):
        asking = np.asarray(layer.token[b, q], np.float64)[np.asarray(layer.instruction[b, q])]
        if not len(asking):
            out.append(np.ones(valid))
            continue
        rows = np.concatenate([[asking.mean(0)], layer.visual[b, :valid]])
        score = slow_cosines(rows)[0, 1:]
        span = score.max() - score.min()
        out.append((score - score.min()) / span if span else np.ones(valid))
    return np.array(out)


def slow_set(rows, relevance, count: int) -> list[int]:
    """The largest squared distance to the span of those chosen times squared relevance; if none
    is left, the most relevant."""
    rows = np.asarray(rows, np.float64)
    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    chosen: list[int] = []

    def worth(i: int) -> tuple[bool, float]:
        span = unit[chosen].T
        rest = unit[i] - span @ np.linalg.lstsq(span, unit[i], rcond=1e-10)[0]
        if relevance[i] > 0 and rest @ rest > 1e-5:
            # Equal relevance must tie at the first choice, where nothing is subtracted.
            return True, relevance[i] ** 2 * (rest @ rest if chosen else 1)
        return False, relevance[i]

    while len(chosen) < min(count, len(rows)):
        left = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(left, key=lambda i: (*worth(i), -i)))
    return sorted(chosen)


def run(cut, layer, slots: int):
    return compiled(lambda layer: cut.select(layer, slots, RUN))(layer)


@compiled
def choose(rows, relevance, count):
    valid = jnp.ones((1, *relevance.shape), bool)
    cosine = cosines(rows[None], valid[0])
    return most_probable(cosine, relevance[None], valid, V, jnp.full(valid.shape[:2], count))


def chosen(rows, relevance, count: int) -> list[int]:
    """The set of one image and one question."""
    rows, relevance = (jnp.asarray(a, jnp.float32) for a in (rows, relevance))
    return kept(choose(rows, relevance[None], count), 0)


def test_each_question_keeps_its_own():
    layer, cut = random_layer(), CDPruner(keep=0.4)
    slots = cut.slots(max(VALID))
    selection, aux = run(cut, layer, slots)
    assert not cut.shared
    assert selection.index.shape == (3, 2, 5)
    for b, valid in enumerate(VALID):
        relevance = slow_relevance(layer, b, valid)
        score = np.asarray(aux.maps["cdpruner/score"][b])
        np.testing.assert_allclose(score[:, :valid], relevance, atol=1e-5)
        assert (score[:, valid:] == 0).all()
        for q in range(2):
            want = slow_set(layer.visual[b, :valid], relevance[q], int(np.ceil(0.4 * valid)))
            assert kept(selection, b, q) == want
    alone, _ = run(cut, one_sample(layer, 1), cut.slots(VALID[1]))
    assert [kept(alone, 0, q) for q in range(2)] == [kept(selection, 1, q) for q in range(2)]
    assert kept(selection, 0, 0) != kept(selection, 0, 1)
    np.testing.assert_array_equal(aux.maps["cdpruner/index"], selection.index)


def test_pooled_questions_keep_one_set():
    layer, cut = random_layer((12, 7)), CDPruner(keep=0.4, sharing="pooled")
    selection, aux = run(cut, layer, 5)
    assert cut.shared
    assert selection.index.shape == (2, 1, 5)
    for b, valid in enumerate((12, 7)):
        rating = []
        for q in range(2):
            asking = np.asarray(layer.token[b, q], np.float64)[np.asarray(layer.instruction[b, q])]
            mean = asking.mean(0) if len(asking) else np.zeros(16)
            rows = np.asarray(layer.visual[b, :valid], np.float64)
            norms = np.sqrt((rows**2).sum(-1) * max((mean**2).sum(), 1e-30))
            rating.append(rows @ mean / norms)
        mean = np.mean(rating, 0)
        relevance = (mean - mean.min()) / (mean.max() - mean.min())
        np.testing.assert_allclose(aux.maps["cdpruner/score"][b, 0, :valid], relevance, atol=1e-5)
        count = int(np.ceil(0.4 * valid))
        assert kept(selection, b) == slow_set(layer.visual[b, :valid], relevance, count)


def test_keep_one_keeps_all_and_more_slots_change_nothing():
    layer = random_layer()
    selection, _ = run(CDPruner(keep=1.0), layer, 12)
    assert [kept(selection, b, 1) for b in range(3)] == [list(range(n)) for n in VALID]
    cut = CDPruner(keep=0.4)
    few_slots, many = (run(cut, layer, slots)[0] for slots in (5, 12))
    for b, q in np.ndindex(3, 2):
        assert kept(few_slots, b, q) == kept(many, b, q)


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, V))
def test_each_choice_makes_the_determinant_largest(seed, count):
    rng = np.random.default_rng(seed)
    rows, relevance = rng.standard_normal((V, 16)), rng.uniform(0.05, 1, V)
    kernel = slow_cosines(rows) * np.outer(relevance, relevance)
    want: list[int] = []
    for _ in range(count):
        grown = [[*want, i] for i in range(V) if i not in want]
        want = max(grown, key=lambda s: np.linalg.slogdet(kernel[np.ix_(s, s)])[1])
    assert chosen(rows, relevance, count) == sorted(want)


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, V))
def test_exhausted_directions_leave_the_choice_to_relevance(seed, count):
    """Of three-wide rows no fourth is new."""
    rng = np.random.default_rng(seed)
    rows, relevance = rng.standard_normal((V, 3)), rng.uniform(0.05, 1, V)
    relevance[0] = 0
    want = slow_set(rows, relevance, count)
    assert chosen(rows, relevance, count) == want
    if 3 < count < V:
        left = [i for i in range(V) if i not in want]
        fourth = set(want) - set(slow_set(rows, relevance, 3))
        assert min(relevance[list(fourth)]) >= max(relevance[left])


def test_copies_come_after_everything_new_by_relevance():
    a, b, c = np.eye(3)
    rows, relevance = [a, b, a, 3 * b, c, a], [1.0, 0.5, 0.9, 0.4, 0.1, 0.95]
    assert chosen(rows, relevance, 2) == [0, 1]
    assert chosen(rows, relevance, 3) == [0, 1, 4]
    assert chosen(rows, relevance, 4) == [0, 1, 4, 5]
    assert chosen(rows, relevance, 5) == [0, 1, 2, 4, 5]
    irrelevant = [1.0, 0.5, 0.9, 0.4, 0.0, 0.95]  # c is new, but of no relevance at all
    assert chosen(rows, irrelevant, 4) == [0, 1, 2, 5]
    assert chosen(rows, irrelevant, 6) == [0, 1, 2, 3, 4, 5]


def test_without_an_instruction_only_diversity_counts():
    layer = random_layer((10,), questions=1)
    layer = layer._replace(instruction=jnp.zeros_like(layer.instruction))
    selection, aux = run(CDPruner(keep=0.4), layer, 4)
    assert (aux.maps["cdpruner/score"] == 1).all()
    assert kept(selection, 0) == slow_set(layer.visual[0], np.ones(10), 4)


def test_min_max_by_hand():
    score = jnp.asarray([[[3.0, 1.0, 2.0, 9.0], [5.0, 5.0, 5.0, 0.0], [1.0, 2.0, 3.0, 4.0]]])
    valid = jnp.asarray([[[True, True, True, False]] * 2 + [[False] * 4]])
    assert min_max(score, valid).tolist() == [[[1, 0, 0.5, 0], [1, 1, 1, 0], [0, 0, 0, 0]]]


def test_other_sources_of_relevance():
    """The negative cosine of the official code, and whatever a subclass rates by."""
    layer, cut = random_layer((10,), questions=1), CDPruner(keep=0.4)
    _, aux = run(cut, layer, 4)
    score = aux.maps["cdpruner/score"]
    _, aux = run(replace(cut, relevance="negative_embedding"), layer, 4)
    np.testing.assert_allclose(aux.maps["cdpruner/score"], 1 - score, atol=1e-6)

    @dataclass(frozen=True)
    class ByPlace(CDPruner):
        def rating(self, layer):
            return jnp.arange(10.0)[None, None]

    selection, aux = run(ByPlace(keep=0.4), layer, 4)
    np.testing.assert_allclose(aux.maps["cdpruner/score"][0, 0], np.arange(10) / 9, rtol=1e-6)
    assert kept(selection, 0) == slow_set(layer.visual[0], np.arange(10) / 9, 4)


def test_vmap_and_gradient():
    layer, cut = random_layer(), CDPruner(keep=0.4)
    whole, _ = run(cut, layer, 5)
    single = lambda one: cut.select(jax.tree.map(lambda a: a[None], one), 5, RUN)[0]  # noqa: E731
    mapped = compiled(jax.vmap(single))(layer)
    np.testing.assert_array_equal(mapped.index[:, 0], whole.index)

    def loss(rows):
        changed = layer._replace(visual=rows[0], token=rows[1])
        return cut.select(changed, 5, RUN)[1].maps["cdpruner/score"].sum()

    gradient = compiled(jax.grad(loss))((layer.visual, layer.token))
    assert all((g == 0).all() for g in gradient)


def test_method_and_its_operations():
    method = cdpruner(keep=0.25, layer=2, relevance="negative_embedding", sharing="pooled")
    cut = CDPruner(layer=2, keep=0.25, relevance="negative_embedding", sharing="pooled")
    assert method.cuts == (cut,)
    assert method.stage_slots(dims()) == (64, 16)
    sizes = {"visual": 64, "text": 5, "width": 8, "kv_width": 4, "questions": 3}
    products, questions, factor = 2 * 64**2 * 256, 3 * 2 * 64 * 256, 2 * 16**2 * 64
    planned = CDPruner(keep=0.25).flops(dims(width=256), **sizes)
    assert planned == products + questions + 3 * factor
    assert cut.flops(dims(width=256), **sizes) == products + questions + factor
    layer = random_layer((64,), questions=3, width=256)
    program = compiled(lambda layer: CDPruner().select(layer, 16, RUN)).lower(layer).compile()
    once = products + questions + 3 * factor / 16  # the compiler counts one step of the loop
    assert program.cost_analysis()["flops"] == pytest.approx(once, rel=0.1)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"keep": 0.0}, "keep=0.0"), ({"keep": 1.01}, "keep=1.01"), ({"layer": -1}, "layer -1")],
)
def test_errors_name_the_number(change, named):
    with pytest.raises(ValueError, match=named):
        cdpruner(**change).check(dims())
