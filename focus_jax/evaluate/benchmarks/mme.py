"""MME: two yes/no questions for each image, ten categories of perception and four of cognition.

From the authors' folder (BradyFU/Awesome-Multimodal-Large-Language-Models:
MME_Benchmark_release_version/<category>, text and images side by side or in `images` and
`questions_answers_YN`), LLaVA's `eval/MME/llava_mme.jsonl` beside it, or `lmms-lab/MME`
(data/test-*.parquet). " Please answer yes or no." gives way to the demand for a word.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import Benchmark, Figures, Picture, Protocol, Rating, Sample
from focus_jax.evaluate.prompts import SHORT
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring import mme as rule

DEMAND = " Please answer yes or no."
CATEGORIES = (*rule.PERCEPTION, *rule.COGNITION)
ROOTS = (
    "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version",
    "MME_Benchmark", ".",
)  # fmt: skip
LOOKED_FOR = {
    "LLaVA": "llava_mme.jsonl, MME_Benchmark_release_version/<category>/",
    "authors": "MME_Benchmark_release_version/<category>/*.txt (or questions_answers_YN/*.txt)",
    "lmms-eval": "data/test-*.parquet",
}


class Question(NamedTuple):
    """A question as a file has it. `image_id`: category/file."""

    category: str
    image_id: str
    image: Picture
    text: str
    answer: str


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions. FileNotFoundError, or ValueError naming the row that is wrong."""
    root = next((folder / r for r in ROOTS if any((folder / r / c).is_dir() for c in CATEGORIES)),
                None)  # fmt: skip
    asked = files.find(folder, "llava_mme.jsonl")
    shards = files.shards(folder, "test")
    if root:
        found = list(questions(root))
        return samples(in_order(asked, found, protocol) if asked else found, protocol)
    if shards:
        return samples(list(parquet(shards)), protocol)
    raise files.not_found(
        "MME", folder, LOOKED_FOR,
        "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation)",
    )  # fmt: skip


def questions(root: Path) -> Iterator[Question]:
    """The authors' questions: one text for each image, a line for each question.

    FileNotFoundError: a category is not there.
    """
    if missing := [name for name in CATEGORIES if not (root / name).is_dir()]:
        raise FileNotFoundError(
            f"MME: {root} lacks {', '.join(missing)}: its figures are sums over all categories"
        )
    for category in CATEGORIES:
        apart = (root / category / "questions_answers_YN").is_dir()
        texts = root / category / ("questions_answers_YN" if apart else ".")
        images = root / category / ("images" if apart else ".")
        for path in sorted(texts.glob("*.txt")):
            image = files.image_at(images, path.stem)
            for number, line in enumerate(files.read_text(path).strip().split("\n"), 1):
                question, tab, answer = line.strip().rpartition("\t")
                if not tab:
                    raise ValueError(f"{path} line {number} is no question, tab and answer")
                yield Question(category, f"{category}/{image.name}", image, question, answer)


def in_order(asked: Path, found: Sequence[Question], protocol: Protocol) -> list[Question]:
    """The authors' questions in the order of LLaVA's file, under its protocol with its texts.

    ValueError: one of LLaVA's questions that the authors' folder lacks.
    """
    by_key = {key(q.category, q.image_id, q.text): q for q in found}
    out = []
    for row in files.read_jsonl(asked):
        name, text = row["question_id"], row["text"].removesuffix(SHORT)
        category = row.get("category") or name.split("/")[0]
        wanted = key(category, name, text)
        if wanted not in by_key:
            raise ValueError(
                f"{row.where} asks {row['text']!r} of {name}, which is not in "
                "MME_Benchmark_release_version: is the folder complete?"
            )
        question = by_key[wanted]
        out.append(question._replace(text=text) if protocol == "llava" else question)
    return out


def key(category: str, image_id: str, text: str) -> tuple[str, str, str]:
    """What tells a question from others: suffixes and white space aside."""
    bare = " ".join(text.replace(DEMAND.strip(), "").split())
    return category, Path(image_id).stem, bare


def parquet(shards: Sequence[Path]) -> Iterator[Question]:
    """lmms-eval's rows."""
    for row in files.read_parquet(shards, ("question_id", "question", "answer", "category")):
        yield Question(row["category"], row["question_id"], row["image"], row["question"],
                       row["answer"])  # fmt: skip


def samples(found: Sequence[Question], protocol: Protocol) -> list[Sample]:
    """Questions with their prompts; both of an image are drawn together."""
    names = files.unique([question.image_id for question in found])
    return [
        Sample(
            name, (q.image,), prompt_of(q.text, protocol),
            {"answer": gold_of(q), "category": q.category, "image": q.image_id}, q.image_id,
        )
        for name, q in zip(names, found, strict=True)
    ]  # fmt: skip


def prompt_of(text: str, protocol: Protocol) -> str:
    """The question with its new demand; LLaVA's has no space where two stood before the old."""
    bare = text.strip().replace(DEMAND, "")
    return (bare if protocol == "lmms-eval" else bare.rstrip()) + SHORT


def gold_of(question: Question) -> str:
    """Yes or no. ValueError: another answer."""
    answer = rule.cleaned(question.answer)
    if answer not in ("yes", "no"):
        raise ValueError(f"{question.image_id} has the answer {answer!r}; it should be yes or no")
    return answer


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """One rule for both protocols."""
    parsed = rule.parse(answer)
    return Rating(float(parsed == asked.gold["answer"]), parsed)


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """Perception (of 2000), cognition (of 800) and every category (of 200)."""
    categories = rule.by_category(
        [
            rule.Answered(sample.gold["category"], sample.gold["image"], rating.score)
            for sample, rating in zip(samples, ratings, strict=True)
        ]
    )
    return rule.totals(categories) | categories


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    metric="perception: per category accuracy + accuracy of both questions, summed (of 2000)",
    read=read,
    rate=rate,
    summarise=summarise,
    headline="perception",
    is_mean=False,
    scale=2000.0,
    published=PUBLISHED["mme"],
    folders=("MME",),
)
