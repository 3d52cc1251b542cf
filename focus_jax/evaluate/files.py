"""Benchmarks' files: JSON, JSONL, TSV, CSV and parquet, and where they and their images lie.

Rows come with clear errors (file, line); images stay where they are until they are asked for.
"""

import csv
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]


class Entry(Row):
    """An object of a file. ValueError names the file and what is there when it lacks a key."""

    __slots__ = ("where",)
    where: str

    def __missing__(self, name: str) -> Any:
        some = [str(key) for key, _ in zip(self, range(12), strict=False)]
        there = ", ".join(some + ["..."] * (len(self) > len(some))) or "nothing"
        raise ValueError(f'{self.where} has no "{name}"; it has {there}')


# Names of what is asked, in one file or another.
ASKED = ("question", "query", "text")


def named(found: Mapping[str, Any], where: str) -> Entry:
    """An object with the place that errors name. ValueError: its question is no text."""
    for name in ASKED:
        if name in found and isinstance(found[name], int | float | None):
            raise ValueError(
                f'{where}: "{name}" is {found[name]!r:.80}, not text: mend or remove that entry'
            )
    entry = Entry(found)
    entry.where = where
    return entry


PICTURES = (".jpg", ".png", ".jpeg", ".webp", ".JPG", ".PNG", ".JPEG")


def find(folder: Path, *patterns: str) -> Path | None:
    """The first file or folder that a pattern names, patterns in order of preference.

    Patterns are globs below `folder` ("data/*.json"); among the matches of one, the first by name.
    """
    for pattern in patterns:
        if matches := sorted(folder.glob(pattern)):
            return matches[0]
    return None


def shards(folder: Path, split: str, config: str = "") -> list[Path]:
    """The parquet files of a split, as the Hugging Face hub keeps them; none where it has none.

    They lie below `folder`, its "data", or the configuration's own folder; a hub's cache
    ("snapshots/...") does as well. FileNotFoundError: some of the split's files are missing.
    """
    places = [config] if config else []
    places += ["data", "."]
    for place in [*places, *(f"snapshots/*/{place}" for place in places)]:
        if found := sorted(folder.glob(f"{place}/{split}-*.parquet")):
            break
    else:
        return []
    # A cache may hold several snapshots: one of them.
    found = [path for path in found if path.parent == found[-1].parent]
    parts = re.search(r"-of-(\d+)", found[0].name)
    if parts and len(found) != int(parts[1]):
        raise FileNotFoundError(
            f"{found[0].parent} has {len(found)} of the {int(parts[1])} files of {split}: fetch "
            "the others"
        )
    return found


def image_folder(folder: Path, *names: str) -> Path:
    """The first of some folders below `folder` that is there. FileNotFoundError: none is."""
    for name in names:
        if (found := folder / name).is_dir():
            return found
    raise FileNotFoundError(
        f"{folder} has the questions but no folder of images: looked for {', '.join(names)}"
    )


def not_found(
    title: str, folder: Path, looked_for: Mapping[str, str], where: str
) -> FileNotFoundError:
    """The error of a benchmark whose files are not there.

    `looked_for`: what each layout would hold, by the layout's name. `where`: who gives the files.
    """
    there = "has none of its files" if folder.is_dir() else "does not exist"
    listed = "".join(f"\n  {layout}: {names}" for layout, names in looked_for.items())
    return FileNotFoundError(
        f"{title}: {folder} {there}; looked for{listed}\nPut one of them there; the files come "
        f"from {where}"
    )


def read_json(path: Path) -> Any:
    """A JSON file; its objects are entries. ValueError names file and line."""
    try:
        return json.loads(read_text(path), object_hook=lambda found: named(found, str(path)))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON (line {error.lineno}: {error.msg}): fetch it again"
        ) from error


def read_object(path: Path) -> Entry:
    """A JSON file that holds one object. ValueError: it holds something else."""
    found = read_json(path)
    if not isinstance(found, Entry):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object: is it another file?")
    return found


def read_keyed(path: Path) -> dict[str, Entry]:
    """Objects by their ids, as a JSON file has them. ValueError: it holds something else."""
    found = read_object(path)
    for key, row in found.items():
        if not isinstance(row, Entry):
            raise ValueError(f"{path} should hold objects by their ids: is it another file?")
        row.where = f"{path}: {key}"
    return found


