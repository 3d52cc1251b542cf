"""Recorded scores of yes/no and choice benchmarks: POPE, MME, MMBench, ScienceQA.

Parsed texts and aggregates must be equal too; ValueError names the first that is not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from focus_jax.evaluate.scoring import mmbench, mme, pope, scienceqa
from focus_jax.golden.case import Recorded
from focus_jax.golden.items import Item, check_aggregate, check_items, read_items


def floats(values: Sequence[float | bool]) -> np.ndarray:
    """Scores as they are recorded."""
    return np.asarray(values, np.float32)


# ------------------------------------------------------------------------------------- POPE


def replay_pope(case: Recorded) -> dict[str, np.ndarray]:
    """LLaVA's rule by category; lmms-eval's over all items."""
    items = read_items(case, ("prediction", "label", "category"))
    # LLaVA's script takes every label but "no" for yes.
    labels = ["no" if item["label"] == "no" else "yes" for item in items]
    llava = [pope.parse(item["prediction"]) for item in items]
    scores = [float(said == label) for said, label in zip(llava, labels, strict=True)]
    other = [pope.parse_lmms_eval(item["prediction"]) for item in items]
    golds = [item["label"].lower().strip() for item in items]
    others = [float(said == gold) for said, gold in zip(other, golds, strict=True)]
    rows = zip(llava, scores, other, others, strict=True)
    names = ("parsed", "score", "lmms_eval_prediction", "lmms_eval_score")
    check_items(items, (dict(zip(names, row, strict=True)) for row in rows))
    check_aggregate(case.info.get("aggregate", {}), pope_aggregate(items, llava, labels, other))
    return {"scores": floats(scores), "scores_lmms_eval": floats(others)}


def pope_aggregate(
    items: Sequence[Item], llava: Sequence[str], labels: Sequence[str], other: Sequence[str]
) -> dict[str, Any]:
    """Counts and figures of each category, their means, and lmms-eval's figures of all."""
    by_category = {}
    for category in dict.fromkeys(item["category"] for item in items):
        of = [i for i, item in enumerate(items) if item["category"] == category]
        counts = pope.count([llava[i] for i in of], [labels[i] for i in of])
        numbers = {"TP": counts.tp, "FP": counts.fp, "TN": counts.tn, "FN": counts.fn}
        by_category[category] = {"count": counts.total, **numbers, **counts.figures()}
    golds = [item["label"].lower().strip() for item in items]
    means = {
        f"mean_{name}": sum(found[name] for found in by_category.values()) / len(by_category)
        for name in ("f1", "accuracy", "precision", "recall", "yes_ratio")
    }
    every = pope.count(other, golds, yes_of_labels=True).figures()
    return {"per_category": by_category, **means, "lmms_eval_all_items": every}


# -------------------------------------------------------------------------------------- MME


def replay_mme(case: Recorded) -> dict[str, np.ndarray]:
    """Every answer, and the sums over categories."""
    items = read_items(case, ("question_id", "category", "answer", "prediction"))
    parsed = [mme.parse(item["prediction"]) for item in items]
    golds = [mme.cleaned(item["answer"]) for item in items]
    scores = [float(said == gold) for said, gold in zip(parsed, golds, strict=True)]
    rows = zip(parsed, scores, strict=True)
    check_items(items, ({"parsed": said, "score": score} for said, score in rows))
    categories = mme.by_category(
        [
            mme.Answered(item["category"], item["question_id"], score)
            for item, score in zip(items, scores, strict=True)
        ]
    )
    aggregate = mme.totals(categories) | {"per_category": categories}
    check_aggregate(case.info.get("aggregate", {}), aggregate)
    return {"scores": floats(scores)}


# ---------------------------------------------------------------------------------- MMBench


def replay_mmbench(case: Recorded) -> dict[str, np.ndarray]:
    """Hits of whole questions, in the order of their ids."""
    items = read_items(case, ("index", "choices", "answer", "prediction"))
    texts = [str(item["prediction"]) for item in items]
    inferred = [mmbench.infer(t, i["choices"]) for t, i in zip(texts, items, strict=True)]
    groups = [item["index"] % mmbench.ROTATION for item in items]
    rows = zip(inferred, groups, strict=True)
    check_items(items, ({"inferred": letter, "group": group} for letter, group in rows))
    read = [mmbench.read_letter(t, i["choices"]) for t, i in zip(texts, items, strict=True)]
    rotations = rotations_of(items, [r == i["answer"] for r, i in zip(read, items, strict=True)])
    hits = mmbench.circular(rotations)
    bare = rotations_of(
        items, [t.strip() == i["answer"] for t, i in zip(texts, items, strict=True)]
    )
    rates = mmbench.hit_rates(rotations)
    aggregate = {
        "overall": rates["overall"][""], "category": rates["category"],
        "l2_category": rates["l2_category"],
        "group_hits": {str(group): int(hit) for group, hit in hits.items()},
        "single_letter_only_overall": mmbench.hit_rates(bare)["overall"][""],
    }  # fmt: skip
    check_aggregate(case.info.get("aggregate", {}), aggregate)
    return {"scores": np.asarray(list(hits.values()), np.int64)}


def rotations_of(items: Sequence[Item], right: Sequence[bool]) -> list[mmbench.Rotation]:
    """The items with what came of them."""
    return [
        mmbench.Rotation(item["index"], hit, item.get("category", ""), item.get("l2_category", ""))
        for item, hit in zip(items, right, strict=True)
    ]


# -------------------------------------------------------------------------------- ScienceQA


def replay_scienceqa(case: Recorded) -> dict[str, np.ndarray]:
    """Answers (null: missing from the result file), all of them and those with an image."""
    items = read_items(case, ("num_choices", "answer", "prediction", "prompt"))
    ours = [scienceqa_item(item) for item in items]
    check_items(items, ours)
    right = [row["score"] for row in ours]
    image = [row["score"] for row in ours if row["is_multimodal"]]
    total, of_images = 100 * sum(right) / len(right), 100 * sum(image) / max(len(image), 1)
    printed = (
        f"Total: {len(right)}, Correct: {int(sum(right))}, Accuracy: {total:.2f}%, "
        f"IMG-Accuracy: {of_images:.2f}%"
    )
    aggregate = {
        "accuracy_percent": total, "correct": sum(right), "count": len(right),
        "img_accuracy_percent": of_images, "printed": printed,
    }  # fmt: skip
    check_aggregate(case.info.get("aggregate", {}), aggregate)
    others = [row["lmms_eval_score"] or 0.0 for row in ours]
    return {"scores": floats(right), "scores_lmms_eval": floats(others)}


def scienceqa_item(item: Item) -> dict[str, Any]:
    """What is recorded of one item."""
    answer, gold = item["prediction"], item["answer"]
    missing = answer is None
    parsed = scienceqa.parse(scienceqa.FAILED if missing else answer)
    place = scienceqa.index_of(parsed, item["num_choices"])
    other = None if missing else scienceqa.right_by_lmms_eval(answer, scienceqa.LETTERS[gold])
    return {
        "parsed": parsed, "predicted_index": place, "score": float(place == gold),
        "is_multimodal": not missing and "<image>" in item["prompt"],
        "lmms_eval_score": None if other is None else float(other),
    }  # fmt: skip


CASES: dict[str, Callable[[Recorded], Mapping[str, np.ndarray]]] = {
    "pope": replay_pope,
    "mme": replay_mme,
    "mmbench_circular": replay_mmbench,
    "scienceqa": replay_scienceqa,
}
