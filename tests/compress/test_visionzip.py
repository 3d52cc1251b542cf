"""VisionZip against the official code's outputs and against loops over the patches of a tile."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.visionzip import METHODS, VisionZip, visionzip
from tests.compress import clip_cases
from tests.compress.views import RUN, dims, random_views
from tests.quick import compiled

D = dims(3)
STAGE = VisionZip(dominant=6, contextual=4)


@partial(compiled, static_argnums=(0, 2))
def run(stage, views, d=D):
    return stage.apply(views, d, None, None, RUN)


@partial(compiled, static_argnums=0)
def trace(stage, views):
    return stage.trace(views)


def listed(row) -> list[int]:
    """What stands before the -1 at the end."""
    row = np.asarray(row)
    found = row[row >= 0]
    assert (row[len(found) :] == -1).all()
    return found.tolist()


def test_official_outputs():
    case = "visionzip/d53_c10"
    want = clip_cases.arrays(case)
    views = clip_cases.seen(clip_cases.GOLDEN / case, want["pixel_values"])
    d = clip_cases.dims_of(views)
    stage = visionzip().check(d).vision
    assert stage.slots(d) == 64
    found = {name: np.asarray(a)[:, 0] for name, a in trace(stage, views).items()}
    np.testing.assert_allclose(found["cls_attention_sum"], want["cls_attention_sum"], rtol=1e-4)
    np.testing.assert_allclose(found["metric"], want["metric"], atol=1e-4)
    for name in (
        "all_indices", "dominant_indices", "target_indices", "merged_indices", "assignment",
        "counts",
    ):  # fmt: skip
        assert listed(found[name][0]) == want[name][0].tolist(), name
    [tokens], aux = run(stage, views, d)
    assert tokens.valid.all()
    np.testing.assert_allclose(tokens.features[:, 0], want["tokens"], atol=1e-4)
    patches = aux.maps["visionzip/index"][0, 0] + 1
    assert [0, *patches.tolist()] == want["dominant_indices"][0].tolist()


# --------------------------------------------------------------------------------- by loops


def tower_views(d=D, batch=2, seed=0, heads=2):
    """The second image's tiles hold 7 valid patches, 3, and none."""
    views = random_views(d, batch, seed, padded=0.25)
    rng = np.random.default_rng(seed + 100)
    valid = np.asarray(views.patch_valid).copy()
    for m, few in enumerate((7, 3, 0)[: d.tiles]):
        valid[1:, m] = False
        valid[1:, m, rng.permutation(d.patches)[:few]] = True
    own = np.exp(2 * rng.standard_normal((batch, d.tiles, heads, 1 + d.patches)))
    own = (own / own.sum(-1, keepdims=True))[..., 1:]
    shape = (batch, d.tiles, 1 + d.patches, d.vision_width)
    token = rng.standard_normal((batch, d.tiles, 1, d.vision_width))
    named = {"cls_attention@-2": own, "keys@-2": rng.standard_normal(shape), "class_token": token}
    valid = jnp.asarray(valid)
    return views._replace(
        patch_valid=valid,
        row_valid=valid.reshape(*valid.shape[:2], d.rows, d.cols).any(-1),
        named={name: jnp.asarray(a, jnp.float32) for name, a in named.items()},
    )


VIEWS = tower_views()


