"""Losses against sums in NumPy, and how scenes are told in words."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax import objectives
from focus_jax.compress.baselines import full
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.method import Aux, Context
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.models.params import abstract
from focus_jax.objectives import WORD_SLOTS, Loss, answer_loss, route, words
from focus_jax.step import abstract_batch
from tests.micro import get_config

RNG = np.random.default_rng(0)


def model_of(words):
    """A model whose normed rows are its scores."""
    decoder = SimpleNamespace(norm=lambda hidden: hidden, head_kernel=lambda: jnp.eye(words))
    return SimpleNamespace(decoder=decoder, layout=None)


def test_answer_loss_is_the_mean_over_supervised_tokens():
    logits = RNG.normal(size=(3, 5, 7)).astype(np.float32)
    tokens = RNG.integers(0, 7, (3, 5))
    label = np.zeros((3, 5), bool)
    label[0, 2:4] = label[1, 4] = True
    # The first row is right in both of its tokens; the second is wrong; the third asks nothing.
    for place in (2, 3):
        logits[0, place - 1, tokens[0, place]] = 9
    logits[1, 3, tokens[1, 4]] = -9
    arrays = (jnp.asarray(a) for a in (logits, tokens, label))
    loss = answer_loss(model_of(7), *arrays)
    expected = []
    for row, place in ((0, 2), (0, 3), (1, 4)):
        z = logits[row, place - 1].astype(np.float64)
        expected.append(np.log(np.exp(z).sum()) - z[tokens[row, place]])
    assert float(loss.value) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(loss.metrics["accuracy"]) == 0.5


def test_nothing_to_learn_costs_nothing():
    none = jnp.zeros((2, 4), bool)
    loss = answer_loss(model_of(5), jnp.ones((2, 4, 5)), jnp.zeros((2, 4), int), none)
    assert float(loss.value) == 0 and float(loss.metrics["accuracy"]) == 0


@pytest.fixture
def told(monkeypatch):
    """(visual tokens, places, cell_words, cell_filled, embeddings) of scenes told in words."""
    table = RNG.normal(size=(50, 6)).astype(np.float32)
    seen = {}

    def caught(vlm, batch, ctx, visual, places):
        seen.update(visual=visual, places=np.asarray(places))
        return Loss(jnp.zeros(()), {})

    monkeypatch.setattr(objectives, "answer", caught)
    model = SimpleNamespace(decoder=SimpleNamespace(embedded=lambda ids: jnp.asarray(table)[ids]))
    # No two cells have the same words, so a token tells which cell it is.
    cell_words = np.stack([RNG.permutation(50)[:36] for _ in range(64)])[..., None]
    filled = np.zeros((64, 36), bool)
    for row, count in enumerate(RNG.integers(0, WORD_SLOTS + 1, 64)):
        filled[row, RNG.permutation(36)[:count]] = True
    batch = {"cell_words": jnp.asarray(cell_words), "cell_filled": jnp.asarray(filled)}
    words(model, batch, Context(jax.random.key(3), train=True))
    valid = np.asarray(seen["visual"].valid)
    features = np.asarray(seen["visual"].features)
    vectors = table[cell_words].sum(-2)
    cells = [
        [int(np.flatnonzero((vectors[b] == f).all(-1))[0]) for f in features[b][valid[b]]]
        for b in range(64)
    ]
    return SimpleNamespace(cells=cells, places=seen["places"], valid=valid, filled=filled)


def test_all_filled_cells_are_told_in_raster_order(told):
    extra = []
    for b, cells in enumerate(told.cells):
        assert cells == sorted(set(cells))
        assert set(np.flatnonzero(told.filled[b])) <= set(cells)
        extra.append(len(cells) - told.filled[b].sum())
        assert len(cells) <= WORD_SLOTS
        np.testing.assert_array_equal(told.valid[b], np.arange(WORD_SLOTS) < len(cells))
    assert min(extra) == 0 and max(extra) > 5


def test_places_lie_between_closed_up_and_the_raster(told):
    closed = spread = 0
    for b, cells in enumerate(told.cells):
        places = told.places[b][: len(cells)]
        assert (np.diff(places) > 0).all()
        assert (places >= np.arange(len(cells))).all() and (places <= np.array(cells)).all()
        if len(cells) and cells[-1] > len(cells):
            share = (places[-1] - len(cells) + 1) / (cells[-1] - len(cells) + 1)
            closed, spread = closed + (share < 0.3), spread + (share > 0.7)
    assert closed > 3 and spread > 3


def test_routing_minimises_the_losses_of_the_vision_stage_alone(monkeypatch):
    aux = Aux({"router": jnp.asarray(0.5), "balance": jnp.asarray(0.25)}, {"seen": 3}, {})
    monkeypatch.setattr(objectives, "inputs_of", lambda batch: batch)
    model = SimpleNamespace(see=lambda inputs, ctx: (None, aux))  # no decoder to run
    loss = route(model, {}, Context(jax.random.key(0), train=True))
    assert float(loss.value) == 0.75
    assert loss.metrics == {"seen": 3, "loss_router": 0.5, "loss_balance": 0.25}


@pytest.mark.parametrize(
    "method", [full(), focusllava(VisionGuided(region=2, scales=(2, 1), budget=8, gate="measured"))]
)
def test_a_method_without_a_router_is_not_taught(method):
    config = get_config()
    batch = abstract_batch(config, config.train.stages[0], 1)
    learn = lambda vlm, batch: route(vlm, batch, Context(jax.random.key(0), train=True))  # noqa: E731
    said = f"'{method.name}' has no router to teach; leave the stage out"
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(learn, abstract(config.model, method), batch)


def test_what_follows_an_image_is_told_from_its_last_row():
    hidden = np.arange(2 * 5, dtype=np.float32).reshape(2, 5, 1)
    visual = 100 + np.arange(2 * 6, dtype=np.float32).reshape(2, 6, 1)
    # The first sample: images before tokens 1 and 3, of two slots each. The second: two images
    # before token 2, of which slots 1 and 3 are not valid, and none in front of token 0.
    after = np.array([[1, 1, 3, 3, 5, 5], [2, 2, 2, 2, 0, 0]])
    valid = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1]], bool)
    streams = SimpleNamespace(
        visual=jnp.asarray(visual), visual_valid=jnp.asarray(valid), after=jnp.asarray(after)
    )
    image_at = jnp.asarray([[1, 3, 5], [2, 2, 0]])
    got = objectives.behind_images(jnp.asarray(hidden), streams, image_at)[..., 0]
    assert got.tolist() == [[101, 1, 103, 3, 4], [5, 108, 7, 8, 9]]
    none = jnp.zeros((2, 0), jnp.int32)
    assert objectives.behind_images(hidden, streams, none) is hidden
