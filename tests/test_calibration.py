"""Calibration measures what running each choice through the model would show."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from focus_jax import calibration, charts
from focus_jax.calibration import choose_heads, first_within, usual_first, withdrawal_curve
from focus_jax.compress.baselines import full
from focus_jax.compress.method import Method
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vtw import vtw
from focus_jax.config import ModelConfig
from focus_jax.golden import cuts
from focus_jax.golden.decoder import read_case
from focus_jax.models.streams import Streams, fold, pack
from focus_jax.models.vlm import VLM, Inputs
from tests.models.tiny_models import RUN, SINGLE, TILED, random_inputs, random_model, random_tree
from tests.quick import compiled

GOLDEN = Path(__file__).parent / "golden" / "vtw" / "kl_search"
DEEP = replace(SINGLE, decoder=replace(SINGLE.decoder, layers=4))


def mixed(cfg: ModelConfig, **kwargs) -> Inputs:
    """Two samples of different lengths in front of, behind, and within the image."""
    inputs = random_inputs(cfg, text=7, prefix=3, **kwargs)
    return inputs._replace(
        token_valid=inputs.token_valid.at[1, :, 5:].set(False),
        prefix_valid=inputs.prefix_valid.at[1, 2:].set(False),
        patch_valid=inputs.patch_valid.at[1, :, 20:].set(False),
    )


@compiled
def streams(model: VLM, inputs: Inputs) -> Streams:
    return model.begin(inputs, model.see(inputs, RUN)[0])


@compiled
def last_logits(model: VLM, s: Streams):
    """Scores and final-norm row behind the last prompt token, all stages being run with cuts."""
    out = model.decode(s, range(len(model.decoder.stages)), s.visual.shape[1], RUN).streams
    at = jnp.argmax(out.last[:, 0], axis=-1)
    rows = out.token[jnp.arange(len(at)), 0, at]
    return model.decoder.logits(rows), model.decoder.norm(rows)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = (np.asarray(a, np.float64) for a in (p, q))
    p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("case", [pytest.param("apart", marks=pytest.mark.slow), "tiles"])
def test_a_curve_is_what_each_withdrawal_does(case):
    cfg, first = (TILED, 0) if case == "tiles" else (replace(DEEP, stacked=False), 1)
    tree, inputs = random_tree(cfg), mixed(cfg, tiles=3 if case == "tiles" else 1)
    if case == "apart":  # images within the text, which ends in an answer
        inputs = inputs._replace(
            image_at=jnp.asarray([[2], [3]], jnp.int32),
            label=inputs.label.at[0, :, 5:].set(True),
        )
    model = random_model(cfg, tree=tree)
    s = streams(model, inputs)
    curve = compiled(partial(withdrawal_curve, first=first))(model, s)
    wanted, _ = last_logits(model, s)
    np.testing.assert_allclose(curve.full_logits, wanted, rtol=1e-4, atol=1e-4)
    assert curve.kl.shape == (2, cfg.decoder.layers - first)
    for i, layer in enumerate(range(first, cfg.decoder.layers)):
        gone, rows = last_logits(random_model(cfg, vtw(layer), tree=tree), s)
        np.testing.assert_allclose(curve.last_hidden[:, i], rows, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(curve.kl[:, i], kl(gone, wanted), rtol=1e-3, atol=1e-5)
    assert (np.asarray(curve.kl) > 1e-3).all()


def test_the_official_search():
    case = read_case(GOLDEN)
    found, wanted = cuts.search(case), case.arrays
    close = np.testing.assert_allclose
    close(found["logits_full_last"], wanted["logits_full_last"], rtol=0, atol=2e-4)
    close(found["last_hidden_per_layer"], wanted["last_hidden_per_layer"], rtol=0, atol=1e-4)
    close(found["kl"], wanted["kl"], rtol=2e-2, atol=1e-6)
    close(found["mean_kl"], wanted["mean_kl"], rtol=2e-2, atol=1e-6)
    assert found["chosen_k"].tolist() == wanted["chosen_k"].tolist() == [6, 8, 9]


def test_the_first_layer_within_reach():
    curve = np.array([0.5, 0.01, 0.003, 0.2, 0.001])
    assert [first_within(curve, 5, eta) for eta in (0.003, 0.0029, 0.6)] == [7, 9, 5]
    assert first_within(curve, 5, 1e-4) is None
    assert [usual_first(n) for n in (1, 2, 4, 12, 24)] == [0, 1, 1, 3, 5]


def attention_by_hand(model: VLM, s: Streams) -> np.ndarray:
    """[S L H 2]: weights to the image and to text, row by row, of rows sorted by position."""
    pair = lambda q, k, _: (q, k)  # noqa: E731
    seen = compiled(lambda m, s: m.decoder.run(0, *pack(s)[:3], observe=pair)[2])
    q, k = (np.asarray(a, np.float64) for a in seen(model, s))
    (layers, b, _, heads, size), groups = q.shape, k.shape[3]
    out = np.zeros((b, layers, heads, 2))
    for i in range(b):
        rows = []
        for kind in ("prefix", "visual", "token"):
            valid, at, after, line = (
                np.asarray(getattr(s, name)[i]).ravel()
                for name in (f"{kind}_valid", f"{kind}_position", "after", "newline")
            )
            image = ~line if kind == "visual" else np.zeros(len(valid), bool)
            last = after[np.asarray(s.visual_valid[i])].max()
            asks = (np.arange(len(valid)) >= last) & (kind == "token")
            if kind == "token":
                asks &= np.asarray(s.prompt[i, 0])
            rows += [(at[j], image[j], asks[j]) for j in np.flatnonzero(valid)]
        rows.sort()
        for layer, head in np.ndindex(layers, heads):
            for n, (_, _, asks) in enumerate(rows):
                if asks:
                    keys = k[layer, i, : n + 1, head * groups // heads]
                    weight = np.exp(keys @ q[layer, i, n, head] / size**0.5)
                    image = np.array([is_image for _, is_image, _ in rows[: n + 1]])
                    weight /= weight.sum()
                    out[i, layer, head] += weight[image].sum(), weight[~image].sum()
    return out


@pytest.mark.parametrize("case", ["between", "tiles"])
def test_attention_of_each_head_to_the_image(case):
    cfg = TILED if case == "tiles" else SINGLE
    inputs = mixed(cfg, tiles=3 if case == "tiles" else 1)
    if case == "between":
        inputs = inputs._replace(
            image_at=jnp.asarray([[2], [3]], jnp.int32),
            label=inputs.label.at[0, :, 5:].set(True),
        )
    model = random_model(cfg)
    s = streams(model, inputs)
    assert bool(s.newline.any()) == (case == "tiles")
    apart = random_model(replace(cfg, stacked=False))
    got = compiled(calibration.head_attention)(apart if case == "tiles" else model, s)
    wanted = attention_by_hand(model, s)
    np.testing.assert_allclose(np.stack(got, -1), wanted, rtol=1e-4, atol=1e-5)
    ratio = wanted[..., 0] / wanted[..., 1]
    pairs = ratio.reshape(2, 3, 2, 2).mean(-1)  # two query heads of a key head
    wanted_pairs = np.stack([pairs[..., 0], pairs[..., 0], pairs[..., 1], pairs[..., 1]], -1)
    np.testing.assert_allclose(calibration.ratios(got, 2), wanted_pairs, rtol=1e-3)


def test_samples_that_say_nothing_of_heads():
    seen = calibration.HeadAttention(np.ones((3, 2, 4)), np.ones((3, 2, 4)))
    seen.visual[1] = 0
    with pytest.raises(ValueError, match="sample 1 has no image"):
        calibration.ratios(seen, 4)
    seen.text[1] = 0
    with pytest.raises(ValueError, match="sample 1 has no text behind its image"):
        calibration.ratios(seen, 4)


def test_a_head_stays_above_the_threshold_in_enough_samples():
    ratio = np.zeros((100, 4, 2))
    ratio[:40, 2, 0] = ratio[:41, 2, 1] = 0.3  # 40 of 100 are not more than 40
    found = choose_heads(ratio, threshold=0.2)
    assert found.mask.tolist() == [[True, True], [True, True], [False, True], [False, False]]
    np.testing.assert_allclose(found.above[2], [0.40, 0.41])
    np.testing.assert_allclose(found.importance[2], [0.12, 0.123])
    assert not choose_heads(ratio, threshold=0.3).mask[2, 1]
    assert choose_heads(ratio, threshold=0.2, share=0.39).mask[2].all()
    low = choose_heads(ratio, threshold=0.2, whole=1, layers=3).mask
    assert low.tolist() == [[True, True], [False, False], [False, True], [True, True]]


def test_the_threshold_that_keeps_a_part():
    rng = np.random.default_rng(0)
    ratio = rng.lognormal(size=(10, 8, 6))
    for keep, heads in ((0.5, 18), (1 / 6, 6), (1.0, 36), (0.01, 1)):
        found = choose_heads(ratio, keep=keep)
        assert found.mask[2:].sum() == heads and found.mask[:2].all()
        again = choose_heads(ratio, threshold=found.threshold)
        np.testing.assert_array_equal(again.mask, found.mask)
        # Those that stay are above it in more than 4 of 10 samples, and no other one is.
        np.testing.assert_array_equal((ratio > found.threshold).sum(0)[2:] > 4, found.mask[2:])
    part = choose_heads(ratio, keep=0.5, layers=4).mask
    assert part[2:4].sum() == 6 and part[4:].all()
    same = choose_heads(np.ones((5, 4, 4)), keep=0.5).mask
    assert same[:2].all() and not same[2:].any()  # equal heads go together


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give one of them"),
        ({"threshold": 0.1, "keep": 0.5}, "give one of them"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"threshold": 0.1, "share": 1.0}, "share=1.0"),
        ({"threshold": 0.1, "whole": 4}, "give whole=0..3"),
        ({"threshold": 0.1, "layers": 5}, "layers 2..4 of a decoder of 4"),
    ],
)
def test_choices_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        choose_heads(np.ones((3, 4, 2)), **change)


def test_models_and_prompts_that_do_not_fit():
    cut = random_model(SINGLE, Method("cut", full().vision, (TextGuided(layer=1),)))
    model = random_model(SINGLE)
    s = streams(model, random_inputs(SINGLE, questions=2))
    with pytest.raises(ValueError, match="method 'cut' spares some"):
        withdrawal_curve(cut, s, 1)
    with pytest.raises(ValueError, match="one question a sample, not 2"):
        calibration.head_attention(model, s)
    with pytest.raises(ValueError, match=r"first=3 is outside .* 0\.\.2"):
        withdrawal_curve(model, fold(s), 3)
    with pytest.raises(ValueError, match="no samples"):
        calibration.over_samples(calibration.head_attention, model, [])


def test_pictures_show_what_was_chosen(tmp_path):
    kl = np.array([[0.5, 0.01, 0.0], [0.3, 0.02, 1e-5]])
    green = (0x00, 0x9E, 0x73)
    for layer in (2, None):
        charts.divergence_plot(tmp_path / "kl.png", range(1, 4), kl, 0.02, layer)
        assert (pixels(tmp_path / "kl.png", green) > 50) == (layer is not None)
    charts.divergence_plot(tmp_path / "kl.png", [1], np.zeros((2, 1)), 0.02, 1)
    importance, mask = np.geomspace(0.01, 10, 12).reshape(3, 4), np.ones((3, 4), bool)
    charts.head_picture(tmp_path / "heads.png", importance, mask)
    whole = pixels(tmp_path / "heads.png", (255, 255, 255), 0)
    mask[0] = False
    charts.head_picture(tmp_path / "heads.png", importance, mask)
    assert pixels(tmp_path / "heads.png", (255, 255, 255), 0) > whole + 100
    with pytest.raises(ValueError, match=r"give \[S, K\]"):
        charts.divergence_plot(tmp_path / "kl.png", [1, 2], kl, 0.02, None)
    with pytest.raises(ValueError, match=r"give both \[L, H\]"):
        charts.head_picture(tmp_path / "heads.png", importance, mask[:2])


def pixels(path: Path, colour: tuple[int, int, int], tolerance: int = 12) -> int:
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(drawn - np.asarray(colour)).max(-1) <= tolerance).sum())
