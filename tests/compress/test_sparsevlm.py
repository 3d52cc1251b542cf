"""SparseVLM against a recorded run of its official code, and mixed batches against loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.method import Entry
from focus_jax.compress.sparsevlm import (
    TABLE,
    SparseCut,
    budget,
    budget_of_slots,
    rater_scores,
    sparsevlm,
)
from tests.compress.layer_views import one_sample, random_layer
from tests.compress.recorded import assert_replayed
from tests.compress.slow_decoder import (
    DEEP,
    SlowDecoder,
    assert_text_equal,
    highest,
    mixed_batch,
    questions,
)
from tests.compress.test_density_peaks import slow_density_peaks
from tests.compress.views import RUN, dims
from tests.models.tiny_models import random_model, random_tree
from tests.quick import compiled


def test_a_recorded_run():
    stages = (
        "scores", "keep", "recycled", "cluster_centres", "cluster_assignment", "merged", "hidden"
    )  # fmt: skip
    assert assert_replayed("sparsevlm/v1_192") == {
        "rater_scores", "rater_indices", "prefill_output", "decode_output", "kv_lengths",
        *(f"{name}_layer{i}" for name in stages for i in (2, 6, 15)),
    }  # fmt: skip


# ------------------------------------------------------------------------- mixed batches

LAYERS, KEEP, OF = (0, 2), (16, 8), 64  # cuts before layers 1 and 3


def slow_raters(visual: np.ndarray, text: np.ndarray) -> tuple[int, ...]:
    """Rows whose mean share of the visual tokens' softmax is above the mean of all rows."""
    shares = []
    for v in visual:
        weight = np.exp([v @ t - max(v @ u for u in text) for t in text])
        shares.append(weight / weight.sum())
    mean = np.mean(shares, axis=0)
    return tuple(int(i) for i in np.flatnonzero(mean > mean.mean()))


def slow_cut(s, score: np.ndarray, entered: int, keep: int):
    """Kept places, then the means of clusters of the best of what is pruned."""
    present = len(score)
    kept = highest(score, min(int(entered * keep / OF), present - 1))
    pruned = [i for i in range(present) if i not in kept]
    again = sorted(pruned, key=lambda i: (-score[i], i))[: int(0.3 * len(pruned)) + 1]
    rows = s.x[s.image]
    clusters = int(len(again) / 10) + 1
    _, assign = slow_density_peaks(rows[again], clusters)
    means = [rows[again][np.asarray(assign) == c].mean(0) for c in range(clusters)]
    return kept, s.with_image(np.concatenate([rows[kept], means]), None)


def test_each_question_of_a_mixed_batch_is_as_alone():
    """64 tokens make 16 + 2, then 8 + 1; 37 make 9 + 1, then 4 + 1: counts are each row's own."""
    method = sparsevlm(layers=LAYERS, keep=KEEP, of=OF)
    tree = random_tree(DEEP, method)
    inputs, visual = mixed_batch(valid=(64, 37))
    model = random_model(DEEP, method, tree=tree)

    out = compiled(lambda model, visual: model(inputs, RUN, visual=visual))(model, visual)
    assert method.check(dims(side=8)).stage_slots(dims(side=8)) == (64, 18, 18, 9)
    decoder, raters = SlowDecoder(DEEP, tree), set()
    for b, q, sample in questions(decoder, inputs, visual):
        entered, maps = sample.visual, out.aux.maps
        asks = slow_raters(sample.x[sample.image], sample.x[sample.image.stop :])
        assert np.flatnonzero(maps["sparsevlm/raters@1"][b, q]).tolist() == list(asks)
        raters.add(asks)

        def cut(s, layer, keep, at, entered=entered, maps=maps):
            score = decoder.scores(layer - 1, s.before)
            kept, after = slow_cut(s, score, entered, keep)
            assert maps[f"sparsevlm/index@{layer}"][*at, : len(kept)].tolist() == kept
            return after

        cuts = {
            1: lambda s, at=(b, q): cut(s, 1, 16, at),
            3: lambda s, at=(2 * b + q, 0): cut(s, 3, 8, at),
        }
        end = decoder.run(replace(sample, asks=asks), cuts)
        assert end.visual == (9, 5)[b]
        assert_text_equal(out.hidden, inputs, b, q, end)
    assert len(raters) > 1


def test_clusters_carry_gradients():
    """A recycled token reaches the loss through its cluster, a lost one does not."""
    cut = SparseCut(keep=(3,), of=12)
    layer = random_layer((12,), questions=1)

    def loss(visual):
        kept, aux = cut.apply(layer._replace(visual=visual), cut.slots(12), RUN)
        return kept.merged.features.sum(), (kept, aux)

    gradient, (kept, aux) = compiled(jax.grad(loss, has_aux=True))(layer.visual)
    again = aux.maps["sparsevlm/recycled"][0, 0]
    again = set(again[again >= 0].tolist())
    assert len(again) == 3  # int(0.3 * 9) + 1
    assert set(np.flatnonzero(np.abs(gradient[0]).sum(-1)).tolist()) == again
    assert not again & set(kept.selection.index[0, 0].tolist())


def test_rater_scores_of_a_padded_sample_are_its_own():
    layer = random_layer((12, 7), questions=2)
    entry = lambda a: Entry(a.visual, a.visual_valid, a.token, a.instruction)  # noqa: E731
    run = compiled(rater_scores)
    whole = run(entry(layer))
    for b in range(2):
        one = one_sample(layer, b)
        np.testing.assert_allclose(whole[b], run(entry(one))[0], rtol=1e-5)
        assert (whole[b][~layer.instruction[b]] == 0).all()
        some = np.asarray(layer.instruction[b].any(-1))
        np.testing.assert_allclose(whole[b].sum(-1)[some], 1, rtol=1e-5)
    assert not whole[1, 1].any()  # nothing asks there


