"""SEED-Bench, the questions about images: lettered options in nine dimensions.

From the authors' files (AILab-CVC/SEED-Bench: SEED-Bench.json, SEED-Bench-image/), LLaVA's
`eval/seed_bench/llava-seed-bench.jsonl` beside those, or `lmms-lab/SEED-Bench`
(data/test-*.parquet). Questions about videos are left out: LLaVA-1.5's published figures have them,
LLaVA-NeXT's do not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import (
    Benchmark,
    Figures,
    Picture,
    Protocol,
    Rating,
    Sample,
    mean,
)
from focus_jax.evaluate.prompts import MCQ, lettered
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring.letters import first_letter, same_letter

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
# The authors' numbers of what is asked about in images.
DIMENSIONS = {
    1: "Scene Understanding", 2: "Instance Identity", 3: "Instance Attributes",
    4: "Instance Location", 5: "Instances Counting", 6: "Spatial Relation",
    7: "Instance Interaction", 8: "Visual Reasoning", 9: "Text Understanding",
}  # fmt: skip
LOOKED_FOR = {
    "LLaVA": "llava-seed-bench.jsonl, SEED-Bench.json, SEED-Bench-image/",
    "authors": "SEED-Bench.json, SEED-Bench-image/",
    "lmms-eval": "data/test-*.parquet",
}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """Questions about images. FileNotFoundError, or ValueError naming the row that is wrong."""
    table, asked = (
        files.find(folder, "SEED-Bench.json"),
        files.find(folder, "llava-seed-bench*.jsonl"),
    )
    shards = files.shards(folder, "test")
    if table:
        rows = read_authors(table)
        return read_llava(asked, rows, folder) if asked else list(rows.values())
    if shards:
        return read_parquet(shards)
    raise files.not_found("SEED-Bench", folder, LOOKED_FOR, "github.com/AILab-CVC/SEED-Bench")


def read_authors(table: Path) -> dict[str, Sample]:
    """All questions about images, by id."""
    found = {}
    for row in files.read_rows(table, "questions"):
        if row["data_type"] == "image":
            image = files.image_at(table.parent / "SEED-Bench-image", row["data_id"])
            one = sample(row, image)
            found[one.id] = one
    return found


def read_llava(asked: Path, rows: Mapping[str, Sample], folder: Path) -> list[Sample]:
    """LLaVA's rows, whose text has its suffix, with the authors' answers; videos are left out."""
    out = []
    for row in files.read_jsonl(asked):
        name = str(row["question_id"])
        if name in rows:
            image = files.image_at(folder, row["image"])
            out.append(rows[name]._replace(prompt=row["text"], images=(image,)))
    if not out:
        raise ValueError(f"{asked} has no question about an image of SEED-Bench.json")
    return out


def read_parquet(shards: Sequence[Path]) -> list[Sample]:
    """lmms-eval's rows; an image is a list of one."""
    names = ("question_id", "question", "answer", "data_id", "data_type", "question_type_id?")
    rows = files.read_parquet(shards, (*names, *CHOICES))
    return [sample(row, row["image"]) for row in rows if row["data_type"] == "image"]


def sample(row: Mapping[str, Any], image: Picture) -> Sample:
    """A question."""
    options = [row[name] for name in CHOICES]
    prompt = f"{row['question']}\n{lettered(options)}{MCQ}"
    gold = {"answer": row["answer"], "dimension": row.get("question_type_id")}
    return Sample(str(row["question_id"]), (image,), prompt, gold, row["data_id"])


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """LLaVA: the letter alone. lmms-eval: the first character."""
    right = same_letter if protocol == "llava" else first_letter
    return Rating(float(right(answer, asked.gold["answer"])), answer.strip()[:1])


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """Accuracy, then that of each dimension."""
    figures = mean(samples, ratings, protocol)
    for number, name in DIMENSIONS.items():
        of = [i for i, s in enumerate(samples) if str(s.gold["dimension"]) == str(number)]
        if of:
            figures[name] = 100 * sum(ratings[i].score for i in of) / len(of)
    return figures


BENCHMARK = Benchmark(
    name="seed",
    title="SEED-Bench (images)",
    metric="accuracy over the questions about images",
    read=read,
    rate=rate,
    summarise=summarise,
    published=PUBLISHED["seed"],
    folders=("seed_bench", "SEED-Bench"),
)
