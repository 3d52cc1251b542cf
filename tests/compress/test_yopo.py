"""YOPO as a value: its arguments, files of head masks, what it costs, the recorded runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from focus_jax.compress.baselines import Full, pool
from focus_jax.compress.method import Method, compose
from focus_jax.compress.plan import plan
from focus_jax.compress.pyramiddrop import pyramiddrop
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.compress.visual_compute import VisualCompute, heads_of, layout
from focus_jax.compress.vtw import Withdraw
from focus_jax.compress.yopo import load_head_mask, save_head_mask, yopo
from focus_jax.config import llava_1_5_7b, llava_1_5_13b, llava_next_vicuna_7b
from focus_jax.golden.decoder import read_case, replay
from focus_jax.models.vlm import dims_of, sizes_of
from tests.compress.test_plan import BASE, SMALL, counted
from tests.models.tiny_models import SINGLE

GOLDEN = Path(__file__).parents[1] / "golden" / "yopo"
DIMS = dims_of(SINGLE, 1)  # 3 layers of 4 heads, 2 of them to a key head


def of(**fields) -> Method:
    return Method("yopo", Full(), (), VisualCompute(**fields))


# ------------------------------------------------------------------------------ recorded


def recorded(case, mass: str, mode: str) -> Method:
    """The method of a recorded run."""
    mask = tuple(tuple(row) for row in case.arrays["head_mask"].tolist())
    cut, official = case.knobs["layercut_num"], mass == "official"
    return Method(
        "yopo", Full(), () if official else (Withdraw(layer=cut),),
        VisualCompute(
            window=case.knobs["attncut_w"], heads=mask, layers=cut if official else None,
            ffn=case.knobs["mlpcut_ratio"], mode=mode, mass=mass,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["masked", "efficient"])
def test_recorded_runs(mode):
    """Prefill and one decoded token of the authors' own code."""
    case = read_case(GOLDEN / "all")
    trace = replay(case, recorded(case, "official", mode))
    np.testing.assert_allclose(trace.output, case.arrays["prefill_output"], atol=1e-4)
    np.testing.assert_allclose(trace.decoded, case.arrays["decode_output"], atol=1e-4)


def test_renormalised_mass_is_another_method():
    """On the recorded network text rows differ by 0.65 (rms), with outputs of about 1."""
    case = read_case(GOLDEN / "all")
    trace = replay(case, recorded(case, "renormalise", "efficient"))
    text = np.r_[0 : case.prefix, case.prefix + case.visual : case.embeds.shape[1]]
    gap = trace.output - case.arrays["prefill_output"][:, text]
    assert np.sqrt((gap[:, case.prefix :] ** 2).mean()) == pytest.approx(0.65, abs=0.01)
    assert np.abs(gap).max() == pytest.approx(2.95, abs=0.01)
    assert trace.kv_lengths.tolist() == [594] * 3 + [18] * 3


# ------------------------------------------------------------------------- the value


def test_parts_alone_are_off():
    """Each knob has a value that switches it off; all off is no visual compute."""
    assert not yopo(window=None, layers=None, ffn=1, heads=None, mass="official").compute.active
    for knob in ({"window": 5}, {"layers": 2}, {"ffn": 2}, {"heads": 0.5}):
        off = {"window": None, "layers": None, "ffn": 1, "heads": None, "mass": "official"}
        assert yopo(**(off | knob)).compute.active


def test_renormalised_visual_tokens_leave_by_a_cut():
    method = yopo(layers=2)
    assert method.cuts == (Withdraw(layer=2),)
    assert method.compute.layers is None
    assert yopo(layers=2, mass="official").cuts == ()
    assert yopo(layers=None).cuts == ()
    assert compose(pyramiddrop((1,), (0.5,)), method).compute == method.compute


def test_a_share_keeps_the_lowest_heads_behind_whole_layers():
    alive = of(heads=0.5).compute.alive(DIMS)
    assert alive.tolist() == [[True, True], [True, True], [True, False]]
    assert of(heads=0.5, whole=0).compute.alive(DIMS).sum() == 3
    assert of(heads=0.1, whole=1).compute.alive(DIMS).tolist()[1:] == [[True, False]] * 2