def slow_tile(stage, views, b, m):
    """Dominant patches and targets, in output order, and the tokens of one tile."""
    x = np.asarray(views.features[b, m], np.float64)
    seen = np.flatnonzero(views.patch_valid[b, m]).tolist()
    if not seen:
        return [], [], []
    score = dict.fromkeys(seen, 0.0)
    for head in np.asarray(views.named["cls_attention@-2"][b, m], np.float64):
        class_token = 1 - head.sum()
        for i in seen:
            score[i] += head[i] / (class_token + head[seen].sum())
    dominant = sorted(seen, key=lambda i: (-score[i], i))[: stage.dominant - 1]
    dominant = sorted(dominant) if stage.order == "raster" else dominant
    tokens = [np.asarray(views.named["class_token"][b, m, 0]), *x[dominant]]
    left = [i for i in seen if i not in dominant]
    if not stage.contextual:
        return dominant, [], tokens
    targets = left[:: max(1, len(left) // stage.contextual)][: stage.contextual]
    vectors = np.asarray(views.named["keys@-2"][b, m, 1:], np.float64)
    if stage.metric == "keys":
        vectors = (vectors[:, :3] + vectors[:, 3:]) / 2
    elif stage.metric == "features":
        vectors = x
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    joined = {t: [] for t in targets}
    for i in left:
        if i not in targets:
            joined[max(targets, key=lambda t: (vectors[i] @ vectors[t], -t))].append(i)
    for target, members in joined.items():
        if stage.merge == "average":
            tokens.append(x[[target, *members]].mean(0))
        else:
            tokens.append(x[target] + (x[members].mean(0) if members else 0))
    return dominant, targets, tokens


@pytest.mark.parametrize(
    "stage",
    [
        STAGE,
        replace(STAGE, metric="features", merge="average", order="score"),
        replace(STAGE, dominant=3, contextual=13, metric="whole_keys"),
        replace(STAGE, contextual=0),
    ],
)
def test_each_tile_is_a_loop_over_its_valid_patches(stage):
    [tokens], aux = run(stage, VIEWS)
    assert tokens.features.shape[2] == stage.tile_slots(D)[0]
    for b, m in np.ndindex(2, 3):
        dominant, targets, want = slow_tile(stage, VIEWS, b, m)
        assert listed(aux.maps["visionzip/index"][b, m]) == dominant
        if stage.contextual:
            assert listed(aux.maps["visionzip/target"][b, m]) == targets
        valid = np.asarray(tokens.valid[b, m])
        assert valid.sum() == len(want)
        if not want:
            continue
        got = np.asarray(tokens.features[b, m])[valid]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        centre, side = np.asarray(tokens.centre[b, m])[valid], np.asarray(tokens.side[b, m])[valid]
        assert centre[0].tolist() == [3.5, 3.5] and side.tolist() == [8] + [1] * (len(want) - 1)
        assert (centre[1:] @ [8, 1]).tolist() == [*dominant, *targets]


def test_an_image_does_not_depend_on_its_batch():
    [both], _ = run(STAGE, VIEWS)
    [alone], _ = run(STAGE, jax.tree.map(lambda a: a[:1], VIEWS))
    for a, b in zip(both, alone, strict=True):
        np.testing.assert_allclose(a[:1], b, rtol=1e-5, atol=1e-6)


def test_a_trace_of_few_patches_ends_in_minus_one():
    found = trace(STAGE, VIEWS)
    dominant, targets, _ = slow_tile(STAGE, VIEWS, 1, 0)
    assert listed(found["dominant_indices"][1, 0]) == [0, *(1 + i for i in dominant)]
    assert listed(found["target_indices"][1, 0]) == [1 + i for i in targets]
    assert listed(found["merged_indices"][1, 0]) == listed(found["assignment"][1, 0]) == []
    for b, m in np.ndindex(2, 3):
        joins = listed(found["assignment"][b, m])
        assert len(joins) == len(listed(found["merged_indices"][b, m]))
        assert found["counts"][b, m].tolist() == [joins.count(t) for t in range(4)]


def test_gradient_is_that_of_a_weighted_sum():
    """Tokens are linear in features and class token, and nothing else is learned from."""
    weight = np.random.default_rng(1).standard_normal((2, 3, 10, 6))

    def total(features, named):
        views = VIEWS._replace(features=features, named=named)
        [tokens], _ = STAGE.apply(views, D, None, None, RUN)
        return (tokens.features * weight).sum()

    gradients = compiled(jax.value_and_grad(total, argnums=(0, 1)))
    value, (features, named) = gradients(VIEWS.features, VIEWS.named)
    token = named.pop("class_token")
    linear = (features * VIEWS.features).sum() + (token * VIEWS.named["class_token"]).sum()
    assert float(linear) == pytest.approx(float(value), rel=1e-4)
    assert np.isfinite(features).all()
    assert ((np.abs(features).max(-1) > 0) == VIEWS.patch_valid).all()
    assert all((g == 0).all() for g in jax.tree.leaves(named))


def test_flops_are_what_the_compiler_counts():
    """Without keys and class attention, which the tower computes; keys as wide as compared."""
    d = dims(2, width=384)
    stage = VisionZip(dominant=20, contextual=16, metric="whole_keys")
    program = run.lower(stage, tower_views(d), d).compile()
    width, n = d.vision_width, d.patches
    by_tower = 2.0 * d.tiles * ((n + 2) * width**2 + (n + 1) * width)
    counted = program.cost_analysis()["flops"] / 2  # images
    assert stage.flops(d) - by_tower == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (visionzip(dominant=1), r"dominant=1 .* use 2\.\.65"),
        (visionzip(dominant=66), "dominant=66"),
        (visionzip(contextual=12), r"contextual=12 must lie in 0\.\.11"),
        (visionzip(contextual=-1), "contextual=-1"),
    ],
)
def test_errors_name_the_number(method, named):
    with pytest.raises(ValueError, match=named):
        method.check(D)


def test_what_it_cannot_stand_on():
    with pytest.raises(ValueError, match=r"class token.*random"):
        visionzip().check(replace(D, class_token=False))
    with pytest.raises(ValueError, match="contextual=0"):
        replace(STAGE, contextual=0).trace(VIEWS)
    assert replace(STAGE, contextual=0).requests() == ("cls_attention@-2",)
    assert [f.__name__ for f in METHODS] == ["visionzip"]
