"""How recorded cases are read and compared; all of them are run where there is time."""

import json
from pathlib import Path

import numpy as np
import pytest

from focus_jax.golden import decoder, vision, yopo
from focus_jax.golden.case import Recorded, find, read
from focus_jax.golden.decoder import read_case
from focus_jax.golden.replay import METHODS, check, compared
from focus_jax.golden.tolerance import Tolerance, compare, parse, tolerance_of

GOLDEN = Path(__file__).parent / "golden"
BESIDE = Path(__file__).parents[2] / "shared" / "golden"  # more cases, where they lie there
CASES = find([GOLDEN])
EXACT = Tolerance()


def cases_beside() -> dict[str, Path]:
    return find([BESIDE]) if BESIDE.is_dir() else {}


# ------------------------------------------------------------------------------- tolerances


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        ("exact", EXACT),
        ("exact (only copies)", EXACT),
        ("rtol 1e-4", Tolerance(rtol=1e-4)),
        ("atol 2e-4, rtol 1e-4", Tolerance(2e-4, 1e-4)),
        ("rtol 2e-2, atol 1e-6", Tolerance(1e-6, 2e-2)),
        ("atol 4e-3 (float16 rounding); else atol 0.5 on 1 % of the pixels", Tolerance(4e-3)),
        ("atol 0.03", Tolerance(0.03)),
        ("1e-6", Tolerance(1e-6)),
    ],
)
def test_words_of_a_tolerance(text, tolerance):
    assert parse({"x": text}) == {"x": tolerance}


def test_the_same_is_the_one_before():
    assert parse({"a": "exact", "b": "rtol 1e-3", "c": "the same"})["c"] == Tolerance(rtol=1e-3)
    with pytest.raises(ValueError, match=r"tolerances\.tokens is 'about 1e-3'"):
        parse({"tokens": "about 1e-3"})
    with pytest.raises(ValueError, match="the same"):
        parse({"tokens": "the same"})


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("scores", Tolerance(rtol=1e-3)),
        ("scores_stage11", Tolerance(rtol=1e-3)),
        ("rater_scores", Tolerance(rtol=1e-3)),
        ("hidden_layer2", Tolerance(1e-5)),
        ("hidden_layerK", Tolerance(1e-5)),
        ("last_hidden_per_layer", Tolerance(2e-5)),
        ("q23", Tolerance(2e-4)),
        ("k23", Tolerance(2e-4)),
        ("prefill_output", Tolerance(1e-2)),
        ("decode_output", Tolerance(1e-4)),  # not stated
        ("threshold", Tolerance(rtol=1e-4)),
        ("q1_q3", Tolerance(rtol=1e-4)),
        ("cls_attention_sum", Tolerance(rtol=1e-4)),
        ("metric", Tolerance(1e-4)),
        ("packed_single_tile", EXACT),
    ],
)
def test_the_tolerance_of_an_array(name, tolerance):
    stated = {
        "indices": "exact", "scores": "rtol 1e-3", "hidden": "atol 1e-5", "packed": "exact",
        "last_hidden_per_layer": "atol 2e-5", "q23_k23": "atol 2e-4", "prefill_output": "atol 1e-2",
    }  # fmt: skip
    assert tolerance_of(name, np.zeros(3, "f4"), parse(stated)) == tolerance
    for whole in (np.zeros(3, np.int64), np.zeros(3, bool), np.array(["a"])):
        assert tolerance_of(name, whole, parse(stated)) == EXACT


def test_the_largest_error_is_told_in_the_measure_that_counts():
    recorded, ours = np.array([1.0, -4.0, 0.5]), np.array([1.1, -3.8, 0.5])
    found = compare(ours, recorded, Tolerance(rtol=0.2))
    assert found.error == pytest.approx(0.1) and not found.fault
    found = compare(ours, recorded, Tolerance(atol=0.15))
    assert found.error == pytest.approx(0.2)
    assert found.fault == "2.0e-01 (1 of 3 beyond atol 0.15)"
    assert not compare(ours, recorded, Tolerance(0.15, 0.02)).fault


@pytest.mark.parametrize("tolerance", [Tolerance(1e-4), Tolerance(rtol=1e-4), EXACT])
def test_what_is_no_number_is_within_nothing(tolerance):
    recorded = np.array([1.0, np.nan, np.inf])
    assert not compare(recorded, recorded, tolerance).fault
    for worse in (
        [np.nan, np.nan, np.inf],
        [1.0, 2.0, np.inf],
        [1.0, np.nan, -np.inf],
        [1, np.nan],
    ):
        found = compare(np.array(worse), recorded, tolerance)
        assert found.fault
        json.loads(json.dumps(found.to_json(), allow_nan=False))


def test_exact_arrays_tell_the_first_that_differs():
    found = compare(np.array([[1, 2], [5, 6]]), np.array([[1, 2], [3, 4]]), EXACT)
    assert (found.error, found.fault) == (2, "2 of 4 differ, first [1, 0]: 5 instead of 3")
    assert compare(np.array(["yes"]), np.array(["no"]), EXACT).fault.endswith("yes instead of no")
    assert (
        compare(np.int32(3), np.array(4), EXACT).fault == "1 of 1 differ, first []: 3 instead of 4"
    )
    assert str(compare(np.int32(4), np.array(4), EXACT)) == "exact"


# ------------------------------------------------------------------- every array of every case


