"""A benchmark of made-up questions about small made-up images, read from a folder."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from focus_jax.evaluate.benchmark import Benchmark, Rating, Sample, mean

SIZES = ((60, 40), (30, 90), (28, 28), (100, 20))
LONG = " and what else is there to be seen in it, from left to right and from top to bottom"


def write_toy(folder: Path, count: int = 6, sizes=SIZES) -> Path:
    """`count` questions, two to an image, every third of them long."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = f"{number // 2}.png"
        if number % 2 == 0:
            width, height = sizes[number // 2 % len(sizes)]
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name)
        text = f"What is number {number}" + (LONG if number % 3 == 2 else "") + "?"
        rows.append({"id": f"q{number}", "image": name, "text": text, "label": number % 2})
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


def read(folder: Path, protocol) -> list[Sample]:
    rows = json.loads((folder / "questions.json").read_text())
    return [
        Sample(r["id"], (folder / r["image"],), r["text"], {"label": r["label"]}, r["image"])
        for r in rows
    ]


def rate(sample: Sample, answer: str, protocol) -> Rating:
    """The parity of the answer's length: 0 for no words, which must count as wrong all the same."""
    return Rating(float(len(answer) % 2 == sample.gold["label"]), len(answer))


TOY = Benchmark(
    "toy", "Toy", "parity", read, rate, mean, max_new_tokens=6, folders=("Toy",),
    published={"llava-1.5-7b": 61.5, "llava-next-7b": 64.9},
)  # fmt: skip
