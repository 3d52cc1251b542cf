"""POPE: is an object in the image? Adversarial, popular and random absent objects.

From the authors' repository (RUCAIBox/POPE: output/coco/coco_pope_*.json, lines in spite of the
name, and COCO's val2014), LLaVA's `eval/pope/llava_pope_test.jsonl` beside those, or
`lmms-lab/POPE` (data/test-*.parquet). LLaVA's protocol: its rule for each category, then the mean
over categories; F1 is what papers print. lmms-eval's: its stricter rule over all questions.
"""

from collections.abc import Sequence
from pathlib import Path

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import Benchmark, Figures, Picture, Protocol, Rating, Sample
from focus_jax.evaluate.prompts import SHORT
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring import pope as rule

LOOKED_FOR = {
    "LLaVA": "llava_pope_test.jsonl, coco/coco_pope_*.json, val2014/",
    "authors": "coco_pope_{adversarial,popular,random}.json, val2014/",
    "lmms-eval": "data/test-*.parquet (or Full/{adversarial,popular,random}-*.parquet)",
}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """All questions. FileNotFoundError, or ValueError naming the row that is wrong."""
    labels = {category: labels_of(folder, category) for category in rule.CATEGORIES}
    there = {category: path for category, path in labels.items() if path}
    asked = files.find(folder, "llava_pope_test.jsonl")
    # Of one of its configurations all questions are one split, of the other each category.
    shards = files.shards(folder, "test") or [
        path for category in rule.CATEGORIES for path in files.shards(folder, category, "Full")
    ]
    if there:
        if missing := labels.keys() - there.keys():
            raise FileNotFoundError(
                f"POPE: {folder} lacks the categories {', '.join(sorted(missing))} "
                "(coco_pope_CATEGORY.json): its figure is the mean over all three"
            )
        images = files.image_folder(folder, "val2014", "coco/val2014", "images/val2014", "images")
        return read_llava(asked, there, images) if asked else read_authors(there, images)
    if shards:
        return read_parquet(shards)
    raise files.not_found("POPE", folder, LOOKED_FOR, "github.com/RUCAIBox/POPE and COCO's val2014")


def labels_of(folder: Path, category: str) -> Path | None:
    """The authors' file of a category."""
    name = f"coco_pope_{category}.json"
    return files.find(folder, name, f"coco/{name}", f"output/coco/{name}")


def read_authors(labels: dict[str, Path], images: Path) -> list[Sample]:
    """Category by category; question ids are unique within one alone."""
    out = []
    for category, path in labels.items():
        for row in files.read_jsonl(path):
            name, image = f"{category}-{row['question_id']}", images / row["image"]
            out.append(sample(name, image, row["text"], row["label"], category, row.where))
    return out


def read_llava(asked: Path, labels: dict[str, Path], images: Path) -> list[Sample]:
    """LLaVA's questions, whose text has its suffix; labels of a category are in the same order.

    ValueError: a question that is not the label file's, by image and text.
    """
    left = {category: list(files.read_jsonl(path)) for category, path in labels.items()}
    out = []
    for row in files.read_jsonl(asked):
        category = row["category"]
        text = row["text"].removesuffix(SHORT)
        label = left[category].pop(0) if left.get(category) else {}
        if (label.get("image"), label.get("text", "").strip()) != (row["image"], text.strip()):
            raise ValueError(
                f"{row.where} asks {text!r} of {row['image']}; the {category} file has "
                f"another question in its place: take both from the same release"
            )
        name = f"{category}-{label['question_id']}"
        out.append(sample(name, images / row["image"], text, label["label"], category, row.where))
    return out


def read_parquet(shards: Sequence[Path]) -> list[Sample]:
    """lmms-eval's rows."""
    names = ("question_id", "question", "answer", "image_source", "category")
    rows = files.read_parquet(shards, names)
    return [
        sample(
            f"{row['category']}-{row['question_id']}", row["image"], row["question"],
            row["answer"], row["category"], f"{shards[0].parent} row {number}", row["image_source"],
        )
        for number, row in enumerate(rows)
    ]  # fmt: skip


def sample(
    name: str, image: Picture, text: str, label: str, category: str, where: str, source: str = ""
) -> Sample:
    """A question; all of one image are drawn together."""
    label = str(label).lower().strip()
    if label not in ("yes", "no"):
        raise ValueError(f"{where} has the label {label!r}; it should be yes or no")
    unit = Path(source).stem if source else image.stem if isinstance(image, Path) else name
    return Sample(name, (image,), text.strip() + SHORT, {"answer": label, "category": category},
                  unit)  # fmt: skip


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """LLaVA's rule or lmms-eval's."""
    parsed = rule.parse(answer) if protocol == "llava" else rule.parse_lmms_eval(answer)
    return Rating(float(parsed == asked.gold["answer"]), parsed)


def summarise(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """In percent: each category's figures and their means; lmms-eval's means are of all at once."""
    lmms_eval = protocol == "lmms-eval"
    parts = {}
    for category in dict.fromkeys(sample.gold["category"] for sample in samples):
        of = [i for i, sample in enumerate(samples) if sample.gold["category"] == category]
        parts[category] = figures_of([samples[i] for i in of], [ratings[i] for i in of], lmms_eval)
    means = {
        name: sum(part[name] for part in parts.values()) / len(parts)
        for name in next(iter(parts.values()))
    }
    by_category = {f"{c}_{name}": v for c, part in parts.items() for name, v in part.items()}
    return (figures_of(samples, ratings, True) if lmms_eval else means) | by_category


def figures_of(
    samples: Sequence[Sample], ratings: Sequence[Rating], lmms_eval: bool
) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, in percent.

    A question without an answer (nothing parsed) counts as its wrong answer.
    """
    golds = [sample.gold["answer"] for sample in samples]
    wrong = {"yes": "no", "no": "yes"}
    said = [
        wrong[gold] if rating.parsed is None else str(rating.parsed)
        for gold, rating in zip(golds, ratings, strict=True)
    ]
    counts = rule.count(said, golds, yes_of_labels=lmms_eval)
    return {name: 100 * value for name, value in counts.figures().items()}


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    metric="F1 of yes, the mean over adversarial, popular and random (lmms-eval: over all)",
    read=read,
    rate=rate,
    summarise=summarise,
    headline="f1",
    is_mean=False,
    published=PUBLISHED["pope"],
    folders=("POPE",),
)
