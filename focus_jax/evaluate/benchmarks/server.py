"""Samples whose gold answers only the benchmark's own server has: no figures, but a file for it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from focus_jax.evaluate.benchmark import Benchmark, Figures, Protocol, Rating, Sample, mean
from focus_jax.evaluate.files import read_jsonl
from focus_jax.workdir import write_text


def has_gold(sample: Sample) -> bool:
    """Whether the right answer, or answers, are known here."""
    return bool(sample.gold.get("answers") or sample.gold.get("answer"))


def unrated(parsed: str) -> Rating:
    """The rating of an answer that cannot be rated here."""
    return Rating(math.nan, parsed)


def mean_of_rated(
    samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol
) -> Figures:
    """100 x the mean score; no figures where the gold answers are not known."""
    if not all(map(has_gold, samples)):
        return {}
    return mean(samples, ratings, protocol)


def write_submission(
    benchmark: Benchmark, folder: Path, samples: Sequence[Sample], answers: Path
) -> Path | None:
    """Write the server's file beside an answer file (`NAME.upload.json`) and return its path.

    `folder`: the benchmark's. None, and nothing is written, where the benchmark has no server or
    the gold answers are here. ValueError: a sample without an answer.
    """
    if benchmark.submission is None or any(map(has_gold, samples)):
        return None
    texts = {str(row["question_id"]): row["text"] for row in read_jsonl(answers)}
    missing = [sample.id for sample in samples if sample.id not in texts]
    if missing:
        raise ValueError(
            f"{answers} lacks {len(missing)} of {len(samples)} answers, that to {missing[0]} "
            "first: let the evaluation finish"
        )
    rows = benchmark.submission(folder, samples, [texts[sample.id] for sample in samples])
    path = answers.with_suffix(".upload.json")
    write_text(path, json.dumps(rows))
    return path
