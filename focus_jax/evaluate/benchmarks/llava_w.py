"""LLaVA-Bench (In-the-Wild): sixty open questions about two dozen images; GPT-4 rates the answers.

From `liuhaotian/llava-bench-in-the-wild` (questions.jsonl, images/), which is both the authors' and
LLaVA's layout, or `lmms-lab/llava-bench-in-the-wild` (data/train-*.parquet).
"""

from collections.abc import Sequence
from pathlib import Path

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import Benchmark, Figures, Picture, Protocol, Rating, Sample
from focus_jax.evaluate.benchmarks.server import unrated
from focus_jax.evaluate.published import PUBLISHED

LOOKED_FOR = {
    "authors and LLaVA": "questions.jsonl, images/",
    "lmms-eval": "data/train-*.parquet",
}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions. FileNotFoundError, or ValueError naming the row that is wrong."""
    asked = files.find(folder, "questions.jsonl")
    shards = files.shards(folder, "train")
    if asked:
        images = asked.parent / "images"
        return [
            sample(row["question_id"], images / row["image"], row["text"], row["category"])
            for row in files.read_jsonl(asked)
        ]
    if shards:
        rows = files.read_parquet(shards, ("question_id", "question", "category"))
        return [
            sample(row["question_id"], row["image"], row["question"], row["category"])
            for row in rows
        ]
    raise files.not_found(
        "LLaVA-Bench (In-the-Wild)", folder, LOOKED_FOR,
        "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    )  # fmt: skip


def sample(name: object, image: Picture, text: str, category: str) -> Sample:
    """A question: conv, detail or complex."""
    return Sample(str(name), (image,), text, {"category": category})


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """Nothing: a language model rates."""
    return unrated("")


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """None of its own."""
    return {}


BENCHMARK = Benchmark(
    name="llava_w",
    title="LLaVA-Bench (In-the-Wild)",
    metric="rated by a language model (GPT-4) beside its own answers, in percent",
    read=read,
    rate=rate,
    summarise=summarise,
    max_new_tokens=1024,
    published=PUBLISHED["llava_w"],
    judge=(
        "LLaVA-Bench is rated by GPT-4: the answer file has LLaVA's own format; give it to "
        "llava/eval/eval_gpt_review_bench.py of github.com/haotian-liu/LLaVA beside "
        "answers_gpt4.jsonl, then run summarize_gpt_review.py"
    ),
    folders=("llava-bench-in-the-wild", "llava_bench_in_the_wild"),
)
