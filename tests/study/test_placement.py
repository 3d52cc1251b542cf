"""A curve is what the method value with that cut answers; the controls keep what they say."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.method import Context, Method
from focus_jax.compress.text_guided import TextGuided
from focus_jax.objectives import inputs_of
from focus_jax.study.answers import answer, device_part, image_keys
from focus_jax.study.placement import RANKINGS, Ranking, answer_cut, evidence_at, place

KEEPS = (0.5, 0.125)
KEY = jax.random.key(3)


def method_of(run, layer: int, keep: float, **fields) -> Method:
    cut = TextGuided(layer=layer, keep=keep, **fields)
    return Method("cut", run.method("full").vision, (cut,))


def hand_made(batches, seed: int = 0):
    """Batches in which every question is about three random cells."""
    rng = np.random.default_rng(seed)
    out = []
    for batch in batches:
        b, q, _ = batch["tokens"].shape
        cells = np.argsort(rng.random((b, q, batch["cell_filled"].shape[1])), axis=-1)
        out.append({**batch, "evidence": jnp.asarray(cells < 3)})
    return out


@pytest.fixture(scope="module")
def curves(fitted, batches):
    model = fitted.model(fitted.method("full"))
    found = place(model, hand_made(batches), (0, 1), KEEPS, KEY)
    return {(c.layer, c.keep, c.rank, c.queries): c.correct for c in found}


def test_a_curve_for_each_layer_share_and_ranking(curves):
    wanted = [(at, k, r.rank, r.queries) for at in (0, 1) for k in KEEPS for r in RANKINGS]
    assert list(curves) == wanted
    assert {c.shape for c in curves.values()} == {(5, 4)}
    # Which tokens stay changes answers, so that curves can be told apart.
    assert len({c.tobytes() for c in curves.values()}) > len(wanted) // 2


@pytest.mark.parametrize(
    ("layer", "keep", "rank", "queries"),
    [
        (1, 0.5, "top", "instruction"),
        (1, 0.125, "least", "last"),
        (0, 0.125, "top", "peak"),
        (1, 0.5, "random", ""),
    ],
)
def test_a_curve_is_what_the_method_answers(fitted, batches, curves, layer, keep, rank, queries):
    fields = {"queries": queries} if queries else {}
    fields["rank"] = {"top": "most"}.get(rank, rank)
    model = fitted.model(method_of(fitted, layer, keep, **fields))
    np.testing.assert_array_equal(
        curves[layer, keep, rank, queries], answer(model, batches, KEY).correct
    )


def test_an_oracle_that_knows_what_attention_ranks_highest_answers_as_it_does(
    fitted, batches, curves
):
    model = fitted.model(method_of(fitted, 1, 0.5))
    score_of = jax.jit(lambda m, b, k: m(inputs_of(b), Context(k)).aux.maps["text/score@1"])
    told = []
    for batch in batches:
        score = np.asarray(score_of(model, device_part(batch), image_keys(KEY, batch)))
        kept = np.argsort(-score, axis=-1, kind="stable")[..., :8]
        evidence = (kept[..., None] == np.arange(16)).any(-2)
        told.append({**batch, "evidence": jnp.asarray(evidence)})
    full = fitted.model(fitted.method("full"))
    [_, curve] = place(full, told, (1,), (0.5,), KEY, (Ranking("random"), Ranking("oracle")))
    np.testing.assert_array_equal(curve.correct, curves[1, 0.5, "top", "instruction"])


def test_evidence_lies_at_its_cells_whatever_the_order_of_the_tokens():
    order = np.random.default_rng(0).permutation(16)
    centre = np.stack(np.divmod(order, 4), axis=-1).astype(np.float32)
    newline = np.zeros((1, 17), bool)
    newline[0, 16] = True
    s = SimpleNamespace(
        centre=jnp.asarray(np.concatenate([centre, [[0, 0]]]))[None],
        newline=jnp.asarray(newline),
        view=jnp.zeros((1, 17), jnp.int32),
    )
    evidence = np.random.default_rng(1).random((1, 3, 16)) < 0.5
    evidence[..., 0] = True  # the cell that the newline claims to be at
    found = np.asarray(evidence_at(s, jnp.asarray(evidence), 16))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found[..., :16], evidence[..., order])
    assert not found[..., 16].any()


def test_all_tokens_kept_is_full_and_other_weights_need_no_other_program(fitted, batches):
    kinds = (Ranking("least", "last"), Ranking("random"))
    full = fitted.model(fitted.method("full"))
    found = place(full, batches, (1,), (1.0,), KEY, kinds)
    for curve in found:
        np.testing.assert_array_equal(curve.correct, answer(full, batches).correct)
    count = answer_cut._cache_size()
    tree = {name: leaf + 0 for name, leaf in fitted.tree.items()}
    tree["decoder.head.kernel"] = -tree["decoder.head.kernel"]
    other = replace(fitted, tree=tree)
    again = place(other.model(fitted.method("full")), batches, (1,), (1.0,), KEY, kinds)
    assert answer_cut._cache_size() == count
    assert not any(curve.correct.any() for curve in again)


def test_what_cannot_be_placed(fitted, batches):
    full = fitted.model(fitted.method("full"))
    bare = [{k: a for k, a in b.items() if k != "evidence"} for b in batches]
    with pytest.raises(ValueError, match=r"the oracle needs `evidence`"):
        place(full, bare, (1,), (0.5,))
    with pytest.raises(ValueError, match="has the method 'text_only'"):
        place(fitted.model(fitted.method("text_only")), batches, (1,), (0.5,))
    one = (Ranking("random"),)
    with pytest.raises(ValueError, match="layer 2 is outside the decoder's 2 layers"):
        place(full, batches, (2,), (0.5,), rankings=one)
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        place(full, batches, (1,), (1.5,), rankings=one)
    for rank, queries in (("top", ""), ("oracle", "last")):
        with pytest.raises(ValueError, match="top and least read attention"):
            Ranking(rank, queries)
