"""MMMU: questions of thirty college subjects with one image or several, the validation split.

From the authors' parquet files, one folder a subject (`MMMU/MMMU`: Art/validation-*.parquet), or
all in one (`lmms-lab/MMMU`: data/validation-*.parquet).
LLaVA's protocol is that of the authors' own script for LLaVA (`mmmu/run_llava.py`): options as
"(A) ...", and of a question's images the first alone. lmms-eval's is that of its LLaVA: every image
that the question names. Both put images in front and leave "<image 1>" standing in the text.
Open answers are rated by the authors' rule under both: lmms-eval's, which goes through the letters
of an answer one by one, finds none right.
An answer that names no option is given a random one, drawn from the question's id and one seed, so
that it is the same in every run.
"""

import ast
import random
import re
from collections.abc import Iterator, Mapping, Sequence
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
from focus_jax.evaluate.prompts import LETTERS, MCQ, SHORT, lettered
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring import mmmu as rule

SEED = 42  # the authors'
MARKER = re.compile(r"<image (\d+)>")
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
        "Public_Health"
    ),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
        "Materials Mechanical_Engineering"
    ),
}
LOOKED_FOR = {
    "authors": "<subject>/validation-*.parquet",
    "lmms-eval": "data/validation-*.parquet",
}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """The validation questions. FileNotFoundError, or ValueError naming the question."""
    shards = files.shards(folder, "validation")
    for subject in sorted(folder.glob("*/")) if not shards else ():
        shards += files.shards(subject, "validation")
    if not shards:
        raise files.not_found("MMMU", folder, LOOKED_FOR, "huggingface.co/datasets/MMMU/MMMU")
    return [sample(row, protocol) for row in rows_of(shards)]


def rows_of(shards: Sequence[Path]) -> Iterator[files.Row]:
    """All rows."""
    names = ("id", "question", "options", "answer", "question_type")
    yield from files.read_parquet(shards, names, IMAGES)


def sample(row: Mapping[str, Any], protocol: Protocol) -> Sample:
    """A question with its options and images."""
    name, answer = str(row["id"]), row["answer"]
    options = literal(row["options"], name)
    choice = row["question_type"] == "multiple-choice"
    prompt = prompt_of(row["question"], options if choice else (), protocol, choice)
    images: tuple[Picture, ...] = (row["image_1"],)
    if protocol == "lmms-eval":
        images = tuple(row[f"image_{number}"] for number in marked(prompt, name))
        prompt = " ".join(["<image>"] * len(images)) + "\n" + prompt if images else prompt
    # The right answers of an open question may be several, in Python's notation.
    if not choice and answer.startswith("["):
        answer = literal(answer, name)
    lettered_options = dict(zip(LETTERS, options, strict=False)) if choice else {}
    gold = {"answer": answer, "options": lettered_options, "subject": subject_of(name)}
    return Sample(name, images, prompt, gold)


def prompt_of(text: str, options: Sequence[str], protocol: Protocol, choice: bool) -> str:
    """The question as a protocol asks it."""
    demand = (MCQ if choice else SHORT).strip()
    if protocol == "llava":
        return (
            f"{text}\n{lettered(options, '({}) {}')}\n\n{demand}" if choice else f"{text}\n{demand}"
        )
    return f"{text}\n{lettered(options)}\n\n{demand}" if choice else f"{text}\n\n{demand}"


def marked(prompt: str, name: str) -> list[int]:
    """The numbers of the images that a text names, in order. ValueError: one beyond the columns."""
    numbers = sorted({int(number) for number in MARKER.findall(prompt)})
    if not set(numbers) <= set(range(1, len(IMAGES) + 1)):
        raise ValueError(f"{name} names the images {numbers}; a question has those of 1 to 7")
    return numbers


def literal(text: str, name: str) -> list[str]:
    """A list in Python's notation. ValueError: something else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{name}: {text!r} is no list of options") from error
    if not isinstance(found, list):
        raise ValueError(f"{name}: {text!r} is no list of options")
    return [str(value) for value in found]


def subject_of(name: str) -> str:
    """The subject within an id: validation_Art_Theory_12."""
    match = re.fullmatch(r"[^_]+_(.+)_\d+", name)
    return match[1] if match else ""


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """An option, or any of the texts and numbers of an open answer."""
    gold, options = asked.gold["answer"], asked.gold["options"]
    if not options:
        said = rule.parse_open(answer)
        return Rating(float(rule.open_right(said, gold)), said)
    rng = random.Random(f"{SEED} {asked.id}")
    letter = rule.parse_option(answer, options, rng, lmms_eval=protocol == "lmms-eval")
    return Rating(float(letter == gold), letter)


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """Accuracy, then that of each domain and subject."""
    figures = mean(samples, ratings, protocol)
    for domain, subjects in DOMAINS.items():
        groups = {domain: subjects.split()} | {name: [name] for name in subjects.split()}
        for name, of in groups.items():
            pairs = zip(samples, ratings, strict=True)
            scores = [rating.score for asked, rating in pairs if asked.gold["subject"] in of]
            if scores:
                figures[name] = 100 * sum(scores) / len(scores)
    return figures


BENCHMARK = Benchmark(
    name="mmmu",
    title="MMMU (validation)",
    metric="accuracy; an answer that names no option is given a random one (seeded)",
    read=read,
    rate=rate,
    summarise=summarise,
    published=PUBLISHED.get("mmmu", {}),
    folders=("MMMU",),
)
