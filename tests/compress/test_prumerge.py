"""PruMerge against the official code's outputs and against loops over the patches of a tile.

`plus_adaptive` runs the tower as well; `plus_fixed` begins behind it: its arrays alone are kept.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.prumerge import METHODS, PruMerge, official_counts, prumerge, prumerge_plus
from focus_jax.compress.stitch import stitch
from tests.compress import clip_cases
from tests.compress.views import RUN, dims, random_views
from tests.quick import compiled

D = dims(3)
PLAIN = PruMerge(budget=8, neighbours=5)
PLUS = replace(PLAIN, budget=40, spatial=3)
PAPER = replace(PLAIN, attention="heads", similarity="dot", merge="average", summary=False)


@partial(compiled, static_argnums=(0, 2))
def run(stage, views, d=D):
    return stage.apply(views, d, None, None, RUN)


@partial(compiled, static_argnums=(0, 2))
def trace(stage, views, d=D):
    return stage.trace(views, d)


stitched = compiled(stitch, static_argnums=(2, 3, 4))


# ------------------------------------------------------------------------------ official outputs


def golden_views(case: str) -> tuple[clip_cases.Views, dict[str, np.ndarray]]:
    """What the tower hands out in a case, run on one and as recorded in the other."""
    want = clip_cases.arrays(f"prumerge/{case}")
    if case == "plus_adaptive":
        return clip_cases.seen(clip_cases.GOLDEN / "prumerge" / case, want["pixel_values"]), want
    given = {
        "features": want["hidden_minus2"][:, None, 1:],
        "cls_query@-1": want["q23"][:, None, :1],
        "keys@-1": want["k23"][:, None],
    }
    return clip_cases.views(given), want


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("plus_adaptive", prumerge_plus()),
        ("plus_fixed", prumerge_plus(ratio=0.125, strict=True)),
    ],
)
def test_official_outputs(case, method):
    views, want = golden_views(case)
    d = clip_cases.dims_of(views)
    stage = method.check(d).vision
    found = {name: np.asarray(a)[:, 0] for name, a in trace(stage, views, d).items()}
    for name in ("cls_attn", "threshold", "q1_q3", "reduction_ratio"):
        np.testing.assert_allclose(
            found[name], np.broadcast_to(want[name], found[name].shape), rtol=1e-4
        )
    for name in ("outlier_count", "n_topk"):
        assert (found[name] == want[name]).all()
    [tokens], aux = run(stage, views, d)
    kept = want["kept_indices"].shape[1]
    for b in range(len(want["tokens"])):
        for name in ("kept_indices", "complement_indices"):
            assert listed(found[name][b]) == want[name][b].tolist()
        assert listed(found["sample_indices"][b]) == want["sample_indices"].tolist()
        np.testing.assert_array_equal(
            found["neighbour_indices"][b, :kept], want["neighbour_indices"][b]
        )
        assert listed(aux.maps["prumerge/index"][b, 0]) == want["kept_indices"][b].tolist()
        valid = np.asarray(tokens.valid[b, 0])
        got = np.asarray(tokens.features[b, 0])[valid]
        np.testing.assert_allclose(got, want["tokens"][b], rtol=1e-4, atol=2e-4)
    assert aux.metrics["prumerge/overflow"] == 0


def test_without_strict_a_sample_that_stands_already_is_not_added():
    """137.5 tokens an image where the official code has 144, six or seven of them twice."""
    views, want = golden_views("plus_fixed")
    stage, d = prumerge_plus(ratio=0.125).vision, clip_cases.dims_of(views)
    found = {name: np.asarray(a)[:, 0] for name, a in trace(stage, views, d).items()}
    for b, kept in enumerate(want["kept_indices"].tolist()):
        once = list(dict.fromkeys(kept))
        assert len(once) < len(kept) == 144
        assert listed(found["kept_indices"][b]) == once
        assert listed(found["complement_indices"][b]) == sorted(set(range(576)) - set(once))


def listed(row) -> list[int]:
    """What stands before the -1 at the end."""
    row = np.asarray(row)
    found = row[row >= 0]
    assert (row[len(found) :] == -1).all()
    return found.tolist()


# --------------------------------------------------------------------------------- by loops


def tower_views(d=D, batch=2, seed=0, heads=2):
    """Tiles of which some patches stand out; the second image's last tile is empty."""
    views = random_views(d, batch, seed, padded=0.25)
    rng = np.random.default_rng(seed + 100)
    c, n = d.vision_width, d.patches
    keys = rng.standard_normal((batch, d.tiles, 1 + n, c)) * rng.lognormal(
        0, 0.7, (batch, d.tiles, 1 + n, 1)
    )
    query = 2.5 * rng.standard_normal((batch, d.tiles, 1, c))
    own = np.exp(2 * rng.standard_normal((batch, d.tiles, heads, 1 + n)))
    own = (own / own.sum(-1, keepdims=True))[..., 1:]
    named = {"cls_query@-1": query, "keys@-1": keys, "cls_attention@-1": own}
    valid = views.patch_valid.at[1, -1].set(False)
    return views._replace(
        patch_valid=valid,
        row_valid=valid.reshape(*valid.shape[:2], d.rows, d.cols).any(-1),
        named={name: jnp.asarray(a, jnp.float32) for name, a in named.items()},
    )


