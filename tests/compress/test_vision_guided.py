"""The vision-guided sampler against loops over regions and cells."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from focus_jax.compress.method import Context
from focus_jax.compress.stitch import stitch
from focus_jax.compress.vision_guided import (
    VisionGuided,
    candidate_places,
    distortion,
    to_regions,
)
from tests.compress.views import RUN, dims, identity, random_views
from tests.quick import compiled

GATES = ("distortion", "measured", "switch", "straight_through")
STAGE = VisionGuided(budget=28, hidden=8)
D = dims(3)


def router(stage: VisionGuided, d=D):
    """Random weights: a fresh router's biases are 0 and would tie."""
    module = stage.init(d, nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(module)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.3 * rng.standard_normal(a.shape), a.dtype) for a in leaves]
    )


def cells(x: np.ndarray, side: int) -> np.ndarray:
    """[8 8 ...] -> [4 regions, cells, side**2, ...], all row-major."""
    out = []
    for top, left in ((0, 0), (0, 4), (4, 0), (4, 4)):
        out.append(
            [
                x[top + i : top + i + side, left + j : left + j + side].reshape(
                    side * side, *x.shape[2:]
                )
                for i in range(0, 4, side)
                for j in range(0, 4, side)
            ]
        )
    return np.asarray(out)


def tile(views, b: int, m: int):
    features = np.asarray(views.features[b, m], np.float64).reshape(8, 8, -1)
    return features, np.asarray(views.patch_valid[b, m]).reshape(8, 8)