def test_heads_that_layers_compute():
    """Apart each layer its own; stacked all as many as the one with most; masked all."""
    mask = ((True, True, False, False), (False, False, True, True), (False,) * 4)
    compute = VisualCompute(heads=mask, layers=2)
    apart = heads_of(compute, DIMS, 0, 3, stacked=False)
    assert [h.order for h in apart] == [(0, 1), (1, 0), (0, 1)]
    assert [h.live for h in apart] == [(True,), (True,), (False,)]
    assert [h.read for h in apart] == [(True,), (True,), ()]
    stacked = heads_of(compute, DIMS, 1, 3, stacked=True)
    assert [h.read for h in stacked] == [(True,), (False,)]
    masked = heads_of(replace(compute, mode="masked"), DIMS, 0, 3, stacked=False)
    assert [h.live for h in masked] == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"window": 4}, "window=4 must be odd"),
        ({"window": 0}, "window=0 must be odd"),
        ({"layers": 4}, r"layers=4 is outside 0\.\.3"),
        ({"layers": -1}, r"layers=-1 is outside 0\.\.3"),
        ({"layers": 2, "mass": "renormalise"}, r"the cut Withdraw\(layer=2\)"),
        ({"ffn": 0.5}, "ffn=0.5 divides"),
        ({"heads": 1.5}, "heads=1.5 is a share"),
        ({"heads": 0.5, "whole": -1}, "whole=-1 counts"),
        ({"heads": ((True,) * 4,) * 2}, r"a head mask of \[2, 4\] .* 3 layers with 4 heads"),
        ({"heads": ((True,) * 3,) * 3}, r"a head mask of \[3, 3\] .* 3 layers with 4 heads"),
        ({"heads": ((True, True, False, True),) * 3}, r"heads 2\.\.3, which share one key head"),
    ],
)
def test_what_does_not_fit_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        of(**fields).check(DIMS)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json"])
def test_a_head_mask_in_a_file(tmp_path, suffix):
    mask = np.arange(12).reshape(3, 4) % 4 < 2
    path = tmp_path / f"mask{suffix}"
    save_head_mask(path, mask)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing half written is left
    assert np.array_equal(load_head_mask(path), mask)
    method = yopo(heads=str(path), layers=2)
    assert np.array_equal(method.check(DIMS).compute.alive(DIMS), mask[:, ::2])
    assert hash(method) == hash(yopo(heads=str(path), layers=2))
    assert yopo(heads="0.5") == yopo(heads=0.5)


def test_files_that_hold_no_head_mask(tmp_path):
    (tmp_path / "odd.json").write_text("[[true, false], [true]]")
    (tmp_path / "broken.json").write_text("[[true")
    (tmp_path / "names.json").write_text(json.dumps([["a", "b"]]))
    np.save(tmp_path / "flat.npy", np.ones(4, bool))
    np.save(tmp_path / "floats.npy", np.full((2, 2), 0.5))
    np.save(tmp_path / "bits.npy", np.eye(2, dtype=int))
    np.savez(tmp_path / "two.npz", a=np.ones(1), b=np.ones(1))
    (tmp_path / "mask.txt").write_text("1 0")
    wrong = {
        "odd.json": "rows differ", "broken.json": "no JSON", "names.json": "holds <U1",
        "flat.npy": r"shape \(4,\)", "floats.npy": "holds float64", "two.npz": "'a', 'b'",
        "mask.txt": r"no \.npy",
    }  # fmt: skip
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            load_head_mask(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="one bool for each head"):
        yopo(heads=str(tmp_path / "nowhere.npy"))
    assert load_head_mask(tmp_path / "bits.npy") == ((True, False), (False, True))
    for mask, name in ((np.ones(3, bool), "a.npy"), (np.ones((2, 2)), "a.npy")):
        with pytest.raises(ValueError, match="no bool"):
            save_head_mask(tmp_path / name, mask)
    with pytest.raises(ValueError, match="name it"):
        save_head_mask(tmp_path / "a.txt", np.ones((2, 2), bool))


