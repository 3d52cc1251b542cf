"""VizWiz: questions that blind people asked of their own photographs, some without an answer.

Layouts: the authors' val.json (or test.json) and images (vizwiz.org), lmms-lab/VizWiz-VQA's parquet
files, and LLaVA's questions of the test split (haotian-liu/LLaVA, docs/Evaluation.md), which the
challenge's server rates. Both protocols ask with `str.capitalize`, as LLaVA's file has it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focus_jax.evaluate.benchmark import Benchmark, Protocol, Rating, Sample
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

LLAVA = "llava_test.jsonl"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """The validation split where it is there with its images, else the test split."""
    for split in ("val", "test"):
        annotations = find(folder, f"{split}.json", f"*/{split}.json")
        photos = find(folder, split, f"images/{split}")
        asked = find(folder, LLAVA) if split == "test" else None
        if asked:
            return from_llava(image_folder(folder, "test", "images/test"), asked)
        if annotations and photos:
            return from_authors(photos, annotations)
        if parts := shards(folder, split):
            return from_parquet(parts)
    raise not_found("VizWiz", folder, {
        "authors": "val.json and val/ (without answers: test.json and test/)",
        "lmms-eval": "data/val-*.parquet (without answers: data/test-*.parquet)",
        "llava": f"{LLAVA} and test/",
    }, "vizwiz.org, the lmms-lab/VizWiz-VQA dataset of the Hugging Face hub, or LLaVA's eval.zip"
    )  # fmt: skip


def ask(question: str) -> str:
    """The prompt: first letter upper, all others lower case."""
    return question.capitalize() + UNANSWERABLE + SHORT


def gold_of(image: str, answers: Sequence[str]) -> dict[str, Any]:
    """The image's name, which the server knows answers by, and answers where there are any."""
    return {"image": image} | ({"answers": list(answers)} if answers else {})


def from_authors(photos: Path, annotations: Path) -> list[Sample]:
    """val.json or test.json, in its order; an image has one question."""
    samples = []
    for row in read_rows(annotations):
        image = row["image"]
        answers = [each["answer"] for each in row.get("answers") or ()]
        prompt = ask(row["question"])
        gold = gold_of(image, answers)
        samples.append(Sample(Path(image).stem, (photos / image,), prompt, gold))
    return samples


def from_parquet(parts: Sequence[Path]) -> list[Sample]:
    """The rows of lmms-lab/VizWiz-VQA, whose question_id is the image's name."""
    samples = []
    for row in read_parquet(parts, ("question_id", "question", "answers?")):
        name = Path(row["question_id"]).stem
        gold = gold_of(f"{name}.jpg", row["answers"] or ())
        samples.append(Sample(name, (row["image"],), ask(row["question"]), gold))
    return samples


def from_llava(photos: Path, asked: Path) -> list[Sample]:
    """LLaVA's questions of the test split."""
    return [
        Sample(each.id, (photos / each.image,), each.text, gold_of(each.image, ()))
        for each in read_questions(asked)
    ]


def rate(sample: Sample, answer: str, protocol: Protocol) -> Rating:
    """Agreement with ten people; unrated where their answers are not known."""
    golds, parsed = sample.gold.get("answers"), vqa.normalise(answer)
    if not golds:
        return unrated(parsed)
    rule = vqa.accuracy_lmms_eval if protocol == "lmms-eval" else vqa.accuracy
    return Rating(rule(answer, golds), parsed)


def submission(
    folder: Path, samples: Sequence[Sample], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows for the challenge's server, as LLaVA's scripts/convert_vizwiz_for_submission.py."""
    return [
        {"image": sample.gold["image"], "answer": vqa.normalise(answer)}
        for sample, answer in zip(samples, answers, strict=True)
    ]


BENCHMARK = Benchmark(
    "vizwiz", "VizWiz", "VQA accuracy", read, rate, mean_of_rated,
    published=PUBLISHED.get("vizwiz", {}), submission=submission,
    folders=("VizWiz", "VizWiz-VQA", "vizwiz_vqa"),
)  # fmt: skip
