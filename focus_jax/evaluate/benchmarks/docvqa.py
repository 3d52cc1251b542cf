"""DocVQA: questions about scanned pages; the validation split.

Layouts: the authors' files (docvqa.org, task 1 of the Robust Reading Competition) and
lmms-lab/DocVQA's parquet files, configuration DocVQA. Prompt and length are lmms-eval's.
"""

from collections.abc import Sequence
from pathlib import Path

from focus_jax.evaluate.benchmark import Benchmark, Figures, Protocol, Rating, Sample, mean
from focus_jax.evaluate.files import (
    find,
    image_folder,
    not_found,
    read_parquet,
    read_rows,
    shards,
)
from focus_jax.evaluate.prompts import SHORT
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring.anls import anls

QUESTIONS = ("val_v1.0_withQT.json", "val_v1.0.json")
MAX_NEW_TOKENS = 32


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions of the validation split."""
    if path := find(folder, *QUESTIONS, *(f"*/{name}" for name in QUESTIONS)):
        return from_authors(folder, path)
    if parts := shards(folder, "validation", "DocVQA"):
        return from_parquet(parts)
    raise not_found("DocVQA", folder, {
        "authors": f"{' or '.join(QUESTIONS)}, and documents/ or spdocvqa_images/",
        "lmms-eval": "DocVQA/validation-*.parquet",
    }, "docvqa.org, or the lmms-lab/DocVQA dataset of the Hugging Face hub")  # fmt: skip


def from_authors(folder: Path, path: Path) -> list[Sample]:
    """The authors' file, whose images are named "documents/PAGE.png"."""
    beside = path.parent.relative_to(folder) / "documents"
    pages = image_folder(folder, str(beside), "documents", "spdocvqa_images", "images")
    samples = []
    for row in read_rows(path, "data"):
        page = Path(row["image"])
        key = str(row["questionId"])
        prompt = row["question"] + SHORT
        gold = {"answers": row["answers"]}
        samples.append(Sample(key, (pages / page.name,), prompt, gold, page.stem))
    return samples


def from_parquet(parts: Sequence[Path]) -> list[Sample]:
    """lmms-lab/DocVQA, configuration DocVQA. A page is a document's id and a number."""
    of_page = ("ucsf_document_id?", "ucsf_document_page_no?")
    columns = ("questionId", "question", "answers", *of_page)
    return [
        Sample(
            str(row["questionId"]), (row["image"],), row["question"] + SHORT,
            {"answers": row["answers"]},
            page_of(row["ucsf_document_id"], row["ucsf_document_page_no"]),
        )
        for row in read_parquet(parts, columns)
    ]  # fmt: skip


def page_of(document: str | None, page: str | None) -> str | None:
    """A page's name, as its image file has it."""
    return f"{document}_{page}" if document and page else None


def rate(sample: Sample, answer: str, protocol: Protocol) -> Rating:
    """ANLS of the nearest answer."""
    return Rating(anls(answer, sample.gold["answers"]), answer.strip())


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """100 x ANLS."""
    return {"anls": mean(samples, ratings, protocol)["accuracy"]}


BENCHMARK = Benchmark(
    "docvqa", "DocVQA (validation)", "ANLS", read, rate, summarise, headline="anls",
    max_new_tokens=MAX_NEW_TOKENS, published=PUBLISHED.get("docvqa", {}), folders=("DocVQA",),
)  # fmt: skip
