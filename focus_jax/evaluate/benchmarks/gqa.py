"""GQA: compositional questions about scenes, one answer each; the balanced testdev split.

Layouts: the authors' questions and images (Stanford), LLaVA's question file beside them
(haotian-liu/LLaVA, docs/Evaluation.md), and lmms-lab/GQA's parquet files, where questions and
images are configurations of their own, joined by the image's id.
"""

from collections.abc import Sequence
from pathlib import Path

from focus_jax.evaluate.benchmark import Benchmark, Protocol, Rating, Sample, mean
from focus_jax.evaluate.files import (
    find,
    image_folder,
    not_found,
    read_keyed,
    read_parquet,
    read_questions,
    shards,
)
from focus_jax.evaluate.prompts import SHORT
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring.gqa import converted, exact, exact_lmms_eval

QUESTIONS = "testdev_balanced_questions.json"
LLAVA = "llava_gqa_testdev_balanced.jsonl"
ASKED, SHOWN = "testdev_balanced_instructions", "testdev_balanced_images"


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions of balanced testdev; LLaVA's order and texts where its file is there."""
    questions = find(folder, QUESTIONS, f"*/{QUESTIONS}", f"*/*/{QUESTIONS}")
    asked = find(folder, LLAVA)
    if questions:
        photos = image_folder(folder, "images", "data/images")
        return from_llava(photos, asked, questions) if asked else from_authors(photos, questions)
    if parts := shards(folder, "testdev", ASKED):
        return from_parquet(parts, shards(folder, "testdev", SHOWN))
    raise not_found("GQA", folder, {
        "authors": f"{QUESTIONS} (also below questions1.2/ or data/) and images/",
        "llava": f"{LLAVA} beside the authors' files",
        "lmms-eval": f"{ASKED}/testdev-*.parquet and {SHOWN}/testdev-*.parquet",
    }, "GQA's page at cs.stanford.edu, LLaVA's eval.zip, or the lmms-lab/GQA dataset of the "
        "Hugging Face hub")  # fmt: skip


def from_authors(photos: Path, questions: Path) -> list[Sample]:
    """The authors' file, in its order."""
    return [
        Sample(
            key, (photos / f"{row['imageId']}.jpg",), row["question"] + SHORT,
            {"answer": row["answer"]}, row["imageId"],
        )
        for key, row in read_keyed(questions).items()
    ]  # fmt: skip


def from_llava(photos: Path, asked: Path, questions: Path) -> list[Sample]:
    """LLaVA's texts with the authors' answers. ValueError: a question that they do not have."""
    golds = read_keyed(questions)
    samples = []
    for number, each in enumerate(read_questions(asked)):
        if each.id not in golds:
            raise ValueError(f"{asked} row {number}: {questions} has no question {each.id}")
        gold = {"answer": golds[each.id]["answer"]}
        unit = Path(each.image).stem
        samples.append(Sample(each.id, (photos / each.image,), each.text, gold, unit))
    return samples


def from_parquet(asked: Sequence[Path], shown: Sequence[Path]) -> list[Sample]:
    """lmms-lab/GQA: questions with the images of their ids. FileNotFoundError: no images."""
    if not shown:
        raise FileNotFoundError(f"{asked[0].parent} has GQA's questions, but {SHOWN} is not there")
    photos = {row["id"]: row["image"] for row in read_parquet(shown, ("id",))}
    samples = []
    for row in read_parquet(asked, ("id", "imageId", "question", "answer"), pictures=()):
        image = row["imageId"]
        if image not in photos:
            raise ValueError(f"{shown[0].parent} has no image {image}, of question {row['id']}")
        gold = {"answer": row["answer"]}
        samples.append(Sample(row["id"], (photos[image],), row["question"] + SHORT, gold, image))
    return samples


def rate(sample: Sample, answer: str, protocol: Protocol) -> Rating:
    """The whole answer or nothing."""
    rule = exact_lmms_eval if protocol == "lmms-eval" else exact
    return Rating(rule(answer, sample.gold["answer"]), converted(answer))


BENCHMARK = Benchmark(
    "gqa", "GQA", "exact match", read, rate, mean,
    published=PUBLISHED.get("gqa", {}), folders=("GQA",),
)  # fmt: skip