VIEWS = tower_views()


def slow_attention(stage, views, b, m):
    """Over the valid patches and the class token; 0 at padding."""
    seen = np.flatnonzero(views.patch_valid[b, m])
    out = np.zeros(views.patch_valid.shape[-1])
    if stage.attention == "whole":
        keys = np.asarray(views.named["keys@-1"][b, m], np.float64)
        query = np.asarray(views.named["cls_query@-1"][b, m, 0], np.float64)
        weight = np.exp(keys @ query / len(query) ** 0.5)
        out[seen] = weight[1 + seen] / (weight[0] + weight[1 + seen].sum())
    else:
        for head in np.asarray(views.named["cls_attention@-1"][b, m], np.float64):
            class_token = 1 - head.sum()
            out[seen] += head[seen] / (class_token + head[seen].sum()) / 2
    return out


def slow_tile(stage, views, b, m):
    """Kept patches in output order, tokens of one tile, and how many found no slot."""
    x = np.asarray(views.features[b, m], np.float64)
    keys = np.asarray(views.named["keys@-1"][b, m, 1:], np.float64)
    a = slow_attention(stage, views, b, m)
    seen = np.flatnonzero(views.patch_valid[b, m]).tolist()
    if not seen:
        return [], [], 0
    low, high = np.quantile(a[seen], [0.25, 0.75])
    count = sum(a[i] > high + stage.iqr * (high - low) for i in seen)
    top, step, first = count, len(seen) // max(count, 1) // max(stage.spatial, 1), 0
    if stage.ratio is not None:
        top, step = int(len(seen) * stage.ratio), int(1 / stage.ratio) // max(stage.spatial, 1)
        first = step // 2
    top = max(top, 0 if stage.summary else 1)
    kept = sorted(seen, key=lambda i: (-a[i], i))[:top]
    asked = stage.spatial and (count or stage.ratio is not None)
    spaced = seen[first : len(seen) - 1 : max(step, 1)] if asked else []
    more, room = [i for i in spaced if i not in kept], max(stage.budget - len(kept), 0)
    over = max(len(kept) + len(more) - stage.budget, 0)
    if len(more) > room:
        more = [
            i for r, i in enumerate(more) if (r + 1) * room // len(more) > r * room // len(more)
        ]
    kept = kept[: stage.budget] + more
    kept = sorted(kept) if stage.order == "raster" else kept
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    near_by = unit if stage.similarity == "cosine" else keys
    tokens = []
    for i in kept:
        others = sorted((j for j in seen if j != i), key=lambda j: (-near_by[i] @ near_by[j], j))
        near = others[: stage.neighbours]
        if stage.merge == "sum":
            tokens.append(x[i] + sum((a[j] * x[j] for j in near), np.zeros(len(x[0]))))
        else:
            tokens.append(np.average(x[[i, *near]], axis=0, weights=a[[i, *near]]))
    left = [j for j in seen if j not in kept]
    if stage.summary and left:
        weight = 1.0 if stage.merge == "sum" else a[left].sum()
        tokens.append(a[left] @ x[left] / weight)
    return kept, tokens, over


