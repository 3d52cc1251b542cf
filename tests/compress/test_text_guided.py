"""The text-guided sampler against the whole attention map, and its programs' array lengths."""

import re
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.method import Context, LayerView
from focus_jax.compress.text_guided import TextGuided, attention_score
from tests.compress.views import RUN, dims
from tests.models.tiny_models import SINGLE, random_inputs, random_model
from tests.quick import compiled

B, Q, T, P, V, G, H, K = 2, 3, 5, 2, 12, 2, 4, 6


@pytest.fixture
def layer() -> LayerView:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 1.5, jnp.float32)  # noqa: E731
    valid = np.ones((B, Q, T), bool)
    valid[0, 1, 3:] = False
    valid[1, 2] = False  # a question slot that nobody used
    asks = rng.random((B, Q, T)) < 0.5
    asks[:, :, 1] = True
    last = np.zeros((B, Q, T), bool)
    for b, q in np.ndindex(B, Q):
        if valid[b, q].any():
            last[b, q, np.flatnonzero(valid[b, q])[-1]] = True
    seen = np.ones((B, V), bool)
    seen[1, 7:] = False
    return LayerView(
        q=normal(B, Q, T, H, K), k=normal(B, Q, T, G, K), k_prefix=normal(B, P, G, K),
        k_visual=normal(B, V, G, K), visual=normal(B, V, 3), token=normal(B, Q, T, 3),
        token_valid=jnp.asarray(valid),
        prefix_valid=jnp.asarray([[True, True], [False, True]]), visual_valid=jnp.asarray(seen),
        after=jnp.asarray(np.sort(rng.integers(0, 3, (B, V)))),  # some stand behind some text
        instruction=jnp.asarray(asks & valid), prompt=jnp.asarray(valid), last=jnp.asarray(last),
        starts=jnp.asarray(valid & (rng.random((B, Q, T)) < 0.5)),
        raters=jnp.asarray(valid & (rng.random((B, Q, T)) < 0.5)),
        entered=jnp.asarray(seen.sum(-1)),
    )  # fmt: skip


def slow_score(layer: LayerView, queries: str, heads: str, normalise: str) -> np.ndarray:
    """Column means (or peaks) of the full softmax map over prefix, visual tokens, one question."""
    layer = LayerView(*(np.asarray(a, np.float64 if a.dtype == float else None) for a in layer))
    out = np.zeros((B, Q, V))
    for b, q in np.ndindex(B, Q):
        keys = np.concatenate([layer.k_prefix[b], layer.k_visual[b], layer.k[b, q]])
        valid = np.concatenate(
            [layer.prefix_valid[b], layer.visual_valid[b], layer.token_valid[b, q]]
        )
        if normalise == "visual":
            valid[:P] = valid[P + V :] = False
        asking = (layer.instruction if queries == "peak" else getattr(layer, queries))[b, q]
        rows = []
        for t in np.flatnonzero(asking):
            allowed = valid & (np.arange(P + V + T) <= P + V + t)
            allowed[P : P + V] &= layer.after[b] <= t
            weights = np.zeros((H, P + V + T))
            for h in range(H):
                logits = keys[allowed, h // (H // G)] @ layer.q[b, q, t, h] / np.sqrt(K)
                weights[h, allowed] = np.exp(logits) / np.exp(logits).sum()
            rows.append(weights.mean(0) if heads == "mean" else weights.max(0))
        if rows:
            reduce = np.max if queries == "peak" else np.mean
            out[b, q] = reduce(rows, axis=0)[P : P + V]
    return out


@pytest.mark.parametrize(
    ("queries", "heads", "normalise"),
    [
        *product(["last", "instruction", "peak"], ["mean", "max"], ["all", "visual"]),
        ("starts", "mean", "all"),
        ("raters", "mean", "all"),
    ],
)
def test_score_is_the_attention_maps_column_mean(layer, queries, heads, normalise):
    got = compiled(attention_score, static_argnums=(1, 2, 3))(layer, queries, heads, normalise)
    want = slow_score(layer, queries, heads, normalise)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert (got[1, :, 7:] == 0).all()
    assert (got[1, 2] == 0).all()


def select(cut: TextGuided, layer: LayerView, slots: int, train: bool = False, seed: int = 0):
    run = compiled(lambda layer, key: cut.select(layer, slots, Context(key, train)))
    return run(layer, jax.random.key(seed))


def highest(score, valid, count: int) -> list[int]:
    order = sorted(np.flatnonzero(valid), key=lambda i: (-score[i], i))
    return sorted(order[:count])


def kept(selection, b: int, q: int = 0) -> list[int]:
    return np.asarray(selection.index[b, q])[np.asarray(selection.valid[b, q])].tolist()


def test_each_question_keeps_its_own(layer):
    cut = TextGuided(keep=0.4)
    selection, aux = select(cut, layer, cut.slots(V))
    assert selection.index.shape == (B, Q, 5)
    score = slow_score(layer, "instruction", "mean", "all")
    for b, q in np.ndindex(B, Q):
        count = int(np.ceil(0.4 * int(layer.entered[b])))  # of its own valid tokens
        assert kept(selection, b, q) == highest(score[b, q], layer.visual_valid[b], count)
    assert aux.metrics["text/kept"] == pytest.approx(4.0)  # 5 and 3
    assert len({tuple(kept(selection, 0, q)) for q in range(Q)}) > 1


def test_pooled_questions_keep_one_set(layer):
    cut = TextGuided(keep=0.4, sharing="pooled", queries="last")
    assert cut.shared
    selection, _ = select(cut, layer, cut.slots(V))
    assert selection.index.shape == (B, 1, 5)
    score = slow_score(layer, "last", "mean", "all").mean(1)
    for b in range(B):
        count = int(np.ceil(0.4 * int(layer.entered[b])))
        assert kept(selection, b) == highest(score[b], layer.visual_valid[b], count)


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.99])
def test_top_p_is_the_smallest_set_within_the_share(layer, mass):
    cut = TextGuided(keep=0.6, mode="top_p", mass=mass)
    score = slow_score(layer, "instruction", "mean", "all")
    for slots in (cut.slots(V), V):  # more slots, as in a larger bucket, change nothing
        selection, aux = select(cut, layer, slots)
        over = []
        for b, q in np.ndindex(B, Q):
            share = np.sort(score[b, q])[::-1].cumsum()
            needed = 1
            if share[-1] > 0:
                needed = int(np.searchsorted(share, mass * share[-1])) + 1
            room = int(np.ceil(0.6 * int(layer.entered[b])))
            over.append(max(needed - room, 0))
            want = highest(score[b, q], layer.visual_valid[b], min(needed, room))
            assert kept(selection, b, q) == want
        assert aux.metrics["text/over_budget"] == pytest.approx(np.mean(over))


