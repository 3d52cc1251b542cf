"""Training data read by our loader and by torch's with Hugging Face's processors, same files."""

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from focus_jax.data.build import BuildConfig, build
from focus_jax.data.built import open_built
from focus_jax.data.conversation import VICUNA_V1, render
from focus_jax.data.dialogue_loader import make_dialogue_loader
from focus_jax.data.image_store import open_stores
from focus_jax.data.loader_config import DialogueConfig
from focus_jax.data.preprocess import ImageConfig
from focus_jax.data.row_files import JsonRows
from focus_jax.data.tokenizer import build_tokenizer

SIZE, POINTS = 336, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# Widths and heights of photos as they are met: VGA to two megapixels, upright ones among them.
SIZES = (
    (640, 480), (480, 640), (800, 600), (1024, 683), (768, 1024), (1280, 720), (1600, 1200),
    (1200, 1600),
)  # fmt: skip
QUESTION = "What is shown in the picture, and what is special about it?"
ANSWER = "A temple with a curved roof stands behind trees, and flowers grow in front of it. " * 4
BATCH = 8

Side = Callable[[], Iterator[Any]]


class Files(NamedTuple):
    """The same photos as files, and built with their dialogues; `words` serves both sides."""

    photos: tuple[Path, ...]
    built: Path
    words: PreTrainedTokenizerFast


class Rates(NamedTuple):
    """Images a second of processor time, [rounds] each."""

    ours: np.ndarray
    theirs: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        return self.ours / self.theirs


def write_files(folder: Path, photographs: Sequence[np.ndarray], count: int) -> Files:
    """JPEGs of `SIZES` from photographs, and a data set of them, in a folder."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    rows = []
    for number in range(count):
        name, size = f"{number}.jpg", SIZES[number % len(SIZES)]
        photograph = photographs[number // len(SIZES) % len(photographs)]
        (photos / name).write_bytes(jpeg(photograph, size))
        asked = {"from": "human", "value": f"<image>\n{QUESTION}"}
        turns = [asked, {"from": "gpt", "value": ANSWER}]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    built = folder / "built"
    build([JsonRows(folder / "rows.json")], open_stores([photos]), built, BuildConfig())
    words = build_tokenizer([VICUNA_V1.system, QUESTION, ANSWER], (), ("USER:", "ASSISTANT:"))
    return Files(tuple(photos / f"{number}.jpg" for number in range(count)), built, words)


def jpeg(photograph: np.ndarray, size: tuple[int, int]) -> bytes:
    """A photograph at another size, as a camera would store it."""
    file = io.BytesIO()
    Image.fromarray(photograph).resize(size, Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def ours(files: Files, layout: str) -> Side:
    """One pass of our loader in the caller's thread: uint8 tiles and tokens in static shapes."""
    images = ImageConfig(
        "anyres" if layout == "anyres" else "pad", SIZE, pinpoints=POINTS, grid_order="hf"
    )
    config = DialogueConfig(batch=BATCH, lengths=(256,), epochs=1, threads=0)
    loader = make_dialogue_loader(
        open_built(files.built), files.words, VICUNA_V1, config, images, files.built
    )
    return lambda: iter(loader)


def theirs(files: Files, layout: str) -> Side:
    """One pass of torch's DataLoader without workers: float32 tiles and tokens, padded by batch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    processor = processor_of(layout)
    turns = [(f"<image>\n{QUESTION}", ANSWER)]
    text = render(VICUNA_V1, turns, image=False).text

    class Photos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files.photos)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            with Image.open(files.photos[index]) as photo:
                seen = processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"][0]
            return seen, torch.tensor(files.words(text)["input_ids"])

    def collate(rows: list) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, text = ([row[part] for row in rows] for part in (0, 1))
        stack = torch.stack if layout == "pad" else partial(pad_sequence, batch_first=True)
        return stack(pixels), pad_sequence(text, batch_first=True)

    loader = DataLoader(Photos(), BATCH, shuffle=True, num_workers=0, collate_fn=collate)
    return lambda: iter(loader)


def processor_of(layout: str) -> Any:
    """Hugging Face's processor in PIL: LLaVA-NeXT's tiles, or LLaVA's padded square."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next import image_processing_pil_llava_next as tiled

    side = {"height": SIZE, "width": SIZE}
    if layout == "anyres":
        return tiled.LlavaNextImageProcessorPil(size=side, crop_size=side)  # and the same points
    return LlavaImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side, do_pad=True)


def compare(files: Files, layout: str, rounds: int) -> Rates:
    """Both sides in turns, each a whole pass a round; a first round is not counted."""
    sides = ours(files, layout), theirs(files, layout)
    found = np.array(
        [[rate(side, len(files.photos)) for side in sides] for _ in range(1 + rounds)]
    )[1:]
    return Rates(found[:, 0], found[:, 1])


def rate(side: Side, images: int) -> float:
    """Images per second of this process's CPU time, so that a busy machine matters less."""
    start = time.process_time()
    for _ in side():
        pass
    return images / (time.process_time() - start)