@pytest.mark.parametrize(
    "stage",
    [
        PLAIN,
        PLUS,
        replace(PLUS, budget=10),
        replace(PLUS, ratio=0.2, spatial=1, order="raster", neighbours=0),
        PAPER,
        replace(PLUS, ratio=0.15, budget=12, merge="average", iqr=0.5),
    ],
)
def test_each_tile_is_a_loop_over_its_valid_patches(stage):
    [tokens], aux = run(stage, VIEWS)
    assert tokens.features.shape[2] == stage.tile_slots(D)[0]
    overflow, kept_counts = 0, set()
    for b, m in np.ndindex(2, 3):
        kept, want, over = slow_tile(stage, VIEWS, b, m)
        assert listed(aux.maps["prumerge/index"][b, m]) == kept
        valid = np.asarray(tokens.valid[b, m])
        assert valid.sum() == len(want)
        if want:
            got = np.asarray(tokens.features[b, m])[valid]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        overflow += over
        kept_counts.add(len(kept))
    assert aux.metrics["prumerge/overflow"] == pytest.approx(overflow / 5)  # one tile is empty
    assert len(kept_counts) > 2 or overflow, "the tiles must differ"
    if stage.budget == 10:
        assert overflow > 0


def test_tokens_stand_where_their_patches_are():
    [tokens], aux = run(PLUS, VIEWS)
    index = np.asarray(aux.maps["prumerge/index"])
    where = index >= 0
    centre = np.stack([index // 8, index % 8], axis=-1)
    np.testing.assert_array_equal(np.asarray(tokens.centre[:, :, :-1])[where], centre[where])
    assert (np.asarray(tokens.side[:, :, :-1]) == where).all()
    assert tokens.valid[0, :, -1].all()
    assert (tokens.centre[0, :, -1] == 3.5).all() and (tokens.side[0, :, -1] == 8).all()
    assert not tokens.valid[1, 2].any()


@pytest.mark.parametrize("tile_newline", [False, True])
def test_tiles_stand_one_behind_another(tile_newline):
    stage = replace(PLAIN, tile_newline=tile_newline)
    groups, _ = run(stage, VIEWS)
    out = stitched(groups, VIEWS, D, stage.band(D), tile_newline)
    assert out.features.shape[1] == stage.slots(D) == 3 * 9 + 3 * tile_newline
    tile = jax.tree.map(np.asarray, groups[0])
    out = jax.tree.map(np.asarray, out)
    for b in range(2):
        rows, lines = [], []
        for m in range(3 - b):  # the second image's last tile is empty
            tokens = [*tile.features[b, m][tile.valid[b, m]]]
            rows += [*tokens, np.zeros(6)] if tile_newline else tokens
            lines += [False] * len(tokens) + [True] * tile_newline
        np.testing.assert_array_equal(out.valid[b], np.arange(out.valid.shape[1]) < len(rows))
        assert out.newline[b, : len(rows)].tolist() == lines
        np.testing.assert_array_equal(out.features[b, : len(rows)], rows)


def test_an_image_does_not_depend_on_its_batch():
    stage = replace(PLUS, budget=10)
    [both], _ = run(stage, VIEWS)
    [alone], _ = run(stage, jax.tree.map(lambda a: a[1:], VIEWS))
    for a, b in zip(both, alone, strict=True):
        np.testing.assert_allclose(a[1:], b, rtol=1e-5, atol=1e-6)


def test_nothing_of_a_padded_patch_matters():
    junk = jnp.where(VIEWS.patch_valid[..., None], VIEWS.features, 1e6)
    keys = VIEWS.named["keys@-1"]
    named = VIEWS.named | {
        "keys@-1": keys.at[:, :, 1:].set(
            jnp.where(VIEWS.patch_valid[..., None], keys[:, :, 1:], 30.0)
        )
    }
    [want], _ = run(PLUS, VIEWS)
    [got], _ = run(PLUS, VIEWS._replace(features=junk, named=named))
    np.testing.assert_allclose(got.features, want.features, rtol=1e-5, atol=1e-6)


def test_tokens_keep_the_towers_dtype():
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, VIEWS)
    [got], aux = run(PLAIN, low)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, low)
    [want], same = run(PLAIN, exact)
    assert got.features.dtype == jnp.bfloat16
    np.testing.assert_array_equal(aux.maps["prumerge/index"], same.maps["prumerge/index"])
    np.testing.assert_array_equal(got.features, want.features.astype(jnp.bfloat16))


