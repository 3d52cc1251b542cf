"""OCRBench: a thousand questions about text in images, in ten types.

Layouts: the authors' OCRBench.json and images (Yuliang-Liu/MultimodalOCR) and echo840/OCRBench's
parquet files, which lmms-eval reads. The prompt is the question alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focus_jax.evaluate.benchmark import Benchmark, Figures, Protocol, Rating, Sample
from focus_jax.evaluate.files import (
    find,
    image_folder,
    not_found,
    read_parquet,
    read_rows,
    shards,
)
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring.ocrbench import GROUPS, contains, contains_lmms_eval

QUESTIONS = "OCRBench.json"
# Questions of each group, and so its points of 1000.
POINTS = {"recognition": 300, "scene": 200, "document": 200, "information": 200, "formulas": 100}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions, numbered: the authors' ids repeat."""
    if path := find(folder, QUESTIONS, f"*/{QUESTIONS}"):
        return from_authors(image_folder(folder, "OCRBench_Images", "images"), path)
    if parts := shards(folder, "test"):
        return from_parquet(parts)
    raise not_found("OCRBench", folder, {
        "authors": f"{QUESTIONS} and OCRBench_Images/",
        "lmms-eval": "data/test-*.parquet",
    }, "the Yuliang-Liu/MultimodalOCR repository, or the echo840/OCRBench dataset of the Hugging "
        "Face hub")  # fmt: skip


def gold_of(answers: str | Sequence[str], kind: str, dataset: str, where: str) -> dict[str, Any]:
    """What rating needs. ValueError: a type of question that OCRBench does not have."""
    if kind not in GROUPS:
        raise ValueError(f"{where}: the type is {kind!r}; OCRBench's are {', '.join(GROUPS)}")
    golds = [answers] if isinstance(answers, str) else list(answers)
    return {"answers": golds, "type": kind, "dataset": dataset}


def from_authors(images: Path, path: Path) -> list[Sample]:
    """The authors' file, in its order."""
    samples = []
    for number, row in enumerate(read_rows(path)):
        name = row["image_path"]
        gold = gold_of(row["answers"], row["type"], row["dataset_name"], row.where)
        prompt = row["question"].strip()
        samples.append(Sample(str(number), (images / name,), prompt, gold, name))
    return samples


def from_parquet(parts: Sequence[Path]) -> list[Sample]:
    """echo840/OCRBench, in the same order."""
    samples = []
    for row in read_parquet(parts, ("dataset", "question", "question_type", "answer")):
        where = f"{parts[0].parent} row {row['row']}"
        gold = gold_of(row["answer"], row["question_type"], row["dataset"], where)
        samples.append(Sample(str(row["row"]), (row["image"],), row["question"].strip(), gold))
    return samples


def rate(sample: Sample, answer: str, protocol: Protocol) -> Rating:
    """A point where a gold answer stands within this one."""
    rule = contains_lmms_eval if protocol == "lmms-eval" else contains
    return Rating(rule(answer, sample.gold["answers"], sample.gold["dataset"]), answer.strip())


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """Points of 1000, and of each group that is there; a part of the questions is scaled up."""
    figures = {"score": 1000 * sum(rating.score for rating in ratings) / len(ratings)}
    for group, points in POINTS.items():
        both = zip(samples, ratings, strict=True)
        of = [rating.score for sample, rating in both if GROUPS[sample.gold["type"]] == group]
        if of:
            figures[group] = points * sum(of) / len(of)
    return figures


BENCHMARK = Benchmark(
    "ocrbench", "OCRBench", "points of 1000", read, rate, summarise, headline="score",
    is_mean=False, scale=1000.0, published=PUBLISHED.get("ocrbench", {}), folders=("OCRBench",),
)  # fmt: skip
