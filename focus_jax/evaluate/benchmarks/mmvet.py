"""MM-Vet: open questions that mix capabilities; a language model rates the answers.

From the authors' mm-vet.zip (yuweihao/MM-Vet: mm-vet.json, images/), LLaVA's
`eval/mm-vet/llava-mm-vet.jsonl` beside the images, or `lmms-lab/MMVet` (data/test-*.parquet).
LLaVA asks the question as it stands; lmms-eval asks to reason first.
"""

from collections.abc import Sequence
from pathlib import Path

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import Benchmark, Figures, Picture, Protocol, Rating, Sample
from focus_jax.evaluate.benchmarks.server import unrated
from focus_jax.evaluate.published import PUBLISHED

REASON = (
    "First please perform reasoning, and think step by step to provide best answer to the "
    "following question: \n\n"
)
LOOKED_FOR = {
    "LLaVA": "llava-mm-vet.jsonl, images/",
    "authors": "mm-vet.json, images/",
    "lmms-eval": "data/test-*.parquet",
}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions. FileNotFoundError, or ValueError naming the row that is wrong."""
    asked = files.find(folder, "llava-mm-vet.jsonl")
    table = files.find(folder, "mm-vet.json", "mm-vet/mm-vet.json")
    shards = files.shards(folder, "test")
    if asked:
        images = files.find(folder, "images", "mm-vet/images") or folder / "images"
        return [
            sample(f"v1_{row['question_id']}", images / row["image"], row["text"], protocol)
            for row in files.read_jsonl(asked)
        ]
    if table:
        return [
            sample(name, table.parent / "images" / row["imagename"], row["question"], protocol)
            for name, row in files.read_keyed(table).items()
        ]
    if shards:
        rows_of = files.read_parquet(shards, ("question_id", "question"))
        return [sample(r["question_id"], r["image"], r["question"], protocol) for r in rows_of]
    raise files.not_found("MM-Vet", folder, LOOKED_FOR, "github.com/yuweihao/MM-Vet")


def sample(name: str, image: Picture, text: str, protocol: Protocol) -> Sample:
    """A question; what is right is the judge's matter."""
    return Sample(str(name), (image,), (REASON if protocol == "lmms-eval" else "") + text, {})


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """Nothing: a language model rates."""
    return unrated("")


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """None of its own."""
    return {}


def submission(folder: Path, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, str]:
    """Answers by id, as MM-Vet's evaluator takes them (LLaVA's convert_mmvet_for_eval)."""
    return {sample.id: answer for sample, answer in zip(samples, answers, strict=True)}


BENCHMARK = Benchmark(
    name="mmvet",
    title="MM-Vet",
    metric="rated by a language model (GPT-4), 0 to 100",
    read=read,
    rate=rate,
    summarise=summarise,
    max_new_tokens=1024,
    published=PUBLISHED["mmvet"],
    judge=(
        "MM-Vet is rated by GPT-4: give the submission file (answers by id) to the evaluator of "
        "github.com/yuweihao/MM-Vet (mm-vet_evaluator.ipynb)"
    ),
    submission=submission,
    folders=("mm-vet", "MMVet"),
)
