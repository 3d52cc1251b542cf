"""MMBench: options that are asked about in every rotation, and count only if all are right.

From the authors' tables (open-compass/MMBench: mmbench_dev_20230712.tsv and its like, images as
base64), which LLaVA's `eval/mmbench` takes too, or `lmms-lab/MMBench` (en/dev-*.parquet). A test
table has no answers: its answers go to the benchmark's server, and there are no figures.
The options are read from answers without a language model: MMBench's server asks one where the
rule finds no letter, which for models that answer with a letter is the same.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import Benchmark, Figures, Picture, Protocol, Rating, Sample
from focus_jax.evaluate.benchmarks.server import unrated
from focus_jax.evaluate.prompts import MCQ, MCQ_CN
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring import mmbench as rule

Language = Literal["en", "cn"]
TABLES: dict[Language, tuple[str, ...]] = {
    "en": (
        "mmbench_dev_20230712.tsv", "mmbench_dev_en*.tsv", "MMBench_DEV_EN*.tsv",
        "mmbench_test_20230712.tsv", "mmbench_test_en*.tsv", "MMBench_TEST_EN*.tsv",
    ),
    "cn": (
        "mmbench_dev_cn_20231003.tsv", "mmbench_dev_cn*.tsv", "MMBench_DEV_CN*.tsv",
        "mmbench_test_cn*.tsv", "MMBench_TEST_CN*.tsv",
    ),
}  # fmt: skip
SUFFIX: dict[Protocol, dict[Language, str]] = {
    "llava": {"en": MCQ, "cn": MCQ_CN},
    # lmms-eval adds a line break of its own.
    "lmms-eval": {"en": f"\n{MCQ}", "cn": "\n\n请直接使用所提供的选项字母作为答案回答。"},
}
# What pandas, by which LLaVA reads tables, takes for an empty cell.
EMPTY = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


def read(folder: Path, protocol: Protocol, language: Language = "en") -> list[Sample]:
    """All rows. FileNotFoundError, or ValueError naming the row that is wrong."""
    table = files.find(folder, *TABLES[language])
    shards = files.shards(folder / language, "dev") or files.shards(folder / language, "test")
    if table:
        rows = table_rows(table)
    elif shards:
        rows = parquet_rows(shards)
    else:
        raise files.not_found(
            "MMBench" if language == "en" else "MMBench-CN", folder,
            {"authors and LLaVA": ", ".join(TABLES[language]),
             "lmms-eval": f"{language}/dev-*.parquet"},
            "github.com/open-compass/MMBench",
        )  # fmt: skip
    return [sample(row, protocol, language) for row in rows]


def table_rows(table: Path) -> list[files.Row]:
    """The rows of a table; images are decoded when they are asked for.

    A cell may hold another row's index in place of an image: rotations share one.
    """
    rows = files.read_table(table)
    images: dict[str, str] = {row["index"]: row["image"] for row in rows}
    for row in rows:
        cell: str = row["image"]
        row |= {name: None for name, text in row.items() if text in EMPTY}
        row["image"] = partial(decoded, images.get(cell, cell), row.where)
    return [*rows]


def decoded(cell: str, where: str) -> bytes:
    """An image from base64. ValueError: something else."""
    try:
        return base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where} has no image in base64: {error}") from error


def parquet_rows(shards: Sequence[Path]) -> list[files.Row]:
    """lmms-eval's rows, with the tables' names."""
    names = ("index", "question", "hint", "A", "B", "C?", "D?", "answer?", "category?",
             "L2-category?", "l2-category?")  # fmt: skip
    rows = list(files.read_parquet(shards, names))
    for row in rows:
        row["l2-category"] = row["l2-category"] or row["L2-category"]
    return rows


def sample(row: Mapping[str, Any], protocol: Protocol, language: Language) -> Sample:
    """A rotation of a question; all of a question are drawn together."""
    index, question, options = int(row["index"]), str(row["question"]), options_of(row, protocol)
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    hint = present(row["hint"], protocol)
    if protocol == "llava":
        text = f"{hint}\n{question}\n{listed}" if hint else f"{question}\n{listed}"
    else:
        # lmms-eval's Chinese task does not know that its files have "nan" where there is no hint.
        hint = "nan" if language == "cn" and row["hint"] == "nan" else hint
        text = f"{hint} {question}" if hint else question
        text = f"{text} There are several options:\n{listed}"
    gold = {
        "index": index, "question": question, "options": options,
        "category": present(row["category"], protocol),
        "l2_category": present(row.get("l2-category"), protocol),
    }  # fmt: skip
    if answer := present(row.get("answer"), protocol):
        gold["answer"] = answer
    image: Picture = row["image"]
    prompt = text + SUFFIX[protocol][language]
    return Sample(str(index), (image,), prompt, gold, index % rule.ROTATION)


def options_of(row: Mapping[str, Any], protocol: Protocol) -> dict[str, str]:
    """Options by letter; LLaVA's stop at the first that is absent."""
    found: dict[str, str] = {}
    for letter in "ABCD":
        if text := present(row.get(letter), protocol):
            found[letter] = text
        elif protocol == "llava":
            break
    return found


def present(value: object, protocol: Protocol) -> str:
    """A cell's text, "" for none: "nan" in lmms-eval's files, for LLaVA "None" in any case too."""
    text = "" if value is None else str(value)
    none = text.lower() in ("nan", "none") if protocol == "llava" else text == "nan"
    return "" if none else text


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """The option that an answer names; unrated where the right one is not known."""
    parsed = rule.read_letter(answer, asked.gold["options"])
    if "answer" not in asked.gold:
        return unrated(parsed or "")
    return Rating(float(parsed == asked.gold["answer"]), parsed)


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """In percent: all questions, then each category; nothing for a test table."""
    if any("answer" not in sample.gold for sample in samples):
        return {}
    rates = rule.hit_rates(
        [
            rule.Rotation(s.gold["index"], r.score == 1, s.gold["category"], s.gold["l2_category"])
            for s, r in zip(samples, ratings, strict=True)
        ]
    )
    figures = {"accuracy": 100 * rates["overall"][""]}
    for kind in ("l2_category", "category"):
        figures |= {name: 100 * rate for name, rate in rates[kind].items() if name}
    return figures


def submission(
    folder: Path, samples: Sequence[Sample], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """The columns of the table for MMBench's server (LLaVA's convert_mmbench_for_submission)."""
    return [
        {
            "index": s.gold["index"], "question": s.gold["question"],
            **{letter: s.gold["options"].get(letter) for letter in "ABCD"},
            "answer": s.gold.get("answer"), "prediction": answer,
        }
        for s, answer in zip(samples, answers, strict=True)
    ]  # fmt: skip


BENCHMARK = Benchmark(
    name="mmbench",
    title="MMBench (dev)",
    metric="share of questions that are right in every rotation of their options",
    read=read,
    rate=rate,
    summarise=summarise,
    is_mean=False,
    max_new_tokens=1024,
    published=PUBLISHED["mmbench"],
    submission=submission,
    folders=("MMBench",),
)
CHINESE = replace(
    BENCHMARK,
    name="mmbench_cn",
    title="MMBench-CN (dev)",
    read=partial(read, language="cn"),
    published=PUBLISHED["mmbench_cn"],
    folders=("mmbench", "MMBench", "MMBench_CN"),
)