def test_words_that_no_token_prefers_all_rate():
    layer = random_layer((5,), questions=1)
    token = jnp.ones_like(layer.token)
    asking = jnp.asarray([[[True, False, True, True, False]]])
    entry = Entry(layer.visual, layer.visual_valid, token, asking)
    rate = compiled(SparseCut().rate)
    rates = rate(entry)
    assert rates.any()
    assert not (rates & ~asking).any()
    single = jnp.arange(5) == 2
    entry = entry._replace(asking=single[None, None])
    assert rate(entry).tolist() == [[single.tolist()]]


# ------------------------------------------------------------------------------- counts


def test_counts_of_the_official_table():
    layers = {name: [sum(budget(576, t[: i + 1], 576)) for i in range(3)]
              for name, t in TABLE.items()}  # fmt: skip
    assert layers[192] == [309, 204, 113]
    assert [cut.merged_slots(576) for cut in sparsevlm(192).cuts] == [9, 4, 3]
    for retain, table in TABLE.items():  # other images keep the same share
        for tokens in (144, 2880):
            cuts = sparsevlm(retain).cuts
            kept = [cut.slots(tokens) - cut.merged_slots(tokens) for cut in cuts]
            assert kept == [tokens * n // 576 for n in table]


def slow_budget(entered: int, keep: tuple[int, ...], of: int) -> tuple[int, int]:
    present, kept, merged = entered, 0, 0
    for one in keep:
        kept = max(min(entered * one // of, present - 1), 0)
        again = 3 * (present - kept) // 10 + 1 if present > kept else 0
        merged = again // 10 + 1 if again else 0
        present = kept + merged
    return kept, merged


@pytest.mark.parametrize("keep", [*TABLE.values(), (20, 19), (5,)])
def test_slots_hold_every_smaller_sample_and_tell_their_parts(keep):
    for n in range(1, len(keep) + 1):
        so_far = keep[:n]
        rows = [slow_budget(e, so_far, 576) for e in range(700)]
        for e in (1, 2, 30, 143, 144, 288, 575, 576, 699):
            kept, merged = budget(e, so_far, 576)
            assert kept == max(row[0] for row in rows[: e + 1])
            assert merged == max(row[1] for row in rows[: e + 1])
            assert budget_of_slots(kept + merged, so_far, 576) == (kept, merged)


def test_one_token_more_may_need_one_cluster_less():
    """Why slots are those of the neediest smaller sample."""
    falls = [
        e for e in range(1, 2000)
        if slow_budget(e, TABLE[192], 576)[1] < slow_budget(e - 1, TABLE[192], 576)[1]
    ]  # fmt: skip
    for e in falls[:3]:
        assert budget(e, TABLE[192], 576)[1] == slow_budget(e - 1, TABLE[192], 576)[1]
    assert falls


def test_fewer_tokens_than_the_budget_keep_all_but_what_merges():
    """An earlier cut left 40 of 576, and 3 in another sample: no slots beyond those."""
    cut = SparseCut(keep=(300,), of=576)
    layer = random_layer((40, 3), questions=1)._replace(entered=jnp.asarray([576, 576]))
    kept, _ = compiled(lambda layer: cut.apply(layer, min(cut.slots(576), 40), RUN))(layer)
    total = kept.selection.valid.sum(-1) + kept.merged.valid.sum(-1)
    assert kept.selection.index.shape[-1] + kept.merged.valid.shape[-1] == 40
    assert (total <= jnp.asarray([[40], [3]])).all()
    assert kept.selection.valid.sum(-1)[1] == 2
    assert kept.merged.valid.sum(-1)[1] == 1


def test_flops_count_scores_raters_and_clusters():
    first, second = sparsevlm(layers=LAYERS, keep=KEEP, of=OF).cuts
    sizes = {"text": 5, "width": 24, "kv_width": 12, "prefix": 3, "questions": 2}
    projections = lambda n: 2 * 6 * (2 * 5 * 24 + (3 + n + 2 * 5) * 12)  # noqa: E731
    scores = lambda n: 2 * 2 * 5 * (3 + n + 5) * 24  # noqa: E731
    raters = 2 * 2 * 5 * 64 * 6
    clusters = lambda room, merged: 2 * 2 * (room * room + room * merged) * 6  # noqa: E731
    got = first.flops(dims(width=6), 64, **sizes)
    assert got == projections(64) + scores(64) + raters + clusters(19, 2)
    got = second.flops(dims(width=6), 18, **sizes)
    assert got == projections(18) + scores(18) + clusters(9, 1)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"retain": 100}, "retain=100 is not among 192, 128, 64"),
        ({"layers": (2, 6)}, r"2 layers .* 3 counts"),
        ({"layers": (2, 1, 3)}, r"\[3, 2, 4\] must rise"),
        ({"layers": (1, 2, 5)}, r"layer 6 .* use 1\.\.5"),
        ({"layers": (-1, 2, 3)}, "layer 0 ranks by the layer before it"),
        ({"keep": (30, 30, 10)}, r"\(30, 30\) .* must fall"),
        ({"keep": (30, 10, 0)}, r"keep=\(30, 10, 0\)"),
        ({"keep": (600, 30, 10)}, r"keep=\(600,\) does not fit images of=576"),
        ({"keep": (30, 10, 1), "of": 576}, "1 of 576 tokens is none of the 64"),
    ],
)
def test_errors_name_the_number(given, named):
    with pytest.raises(ValueError, match=named):
        sparsevlm(**{"layers": (1, 2, 3), **given}).check(dims())
