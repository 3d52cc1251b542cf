"""The study's controls: gates and ranks that do not look, or look at labels."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.method import Context
from focus_jax.compress.region_controls import crowding, spread_order
from focus_jax.compress.text_guided import TextGuided, attention_score
from focus_jax.compress.vision_guided import CONTROLS, VisionGuided
from focus_jax.experiment import CompressConfig
from focus_jax.methods import parse_method
from focus_jax.objectives import inputs_of
from tests.compress.layer_views import kept, random_layer
from tests.compress.views import RUN, dims, identity, random_views
from tests.models.tiny_models import SINGLE, random_inputs, random_model
from tests.quick import compiled

WIDE = dims(side=16)  # 4 x 4 regions
STAGE = VisionGuided(budget=112, gate="uniform")
KEY = jax.random.key(0)


@partial(compiled, static_argnames=("stage", "d"))
def costs(stage, views, key=KEY, content=None, d=WIDE):
    """Tokens of each region [B M R] and the tokens of each tile."""
    groups, aux = stage.apply(views, d, None, identity, Context(key, content=content))
    return aux.maps["vision/tokens_per_region"], groups[-1].valid.sum(-1)


# ------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("side", [4, 8])
def test_a_spread_orders_beginnings_lie_apart(side):
    order = spread_order(side, side)
    assert sorted(order.tolist()) == list(range(side**2))
    row, col = np.divmod(order, side)
    for size in (side // 2, 2):  # the quarters, and all blocks of 2 x 2
        blocks = row // size * side + col // size
        for k in range(1, side**2 + 1):
            found = np.unique(blocks[:k], return_counts=True)[1]
            least = 0 if len(found) < (side // size) ** 2 else found.min()
            assert found.max() - least <= 1


def test_a_spread_order_of_any_grid_holds_each_cell_once():
    for rows, cols in ((1, 1), (1, 5), (3, 2), (6, 6)):
        assert sorted(spread_order(rows, cols).tolist()) == list(range(rows * cols))


@pytest.mark.parametrize("budget", [25, 64, 112, 255])
def test_uniform_keeps_regions_within_one_step(budget):
    stage = replace(STAGE, budget=budget)
    cost, tokens = costs(stage, random_views(WIDE))
    cost = np.asarray(cost)
    assert (cost == cost[0, 0]).all()  # whatever the image
    first = cost[0, 0]
    low, high = first.min(), first.max()
    assert (low, high) in ((1, 4), (4, 4), (4, 16))
    # As many as fit have the higher scale: those that the spread order begins with.
    many = (budget - 16 * low) // (high - low) if high > low else 16
    assert set(np.flatnonzero(first == high)) == set(spread_order(4, 4)[:many].tolist())
    assert tokens.tolist() == [[first.sum()]] * 2


def test_random_refines_as_many_regions_in_other_places():
    views = random_views(WIDE, batch=64)
    cost = np.asarray(costs(replace(STAGE, gate="random"), views)[0])[:, 0]
    # 16 tokens, 6 times 15 more, and room for two steps of 3.
    np.testing.assert_array_equal(np.sort(cost, -1), [[1] * 8 + [4] * 2 + [16] * 6] * 64)
    finest = (cost == 16).mean(0)
    assert finest == pytest.approx(np.full(16, 6 / 16), abs=0.25)  # four deviations
    other = costs(replace(STAGE, gate="random"), views, jax.random.key(1))[0]
    assert (np.asarray(other)[:, 0] != cost).any()


def test_random_draws_of_a_sample_do_not_depend_on_its_batch():
    """Two images a sample, and a key for each sample."""
    views = random_views(WIDE, batch=4)
    keys = jax.random.split(KEY, 2)
    stage = replace(STAGE, gate="random")
    both = np.asarray(costs(stage, views, keys)[0])
    turned = np.asarray(costs(stage, views, keys[::-1])[0])
    np.testing.assert_array_equal(both[[2, 3, 0, 1]], turned)
    assert len({tuple(image.ravel()) for image in both}) == 4


def slow_crowding(filled: np.ndarray) -> np.ndarray:
    """[4 3] of one 8 x 8 tile, token by token."""
    out = np.zeros((4, 3))
    for s, p in enumerate((4, 2, 1)):
        for top in range(0, 8, p):
            for left in range(0, 8, p):
                count = filled[top : top + p, left : left + p].sum()
                region = top // 4 * 2 + left // 4
                out[region, s] += max(count - 1, 0) + count * (1 - 1 / p**2)
    return out


def test_crowding_is_its_definition():
    filled = np.random.default_rng(0).random((8, 8)) < 0.4
    filled[:4, :4] = False
    by_token = [filled.reshape(2, 4 // p, p, 2, 4 // p, p).sum((2, 5)) for p in (4, 2, 1)]
    counts = [jnp.asarray(c.transpose(0, 2, 1, 3).reshape(4, -1), jnp.float32) for c in by_token]
    want = slow_crowding(filled)
    np.testing.assert_allclose(crowding(counts, (4, 2, 1)), want, rtol=1e-6)
    assert (want[0] == 0).all() and (want[:, 2] == 0).all()


def crowded(*glyphs: int) -> np.ndarray:
    """Content of an 8 x 8 tile [64] whose four regions hold so many glyphs, first cells first."""
    x = np.zeros((2, 4, 2, 4), np.float32)
    for region, count in enumerate(glyphs):
        up, across = divmod(region, 2)
        for cell in range(count):
            x[up, cell // 4, across, cell % 4] = 1
    return x.reshape(64)


def test_the_oracle_refines_what_is_crowded_and_nothing_empty():
    d, stage = dims(), replace(STAGE, gate="oracle", budget=40)
    content = jnp.asarray(np.stack([crowded(0, 9, 1, 16), crowded(2, 0, 0, 0)])[:, None])
    cost, tokens = costs(stage, random_views(d), content=content, d=d)
    # Of the first tile's room of 36, 30 go to the crowded ones and 3 to the single glyph.
    assert cost[:, 0].tolist() == [[1, 16, 4, 16], [16, 1, 1, 1]]
    assert tokens[:, 0].tolist() == [37, 19]


def test_the_oracle_does_not_count_padding():
    d, stage = dims(), replace(STAGE, gate="oracle", budget=19)  # the finest scale once
    valid = np.ones((2, 1, 8, 8), bool)
    valid[0, :, 1:, :4] = False  # of the first region one row is left, of the third none
    views = random_views(d)._replace(patch_valid=jnp.asarray(valid.reshape(2, 1, 64)))
    content = jnp.asarray(np.stack([crowded(16, 12, 16, 2), crowded(16, 12, 0, 2)])[:, None])
    cost, _ = costs(stage, views, content=content, d=d)
    assert cost[0, 0].tolist() == [1, 16, 0, 1]
    assert cost[1, 0, 0] > cost[1, 0, 1] > 0  # nothing padded: the fuller one


def test_the_oracle_leaves_a_whole_thumbnail_out():
    d = dims(3)
    stage = replace(STAGE, gate="oracle", budget=19, thumbnail="full")
    tiles = [crowded(16, 0, 0, 0), crowded(0, 4, 0, 0), crowded(0, 0, 4, 0)]
    content = jnp.asarray(np.stack([tiles, tiles[::-1]]))
    cost, _ = costs(stage, random_views(d), content=content, d=d)
    assert np.argmax(cost, -1).tolist() == [[1, 2], [1, 0]]


def test_the_oracle_says_what_it_needs():
    with pytest.raises(ValueError, match=r"gate=oracle.*no content.*glyphs"):
        costs(replace(STAGE, gate="oracle"), random_views(WIDE))


@pytest.mark.parametrize("gate", CONTROLS)
def test_controls_learn_nothing_cost_nothing_and_hold_the_budget(gate):
    d = dims(3)
    stage = replace(STAGE, gate=gate, budget=28, min_gain=1e9)
    assert stage.init(d, nnx.Rngs(0)) is None
    assert replace(stage, pooling="saliency").init(d, nnx.Rngs(0)) is not None
    assert stage.flops(d) == 0
    views = random_views(d, batch=4, padded=0.8)
    views = views._replace(patch_valid=views.patch_valid.at[1, 2].set(False))
    content = jnp.ones((4, 3, 64))
    cost, tokens = costs(stage, views, content=content, d=d)
    assert cost.sum(-1).max() <= 28
    assert (tokens <= cost.sum(-1)).all()
    assert cost[1, 2].tolist() == [0] * 4
    assert len(np.unique(cost)) > 2  # `min_gain` stops nothing


# ----------------------------------------------------------------------------- questions


def select(cut, layer, slots, key=KEY, train=False):
    return compiled(lambda layer, key: cut.select(layer, slots, Context(key, train)))(layer, key)


def counts(selection) -> list[int]:
    return np.asarray(selection.valid.sum(-1)).ravel().tolist()


def test_least_keeps_the_lowest_scores():
    layer = random_layer()
    cut = TextGuided(keep=0.4, rank="least", queries="peak")
    selection, aux = select(cut, layer, cut.slots(12))
    score = np.asarray(attention_score(layer, "peak"))
    np.testing.assert_allclose(aux.maps["text/score"], score, rtol=1e-5)
    for b, valid in enumerate((12, 7, 1)):
        for q in range(2):
            lowest = sorted(range(valid), key=lambda i: (score[b, q, i], i))
            assert kept(selection, b, q) == sorted(lowest[: int(np.ceil(0.4 * valid))])


@pytest.mark.parametrize("sharing", ["per_question", "pooled"])
def test_least_keeps_as_many_as_the_mass_needs(sharing):
    layer = random_layer()
    most = TextGuided(keep=0.8, mode="top_p", mass=0.5, sharing=sharing)
    high, _ = select(most, layer, 12)
    low, _ = select(replace(most, rank="least"), layer, 12)
    assert counts(high) == counts(low)
    assert kept(high, 0) != kept(low, 0)


def test_random_draws_for_each_question_step_and_sample():
    layer = random_layer(valid=(40, 25))
    cut = TextGuided(keep=0.3, rank="random")
    slots = cut.slots(40)
    selection, _ = select(cut, layer, slots)
    assert counts(selection) == [12, 12, 8, 8]
    assert kept(selection, 0, 0) != kept(selection, 0, 1)
    assert max(kept(selection, 1)) < 25
    steps = [select(cut, layer, slots, jax.random.key(i), train=True)[0] for i in range(2)]
    assert kept(steps[0], 0) != kept(steps[1], 0)
    # Blind: other rows, the same draws.
    blind, _ = select(cut, random_layer(valid=(40, 25), seed=1), slots)
    np.testing.assert_array_equal(selection.index, blind.index)
    keys = jax.random.split(KEY, 2)
    both, _ = select(cut, random_layer(valid=(40, 40)), slots, keys)
    turned, _ = select(cut, random_layer(valid=(40, 40)), slots, keys[::-1])
    np.testing.assert_array_equal(both.index[::-1], turned.index)


def test_random_shared_is_one_draw_and_costs_nothing():
    layer = random_layer()
    cut = TextGuided(keep=0.5, rank="random", sharing="pooled")
    assert select(cut, layer, 6)[0].index.shape == (3, 1, 6)
    sizes = {"visual": 64, "text": 8, "width": 16, "kv_width": 16}
    assert cut.flops(dims(), **sizes) == 0
    assert replace(cut, rank="least").flops(dims(), **sizes) > 0


def test_random_has_no_mass():
    with pytest.raises(ValueError, match=r"rank=random has no scores.*mode=top_k"):
        focusllava(text=TextGuided(rank="random", mode="top_p")).check(dims())


# ------------------------------------------------------------------------- the whole model


def test_a_command_line_names_them():
    config = CompressConfig()
    method = parse_method("text_only:text.rank=random,text.queries=peak,text.layer=1", config)
    assert method == focusllava(None, TextGuided(layer=1, rank="random", queries="peak"))
    for rank in ("most", "least"):
        assert parse_method(f"text_only:text.rank={rank}", config).cuts[0].rank == rank
    for gate in CONTROLS:
        assert parse_method(f"vision_only:vision.gate={gate}", config).vision.gate == gate


def test_batches_tell_what_patches_hold():
    inputs = random_inputs(SINGLE)
    names = {"origin": "tile_origin", "instruction": "query_mask", "label": "label_mask"}
    batch = {names.get(k, k): v for k, v in inputs._asdict().items() if v is not None}
    assert inputs_of(batch).content is None
    filled = jnp.asarray(np.random.default_rng(0).random((2, 64)) < 0.5)
    content = inputs_of(batch | {"cell_filled": filled}).content
    assert content.dtype == jnp.float32
    np.testing.assert_array_equal(content, filled[:, None])


def test_the_model_hands_content_to_each_image():
    """Two prompts of two images."""
    model = random_model(SINGLE, focusllava(VisionGuided(budget=19, gate="oracle")))
    busy = [crowded(0, 5, 0, 0), crowded(0, 0, 5, 0), crowded(5, 0, 0, 0), crowded(0, 0, 0, 5)]
    inputs = random_inputs(SINGLE, tiles=2)._replace(
        image_at=jnp.asarray([[0, 1], [0, 2]], jnp.int32),
        content=jnp.asarray(np.stack(busy).reshape(2, 2, 64)),
    )
    aux = compiled(lambda model, inputs: model.see(inputs, RUN)[1])(model, inputs)
    cost = aux.maps["vision/tokens_per_region"][:, 0]
    assert np.argmax(cost, -1).tolist() == [1, 2, 0, 3]
