"""TrimTokenator against plain loops; the three diversity cuts in one small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.baselines import Full
from focus_jax.compress.cdpruner import CDPruner
from focus_jax.compress.divprune import DivPrune
from focus_jax.compress.method import Method
from focus_jax.compress.trimtokenator import TrimTokenator, alignment, highest, trimtokenator
from focus_jax.models.vlm import dims_of
from tests.compress.layer_views import VALID, kept, one_sample, random_layer, slow_cosines
from tests.compress.views import RUN, dims
from tests.models.tiny_models import SINGLE, logits, random_inputs, random_model
from tests.quick import compiled


def slow_alignment(layer, b: int, q: int, valid: int) -> np.ndarray:
    """Minus the mean over the instruction's rows of the squared distance, row by row."""
    asking = np.asarray(layer.token[b, q], np.float64)[np.asarray(layer.instruction[b, q])]
    if not len(asking):
        return np.zeros(valid)
    rows = np.asarray(layer.visual[b, :valid], np.float64)
    return np.array([-np.mean([((v - t) ** 2).sum() for t in asking]) for v in rows])


def slow_set(rows, score, near: int, count: int) -> list[int]:
    """The nearest rows, then the least alike of them."""
    candidates = sorted(range(len(rows)), key=lambda i: (-score[i], i))[:near]
    cosine = slow_cosines(rows)
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        against = chosen or candidates
        alike = {i: np.mean([cosine[i, j] for j in against if j != i] or [0]) for i in candidates}
        chosen.append(min((i for i in candidates if i not in chosen), key=lambda i: (alike[i], i)))
    return sorted(chosen)


def run(cut, layer, slots: int):
    return compiled(lambda layer: cut.select(layer, slots, RUN))(layer)


def test_alignment_is_the_mean_squared_distance():
    layer = random_layer()
    score = np.asarray(compiled(alignment)(layer))
    for b, q in np.ndindex(3, 2):
        want = slow_alignment(layer, b, q, VALID[b])
        np.testing.assert_allclose(score[b, q, : VALID[b]], want, rtol=1e-5)
        assert (score[b, q, VALID[b] :] == 0).all()


def test_each_question_keeps_its_own():
    layer, cut = random_layer(), TrimTokenator(keep=0.4, candidates=0.6)
    selection, aux = run(cut, layer, cut.slots(max(VALID)))
    assert not cut.shared
    assert selection.index.shape == (3, 2, 5)
    for b, valid in enumerate(VALID):
        for q in range(2):
            score = slow_alignment(layer, b, q, valid)
            near, count = (int(np.ceil(share * valid)) for share in (0.6, 0.4))
            want = slow_set(layer.visual[b, :valid], score, near, count)
            assert kept(selection, b, q) == want
    alone, _ = run(cut, one_sample(layer, 1), cut.slots(VALID[1]))
    assert [kept(alone, 0, q) for q in range(2)] == [kept(selection, 1, q) for q in range(2)]
    assert kept(selection, 0, 0) != kept(selection, 0, 1)
    np.testing.assert_array_equal(aux.maps["trimtokenator/index"], selection.index)


def test_pooled_questions_keep_one_set():
    layer, cut = random_layer(), TrimTokenator(keep=0.4, candidates=0.6, sharing="pooled")
    selection, aux = run(cut, layer, 5)
    assert cut.shared
    assert selection.index.shape == (3, 1, 5)
    for b, valid in enumerate(VALID):
        score = np.mean([slow_alignment(layer, b, q, valid) for q in range(2)], 0)
        np.testing.assert_allclose(aux.maps["trimtokenator/score"][b, 0, :valid], score, rtol=1e-5)
        near, count = (int(np.ceil(share * valid)) for share in (0.6, 0.4))
        assert kept(selection, b) == slow_set(layer.visual[b, :valid], score, near, count)


def test_keep_one_keeps_all_and_more_slots_change_nothing():
    layer = random_layer()
    selection, _ = run(TrimTokenator(keep=1.0, candidates=1.0), layer, 12)
    assert [kept(selection, b, 1) for b in range(3)] == [list(range(n)) for n in VALID]
    cut = TrimTokenator(keep=0.4)
    few_slots, many = (run(cut, layer, slots)[0] for slots in (5, 12))
    for b, q in np.ndindex(3, 2):
        assert kept(few_slots, b, q) == kept(many, b, q)


def test_as_many_candidates_as_slots_is_the_alignments_choice():
    layer = random_layer((12,))
    selection, _ = run(TrimTokenator(keep=0.5, candidates=0.5), layer, 6)
    for q in range(2):
        score = slow_alignment(layer, 0, q, 12)
        if layer.instruction[0, q].any():
            assert kept(selection, 0, q) == sorted(np.argsort(-score)[:6].tolist())


def test_without_an_instruction_all_are_candidates():
    layer = random_layer((12,), questions=1)
    layer = layer._replace(instruction=jnp.zeros_like(layer.instruction))
    selection, _ = run(TrimTokenator(keep=0.25, candidates=0.3), layer, 3)
    assert kept(selection, 0) == slow_set(layer.visual[0], np.zeros(12), 12, 3)