def slow_pool(x, seen, side: int, pooling: str, saliency) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [4 S C] and validity of one scale of one tile."""
    x, seen = cells(x, side), cells(seen, side)
    out = np.zeros((*x.shape[:2], x.shape[-1]))
    for r, s in np.ndindex(*x.shape[:2]):
        here = x[r, s][seen[r, s]]
        if not len(here):
            continue
        if pooling == "max":
            out[r, s] = here.max(0)
        elif pooling == "avg":
            out[r, s] = here.mean(0)
        else:
            weight = np.exp(here @ saliency[0] + saliency[1])
            out[r, s] = (weight * here).sum(0) / weight.sum()
    return out, seen.any(-1)


@pytest.mark.parametrize("pooling", ["max", "avg", "saliency"])
def test_pooling_of_each_scale(pooling):
    stage = replace(STAGE, pooling=pooling)
    module = router(stage)
    views = random_views(D, padded=0.7)
    saliency = None
    if pooling == "saliency":
        saliency = [np.asarray(a[...]) for a in (module.saliency.kernel, module.saliency.bias)]
    for side in (4, 2, 1):
        tokens, valid = stage.pool(to_regions(views, D, 4), side, module)
        for b, m in np.ndindex(2, 3):
            want, seen = slow_pool(*tile(views, b, m), side, pooling, saliency)
            np.testing.assert_array_equal(valid[b, m], seen)
            np.testing.assert_allclose(tokens[b, m], want, rtol=1e-4, atol=1e-5)


def slow_distortion(views, project, pooling: str) -> np.ndarray:
    """[B M 4 3], by the definition."""
    b, m = views.patch_valid.shape[:2]
    out = np.zeros((b, m, 4, 3))
    for i in range(b):
        squares = [
            (project(x[seen]) ** 2).sum(-1) for x, seen in (tile(views, i, j) for j in range(m))
        ]
        norm = np.concatenate(squares).mean()
        for j, s in np.ndindex(m, 3):
            side, (x, seen) = (4, 2, 1)[s], tile(views, i, j)
            pooled, _ = slow_pool(x, seen, side, pooling, None)
            fine, mask = cells(project(x), side), cells(seen, side)
            gap = ((fine - project(pooled)[:, :, None]) ** 2).sum(-1)
            out[i, j, :, s] = (gap * mask).sum((1, 2)) / 16 / norm
    return out


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_distortion_is_its_definition(pooling):
    stage = replace(STAGE, pooling=pooling)
    weight = np.random.default_rng(5).standard_normal((6, 9))
    project = lambda x: np.tanh(x @ weight)  # noqa: E731
    views = random_views(D, padded=0.4)
    views = views._replace(features=views.features.at[1].multiply(3.0))
    regions = to_regions(views, D, 4)
    pooled = [stage.pool(regions, side, None) for side in stage.scales]
    loss = distortion(regions, pooled, 4, stage.scales, lambda x: jnp.tanh(x @ weight))
    np.testing.assert_allclose(loss, slow_distortion(views, project, pooling), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(loss[..., -1], 0, atol=1e-6)  # the finest scale loses nothing


@partial(compiled, static_argnames=("stage", "d", "train", "project"))
def run(stage, views, d=D, module=None, train=False, progress=1.0, project=identity):
    return stage.apply(views, d, module, project, Context(RUN.key, train, progress))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("budget", [4, 13, 28, 64])
def test_the_budget_is_never_exceeded(gate, budget):
    stage = replace(STAGE, gate=gate, budget=budget)
    d = dims(3)
    stage.check(d)
    for padded in (0.0, 0.9):
        views = random_views(d, batch=4, seed=budget, padded=padded)
        [tokens], aux = run(stage, views, module=router(stage) if gate != "measured" else None)
        assert tokens.features.shape == (4, 3, budget, 6)
        assert tokens.valid.sum(-1).max() <= budget
        claimed = np.asarray(aux.maps["vision/tokens_per_region"])
        assert claimed.sum(-1).max() <= budget
        assert (np.asarray(tokens.valid.sum(-1)) <= claimed.sum(-1)).all()
        if not padded:
            np.testing.assert_array_equal(tokens.valid.sum(-1), claimed.sum(-1))


def test_tokens_are_pooled_patches_where_they_say():
    """Every token is the pool of the patches around its centre; together they cover the tile."""
    stage = replace(STAGE, gate="measured", pooling="avg")
    views = random_views(D)
    [tokens], _ = run(stage, views)
    for b, m in np.ndindex(2, 3):
        x, _ = tile(views, b, m)
        covered = np.zeros((8, 8), int)
        for k in np.flatnonzero(tokens.valid[b, m]):
            side = int(tokens.side[b, m, k])
            top, left = (np.asarray(tokens.centre[b, m, k]) - (side - 1) / 2).astype(int)
            patch = np.s_[top : top + side, left : left + side]
            covered[patch] += 1
            want = x[patch].reshape(-1, 6).mean(0)
            np.testing.assert_allclose(tokens.features[b, m, k], want, rtol=1e-4, atol=1e-5)
        assert (covered == 1).all()


def test_candidate_places_of_all_scales():
    centre, side = candidate_places(dims(), 4, (4, 2, 1))
    assert centre.shape == (4 * 21, 2)
    assert centre[0].tolist() == [1.5, 1.5]
    assert centre[1:5].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert centre[5 + 16].tolist() == [1.5, 5.5]  # the next region
    assert side[:6].tolist() == [4, 2, 2, 2, 2, 1]


def busy(region: int):
    """One region full of noise, the rest flat."""
    x = np.zeros((8, 8, 6), np.float32) + 1.0
    top, left = divmod(region, 2)
    noise = np.random.default_rng(0).standard_normal((4, 4, 6))
    x[top * 4 : top * 4 + 4, left * 4 : left * 4 + 4] += noise
    return x.reshape(64, 6)


def test_tokens_go_where_pooling_loses_most():
    d = dims()
    stage = replace(STAGE, gate="measured", budget=19)
    views = random_views(d, batch=4)
    views = views._replace(features=jnp.asarray(np.stack([busy(r)[None] for r in range(4)])))
    _, aux = run(stage, views, d)
    cost = np.asarray(aux.maps["vision/tokens_per_region"])[:, 0]
    np.testing.assert_array_equal(cost, np.where(np.eye(4), 16, 1))
    assert aux.metrics["vision/share_scale_4"] == pytest.approx(0.75)
    assert aux.metrics["vision/share_scale_1"] == pytest.approx(0.25)
    assert aux.metrics["vision/tokens"] == 19


def test_more_distorted_regions_get_no_fewer_tokens():
    """Scales of one noise: the louder the region, the finer its scale."""
    d = dims()
    noise = np.random.default_rng(0).standard_normal((4, 4, 6))
    x = np.zeros((8, 8, 6))
    for r, loud in enumerate((2.0, 0.5, 4.0, 1.0)):
        top, left = divmod(r, 2)
        x[top * 4 : top * 4 + 4, left * 4 : left * 4 + 4] = noise * loud
    views = random_views(d, batch=1)._replace(
        features=jnp.asarray(x.reshape(1, 1, 64, 6), jnp.float32)
    )
    for budget in (4, 9, 19, 34, 60):
        _, aux = run(replace(STAGE, gate="measured", budget=budget), views, d)
        cost = np.asarray(aux.maps["vision/tokens_per_region"])[0, 0]
        assert (np.diff(cost[[2, 0, 3, 1]]) <= 0).all()


def test_an_image_is_judged_by_itself():
    """`min_gain` means the same beside a neighbour of another loudness."""
    stage = replace(STAGE, gate="measured", min_gain=0.05, budget=64)
    views = random_views(D)
    views = views._replace(features=views.features * jnp.linspace(0, 1, 64)[:, None])
    loud = views._replace(features=views.features.at[1].multiply(100.0))
    maps = [run(stage, v)[1].maps["vision/tokens_per_region"] for v in (views, loud)]
    np.testing.assert_array_equal(*maps)
    assert len(np.unique(maps[0])) > 1


def test_regions_of_padding_cost_nothing():
    valid = np.ones((2, 3, 8, 8), bool)
    valid[0, 1, :, 4:] = False
    valid[1, 2] = False
    views = random_views(D)._replace(patch_valid=jnp.asarray(valid.reshape(2, 3, 64)))
    for gate in GATES:
        stage = replace(STAGE, gate=gate)
        [tokens], aux = run(stage, views, module=router(stage))
        cost = np.asarray(aux.maps["vision/tokens_per_region"])
        assert cost[0, 1, [1, 3]].tolist() == [0, 0]
        assert cost[1, 2].tolist() == [0] * 4
        assert not tokens.valid[1, 2].any()
        assert (tokens.centre[0, 1][tokens.valid[0, 1]][:, 1] < 4).all()


def test_thumbnail_kept_whole():
    stage = replace(STAGE, gate="measured", thumbnail="full")
    assert stage.slots(D) == 64 + 2 * 28 + 4
    assert stage.slots(dims(1)) == 28  # a single view is no thumbnail
    views = random_views(D)
    groups, _ = run(stage, views)
    tokens = stitch(groups, views, D, stage.band(D))
    assert tokens.valid.shape[1] == stage.slots(D)
    np.testing.assert_array_equal(tokens.features[:, :64], views.features[:, 0])
    assert (tokens.view[:, :64] == 0).all()
    sampled, _ = run(replace(stage, thumbnail="same"), views)
    np.testing.assert_array_equal(groups[1].features, sampled[0].features[:, 1:])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("padded", [0.0, 0.8])
def test_gradients_are_finite_and_reach_the_router(gate, padded):
    stage = replace(STAGE, gate=gate, target=0.1)
    module = router(stage)
    views = random_views(D, padded=padded)
    views = views._replace(patch_valid=views.patch_valid.at[1, 2].set(False))
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((6, 6)), jnp.float32)

    def loss(module, features, weight):
        project = lambda x: x @ weight  # noqa: E731
        ctx = Context(RUN.key, True, 0.5)
        [tokens], aux = stage.apply(views._replace(features=features), D, module, project, ctx)
        return (project(tokens.features) ** 2).mean() + sum(aux.losses.values()), aux

    grad = compiled(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, aux = grad(module, views.features, weight)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert all(jnp.isfinite(v) for v in [*aux.losses.values(), *aux.metrics.values()])
    if gate != "measured":
        assert jnp.abs(grads[0].down.kernel[...]).max() > 0
    if gate in ("distortion", "measured"):
        # Its target has no gradient: the tower learns through the tokens that were kept.
        assert set(aux.losses) == ({"router"} if gate == "distortion" else set())
    else:
        assert set(aux.losses) == {"balance", "target"}


def test_gates_scale_tokens_only_in_value_for_switch():
    views = random_views(D)
    plain = replace(STAGE, gate="straight_through")
    module = router(plain)
    [through], _ = run(plain, views, module=module)
    [switched], _ = run(replace(plain, gate="switch"), views, module=module)
    np.testing.assert_array_equal(through.valid, switched.valid)
    x, y = (np.asarray(t.features)[np.asarray(t.valid)] for t in (through, switched))
    ratio = (y / x).mean(-1)
    np.testing.assert_allclose(y, x * ratio[:, None], rtol=1e-3, atol=1e-5)
    assert (ratio > 0).all() and (ratio <= 1 + 1e-5).all() and ratio.min() < 0.9
    assert np.isin(np.round(x, 4), np.round(np.asarray(views.features), 4)).all()


def test_balance_loss_by_its_formula():
    stage = replace(STAGE, gate="switch", balance=0.5, target=2.0, noise=0.0)
    module, views = router(stage), random_views(D)
    _, aux = run(stage, views, module=module, train=True)
    logits = np.asarray(module(to_regions(views, D, 4)), np.float64)
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    f = np.stack([(logits.argmax(-1) == s).mean() for s in range(3)])
    balance = 0.5 * 3 * (f * soft.mean((0, 1, 2))).sum()
    miss = ((soft @ [1, 4, 16]).sum(-1) - 28) / 28
    np.testing.assert_allclose(aux.losses["balance"], balance, rtol=1e-4)
    np.testing.assert_allclose(aux.losses["target"], 2.0 * (miss**2).mean(), rtol=1e-4)


def test_noise_is_for_training_and_ends():
    stage = replace(STAGE, gate="switch", noise=5.0, budget=64)
    module, views = router(stage), random_views(D)

    def choice(**ctx):
        return run(stage, views, module=module, **ctx)[1].maps["vision/tokens_per_region"]

    quiet = choice()
    assert not jnp.array_equal(quiet, choice(train=True, progress=0.0))
    np.testing.assert_array_equal(quiet, choice(train=True, progress=1.0))


def test_only_learned_gates_have_weights():
    assert replace(STAGE, gate="measured").init(D, nnx.Rngs(0)) is None
    assert replace(STAGE, gate="measured", pooling="saliency").init(D, nnx.Rngs(0)) is not None
    assert STAGE.init(D, nnx.Rngs(0)).saliency is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"budget": 0}, r"budget=0 .* outside 4\.\.64"),
        ({"budget": 3}, "budget=3"),
        ({"budget": 65}, "budget=65"),
        ({"region": 3, "scales": (3, 1)}, "region=3 does not divide the tile of 8x8"),
        ({"region": 0}, "region=0"),
        ({"scales": (3, 1)}, r"scales=\(3, 1\) must all divide region=4"),
        ({"scales": (1, 2, 4)}, "must fall"),
        ({"scales": (2, 2, 1)}, "must fall"),
    ],
)
def test_errors_name_the_number(change, named):
    with pytest.raises(ValueError, match=named):
        replace(STAGE, **change).check(dims())
