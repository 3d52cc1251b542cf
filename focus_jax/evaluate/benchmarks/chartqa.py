"""ChartQA: questions about charts, by people and by machine; the test split.

Layouts: the authors' files (vis-nlp/ChartQA) and lmms-lab/ChartQA's parquet files. Prompt, length
and rule are lmms-eval's, for both protocols: LLaVA has no evaluation of it.
"""

from collections.abc import Sequence
from pathlib import Path

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
from focus_jax.evaluate.scoring.relaxed import relaxed

PROMPT = "\nAnswer the question with a single word."
KINDS = ("human", "augmented")


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions of the test split, those by people first."""
    paths = {
        kind: find(folder, f"test/test_{kind}.json", f"*/test/test_{kind}.json") for kind in KINDS
    }
    human, augmented = paths["human"], paths["augmented"]
    if human and augmented:
        return from_authors({"human": human, "augmented": augmented})
    if parts := shards(folder, "test"):
        return from_parquet(parts)
    raise not_found("ChartQA", folder, {
        "authors": "test/test_human.json, test/test_augmented.json and test/png/",
        "lmms-eval": "data/test-*.parquet",
    }, "the vis-nlp/ChartQA repository, or the lmms-lab/ChartQA dataset of the Hugging Face hub"
    )  # fmt: skip


def from_authors(paths: dict[str, Path]) -> list[Sample]:
    """Both files; rows are numbered, for they have no ids."""
    samples = []
    for kind, path in paths.items():
        charts = image_folder(path.parent, "png")
        for number, row in enumerate(read_rows(path, "data")):
            name = row["imgname"]
            prompt = row["query"] + PROMPT
            gold = {"answer": str(row["label"]), "type": kind}
            samples.append(Sample(f"{kind}-{number}", (charts / name,), prompt, gold, name))
    return samples


def from_parquet(parts: Sequence[Path]) -> list[Sample]:
    """lmms-lab/ChartQA, which does not say which questions share a chart."""
    samples = []
    seen = dict.fromkeys(KINDS, 0)
    for row in read_parquet(parts, ("type", "question", "answer")):
        kind = row["type"].removesuffix("_test")
        if kind not in seen:
            raise ValueError(f"{parts[0].parent} row {row['row']}: type is {row['type']!r}")
        gold = {"answer": row["answer"], "type": kind}
        key = f"{kind}-{seen[kind]}"
        seen[kind] += 1
        samples.append(Sample(key, (row["image"],), row["question"] + PROMPT, gold))
    return samples


def rate(sample: Sample, answer: str, protocol: Protocol) -> Rating:
    """Numbers within 5 %, other answers to the letter."""
    return Rating(relaxed(answer, sample.gold["answer"]), answer)


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """Relaxed accuracy of all questions, and of each kind that is there."""
    figures = {}
    for kind in (None, *KINDS):
        both = zip(samples, ratings, strict=True)
        of = [rating.score for sample, rating in both if kind in (None, sample.gold["type"])]
        if of:
            figures[kind or "overall"] = 100 * sum(of) / len(of)
    return figures


BENCHMARK = Benchmark(
    "chartqa", "ChartQA", "relaxed accuracy", read, rate, summarise, headline="overall",
    max_new_tokens=16, published=PUBLISHED.get("chartqa", {}),
    folders=("ChartQA", "ChartQA Dataset"),
)  # fmt: skip
