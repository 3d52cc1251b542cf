"""Recorded scores of open-ended benchmarks: VQA accuracy, GQA, ANLS, ChartQA's relaxed accuracy.

Normalised texts, each item's scores and the aggregates must be equal too; ValueError names the
first that is not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from focus_jax.evaluate.scoring import vqa
from focus_jax.evaluate.scoring.anls import THRESHOLD, anls
from focus_jax.evaluate.scoring.gqa import converted, exact, exact_lmms_eval
from focus_jax.evaluate.scoring.relaxed import relaxed
from focus_jax.golden.case import Recorded
from focus_jax.golden.items import Item, check_aggregate, check_items, read_items


def share(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def columns(
    items: Sequence[Item], rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[np.ndarray, ...]:
    """The named values of every item, as scores are recorded, once all have been checked."""
    check_items(items, rows)
    return tuple(np.asarray([row[name] for row in rows], np.float32) for name in names)


def replay_vqa(case: Recorded) -> dict[str, np.ndarray]:
    """TextVQA by LLaVA's evaluator and lmms-eval's, and lmms-eval's VQAv2."""
    items = read_items(case, ("prediction", "answers"))
    rows = [vqa_item(item["prediction"], item["answers"]) for item in items]
    check_aggregate(case.info.get("aggregate", {}), {
        "accuracy": share([row["score"] for row in rows]),
        "vqav2_variant": share([row["vqav2_variant_score"] for row in rows]),
        "textvqa_lmms_eval": share([row["lmms_eval_score"] for row in rows]),
    })  # fmt: skip
    names = ("score", "vqav2_variant_score", "lmms_eval_score")
    scores, vqav2, lmms_eval = columns(items, rows, names)
    return {
        "scores": scores, "scores_vqav2_variant": vqav2, "scores_textvqa_lmms_eval": lmms_eval,
    }  # fmt: skip


def vqa_item(prediction: str, answers: Sequence[str]) -> dict[str, Any]:
    """What is recorded of one answer."""
    return {
        "prediction_normalised": vqa.normalise(prediction),
        "answers_normalised": [vqa.normalise(answer) for answer in answers],
        "score": vqa.accuracy(prediction, answers),
        "vqav2_variant_prediction": vqa.normalise_vqav2(prediction),
        "vqav2_variant_score": vqa.accuracy_vqav2(prediction, answers),
        "lmms_eval_score": vqa.accuracy_lmms_eval(prediction, answers),
    }


def replay_gqa(case: Recorded) -> dict[str, np.ndarray]:
    """LLaVA's conversion; lmms-eval's exact match."""
    items = read_items(case, ("prediction", "answer"))
    rows: list[dict[str, Any]] = [
        {
            "converted": converted(item["prediction"]),
            "score": exact(item["prediction"], item["answer"]),
            "lmms_eval_score": exact_lmms_eval(item["prediction"], item["answer"]),
        }
        for item in items
    ]
    aggregate = {
        "accuracy": share([row["score"] for row in rows]),
        "lmms_eval": share([row["lmms_eval_score"] for row in rows]),
    }
    check_aggregate(case.info.get("aggregate", {}), aggregate)
    scores, lmms_eval = columns(items, rows, ("score", "lmms_eval_score"))
    return {"scores": scores, "scores_lmms_eval": lmms_eval}


def replay_anls(case: Recorded) -> dict[str, np.ndarray]:
    """ANLS, and how many answers lie at the very threshold."""
    items = read_items(case, ("prediction", "answers"))
    rows = [{"score": anls(item["prediction"], item["answers"])} for item in items]
    found = [row["score"] for row in rows]
    aggregate = {"anls": share(found), "items_at_exactly_half": found.count(THRESHOLD)}
    check_aggregate(case.info.get("aggregate", {}), aggregate)
    return {"scores": columns(items, rows, ("score",))[0]}


def replay_relaxed(case: Recorded) -> dict[str, np.ndarray]:
    """Relaxed accuracy of questions by people, by machine, and all."""
    items = read_items(case, ("prediction", "answer", "type"))
    rows = [{"score": relaxed(item["prediction"], item["answer"])} for item in items]
    both = list(zip((item["type"] for item in items), rows, strict=True))
    aggregate = {"overall": share([row["score"] for row in rows])}
    for kind in ("human", "augmented"):
        aggregate[kind] = share([row["score"] for of, row in both if of == f"{kind}_test"])
    check_aggregate(case.info.get("aggregate", {}), aggregate)
    return {"scores": columns(items, rows, ("score",))[0]}


CASES: dict[str, Callable[[Recorded], Mapping[str, np.ndarray]]] = {
    "vqa_textvqa": replay_vqa,
    "gqa": replay_gqa,
    "anls": replay_anls,
    "relaxed_accuracy": replay_relaxed,
}
