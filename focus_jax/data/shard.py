"""One shard of a data set: its rows checked, packed and written, whole or not at all."""

import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from focus_jax.data.dialogue import Dialogue
from focus_jax.data.image_store import ImageStore, MissingImage, shown
from focus_jax.data.images import CorruptImage, to_rgb
from focus_jax.data.llava import BadRow, parse_row
from focus_jax.data.row_files import RowSource

# Each split and how it is written: images are compressed already. "texts" are the same rows
# without their images, so that reading texts alone stays quick.
SPLITS = {"train": "group_size:1,uncompressed", "texts": "group_size:1"}
WORK = ".building"
# Of all images of a row; several copies are held while it is written.
_MAX_RECORD = 1 << 28
# What PIL tells of a file in memory: another in every process; equal builds list equal reasons.
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")
# Photos' formats. PIL knows others, some of which call programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


@dataclass(frozen=True)
class Job:
    """All that a worker needs to write any shard. `total`: rows of all shards."""

    rows: RowSource
    images: ImageStore
    out: Path
    name: str
    shards: int
    verify_images: bool
    max_pixels: int

    def bounds(self, shard: int) -> range:
        """The rows of a shard."""
        total = len(self.rows)
        return range(total * shard // self.shards, total * (shard + 1) // self.shards)

    def file(self, split: str, shard: int) -> str:
        """The name of a shard's file, as TFDS wants it."""
        return f"{self.name}-{split}.array_record-{shard:05d}-of-{self.shards:05d}"

    def part(self, shard: int) -> Path:
        """What is known of a shard: written last, so that its files are whole when it is there."""
        return self.out / WORK / f"{shard:05d}.npz"


class Part(NamedTuple):
    """A written shard, K rows of which were good.

    `sizes` [K 3]: images, width and height of the largest; `characters` [K] of the texts; `rows`
    [K]: numbers in the source, from 0. `bad`: a JSON line each. `files`: (bytes, SHA-256) by name.
    """

    sizes: np.ndarray
    characters: np.ndarray
    rows: np.ndarray
    bad: tuple[str, ...]
    files: dict[str, tuple[int, str]]


class Packed(NamedTuple):
    """A good row: its records by split, and what the index holds of it."""

    records: dict[str, bytes]
    size: tuple[int, int, int]
    characters: int


def features() -> tfds.features.FeaturesDict:
    """A record: its id, the images' files, and the texts of users and model by turn."""
    texts = tfds.features.Sequence(tfds.features.Text())
    return tfds.features.FeaturesDict(
        {"id": tfds.features.Text(), "images": texts, "users": texts, "answers": texts}
    )


def write_shard(job: Job, shard: int, tell: Callable[[bool], None]) -> Part:
    """Write a shard, unless it is there and whole. `tell` hears of every row whether it is good."""
    found = whole_part(job, shard)
    if found is not None:
        for number in range(len(job.bounds(shard))):
            tell(number < len(found.rows))
        return found
    paths = {split: job.out / job.file(split, shard) for split in SPLITS}
    written = {
        split: job.out / WORK / f"{path.name}.{os.getpid()}" for split, path in paths.items()
    }
    good, bad = _write_rows(job, shard, written, tell)
    files = {paths[split].name: checksum(path) for split, path in written.items()}
    for split, path in written.items():
        _to_disk(path)
        os.replace(path, paths[split])
    part = Part(
        sizes=np.array([size for _, size, _ in good], np.int32).reshape(-1, 3),
        characters=np.array([characters for *_, characters in good], np.int32),
        rows=np.array([number for number, *_ in good], np.int64),
        bad=tuple(bad),
        files=files,
    )
    _write_part(job.part(shard), part)
    return part


def whole_part(job: Job, shard: int) -> Part | None:
    """A shard that was written before, if its files still have their checksums."""
    try:
        part = _read_part(job.part(shard))
    except (FileNotFoundError, ValueError, LookupError, zipfile.BadZipFile):
        return None
    for name, known in part.files.items():
        path = job.out / name
        if not path.is_file() or checksum(path) != known:
            return None
    return part


def checksum(path: Path) -> tuple[int, str]:
    """A file's bytes and SHA-256."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, contents: bytes, work: Path | None = None) -> None:
    """Write a file whole or not at all; it is on the disk when this returns.

    `work`: where it lies before it is whole; default: beside it.
    """
    temporary = (work or path.parent) / f"{path.name}.{os.getpid()}"
    with temporary.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def packed_arrays(**arrays: np.ndarray) -> bytes:
    """Arrays as the bytes of an .npz file; equal ones give equal bytes."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def pack(job: Job, number: int) -> Packed | BadRow:
    """Row `number` as records, its images read and checked."""
    row = job.rows[number]
    dialogue = parse_row(row)
    if isinstance(dialogue, BadRow):
        return dialogue
    images: list[bytes] = []
    sizes = [(0, 0)]
    try:
        for name in dialogue.images:
            images.append(job.images.read(name))
            _check_total(images)
            sizes.append(checked_size(images[-1], name, job.max_pixels, job.verify_images))
    except MissingImage as error:
        return BadRow(row.place, dialogue.id, "missing image", str(error))
    except CorruptImage as error:
        return BadRow(row.place, dialogue.id, "corrupt image", str(error))
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    records = {"train": _record(dialogue, images), "texts": _record(dialogue, ())}
    characters = sum(len(text) for turn in dialogue.turns for text in turn)
    return Packed(records, (len(images), width, height), characters)


def checked_size(encoded: bytes, name: str, max_pixels: int, decode: bool) -> tuple[int, int]:
    """Width and height of an encoded image. Raises CorruptImage, also for one that is too large.

    `decode`: read all of its pixels; otherwise its header only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are odd, and of sizes: asked below
        try:
            with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
                width, height = image.size
            _check_pixels(width, height, max_pixels)
            if decode:
                to_rgb(encoded, exif=False, transparency="drop")
        except Exception as error:
            # Decoders fail on foreign bytes with all kinds of errors; each is one bad image.
            reason = _ADDRESS.sub("", str(error)) or type(error).__name__
            raise CorruptImage(f"{shown(name)} of {len(encoded)} bytes: {reason}") from error
    return width, height


@lru_cache(1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if not 0 < width * height <= max_pixels:
        raise CorruptImage(
            f"{width}x{height} is {width * height} pixels: between 1 and {max_pixels} are allowed"
        )


def _check_total(images: Sequence[bytes]) -> None:
    total = sum(map(len, images))
    if total > _MAX_RECORD:
        raise CorruptImage(f"its first {len(images)} images have {total} bytes: > {_MAX_RECORD}")


def _write_rows(
    job: Job, shard: int, paths: dict[str, Path], tell: Callable[[bool], None]
) -> tuple[list[tuple[int, tuple[int, int, int], int]], list[str]]:
    """Write a file for each split; returns (number, size, characters) of the good, and the bad."""
    writers = {split: ArrayRecordWriter(str(path), SPLITS[split]) for split, path in paths.items()}
    good, bad = [], []
    for number in job.bounds(shard):
        found = pack(job, number)
        if isinstance(found, BadRow):
            bad.append(found.to_json())
        else:
            with _naming(job, shard):
                for split, record in found.records.items():
                    writers[split].write(record)
            good.append((number, found.size, found.characters))
        tell(isinstance(found, Packed))
    with _naming(job, shard):
        for writer in writers.values():
            writer.close()
    return good, bad


@contextmanager
def _naming(job: Job, shard: int) -> Iterator[None]:
    """The writer's errors, such as a full disk, name the shard."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"shard {shard} of {job.out} cannot be written: {error}") from error


def _record(dialogue: Dialogue, images: Sequence[bytes]) -> bytes:
    users, answers = zip(*dialogue.turns, strict=True)
    value = {"id": dialogue.id, "images": images, "users": users, "answers": answers}
    known, serializer = _serializer()
    example = serializer.get_tf_example(known.encode_example(value))
    # Without this the order of the fields would be another in every process.
    return example.SerializeToString(deterministic=True)


@lru_cache(1)
def _serializer() -> tuple[tfds.features.FeaturesDict, ExampleSerializer]:
    known = features()
    return known, ExampleSerializer(known.get_serialized_info())


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _write_part(path: Path, part: Part) -> None:
    facts = json.dumps({"bad": part.bad, "files": part.files}).encode()
    arrays = {"sizes": part.sizes, "characters": part.characters, "rows": part.rows}
    write_whole(path, packed_arrays(**arrays, facts=np.frombuffer(facts, np.uint8)))


def _read_part(path: Path) -> Part:
    with np.load(path) as arrays:
        facts: dict[str, Any] = json.loads(arrays["facts"].tobytes())
        files = {name: (int(size), str(digest)) for name, (size, digest) in facts["files"].items()}
        return Part(
            arrays["sizes"], arrays["characters"], arrays["rows"], tuple(facts["bad"]), files
        )