def test_sampled_share_changes_the_mask_only(layer):
    cut = TextGuided(keep=0.25, train_keep=(0.1, 0.8))
    assert (cut.slots(V), cut.slots(V, train=True)) == (3, 10)
    counts = set()
    for seed in range(8):
        selection, _ = select(cut, layer, 10, train=True, seed=seed)
        assert selection.index.shape == (B, Q, 10)
        counts.add(len(kept(selection, 0)))
        first, _ = select(
            replace(cut, train_keep=None, keep=len(kept(selection, 0)) / V), layer, 10
        )
        assert kept(selection, 0) == kept(first, 0)
    assert len(counts) > 2
    assert min(counts) >= 2
    assert max(counts) <= 10
    selection, _ = select(cut, layer, 3)
    assert len(kept(selection, 0)) == 3  # no sampling outside training


def test_no_gradient_flows_through_the_choice(layer):
    cut = TextGuided(keep=0.4)

    def loss(q):
        _, aux = cut.select(layer._replace(q=q), 5, RUN)
        return aux.maps["text/score"].sum()

    assert (compiled(jax.grad(loss))(layer.q) == 0).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.01}, "keep=1.01"),
        ({"keep": -0.5}, "keep=-0.5"),
        ({"train_keep": (0.0, 0.5)}, r"train_keep=\(0.0, 0.5\)"),
        ({"train_keep": (0.6, 0.5)}, r"train_keep=\(0.6, 0.5\)"),
        ({"train_keep": (0.6, 1.5)}, r"train_keep=\(0.6, 1.5\)"),
        ({"mass": 0.0}, "mass=0.0"),
        ({"layer": 6}, r"layer 6 .* use 0\.\.5"),
        ({"layer": -1}, "layer -1"),
    ],
)
def test_errors_name_the_number(change, named):
    with pytest.raises(ValueError, match=named):
        focusllava(text=TextGuided(**change)).check(dims())


# ------------------------------------------------------------- the programs' own arrays

DEEP = replace(SINGLE, decoder=replace(SINGLE.decoder, layers=5))  # 2 layers, then 3
BATCH, TEXT = 7, 9
BEFORE, AFTER = 2 + 64 + TEXT, 2 + 16 + TEXT  # no width of the model is 27 or 75


def shapes(program) -> set[tuple[int, ...]]:
    found = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", program.as_text())
    return {tuple(map(int, dims_.split(","))) for dims_ in found}


def stacked_rows(found: set, layers: int) -> set[int]:
    """Lengths in arrays that hold something for each layer of a stage and each sample."""
    samples = (BATCH, BATCH * DEEP.decoder.kv_heads)  # caches: samples and heads on one axis
    found = {shape for shape in found if shape[:1] == (layers,) and shape[1:2] != ()}
    return {n for shape in found if shape[1] in samples for n in shape[2:]}


@pytest.fixture(scope="module")
def model_and_inputs():
    method = focusllava(text=TextGuided(layer=2, keep=0.25))
    return random_model(DEEP, method), random_inputs(DEEP, batch=BATCH, text=TEXT)


def test_later_stages_caches_are_shorter(model_and_inputs):
    prefill = compiled(lambda model, inputs: model(inputs, RUN, keep=1).caches)
    found = shapes(prefill.lower(*model_and_inputs).compile())
    assert BEFORE in stacked_rows(found, 2)
    assert AFTER in stacked_rows(found, 3)
    assert not stacked_rows(found, 3) & set(range(AFTER + 2, BEFORE + 2))


def test_later_stages_keep_less_for_the_backward_pass(model_and_inputs):
    def loss(model, inputs):
        out = model(inputs, Context(jax.random.key(0), train=True))
        return (model.decoder.logits(out.hidden) ** 2).mean()

    found = shapes(compiled(jax.grad(loss, allow_int=True)).lower(*model_and_inputs).compile())
    assert BEFORE in stacked_rows(found, 2)
    assert AFTER in stacked_rows(found, 3)
    assert not stacked_rows(found, 3) & set(range(AFTER + 1, BEFORE + 1)) - {DEEP.decoder.mlp_width}