def read_rows(path: Path, key: str = "") -> list[Entry]:
    """The list of objects in a JSON file, under `key` where one is given and the file has it."""
    found = read_json(path)
    if key and isinstance(found, dict) and key in found:
        found = found[key]
    if not isinstance(found, list) or not all(isinstance(row, Entry) for row in found):
        place = f' under "{key}"' if key else ""
        raise ValueError(f"{path} should hold a list of objects{place}: is it another file?")
    for number, row in enumerate(found):
        row.where = f"{path} row {number}"
    return found


def read_jsonl(path: Path) -> list[Entry]:
    """One object a line, empty lines skipped. ValueError names file and line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} holds {type(row).__name__}, not an object")
        rows.append(named(row, where))
    return rows


class Question(NamedTuple):
    """One line of a question file of LLaVA's evaluation. `text` has its suffix already."""

    id: str
    image: str
    text: str
    category: str


def read_questions(path: Path) -> list[Question]:
    """A question file of LLaVA's evaluation: JSONL of question_id, image, text and category.

    `image` and `category` are "" where a question has none. ValueError names file and line.
    """
    return [
        Question(
            str(row["question_id"]), row.get("image") or "", row["text"], row.get("category") or ""
        )
        for row in read_jsonl(path)
    ]


def read_table(path: Path) -> list[Entry]:
    """A TSV or CSV file with a header; cells as they stand. ValueError names file and line."""
    # Images lie in cells as base64: far above csv's limit for one.
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path} line {reader.line_num} has another number of cells than the "
                        f"header ({len(reader.fieldnames or ())}): fetch it again"
                    )
                rows.append(named(row, f"{path} line {reader.line_num}"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    return rows


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a mark. ValueError: other bytes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): fetch it again") from error


def image_at(folder: Path, name: str) -> Path:
    """Where the image `name` lies below `folder`.

    A name without a suffix takes the first of the usual ones that is there. The file may be
    missing: a benchmark is read whole before its first image, and running it names what is not
    there.
    """
    path = folder / name
    # SEED-Bench's images have no suffix.
    if path.suffix.lower() in PICTURES or path.is_file():
        return path
    for suffix in PICTURES:
        candidate = path.with_name(path.name + suffix)
        if candidate.exists():
            return candidate
    return path.with_name(path.name + PICTURES[0])


def read_parquet(
    paths: Sequence[Path], columns: Sequence[str], pictures: Sequence[str] = ("image",)
) -> Iterator[Row]:
    """Rows of a split's shards, in order: the named columns, and images as `Picture`s.

    A column in `pictures` is not read here: each value is a function that reads its own row group
    (one image column of it) when called. `columns` that end in "?" may be missing and are None
    then. "row": the row's number in the split. ValueError: a shard is broken, or lacks a column.
    """
    number = 0
    for path in paths:
        file = open_parquet(path)
        there = file.schema_arrow.names
        wanted = [name.removesuffix("?") for name in columns]
        for name in [*(c for c in columns if not c.endswith("?")), *pictures]:
            if name not in there:
                raise ValueError(f'{path} has no column "{name}"; it has {", ".join(there)}')
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            chosen = [name for name in wanted if name in there]
            # Without any column a table has no rows to walk.
            table = file.read_row_group(group, columns=chosen).to_pylist() if chosen else []
            for row in range(size):
                found: Row = dict.fromkeys(wanted)
                found |= table[row] if chosen else {}
                for name in pictures:
                    found[name] = partial(parquet_image, path, group, row, name)
                found["row"] = number
                yield found
                number += 1


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """A parquet file. ValueError: broken."""
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole parquet file ({error}): fetch it again") from error


def parquet_image(path: Path, group: int, row: int, column: str) -> bytes:
    """The bytes of an image in row `row` of a row group. ValueError: no image is there."""
    with READING:
        found = image_column(path, group, column)
    value = found[row].as_py()
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise ValueError(f'{path}: row {row} of row group {group} has no image in "{column}"')
    return encoded


# Neighbouring samples share a row group (usually 100 rows): reading one again for each would
# read the file a hundred times. Threads that want the same one wait for the first of them.
READING = threading.Lock()


@lru_cache(maxsize=4)
def image_column(path: Path, group: int, column: str) -> pyarrow.ChunkedArray:
    """One column of a row group; the last few are kept."""
    return open_parquet(path).read_row_group(group, columns=[column]).column(0)


def has_column(paths: Sequence[Path], name: str) -> bool:
    """Whether the shards of a split have a column."""
    return bool(paths) and name in open_parquet(paths[0]).schema_arrow.names


def unique(ids: Sequence[str]) -> list[str]:
    """The ids, later copies of one marked "-2", "-3", ...: for files that number images."""
    seen: dict[str, int] = {}
    out = []
    for name in ids:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return out