def perturbed(array: np.ndarray, tolerance: Tolerance, times: float) -> np.ndarray:
    """One entry moved by so many tolerances; whole numbers by one."""
    out = array.copy()
    at = np.unravel_index(out.size // 2, out.shape)
    if tolerance == EXACT:
        out[at] = not out[at] if out.dtype == bool else out[at] + 1
    else:
        value = np.float64(out[at])
        out[at] = value + times * (tolerance.atol + tolerance.rtol * abs(value))
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_array_counts(name):
    """As if ours were what is recorded: each array alone, beyond its tolerance, is what fails."""
    case = read(CASES[name])
    stated = parse(case.info["tolerances"])
    verdict = compared(case, case.arrays)
    assert verdict.status == "passed" and not verdict.faults
    assert sorted([*verdict.arrays, *verdict.inputs]) == sorted(case.info["array_shapes"])
    kinds = {case.arrays[array].dtype.kind for array in verdict.arrays}
    assert kinds <= {"f", "i"}
    for array in verdict.arrays:
        recorded, tolerance = case.arrays[array], tolerance_of(array, case.arrays[array], stated)
        if not recorded.size:
            continue
        for times, status in ((0.8, "passed"), (1.2, "failed")):
            if times > 1 or tolerance != EXACT:
                ours = case.arrays | {array: perturbed(recorded, tolerance, times)}
                found = compared(case, ours)
                assert found.status == status, (array, times)
                assert {n for n, d in found.arrays.items() if d.fault} <= {array}
        without = {n: a for n, a in case.arrays.items() if n != array}
        assert compared(case, without).faults == (
            f"{array} not compared: nothing here computes it",
        )
        lacking = case._replace(arrays=without)
        assert compared(lacking, case.arrays).faults == (f"{array} is listed but was not recorded",)


def test_an_array_that_nobody_knows_or_of_another_shape():
    case = read(CASES["vtw/k4"])
    more = case._replace(arrays=case.arrays | {"surprise": np.zeros(3)})
    assert compared(more, case.arrays).faults == (
        "surprise not compared: nothing here computes it",
    )
    wide = case.arrays["positions_after"].astype(np.int32)
    other = case._replace(arrays=case.arrays | {"positions_after": wide})
    assert compared(other, case.arrays).faults == (
        "positions_after is recorded as int32 [16], case.json says int64 [16]",
    )


def test_nothing_recorded_is_no_success(tmp_path):
    case = Recorded(tmp_path, "anyres", {"knobs": {}}, {"image_newline": np.zeros(4)})
    verdict = compared(case, {})
    assert (verdict.status, verdict.faults) == ("failed", ("no array was compared",))


# -------------------------------------------------------------------------------------- knobs


def test_counts_are_rounded_as_officially():
    """int(n * share) of binary fractions: 100 * (1 - 0.9) and 100 * 0.29 lie below 10 and 29."""
    case = read_case(CASES["fastv/k3_r50"])._replace(visual=100)
    [cut] = decoder.method_of(case._replace(knobs={"K": 2, "ratio": 0.9})).cuts
    assert (cut.layer, cut.slots(100)) == (2, 9)
    knobs = {"layer_list": [1, 3], "image_token_ratio_list": [1.0, 0.6, 0.29]}
    first, second = decoder.method_of(case._replace(method="pyramiddrop", knobs=knobs)).cuts
    assert (first.slots(100), second.slots(100)) == (60, 28)


def test_tables_above_what_is_there_keep_all_but_one():
    case = read_case(CASES["sparsevlm/v1_192"])._replace(visual=256)
    method = decoder.method_of(case)
    cuts = [(c.layer, c.slots(256), c.merged_slots(256)) for c in method.cuts]
    # 1 dropped, 1 cluster; 56 dropped, 17 recycled; 92 dropped, 28 recycled.
    assert cuts == [(3, 256, 1), (7, 202, 2), (16, 113, 3)]
    with pytest.raises(ValueError, match="version '2_0'"):
        decoder.method_of(case._replace(knobs=case.knobs | {"version": "2_0"}))


def test_knobs_of_visual_compute():
    case = read_case(CASES["yopo/all"])
    whole = {"attncut_w": 47, "layercut_num": case.decoder.layers, "mlpcut_ratio": 1}
    off = yopo.method_of(case._replace(knobs=case.knobs | whole))
    assert (off.compute.half, off.compute.layers, off.compute.ffn) == (23, None, 1)
    assert np.array_equal(off.compute.heads, case.arrays["head_mask"])
    assert [cut.layer for cut in off.cuts] == [1, 2, 3, 4, 5]
    knobs = {"attncut_w": 6, "layercut_num": 5, "mlpcut_ratio": 4}
    some = yopo.method_of(case._replace(knobs=case.knobs | knobs)).compute
    assert (some.half, some.layers, some.neurons(128)) == (2, 5, 32)
    assert (some.mode, some.mass) == ("masked", "official")


def test_an_unknown_variant_is_refused():
    case = read(CASES["prumerge/plus_adaptive"])
    other = case._replace(info=case.info | {"knobs": case.knobs | {"variant": "pro"}})
    with pytest.raises(ValueError, match="variant 'pro': known are plain, plus"):
        vision.replay_prumerge(other)


# ------------------------------------------------------------------------------------ running


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_our_cases(name):
    verdict = check(CASES[name])
    assert verdict.status == "passed", verdict.line(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases_beside())
def test_cases_beside_the_repository(name):
    verdict = check(cases_beside()[name])
    assert verdict.status == "passed", verdict.line(name)


def test_each_method_has_a_case():
    methods = {read(place).method for place in CASES.values()}
    assert methods == set(METHODS)
