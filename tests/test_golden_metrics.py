"""Recorded metrics: our rules give what the official code gave, and a copy that is wrong fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from focus_jax.golden.metrics import CASES
from focus_jax.golden.replay import check

GOLDEN = Path(__file__).parent / "golden" / "metrics"
NAMES = sorted(place.name for place in GOLDEN.iterdir())
CHOICE = ("mmbench_circular", "mme", "pope", "scienceqa")


def edit(place: Path, change) -> None:
    """A JSON file as `change` leaves it."""
    content = json.loads(place.read_text())
    change(content)
    place.write_text(json.dumps(content))


@pytest.fixture
def copied(tmp_path):
    """A writable copy of a case."""

    def copy(name: str) -> Path:
        place = tmp_path / name
        shutil.copytree(GOLDEN / name, place)
        return place

    return copy


def test_every_metric_has_a_case():
    assert sorted(CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recorded_scores(name):
    verdict = check(GOLDEN / name)
    assert verdict.status == "passed", verdict.line(name)
    assert not verdict.inputs and all(found.error == 0 for found in verdict.arrays.values())


@pytest.mark.parametrize("name", ["mme", "pope", "scienceqa"])
def test_a_part_of_a_case_is_a_case(name, copied):
    """Other items, in another number and order: nothing is assumed of those that are here."""
    place = copied(name)
    items = json.loads((place / "items.json").read_text())
    part = np.random.default_rng(0).permutation(len(items))[: len(items) // 3]
    (place / "items.json").write_text(json.dumps([items[i] for i in part]))
    arrays = {n: array[part] for n, array in np.load(place / "arrays.npz").items()}
    np.savez(place / "arrays.npz", **arrays)

    def shorten(case):
        case["aggregate"] = {}
        case["array_shapes"] = {n: ["float32", len(part)] for n in arrays}

    edit(place / "case.json", shorten)
    renamed = place.rename(place.with_name(f"{name}_third"))
    verdict = check(renamed)
    assert verdict.status == "passed", verdict.line(name)


def fault(place: Path) -> str:
    verdict = check(place)
    assert verdict.status == "failed"
    return " ".join(verdict.faults)


@pytest.mark.parametrize(
    ("name", "field"),
    [("mme", "parsed"), ("pope", "parsed"), ("pope", "lmms_eval_prediction"),
     ("scienceqa", "parsed"), ("scienceqa", "predicted_index"), ("scienceqa", "lmms_eval_score"),
     ("mmbench_circular", "inferred"), ("mmbench_circular", "group")],
)  # fmt: skip
def test_the_first_item_that_differs_is_told(name, field, copied):
    place = copied(name)

    def change(items):
        items[11][field] = "maybe"
        items[50][field] = "maybe"

    edit(place / "items.json", change)
    assert fault(place).startswith(f"item 11: {field} is ") and "'maybe'" in fault(place)


@pytest.mark.parametrize(
    ("name", "path"),
    [("mme", "perception"), ("mme", "per_category.OCR"), ("pope", "mean_f1"),
     ("pope", "per_category.popular.TP"), ("pope", "lmms_eval_all_items.yes_ratio"),
     ("scienceqa", "img_accuracy_percent"), ("mmbench_circular", "group_hits.7"),
     ("mmbench_circular", "single_letter_only_overall")],
)  # fmt: skip
def test_the_first_figure_that_differs_is_told(name, path, copied):
    place = copied(name)

    def change(case):
        *above, last = path.split(".")
        at = case["aggregate"]
        for key in above:
            at = at[key]
        at[last] += 1e-6

    edit(place / "case.json", change)
    assert f"aggregate.{path} is" in fault(place)


@pytest.mark.parametrize("name", CHOICE)
def test_scores_and_figures_that_nobody_computes(name, copied):
    place = copied(name)
    arrays = dict(np.load(place / "arrays.npz"))
    wrong = arrays | {"scores": arrays["scores"].copy()}
    wrong["scores"][-1] += 1
    np.savez(place / "arrays.npz", **wrong)
    verdict = check(place)
    assert verdict.status == "failed" and "1 of" in str(verdict.arrays["scores"])
    np.savez(place / "arrays.npz", **arrays)
    edit(place / "case.json", lambda case: case["aggregate"].update(surprise=1))
    assert "aggregate.surprise: nothing here computes it" in fault(place)


def test_items_that_are_not_there(copied):
    place = copied("pope")
    edit(place / "items.json", lambda items: items[3].pop("label"))
    assert "item 3 has no label" in fault(place)
    (place / "items.json").unlink()
    assert "there is no" in fault(place) and "items.json" in fault(place)


def test_a_metric_by_its_directory(copied):
    place = copied("mme")
    assert "other is no metric: name the directory after vqa_textvqa" in fault(
        place.rename(place.with_name("other"))
    )
