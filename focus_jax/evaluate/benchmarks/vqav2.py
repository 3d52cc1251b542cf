"""VQAv2: open questions about COCO photographs, ten people's answers each.

Layouts: the authors' validation files (visualqa.org), lmms-lab/VQAv2's parquet files, and LLaVA's
test-dev questions (haotian-liu/LLaVA, docs/Evaluation.md), which the server of the challenge rates.
Rules: LLaVA's EvalAI normalisation; lmms-eval's vqav2 task leaves out its first step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_jax.evaluate.benchmark import Benchmark, Figures, Protocol, Rating, Sample
from focus_jax.evaluate.benchmarks.server import mean_of_rated, unrated
from focus_jax.evaluate.files import (
    find,
    image_folder,
    not_found,
    read_parquet,
    read_questions,
    read_rows,
    shards,
)
from focus_jax.evaluate.prompts import SHORT
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring import vqa

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
LLAVA, LLAVA_ALL = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """The validation split where its answers are there, else LLaVA's test-dev questions."""
    questions = find(folder, QUESTIONS, f"*/{QUESTIONS}")
    annotations = find(folder, ANNOTATIONS, f"*/{ANNOTATIONS}")
    if questions and annotations:
        return from_authors(folder, questions, annotations)
    if parts := shards(folder, "validation"):
        return from_parquet(parts)
    if asked := find(folder, LLAVA, LLAVA_ALL):
        return from_llava(folder, asked)
    raise not_found("VQAv2", folder, {
        "authors": f"{QUESTIONS}, {ANNOTATIONS} and val2014/",
        "lmms-eval": "data/validation-*.parquet",
        "llava": f"{LLAVA} and test2015/",
    }, "visualqa.org, the lmms-lab/VQAv2 dataset of the Hugging Face hub, or LLaVA's eval.zip"
    )  # fmt: skip


def from_authors(folder: Path, questions: Path, annotations: Path) -> list[Sample]:
    """Questions with the annotations of the same id. ValueError: one has none."""
    photos = image_folder(folder, "val2014", "images/val2014", "images")
    golds: dict[Any, dict[str, Any]] = {}
    for row in read_rows(annotations, "annotations"):
        golds[row["question_id"]] = gold_of(row)
    samples = []
    for row in read_rows(questions, "questions"):
        key = row["question_id"]
        image = int(row["image_id"])
        if key not in golds:
            raise ValueError(f"{annotations} has no answers to question {key} of {questions}")
        photo = photos / f"COCO_val2014_{image:012}.jpg"
        text = row["question"]
        samples.append(Sample(str(key), (photo,), text + SHORT, golds[key], str(image)))
    return samples


def gold_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """All answers, and the kind of answer by which the authors report."""
    answers = [each["answer"] for each in row["answers"]]
    return {"answers": answers, "type": row["answer_type"]}


def from_parquet(parts: Sequence[Path]) -> list[Sample]:
    """The rows of lmms-lab/VQAv2's validation split."""
    columns = ("question_id", "image_id", "question", "answers", "answer_type")
    return [
        Sample(
            str(row["question_id"]), (row["image"],), row["question"] + SHORT,
            gold_of(row), str(row["image_id"]),
        )
        for row in read_parquet(parts, columns)
    ]  # fmt: skip


def from_llava(folder: Path, asked: Path) -> list[Sample]:
    """LLaVA's question file; the answers are with the challenge's server."""
    photos = image_folder(folder, "test2015", "images/test2015", "images")
    return [
        Sample(each.id, (photos / each.image,), each.text, {}, each.image)
        for each in read_questions(asked)
    ]


def rate(sample: Sample, answer: str, protocol: Protocol) -> Rating:
    """Agreement with ten people; unrated where their answers are not known."""
    lmms_eval = protocol == "lmms-eval"
    parsed = vqa.normalise_vqav2(answer) if lmms_eval else vqa.normalise(answer)
    golds = sample.gold.get("answers")
    if not golds:
        return unrated(parsed)
    return Rating((vqa.accuracy_vqav2 if lmms_eval else vqa.accuracy)(answer, golds), parsed)


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """Accuracy of all, and by kind of answer."""
    figures = mean_of_rated(samples, ratings, protocol)
    if not figures:
        return {}
    for kind in sorted({sample.gold["type"] for sample in samples}):
        of = [i for i, sample in enumerate(samples) if sample.gold["type"] == kind]
        part = mean_of_rated([samples[i] for i in of], [ratings[i] for i in of], protocol)
        figures[kind] = part["accuracy"]
    return figures


def submission(
    folder: Path, samples: Sequence[Sample], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows for the challenge's server: every question of test2015, "" where none was answered.

    As LLaVA's scripts/convert_vqav2_for_submission.py writes them. Without the file of all
    questions beside the test-dev ones, those that were answered.
    """
    ours = {
        sample.id: vqa.normalise(answer) for sample, answer in zip(samples, answers, strict=True)
    }
    every = find(folder, LLAVA_ALL)
    ids = [each.id for each in read_questions(every)] if every else list(ours)
    return [{"question_id": int(key), "answer": ours.get(key, "")} for key in ids]


BENCHMARK = Benchmark(
    "vqav2", "VQAv2", "VQA accuracy", read, rate, summarise,
    published=PUBLISHED.get("vqav2", {}), submission=submission,
    folders=("VQAv2", "vqa_v2", "vqa"),
)  # fmt: skip
