"""AI2D: questions about diagrams from school books, the test split.

From the authors' files (allenai.org/data/diagrams: questions/, images/, annotations/ and the list
of test images ai2d_test_ids.csv), or `lmms-lab/ai2d` (data/test-*.parquet). Some questions are
about letters that stand in place of the diagram's words: `abc_images/` has those diagrams; where it
is not there, the letters are drawn where the annotations say.
One rule for both protocols: LLaVA's own scripts have no AI2D, LLaVA-NeXT was rated by lmms-eval.
"""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from focus_jax.evaluate import files
from focus_jax.evaluate.benchmark import Benchmark, Picture, Protocol, Rating, Sample, mean
from focus_jax.evaluate.prompts import MCQ, letter, lettered
from focus_jax.evaluate.published import PUBLISHED
from focus_jax.evaluate.scoring.letters import ai2d_letter

LOOKED_FOR = {
    "authors": "questions/*.json, images/, annotations/ or abc_images/, ai2d_test_ids.csv",
    "lmms-eval": "data/test-*.parquet",
}


def read(folder: Path, protocol: Protocol) -> list[Sample]:
    """The test questions. FileNotFoundError, or ValueError naming the file that is wrong."""
    tables = files.find(folder, "questions", "ai2d/questions")
    shards = files.shards(folder, "test")
    if tables:
        return list(read_authors(tables.parent))
    if shards:
        return read_parquet(shards)
    raise files.not_found("AI2D", folder, LOOKED_FOR, "allenai.org/data/diagrams")


def read_authors(root: Path) -> Iterator[Sample]:
    """Questions of the images in the test list, images in the list's order."""
    listed = files.find(root, "ai2d_test_ids.csv", "../ai2d_test_ids.csv")
    if listed is None:
        raise FileNotFoundError(
            f"AI2D: {root} has questions but not ai2d_test_ids.csv, the list of test images: "
            "fetch it from the authors, so that no training question is asked"
        )
    for name in files.read_text(listed).split():
        path = root / "questions" / f"{name}.png.json"
        if not path.is_file():
            raise FileNotFoundError(f"AI2D: {listed} names image {name}, but there is no {path}")
        row = files.read_object(path)
        for text, question in row["questions"].items():
            image = image_of(root, row["imageName"], bool(question.get("abcLabel")))
            options, place = question["answerTexts"], int(question["correctAnswer"])
            yield sample(question["questionId"], image, text, options, place, name)


def read_parquet(shards: Sequence[Path]) -> list[Sample]:
    """lmms-eval's rows, which have no ids: their numbers are taken."""
    rows = files.read_parquet(shards, ("question", "options", "answer"))
    return [
        sample(str(i), row["image"], row["question"], row["options"], int(row["answer"]), None)
        for i, row in enumerate(rows)
    ]


def sample(
    name: str, image: Picture, text: str, options: Sequence[str], place: int, unit: str | None
) -> Sample:
    """A question; its answer as a letter."""
    prompt = f"{text}\n{lettered(options)}{MCQ}"
    return Sample(name, (image,), prompt, {"answer": letter(place, options)}, unit)


def image_of(root: Path, name: str, lettered: bool) -> Picture:
    """A diagram, with letters where the question is about them.

    FileNotFoundError: neither the lettered diagrams nor the annotations are there.
    """
    if not lettered:
        return root / "images" / name
    if (root / "abc_images").is_dir():
        return root / "abc_images" / name
    annotation = root / "annotations" / f"{name}.json"
    if not annotation.is_file():
        raise FileNotFoundError(
            f"AI2D: a question about {name} is about letters in the diagram; there is neither "
            f"{root / 'abc_images'} nor {annotation}, from which they could be drawn"
        )
    return partial(with_letters, root / "images" / name, annotation)


def with_letters(image: Path, annotation: Path) -> bytes:
    """A diagram whose words are covered by their letters, as PNG."""
    texts: dict[str, Any] = files.read_object(annotation)["text"]
    with Image.open(image) as opened:
        picture = opened.convert("RGB")
    draw = ImageDraw.Draw(picture)
    for text in texts.values():
        (left, top), (right, bottom) = text["rectangle"]
        draw.rectangle((left, top, right, bottom), fill="white")
        size = max(8, int(min(right - left, bottom - top)))
        middle = ((left + right) / 2, (top + bottom) / 2)
        font = ImageFont.load_default(size)
        draw.text(middle, text["replacementText"], fill="black", font=font, anchor="mm")
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def rate(asked: Sample, answer: str, protocol: Protocol) -> Rating:
    """lmms-eval's rule."""
    parsed = ai2d_letter(answer)
    return Rating(float(parsed == asked.gold["answer"].lower()), parsed)


BENCHMARK = Benchmark(
    name="ai2d",
    title="AI2D (test)",
    metric="accuracy of the letter",
    read=read,
    rate=rate,
    summarise=mean,
    published=PUBLISHED.get("ai2d", {}),
    folders=("AI2D", "ai2diagram"),
)
