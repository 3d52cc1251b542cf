"""TextVQA: questions whose answers are written in the image, without and with OCR tokens.

LLaVA-1.5's figures are with the tokens that another program read ("Reference OCR token: ..."),
LLaVA-NeXT's without: two benchmarks here. Layouts: the authors' files (textvqa.org; the tokens are
those of TextVQA_Rosetta_OCR), LLaVA's question file beside them (haotian-liu/LLaVA,
docs/Evaluation.md), and lmms-lab/textvqa's parquet files. All ask with `str.capitalize`.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from focus_jax.evaluate.benchmark import Benchmark, Protocol, Rating, Sample, mean
from focus_jax.evaluate.files import (
    find,
    image_folder,
    not_found,
    read_parquet,
    read_questions,
    read_rows,
    shards,
    unique,
)
from focus_jax.evaluate.prompts import SHORT
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring import vqa

QUESTIONS, TOKENS = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
REFERENCE = "\nReference OCR token: "


def read(folder: Path, protocol: Protocol, tokens: bool) -> list[Sample]:
    """The validation split; with LLaVA's own tokens where its file is there."""
    questions = find(folder, QUESTIONS, f"*/{QUESTIONS}")
    if questions:
        photos = image_folder(folder, "train_images", "train_val_images/train_images", "images")
        if asked := find(folder, LLAVA):
            return from_llava(photos, asked, questions, tokens)
        return from_authors(photos, questions, read_tokens(folder) if tokens else None)
    if parts := shards(folder, "validation"):
        return from_parquet(parts, tokens)
    raise not_found("TextVQA", folder, {
        "authors": f"{QUESTIONS} and train_images/, with tokens {TOKENS}",
        "llava": f"{LLAVA}, {QUESTIONS} and train_images/",
        "lmms-eval": "data/validation-*.parquet",
    }, "textvqa.org, LLaVA's eval.zip, or the lmms-lab/textvqa dataset of the Hugging Face hub"
    )  # fmt: skip


def ask(question: str, tokens: Sequence[str] | None) -> str:
    """The prompt; the line of tokens stays where there are none to name."""
    line = "" if tokens is None else REFERENCE + ", ".join(tokens)
    return question.capitalize() + line + SHORT


def read_tokens(folder: Path) -> dict[str, list[str]]:
    """What OCR read in each image, by the image's id. FileNotFoundError: no such file."""
    path = find(folder, TOKENS, f"*/{TOKENS}")
    if path is None:
        raise FileNotFoundError(
            f"{folder} lacks {TOKENS} (textvqa.org), or LLaVA's {LLAVA}: the prompts with OCR "
            "tokens need one of them; the benchmark textvqa is without"
        )
    rows = read_rows(path, "data")
    return {row["image_id"]: row["ocr_tokens"] for row in rows}


def from_authors(
    photos: Path, questions: Path, tokens: dict[str, list[str]] | None
) -> list[Sample]:
    """The authors' file, in its order. ValueError: an image without an entry among the tokens."""
    samples = []
    for number, row in enumerate(read_rows(questions, "data")):
        image = row["image_id"]
        if tokens is not None and image not in tokens:
            raise ValueError(f"{TOKENS} has no image {image}, of row {number} of {questions}")
        prompt = ask(row["question"], None if tokens is None else tokens[image])
        key = str(row["question_id"])
        gold = {"answers": row["answers"]}
        samples.append(Sample(key, (photos / f"{image}.jpg",), prompt, gold, image))
    return samples


def from_llava(photos: Path, asked: Path, questions: Path, tokens: bool) -> list[Sample]:
    """LLaVA's texts with the answers of the same image and question, case aside.

    Its question_id is the image's. ValueError: a question that the authors' file does not have.
    """
    golds: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_rows(questions, "data"):
        text = row["question"].lower()
        golds[row["image_id"], text] = row
    asks, rows = read_questions(asked), []
    for number, each in enumerate(asks):
        question = re.split(r"\nReference OCR token:|\nAnswer the question", each.text)[0]
        key = (Path(each.image).stem, question.lower())
        if key not in golds:
            raise ValueError(f"{asked} row {number}: {questions} has no {question!r} of {key[0]}")
        rows.append(golds[key])
    ids = unique([str(row["question_id"]) for row in rows])
    return [
        Sample(
            key, (photos / each.image,), each.text if tokens else without_tokens(each.text),
            {"answers": row["answers"]}, row["image_id"],
        )
        for key, each, row in zip(ids, asks, rows, strict=True)
    ]  # fmt: skip


def without_tokens(text: str) -> str:
    """A prompt less its line of tokens."""
    head, found, tail = text.partition(REFERENCE)
    return head + "\n" + tail.rpartition("\n")[2] if found else text


def from_parquet(parts: Sequence[Path], tokens: bool) -> list[Sample]:
    """The rows of lmms-lab/textvqa's validation split."""
    columns = ["question_id", "image_id", "question", "answers", *(["ocr_tokens"] * tokens)]
    return [
        Sample(
            str(row["question_id"]), (row["image"],),
            ask(row["question"], row["ocr_tokens"] if tokens else None),
            {"answers": row["answers"]}, row["image_id"],
        )
        for row in read_parquet(parts, columns)
    ]  # fmt: skip


def rate(sample: Sample, answer: str, protocol: Protocol) -> Rating:
    """Agreement with ten people."""
    rule = vqa.accuracy_lmms_eval if protocol == "lmms-eval" else vqa.accuracy
    return Rating(rule(answer, sample.gold["answers"]), vqa.normalise(answer))


BENCHMARK = Benchmark(
    "textvqa", "TextVQA without OCR tokens", "VQA accuracy", partial(read, tokens=False), rate,
    mean, published=PUBLISHED.get("textvqa", {}), folders=("TextVQA", "textvqa_ocr"),
)  # fmt: skip
WITH_OCR = Benchmark(
    "textvqa_ocr", "TextVQA with OCR tokens", "VQA accuracy", partial(read, tokens=True), rate,
    mean, published=PUBLISHED.get("textvqa_ocr", {}), folders=("textvqa", "TextVQA"),
)  # fmt: skip
