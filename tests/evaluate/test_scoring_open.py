"""Official rules of open-ended benchmarks: recorded outputs, and every trap by hand."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from focus_jax.evaluate.scoring import anls as documents
from focus_jax.evaluate.scoring import gqa, ocrbench, relaxed, vqa
from focus_jax.evaluate.scoring.anls import anls, edit_distance
from focus_jax.golden.case import Recorded, read
from focus_jax.golden.metrics_open import CASES

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"


# ------------------------------------------------------------------------ recorded outputs


@pytest.mark.parametrize("name", CASES)
def test_recorded_cases_are_equal_to_the_last_digit(name):
    case = read(GOLDEN / name)
    ours = CASES[name](case)
    assert set(ours) == set(case.arrays)
    for array, recorded in case.arrays.items():
        assert ours[array].dtype == recorded.dtype
        np.testing.assert_array_equal(ours[array], recorded)


def test_recorded_items_are_equal_as_float64():
    """The arrays are float32; items hold what the official code gave."""
    for item in items("vqa_textvqa"):
        assert vqa.accuracy(item["prediction"], item["answers"]) == item["score"]
        own = vqa.accuracy_vqav2(item["prediction"], item["answers"])
        assert own == item["vqav2_variant_score"]
    for item in items("anls"):
        assert anls(item["prediction"], item["answers"]) == item["score"]


def items(name):
    return json.loads((GOLDEN / name / "items.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "field", "wrong"),
    [
        ("vqa_textvqa", "prediction_normalised", "elsewhere"),
        ("vqa_textvqa", "vqav2_variant_prediction", "elsewhere"),
        ("gqa", "converted", "elsewhere"),
        ("anls", "score", 0.123),
        ("relaxed_accuracy", "score", 0.5),
    ],
)
def test_an_item_that_differs_is_named(name, field, wrong, tmp_path):
    rows = items(name)
    rows[3][field] = wrong
    with pytest.raises(ValueError, match=f"item 3.*{field}"):
        CASES[name](changed(name, tmp_path, rows))


@pytest.mark.parametrize("name", CASES)
def test_an_aggregate_that_differs_is_named(name, tmp_path):
    case = changed(name, tmp_path, items(name))
    first = next(iter(case.info["aggregate"]))
    case.info["aggregate"][first] += 0.001
    with pytest.raises(ValueError, match=first):
        CASES[name](case)


def changed(name, folder, rows) -> Recorded:
    (folder / "items.json").write_text(json.dumps(rows), encoding="utf-8")
    return read(GOLDEN / name)._replace(directory=folder)


# --------------------------------------------------------------------------- VQA accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5.", "5"),  # the misspelt look-behind: a period after a digit goes
        ("3.5", "3.5"),
        (".5", ".5"),
        ("1.", "1"),
        ("p.m.", "pm"),
        ("The  Cat ", "cat"),
        ("a", ""),
        ("None", "0"),
        ("two", "2"),
        ("dont", "don't"),
        ("Im", "im"),  # its key has a capital: never matched
        ("somebody'd", "somebodyd"),
        ("Ow's'at", "ow 's'at"),  # "'s" is set apart before contractions are looked up
        ("y'alld've", "y'all'd've"),
        ("it's", "it 's"),
        ("1,000", "1000"),  # the first step drops commas
        ("stop-sign", "stop sign"),
        ("stop- sign", "stop sign"),
        ("a - b", "b"),
        ("x-y z-", "x y z"),
        ("what?", "what"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("a\nb\tc", "b c"),
    ],
)
def test_normalisation(text, expected):
    assert vqa.normalise(text) == expected


def test_a_mark_goes_everywhere_once_it_touches_a_space_anywhere():
    assert vqa.normalise("left-right- up") == "leftright up"
    assert vqa.normalise("left-right up") == "left right up"


def test_the_table_of_contractions_is_as_long_as_the_official_one():
    assert len(vqa.CONTRACTIONS) == 120
    assert vqa.CONTRACTIONS["she'dve"] == vqa.CONTRACTIONS["shed've"] == "she'd've"
    assert "shed" not in vqa.CONTRACTIONS  # a word of its own
    assert "well" not in vqa.CONTRACTIONS


def test_only_thirty_two_periods_go():
    assert vqa.normalise("x." * 40) == "x" * 33 + ".x" * 7 + "."


def test_vqav2s_variant_skips_the_first_step():
    assert vqa.normalise_vqav2("cat's") == "cat's"
    assert vqa.normalise("cat's") == "cat 's"
    assert vqa.normalise_vqav2("red,blue") == "red blue"
    assert vqa.normalise("red,blue") == "redblue"
    assert vqa.normalise_vqav2("1,000-5") == "10005"  # digit,digit: every mark is deleted
    assert vqa.normalise("1,000-5") == "1000 5"


@pytest.mark.parametrize(
    ("same", "expected"),
    # s people agree: s sets have s - 1 matches, 10 - s have s; each counts min(matches / 3, 1).
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_agreement_with_ten_people(same, expected):
    golds = ["yes"] * same + [f"other {i}" for i in range(10 - same)]
    for rule in (vqa.accuracy, vqa.accuracy_lmms_eval, vqa.accuracy_vqav2):
        assert rule("Yes.", golds) == pytest.approx(expected, abs=1e-15)


def test_an_empty_answer_matches_answers_that_normalise_to_nothing():
    assert vqa.accuracy("", ["the"] * 10) == 1.0


def test_no_gold_answers_is_an_error():
    with pytest.raises(ValueError, match="no gold answers"):
        vqa.accuracy("yes", [])
    with pytest.raises(ValueError, match="no gold answers"):
        anls("yes", [])


# -------------------------------------------------------------------------------------- GQA


@pytest.mark.parametrize(
    ("prediction", "gold", "llava", "lmms_eval"),
    [
        ("Yes.", "yes", 1, 1),
        ("yes...", "yes", 1, 1),
        ("yes .", "yes", 0, 0),  # LLaVA strips dots, not spaces
        ("yes!", "yes", 0, 1),
        ("light-blue", "lightblue", 0, 1),
        ("yes", "Yes", 0, 1),  # LLaVA lower-cases the prediction alone
        ("", "", 1, 1),
    ],
)
def test_gqa(prediction, gold, llava, lmms_eval):
    assert gqa.exact(prediction, gold) == llava
    assert gqa.exact_lmms_eval(prediction, gold) == lmms_eval


# ------------------------------------------------------------------------------------- ANLS


def test_anls_of_exactly_a_half_counts():
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abcde", ["abxyz"]) == 0.0  # 0.4


def test_anls_takes_the_nearest_answer_and_ignores_case_and_spaces():
    assert anls("ITC Limited", ["paul", "itc  limited"]) == 1.0
    assert anls("", [""]) == 1.0


def test_anls_divides_by_the_raw_length():
    assert anls("ab ", ["cb"]) == pytest.approx(1 - 1 / 3)  # not 1 - 1 / 2
    assert anls("straße", ["strasse"]) == pytest.approx(1 - 2 / 7)  # upper case is longer


def test_edit_distance_is_the_shortest_way():
    @cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        kept = slow(a[1:], b[1:]) + (a[0] != b[0])
        return min(kept, slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 7))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)
    assert documents.THRESHOLD == 0.5


# ---------------------------------------------------------------------------------- ChartQA


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.0001", "100", False),
        ("1.05", "1", False),  # 0.05 in float64 is a hair over
        ("50%", "0.5", True),
        ("50", "50%", False),
        ("50%", "50", False),
        ("0", "0", True),
        ("0.0", "0", False),  # a target of zero: texts
        ("0.01", "0", False),
        ("0%", "0%", True),
        ("1,000", "1000", False),  # no number to Python
        ("1,000", "1,000", True),
        ("1e3", "1000", True),
        ("1_000", "1000", True),
        ("YES", "yes", True),
        (" yes", "yes", False),
        ("-100", "100", False),
        ("nan", "5", False),
        ("%", "%", True),
    ],
)
def test_relaxed_accuracy(prediction, gold, right):
    assert relaxed.relaxed(prediction, gold) == float(right)


def test_numbers_are_what_python_reads():
    assert relaxed.number("12.5%") == 0.125
    assert relaxed.number(" 7 ") == 7
    assert math.isinf(relaxed.number("inf"))
    assert relaxed.number("7 apples") is None


# --------------------------------------------------------------------------------- OCRBench


@pytest.mark.parametrize(
    ("prediction", "golds", "dataset", "llava", "lmms_eval"),
    [
        ("It says CENTRE.", ["centre"], "IIIT5K", 1, 1),
        ("CENTER", ["centre"], "IIIT5K", 0, 0),
        ("ten past ten", ["10:10", "Ten past"], "textVQA", 1, 1),
        ("two\nlines", ["two lines"], "IIIT5K", 1, 1),
        ("two  lines", ["two lines"], "IIIT5K", 0, 0),
        ("x^{2} + 1", ["x ^ { 2 }"], "HME100k", 1, 1),  # spaces go
        ("X^{2}", ["x^{2}"], "HME100k", 0, 0),  # case stays
        ("X^{2}", ["x^{2}"], "FUNSD", 1, 1),
        ("\uff21\uff22\uff23\u3000\uff11", ["abc 1"], "ReCTS", 0, 1),  # full width
        ("\uff58", ["x"], "HME100k", 0, 0),
    ],
)
def test_ocrbench(prediction, golds, dataset, llava, lmms_eval):
    assert ocrbench.contains(prediction, golds, dataset) == llava
    assert ocrbench.contains_lmms_eval(prediction, golds, dataset) == lmms_eval
