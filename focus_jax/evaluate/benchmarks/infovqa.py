"""InfographicVQA: questions about infographics; the validation split.

Layouts: the authors' files (docvqa.org, task 3 of the Robust Reading Competition) and
lmms-lab/DocVQA's parquet files, configuration InfographicVQA. Prompt and length are lmms-eval's.
"""

from collections.abc import Sequence
from pathlib import Path

from focus_jax.evaluate.benchmark import Benchmark, Protocol, Sample
from focus_jax.evaluate.benchmarks.docvqa import MAX_NEW_TOKENS, rate, summarise
from focus_jax.evaluate.files import (
    find,
    has_column,
    image_folder,
    not_found,
    read_parquet,
    read_rows,
    shards,
)
from focus_jax.evaluate.prompts import SHORT
from focus_jax.evaluate.published import PUBLISHED

QUESTIONS = ("infographic*VQA_val_v1.0_withQT.json", "infographic*VQA_val_v1.0.json")
IMAGES = ("infographicsvqa_images", "infographicvqa_images", "images")


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions of the validation split."""
    if path := find(folder, *QUESTIONS, *(f"*/{name}" for name in QUESTIONS)):
        return from_authors(image_folder(folder, *IMAGES), path)
    if parts := shards(folder, "validation", "InfographicVQA"):
        return from_parquet(parts)
    raise not_found("InfographicVQA", folder, {
        "authors": f"infographicsVQA_val_v1.0_withQT.json and {' or '.join(IMAGES)}",
        "lmms-eval": "InfographicVQA/validation-*.parquet",
    }, "docvqa.org, or the lmms-lab/DocVQA dataset of the Hugging Face hub")  # fmt: skip


def from_authors(images: Path, path: Path) -> list[Sample]:
    """The authors' file, in its order."""
    samples = []
    for row in read_rows(path, "data"):
        name = row["image_local_name"]
        key = str(row["questionId"])
        prompt = row["question"] + SHORT
        gold = {"answers": row["answers"]}
        unit = row.get("image_url") or name
        samples.append(Sample(key, (images / name,), prompt, gold, unit))
    return samples


def from_parquet(parts: Sequence[Path]) -> list[Sample]:
    """lmms-lab/DocVQA, configuration InfographicVQA; images are known by their addresses.

    ValueError: files of the configuration DocVQA, which may lie in the same folder.
    """
    if has_column(parts, "ucsf_document_id"):
        raise ValueError(f"{parts[0].parent} has DocVQA's questions, not InfographicVQA's")
    return [
        Sample(
            str(row["questionId"]), (row["image"],), row["question"] + SHORT,
            {"answers": row["answers"]}, row["image_url"],
        )
        for row in read_parquet(parts, ("questionId", "question", "answers", "image_url?"))
    ]  # fmt: skip


BENCHMARK = Benchmark(
    "infovqa", "InfographicVQA (validation)", "ANLS", read, rate, summarise, headline="anls",
    max_new_tokens=MAX_NEW_TOKENS, published=PUBLISHED.get("infovqa", {}),
    folders=("InfographicVQA", "infographicsvqa", "InfoVQA", "docvqa", "DocVQA"),
)  # fmt: skip