def test_gradient_is_that_of_a_weighted_sum():
    """Tokens are linear in the features, and nothing else is learned from."""
    weight = np.random.default_rng(1).standard_normal((2, 3, PLUS.tile_slots(D)[0], 6))

    def total(features, named):
        [tokens], _ = PLUS.apply(VIEWS._replace(features=features, named=named), D, None, None, RUN)
        return (tokens.features * weight).sum()

    gradients = compiled(jax.value_and_grad(total, argnums=(0, 1)))
    value, (features, named) = gradients(VIEWS.features, VIEWS.named)
    assert np.isfinite(features).all()
    assert float((features * VIEWS.features).sum()) == pytest.approx(float(value), rel=1e-4)
    assert (np.abs(features).max(-1) > 0).sum() == VIEWS.patch_valid.sum()
    assert all((g == 0).all() for g in jax.tree.leaves(named))


# ------------------------------------------------------------------------------- by hand


def flat_views(attention: list[float], width: int = 2):
    """One tile of 4x4 patches with this attention (by one head), and equal keys."""
    d = dims(1, side=4, width=width)
    views = random_views(d, batch=1)
    share = np.asarray(attention)[None, None, None] / (1 + sum(attention))
    named = {
        "cls_attention@-1": jnp.asarray(share, jnp.float32),
        "keys@-1": jnp.ones((1, 1, 17, width)),
    }
    return d, views._replace(named=named)


def test_without_outliers_one_token_is_left():
    d, views = flat_views([1.0 + i / 100 for i in range(16)])
    stage = PruMerge(budget=4, attention="heads", neighbours=3)
    share = np.asarray(views.named["cls_attention@-1"])[0, 0, 0]
    for plus in (0, 3):
        [tokens], aux = run(replace(stage, spatial=plus), views, d)
        assert tokens.valid[0, 0].tolist() == [False] * 4 + [True]
        np.testing.assert_allclose(
            tokens.features[0, 0, -1], share @ np.asarray(views.features[0, 0]), rtol=1e-5
        )
        assert aux.metrics["prumerge/kept"] == 0
    [tokens], aux = run(replace(stage, spatial=3, summary=False), views, d)
    assert listed(aux.maps["prumerge/index"][0, 0]) == [15]
    assert tokens.valid.sum() == 1


def test_a_step_is_at_least_one():
    """Seven of sixteen stand out with iqr=0: every patch but the very last one is a sample."""
    d, views = flat_views([2.0 + i if i < 4 else 0.1 for i in range(15)] + [0.05])
    stage = PruMerge(budget=16, attention="heads", spatial=9, iqr=0.0, neighbours=1)
    _, aux = run(stage, views, d)
    assert listed(aux.maps["prumerge/index"][0, 0]) == [3, 2, 1, 0, *range(4, 15)]


