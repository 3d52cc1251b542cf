"""Random-access sources of glyph records: a TensorFlow Datasets builder, and one in memory.

A source has `__len__` and `__getitem__`; an element is a `Record`.
"""

import contextlib
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import tensorflow_datasets as tfds

from focus_jax.data.glyph_config import SPLITS
from focus_jax.data.glyphs import HOPS, KINDS, VERSION, GlyphsConfig, make_example, split_seed
from focus_jax.data.images import encode_png


class Record(TypedDict):
    """One image with its questions; `kind` indexes `KINDS`, labels are per cell.

    `evidence` [Q, E]: the cells that each question is about, -1 where they are fewer.
    """

    index: int
    image: bytes
    question: tuple[str, ...]
    answer: tuple[str, ...]
    kind: np.ndarray
    hops: np.ndarray
    glyph: np.ndarray
    colour: np.ndarray
    card: np.ndarray
    evidence: np.ndarray


class Source(Protocol):
    """A data set with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass
class GlyphsBuilderConfig(tfds.core.BuilderConfig):
    """Names one data set: its contents and its seed."""

    glyphs: GlyphsConfig = field(default_factory=GlyphsConfig)
    seed: int = 0

    def __str__(self) -> str:
        return self.name


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """The embedded glyphs data set as ArrayRecord files."""

    VERSION = tfds.core.Version(VERSION)
    builder_config: GlyphsBuilderConfig

    # `prepare` tells of the writing; there is no download to tell of.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass

    def _info(self) -> tfds.core.DatasetInfo:
        glyphs = self.builder_config.glyphs
        labels = tfds.features.Tensor(shape=(glyphs.grid**2,), dtype=np.uint8)
        per_question = tfds.features.Tensor(shape=(glyphs.questions,), dtype=np.uint8)
        size = glyphs.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural images of coloured glyphs with questions of one to three hops.",
            features=tfds.features.FeaturesDict(
                {
                    "index": tfds.features.Scalar(np.int64),
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "question": tfds.features.Sequence(tfds.features.Text()),
                    "answer": tfds.features.Sequence(tfds.features.Text()),
                    "kind": per_question,
                    "hops": per_question,
                    "glyph": labels,
                    "colour": labels,
                    "card": labels,
                    "evidence": tfds.features.Tensor(
                        shape=(glyphs.questions, glyphs.most_cells), dtype=np.int16
                    ),
                }
            ),
            # Index order on disk: record i of a split is example i, and nothing is sorted.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Record]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Record]]:
        config = self.builder_config
        seed = split_seed(config.seed, split)
        for index in range(config.glyphs.size(split)):
            yield index, make_record(config.glyphs, seed, index)


class GlyphsSource:
    """One split of a prepared data set, read at random from its files."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        skip = {"image": tfds.decode.SkipDecoding()}
        self._rows = builder.as_data_source(split, decoders=skip)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[_checked(index, len(self))]
        return Record(
            index=int(row["index"]),
            image=row["image"],
            question=tuple(text.decode() for text in row["question"]),
            answer=tuple(text.decode() for text in row["answer"]),
            kind=row["kind"],
            hops=row["hops"],
            glyph=row["glyph"],
            colour=row["colour"],
            card=row["card"],
            evidence=row["evidence"],
        )


class FreshSource:
    """Examples made on demand and never written, from a stream that no split shares."""

    def __init__(self, config: GlyphsConfig, seed: int, size: int):
        if size < 1:
            raise ValueError(f"size={size}: give 1 or more examples")
        self._config = config
        self._seed = split_seed(seed, "fresh")
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        return make_record(self._config, self._seed, _checked(index, self._size))


def make_record(config: GlyphsConfig, stream: int, index: int) -> Record:
    """Example `index` of a stream (see `split_seed`) in the form that sources hand out."""
    example = make_example(config, stream, index)
    questions = example["questions"]
    return Record(
        index=index,
        image=encode_png(example["image"]),
        question=tuple(q["question"] for q in questions),
        answer=tuple(q["answer"] for q in questions),
        kind=np.array([KINDS.index(q["kind"]) for q in questions], np.uint8),
        hops=np.array([HOPS[q["kind"]] for q in questions], np.uint8),
        glyph=example["glyph"],
        colour=example["colour"],
        card=example["card"],
        evidence=_padded([q["cells"] for q in questions], config.most_cells),
    )


def _padded(cells: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Lists of cells as rows of one array, filled up with -1."""
    out = np.full((len(cells), width), -1, np.int16)
    for row, own in zip(out, cells, strict=True):
        row[: len(own)] = own
    return out


def prepare(
    config: GlyphsConfig, seed: int, data_dir: str | Path, verbose: bool = False
) -> tfds.core.DatasetBuilder:
    """Write the data set below `data_dir` unless it is there already; returns its builder.

    Processes may prepare the same data set at once. Tells where it writes, on stderr; `verbose`
    adds the progress of TensorFlow Datasets.
    """
    builder = _builder(config, seed, data_dir, verbose)
    target = Path(builder.data_path)
    if target.exists():
        return builder
    print(f"writing data set to {target}", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own: two processes would write the same names.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=data_dir) as private:
        writer = _builder(config, seed, private, verbose)
        with contextlib.nullcontext() if verbose else _without_bars():
            writer.download_and_prepare()
        _move(Path(writer.data_path), target)
    return _builder(config, seed, data_dir, verbose)


def _builder(config: GlyphsConfig, seed: int, data_dir: str | Path, verbose: bool) -> Glyphs:
    # The name holds a digest of all fields and of one example: neither another configuration nor a
    # generator that was changed without a new VERSION ever finds these files.
    fields = json.dumps({"seed": seed, **asdict(config)}, sort_keys=True)
    example = make_example(config, seed, 0)
    digest = hashlib.sha256(f"{fields}{example['questions']}".encode() + example["image"].tobytes())
    name = f"s{seed}_{digest.hexdigest()[:12]}"
    with contextlib.nullcontext() if verbose else _without_notice():
        return Glyphs(
            data_dir=str(data_dir),
            config=GlyphsBuilderConfig(
                name=name, version=VERSION, description=fields, glyphs=config, seed=seed
            ),
            file_format="array_record",
        )


def _move(written: Path, target: Path) -> None:
    try:
        written.rename(target)
    except OSError:
        # Another process was first; what it wrote is the same.
        if not target.is_dir():
            raise


@contextlib.contextmanager
def _without_notice() -> Iterator[None]:
    # The library warns of every configuration that is not listed in the class.
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "custom data configuration" not in str(record.msg)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    tfds.display_progress_bar(False)
    try:
        yield
    finally:
        tfds.display_progress_bar(True)


def source(config: GlyphsConfig, seed: int, split: str, data_dir: str | Path) -> GlyphsSource:
    """A split ("train", "validation" or "test") of the data set, written first if need be."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    return GlyphsSource(prepare(config, seed, data_dir), split)


def _checked(index: int, size: int) -> int:
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside a source of {size} examples")
    return int(index)
