"""A benchmark's samples as batches of equal static shapes, prepared ahead of the devices.

A sample's shape is its own, whatever else is asked: so its answer does not depend on the batch.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from focus_jax.data.conversation import Prompt
from focus_jax.data.images import Tiles, size_of
from focus_jax.data.preprocess import ImageConfig, layout_of, preprocess
from focus_jax.evaluate.benchmark import Picture, Sample
from focus_jax.models.vlm import dims_of
from focus_jax.pipeline import Pipeline
from focus_jax.prompts import Arrays, bucket, make_arrays

# Columns of what is known of a sample before it runs.
IMAGES, TILES, TEXT, STATE = range(4)
# What becomes of it: asked; answered before; an image that cannot be read; beyond the context.
ASK, ANSWERED, UNREADABLE, TOO_LONG = range(4)
NOTES = {UNREADABLE: "unreadable", TOO_LONG: "too_long"}
Known = Int32[np.ndarray, "N 4"]
# Threads that read and resize images, which mostly leaves Python's lock alone.
WORKERS = min(32, max(4, os.cpu_count() or 1))


class Shape(NamedTuple):
    """Static sizes of a prompt: images, tiles of each, and text tokens they are padded to."""

    images: int
    tiles: int
    text: int


class Batch(NamedTuple):
    """Samples (by their places) that run together; fewer than the rest only at a shape's end."""

    shape: Shape
    members: tuple[int, ...]


class Failed(NamedTuple):
    """Why a sample's images cannot be read."""

    why: str


def measure(pipeline: Pipeline, samples: Sequence[Sample], workers: int = WORKERS) -> Known:
    """Shape and state of every sample; of images at most the heads of their files are read.

    Too long is a prompt that, with its images, leaves no place in the context for an answer.
    ValueError: a sample that places more images than it has, or asks nothing.
    """
    cfg, method = pipeline.vlm.cfg, pipeline.vlm.method
    sizes = iter(picture_sizes(samples, pipeline.images, workers))
    out = np.zeros((len(samples), 4), np.int32)
    slots: dict[int, int] = {}
    for number, sample in enumerate(samples):
        length = len(encoded(pipeline, sample).ids)
        layouts = [next(sizes) for _ in sample.images]
        tiles = max((tiles for tiles, _ in layouts), default=1)
        visual = 0
        for own, tokens in layouts:
            if own and own not in slots:
                slots[own] = method.stage_slots(dims_of(cfg, own))[0]
            visual += min(tokens, slots[own]) if own else 0
        state = ASK
        if any(own == 0 for own, _ in layouts):
            state = UNREADABLE
        elif length + visual >= cfg.decoder.max_position:
            state = TOO_LONG
        out[number] = max(len(layouts), 1), tiles, bucket(length), state
    return out


def encoded(pipeline: Pipeline, sample: Sample) -> Prompt:
    """A sample's prompt as tokens. ValueError names the sample."""
    try:
        return pipeline.encode(sample.prompt, len(sample.images))
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}") from error


def picture_sizes(
    samples: Sequence[Sample], cfg: ImageConfig, workers: int
) -> list[tuple[int, int]]:
    """Tiles and visual tokens of every picture in a row; (0, 0) where its head cannot be read.

    Only where tiles depend on the image's size is a file opened.
    """
    pictures = [picture for sample in samples for picture in sample.images]
    if cfg.layout != "anyres":
        return [(1, (cfg.size // cfg.patch) ** 2)] * len(pictures)

    def one(picture: Picture) -> tuple[int, int]:
        try:
            layout = layout_of(size_of(opened(picture), exif=cfg.exif), cfg)
        except (ValueError, OSError):
            return 0, 0
        return 1 + layout.grid[0] * layout.grid[1], layout.tokens

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, pictures))


def opened(picture: Picture) -> Path | bytes:
    return picture if isinstance(picture, Path) else picture()


def plan_batches(known: Known, batch: int) -> list[Batch]:
    """All samples that can run, by shape, large ones first, each shape's in the samples' order.

    Memory that does not suffice so is met at once. What was answered before keeps its place, so
    that the batches of a run that goes on are those of one that was never stopped.
    """
    runs = np.flatnonzero(np.isin(known[:, STATE], (ASK, ANSWERED)))
    shapes, group = np.unique(known[runs][:, :STATE], axis=0, return_inverse=True)
    found = [(Shape(*map(int, s)), runs[group == i]) for i, s in enumerate(shapes)]
    found.sort(key=lambda item: (item[0].images * item[0].tiles, item[0].text), reverse=True)
    return [
        Batch(shape, tuple(int(i) for i in members[first : first + batch]))
        for shape, members in found
        for first in range(0, len(members), batch)
    ]


def tiles_of(sample: Sample, cfg: ImageConfig) -> list[Tiles] | Failed:
    """A sample's images, read and preprocessed."""
    try:
        return [preprocess(opened(picture), cfg) for picture in sample.images]
    except (ValueError, OSError) as error:
        return Failed(str(error))


def ahead(
    batches: Sequence[Batch],
    rows: Callable[[Batch], Sequence[int]],
    load: Callable[[int], list[Tiles] | Failed],
    depth: int = 2,
    workers: int = WORKERS,
) -> Iterator[tuple[Batch, list[list[Tiles] | Failed]]]:
    """Batches with the loaded images of `rows(batch)`, `depth` batches ahead in threads."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[Batch, list[Future[list[Tiles] | Failed]]]] = deque()
    try:
        for batch in batches:
            held = rows(batch)
            # One that fills a batch up is loaded once.
            loading = {row: pool.submit(load, row) for row in dict.fromkeys(held)}
            waiting.append((batch, [loading[row] for row in held]))
            if len(waiting) > depth:
                yield finished(waiting.popleft())
        while waiting:
            yield finished(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def finished(
    item: tuple[Batch, list[Future[list[Tiles] | Failed]]],
) -> tuple[Batch, list[list[Tiles] | Failed]]:
    return item[0], [future.result() for future in item[1]]


def arrays_of(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    shape: Shape,
    rows: Sequence[int],
    images: Sequence[list[Tiles] | Failed],
) -> Arrays:
    """The rows' arrays in the batch's shape; one without its images keeps its text."""
    prompts = [encoded(pipeline, samples[row]) for row in rows]
    there = [own if isinstance(own, list) else [] for own in images]
    return make_arrays(pipeline.vlm.cfg, prompts, there, shape.text, shape.images, shape.tiles)