def test_samples_that_find_no_slot_are_thinned_evenly():
    d, views = flat_views([1.0] * 5 + [9.0] + [1.0] * 9 + [0.5])
    stage = PruMerge(budget=6, attention="heads", spatial=8, neighbours=1)
    _, aux = run(stage, views, d)
    kept = listed(aux.maps["prumerge/index"][0, 0])
    spaced = [0, 2, 4, 6, 8, 10, 12, 14]
    assert kept[0] == 5 and len(kept) == 6 and set(kept[1:]) < set(spaced)
    assert max(np.diff(kept[1:])) <= 4 and kept[1] <= 2 and kept[-1] >= 12
    assert aux.metrics["prumerge/overflow"] == 3


def test_strict_pools_the_statistics():
    stage = replace(PLAIN, strict=True)
    found = trace(stage, VIEWS)
    whole = np.stack([slow_attention(stage, VIEWS, b, m) for b, m in np.ndindex(2, 3)])
    valid = np.asarray(VIEWS.patch_valid).reshape(6, 64)
    low, high = np.quantile(whole[valid], [0.25, 0.75])
    count = int((whole[valid] > high + 1.5 * (high - low)).sum())
    assert (found["outlier_count"] == count).all() and count > 6
    want = valid.sum(-1) * count // valid.sum()
    np.testing.assert_array_equal(np.asarray(found["n_topk"]).reshape(6), want)


def test_strict_counts_in_binary_fractions():
    """27 of 196 patches: int(196 * (27 / 196)) is 26."""
    tops, steps = official_counts(196, 196, 3)
    assert tops[[0, 26, 27, 28]].tolist() == [0, 26, 26, 28]
    assert steps[[0, 1, 27, 100, 196]].tolist() == [196, 65, 2, 0, 0]
    assert official_counts(576, 1152, 1)[0][46] == 23


# --------------------------------------------------------------------------------- sizes


def test_slots_of_the_official_settings():
    llava = dims(1, side=24)
    assert prumerge().check(llava).vision.slots(llava) == 65
    assert prumerge_plus().check(llava).vision.slots(llava) == 193
    assert prumerge_plus(ratio=0.125).check(llava).vision.slots(llava) == 145
    assert prumerge(ratio=0.125).check(llava).vision.slots(llava) == 65
    assert prumerge(summary=False).vision.slots(dims(5, side=24)) == 5 * 64
    assert [f.__name__ for f in METHODS] == ["prumerge", "prumerge_plus"]


@pytest.mark.parametrize("stage", [PLUS, replace(PLUS, ratio=0.25, strict=True)])
def test_flops_are_what_the_compiler_counts(stage):
    """Without keys and class query, which the tower computes."""
    d = dims(2, width=384)
    views = tower_views(d, batch=1)
    program = run.lower(stage, views, d).compile()
    width = d.vision_width
    projected = 2.0 * d.tiles * (d.patches + 2) * width**2
    counted = program.cost_analysis()["flops"]
    assert stage.flops(d) - projected == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (prumerge(budget=0), "budget=0 slots a tile is outside 1..64"),
        (prumerge(budget=65), "budget=65"),
        (prumerge(ratio=0.0), "ratio=0.0"),
        (prumerge_plus(budget=64, ratio=1.5), "ratio=1.5"),
        (prumerge(neighbours=64), "neighbours=64 must lie in 0..63"),
        (prumerge(iqr=-1.0), "iqr=-1.0"),
        (prumerge_plus(budget=64, spatial=-1), "spatial=-1"),
    ],
)
def test_errors_name_the_number(method, named):
    with pytest.raises(ValueError, match=named):
        method.check(D)


def test_a_tower_without_a_class_token_is_refused():
    with pytest.raises(ValueError, match=r"class token.*divprune"):
        prumerge().check(replace(D, class_token=False))