# ------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("cfg", "method", "trillions"),
    [
        (llava_1_5_7b(), yopo(window=None, layers=None, ffn=1, heads=None), 7.63),
        (llava_1_5_7b(), yopo(window=None, whole=0), 1.91),
        (llava_1_5_7b(), yopo(window=None, whole=0, mass="official"), 1.91),
        (llava_1_5_13b(), yopo(window=None, whole=0, layers=20), 3.72),
        (llava_1_5_7b(), yopo(window=5, whole=0, layers=8), 0.933),
    ],
)
def test_published_counts(cfg, method, trillions):
    table = plan(method, dims_of(cfg, 1), sizes_of(cfg), 64)
    assert table.decoder_flops_x2 / 1e12 == pytest.approx(trillions, abs=0.005)


def test_rows_of_a_stage():
    """24 x 24 patches in blocks of 8, whatever the tiles; a few tokens all with all."""
    cfg = llava_next_vicuna_7b()
    rows = layout(of(window=5), dims_of(cfg, 5), 1, 2928)
    assert (rows.newlines, rows.visual) == (72, 2880)
    assert (rows.blocks, rows.side, rows.reach) == (45, 8, 12)
    assert rows.aligned
    assert rows.pairs() == 2880 * 144
    few = layout(of(window=5), dims_of(cfg, 5), 1, 300)  # behind a cut
    assert (few.blocks, few.visual, few.pairs()) == (0, 300, 90000)
    some = layout(of(window=5), dims_of(cfg, 5), 1, 1464)
    assert (some.blocks, some.aligned) == (45, False)
    causal = layout(of(ffn=2), dims_of(cfg, 5), 1, 2928)
    assert (causal.causal, causal.pairs(block=2880), causal.pairs(960)) == (
        True,
        2880**2,
        960**2 * 6,
    )
    wide = layout(of(window=47), dims_of(llava_1_5_7b(), 1), 1, 576)
    assert wide.blocks == 0
    cells = layout(Method("yopo", pool(12).vision, (), VisualCompute(3)), dims_of(cfg, 5), 1, 800)
    assert (cells.unit, cells.side, cells.newlines) == (2.0, 6, 36)


STACK = replace(BASE, decoder=replace(BASE.decoder, layers=3))
GROUPED = replace(SMALL, stacked=False, decoder=replace(SMALL.decoder, layers=3))
APART = replace(STACK, stacked=False)
HEADS = ((True,) * 4, (True, False, True, False), (False,) * 4)
SAMPLED = compose(Method("v", VisionGuided(budget=30)), yopo(window=3, layers=2, whole=0))


@pytest.mark.parametrize(
    ("cfg", "method", "questions"),
    [
        (APART, of(window=5, heads=HEADS, ffn=2, mass="renormalise"), 1),
        pytest.param(STACK, of(window=5, heads=0.5, whole=0, layers=2), 2, marks=pytest.mark.slow),
        pytest.param(GROUPED, SAMPLED, 2, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_what_the_compiler_counts(cfg, method, questions):
    table = plan(method, dims_of(cfg, 1), sizes_of(cfg), 24, prefix_tokens=8, questions=questions)
    count = counted(cfg, method, prefix=8, questions=questions, text=24)
    assert table.flops.total == pytest.approx(count, rel=0.03)


def test_official_mass_costs_keys_and_layers_that_renormalised_does_not():
    cfg = llava_1_5_7b()
    dims, sizes = dims_of(cfg, 1), sizes_of(replace(cfg, stacked=False))
    full, mine, theirs = (
        plan(m, dims, sizes, 64).flops.decoder
        for m in (
            yopo(None, None, 1, None), yopo(whole=0), yopo(whole=0, mass="official"),
        )
    )  # fmt: skip
    assert 0.30 < mine / full < 0.33
    assert 0.55 < theirs / full < 0.57


def test_cache_bytes_end_at_the_withdrawal():
    dims, sizes = dims_of(BASE, 1), sizes_of(BASE)
    table = plan(yopo(layers=2), dims, sizes, 10)
    row = 2 * 4 * 32 * 4
    assert table.kv_bytes == (2 * (256 + 10) * row, 4 * 10 * row)
