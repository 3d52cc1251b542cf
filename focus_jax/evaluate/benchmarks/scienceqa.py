"""ScienceQA-IMG: school questions with an image and lettered options, of the test split.

From the authors' repository (lupantech/ScienceQA: problems.json, pid_splits.json, images/test),
LLaVA's `eval/scienceqa/llava_test_CQM-A.json` beside those, or `lmms-lab/ScienceQA`
(ScienceQA-IMG/test-*.parquet). Prompt of all three: the hint, the question, "A. ..." and the demand
for a letter. Questions without an image are left out, as in the figures that papers print.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import Benchmark, Picture, Protocol, Rating, Sample, mean
from focus_jax.evaluate.prompts import MCQ, letter, lettered
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring import scienceqa as rule

LOOKED_FOR = {
    "LLaVA": "llava_test_CQM-A.json, problems.json, images/test/",
    "authors": "problems.json, pid_splits.json, images/test/",
    "lmms-eval": "ScienceQA-IMG/test-*.parquet",
}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """Questions with an image. FileNotFoundError, or ValueError naming the row that is wrong."""
    problems = files.find(folder, "problems.json", "data/scienceqa/problems.json")
    asked = files.find(folder, "llava_test_CQM-A.json")
    shards = files.shards(folder, "test", "ScienceQA-IMG")
    if problems and asked:
        return read_llava(asked, problems)
    if problems:
        return read_authors(problems)
    if shards:
        return read_parquet(shards)
    raise files.not_found("ScienceQA", folder, LOOKED_FOR, "github.com/lupantech/ScienceQA")


def read_authors(problems: Path) -> list[Sample]:
    """All problems of the test split."""
    of = files.read_keyed(problems)
    splits = problems.with_name("pid_splits.json")
    out = []
    for pid in files.read_object(splits)["test"]:
        row = of[str(pid)]
        if row.get("image"):
            out.append(sample(str(pid), image_of(problems, str(pid), row), prompt_of(row), row))
    return out


def read_llava(asked: Path, problems: Path) -> list[Sample]:
    """LLaVA's rows, whose text lacks the demand for a letter; answers are the authors'."""
    of = files.read_keyed(problems)
    out = []
    for row in files.read_rows(asked):
        pid = str(row["id"])
        problem = of[pid]
        if "image" in row:
            text = row["conversations"][0]["value"].replace("<image>", "").strip()
            image = problems.parent / "images" / "test" / row["image"]
            out.append(sample(pid, image, text + MCQ, problem))
    return out


def read_parquet(shards: Sequence[Path]) -> list[Sample]:
    """lmms-eval's rows, which have no ids: their numbers are taken."""
    rows = files.read_parquet(shards, ("question", "choices", "answer", "hint?"))
    return [sample(str(i), row["image"], prompt_of(row), row) for i, row in enumerate(rows)]


def image_of(problems: Path, pid: str, row: Mapping[str, Any]) -> Path:
    """The image of a problem of the test split."""
    return problems.parent / "images" / "test" / pid / row["image"]


def prompt_of(row: Mapping[str, Any]) -> str:
    """Hint, question and options."""
    hint = f"Context: {row['hint']}\n" if row.get("hint") else ""
    return f"{hint}{row['question']}\n{lettered(row['choices'])}{MCQ}"


def sample(name: str, image: Picture, prompt: str, row: Mapping[str, Any]) -> Sample:
    """A question; its answer as a letter."""
    choices = list(row["choices"])
    gold = {"answer": letter(int(row["answer"]), choices), "choices": choices}
    return Sample(name, (image,), prompt, gold)


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """LLaVA's rule or lmms-eval's."""
    gold = asked.gold["answer"]
    if protocol == "lmms-eval":
        return Rating(float(rule.right_by_lmms_eval(answer, gold)), answer.strip())
    parsed = rule.parse(answer)
    place = rule.index_of(parsed, len(asked.gold["choices"]))
    return Rating(float(place >= 0 and rule.LETTERS[place] == gold), parsed)


BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA-IMG",
    metric="accuracy over the test questions with an image",
    read=read,
    rate=rate,
    summarise=mean,
    max_new_tokens=1024,
    published=PUBLISHED["scienceqa"],
    folders=("ScienceQA", "scienceqa_img"),
)