def test_by_hand():
    """Text at the origin: the longest row is no candidate.

    A copy of the second choice, the opposite of the first, is as unlike both as a new direction.
    """
    a, b, c = np.eye(3)
    layer = random_layer((6,), questions=1, width=3)
    rows = jnp.asarray([[a, a, a, 9 * c, b, -a]], jnp.float32)
    layer = layer._replace(visual=rows, token=jnp.zeros_like(layer.token))
    for keep, want in ((2 / 6, [0, 5]), (3 / 6, [0, 1, 5]), (4 / 6, [0, 1, 4, 5])):
        selection, _ = run(TrimTokenator(keep=keep, candidates=5 / 6), layer, 6)
        assert kept(selection, 0) == want


def test_highest_marks_ties_from_the_front():
    score = jnp.asarray([[[1.0, 2.0, 2.0, 2.0, 9.0]]])
    valid = jnp.asarray([[[True] * 4 + [False]]])
    marks = [highest(score, valid, jnp.asarray([[n]]))[0, 0].tolist() for n in (0, 2, 4, 9)]
    assert marks[0] == [False] * 5
    assert marks[1] == [False, True, True, False, False]
    assert marks[2] == marks[3] == [True] * 4 + [False]


def test_vmap_and_gradient():
    layer, cut = random_layer(), TrimTokenator(keep=0.4)
    whole, _ = run(cut, layer, 5)
    single = lambda one: cut.select(jax.tree.map(lambda a: a[None], one), 5, RUN)[0]  # noqa: E731
    mapped = compiled(jax.vmap(single))(layer)
    np.testing.assert_array_equal(mapped.index[:, 0], whole.index)

    def loss(rows):
        changed = layer._replace(visual=rows[0], token=rows[1])
        return cut.select(changed, 5, RUN)[1].maps["trimtokenator/score"].sum()

    gradient = compiled(jax.grad(loss))((layer.visual, layer.token))
    assert all((g == 0).all() for g in gradient)


def test_method_and_its_operations():
    method = trimtokenator(keep=0.25, layer=2, candidates=0.5, sharing="pooled")
    cut = TrimTokenator(layer=2, keep=0.25, candidates=0.5, sharing="pooled")
    assert method.cuts == (cut,)
    assert method.stage_slots(dims()) == (64, 16)
    layer = random_layer((64,), questions=2, width=512)
    program = compiled(lambda layer: TrimTokenator().select(layer, 16, RUN)).lower(layer).compile()
    planned = TrimTokenator().flops(dims(width=512), 64, 5, 8, 4, questions=2)
    assert program.cost_analysis()["flops"] == pytest.approx(planned, rel=0.1)
    assert planned - cut.flops(dims(width=512), 64, 5, 8, 4, questions=2) == 2 * 64**2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.01}, "keep=1.01"),
        ({"candidates": 0.2}, "candidates=0.2 .* keep=0.25 .* keep <= candidates"),
        ({"candidates": 1.2}, "candidates=1.2"),
        ({"layer": 6}, "layer 6"),
    ],
)
def test_errors_name_the_number(change, named):
    with pytest.raises(ValueError, match=named):
        trimtokenator(**change).check(dims())


# -------------------------------------------------------------------- all three cuts


@pytest.mark.parametrize("kind", [DivPrune, CDPruner, TrimTokenator])
def test_padding_may_hold_anything(kind):
    layer, cut = random_layer((12, 7), questions=1), kind(keep=0.4)
    broken = jnp.where(layer.visual_valid[..., None], layer.visual, jnp.nan)
    want, aux = run(cut, layer, 5)
    got, other = run(cut, layer._replace(visual=broken), 5)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(np.isfinite(a).all() for a in (*aux.maps.values(), *other.maps.values()))


CUTS = (TrimTokenator(keep=0.6), CDPruner(layer=1, keep=0.3), DivPrune(layer=2, keep=0.1))
THREE = Method("three", Full(), CUTS)


def test_a_batch_of_questions_equals_single_runs():
    """Embeddings at layer 0, hidden rows later; one image has padding, one question is short."""
    model, inputs = random_model(SINGLE, THREE), random_inputs(SINGLE, questions=2, text=5)
    seen = np.ones(inputs.patch_valid.shape, bool)
    seen[0, 0, 40:] = False
    short = jnp.arange(5) < jnp.asarray([[5, 4], [3, 5]])[..., None]
    inputs = inputs._replace(patch_valid=jnp.asarray(seen), token_valid=short)
    got = logits(model, inputs)
    assert got.shape[:2] == (4, 5)
    every = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), inputs)
    asked = {"tokens", "token_valid", "instruction", "label"}
    single = {name: getattr(inputs, name).reshape(4, 1, 5) for name in asked}
    want = logits(model, every._replace(**single))
    mark = short.reshape(4, 5)
    np.testing.assert_allclose(got[mark], want[mark], rtol=1e-4, atol=1e-4)


def test_slots_and_maps_in_a_model():
    model, inputs = random_model(SINGLE, THREE), random_inputs(SINGLE, questions=1, text=5)
    out = jax.eval_shape(lambda model, inputs: model(inputs, RUN, keep=1), model, inputs)
    slots = THREE.stage_slots(dims_of(SINGLE, 1))
    assert slots == (39, 20, 7)
    assert [cache.size - 2 - 5 - 1 for cache in out.caches] == list(slots)
    shapes = {name: a.shape for name, a in out.aux.maps.items()}
    assert shapes["trimtokenator/score@0"] == (2, 1, 64)
    assert shapes["cdpruner/score@1"] == (2, 1, 39)
    assert shapes["divprune/index@2"] == (2, 1, 7)
