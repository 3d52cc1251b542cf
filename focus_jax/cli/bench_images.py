"""`python -m focus_jax.cli.bench_images`: photos a second, beside Hugging Face's PIL processor."""

import io
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from focus_jax.cli.arguments import Parser, argv_or, positive
from focus_jax.cli.common import friendly
from focus_jax.config import VisionConfig
from focus_jax.data.preprocess import ImageConfig, preprocess

Side = Callable[[bytes], object]
VISION = VisionConfig()
POINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
HEADER = """Images/s per core: anyres 336, JPEG bytes to tiles (HF ends in normalised float32).

| JPEG | ours, uint8 | ours, normalised | HF | uint8 / HF | normalised / HF |
|---|---|---|---|---|---|"""


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Time LLaVA-NeXT's tiles from JPEG bytes in one thread; print a Markdown table."""
    out = Parser("python -m focus_jax.cli.bench_images")
    out.add_argument("--rounds", type=positive, default=7, help="the sides alternate this often")
    out.add_argument("--images", type=positive, default=10, help="calls a round")
    flags = out.parse_args(argv_or(argv))
    cfg = ImageConfig("anyres", pinpoints=POINTS, grid_order="hf")
    sides = [lambda b: preprocess(b, cfg), lambda b: normalise(preprocess(b, cfg).pixels), hf()]
    print(HEADER)
    for size in ((640, 480), (1600, 1200)):
        data = photo(size)
        rows = [[rate(side, data, flags.images) for side in sides] for _ in range(1 + flags.rounds)]
        rates = np.array(rows[1:])  # the first warms up
        cells = [f"{size[0]}x{size[1]}", *(f"{rate:.1f}" for rate in np.median(rates, axis=0))]
        ratios = (rates[:, :2] / rates[:, 2:]).T
        cells += [f"{np.median(r):.2f} ({r.min():.2f}-{r.max():.2f})" for r in ratios]
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


def hf() -> Side:
    """Hugging Face's LLaVA-NeXT processor without torch, from bytes to an array."""
    from transformers.models.llava_next import image_processing_pil_llava_next as pil

    side = {"height": 336, "width": 336}
    processor = pil.LlavaNextImageProcessorPil(size=side, crop_size=side)  # and the same points
    return lambda data: processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"]


def normalise(tiles: np.ndarray) -> np.ndarray:
    """What the vision tower does first, in NumPy."""
    mean, std = (np.array(value, np.float32) for value in (VISION.pixel_mean, VISION.pixel_std))
    return ((tiles * np.float32(1 / 255) - mean) / std).transpose(0, 3, 1, 2)


def photo(size: tuple[int, int]) -> bytes:
    """A JPEG of large shapes under fine grain."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size)
    grain = rng.integers(0, 25, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(np.asarray(shapes) // 2 + grain).save(file, "JPEG", quality=90)
    return file.getvalue()


def rate(side: Side, data: bytes, count: int) -> float:
    """Calls per second of this process's CPU time, so that a busy machine matters less."""
    start = time.process_time()
    for _ in range(count):
        side(data)
    return count / (time.process_time() - start)


if __name__ == "__main__":
    sys.exit(main())
