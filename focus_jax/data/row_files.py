"""Rows of JSON lists, JSON lines and webdataset shards, found once and then read at random.

Only where rows begin and end is held, so that a list of gigabytes takes little memory.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from focus_jax.data.image_store import members
from focus_jax.data.random_file import RandomFile

# A longer row is not one: a quote or bracket is missing.
MAX_ROW = 1 << 26
_CHUNK = 1 << 22
_SPACE = " \t\r\n"
_BEHIND = {"", ",", "]", *_SPACE}
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{},]', re.DOTALL)
_WORD = re.compile(f"[^{_SPACE}]")
_PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class Place(NamedTuple):
    """A row's file, its line and its number in the file, from 1; line 0: it has no lines."""

    file: str
    line: int
    row: int

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return f"{self.file}{line} (row {self.row})"


class Row(NamedTuple):
    """A row as it stands in its file. `key`, `beside`: its name and images in a shard."""

    raw: bytes
    place: Place
    key: str = ""
    beside: tuple[str, ...] = ()


class RowSource(Protocol):
    """Rows with random access; can be sent to other processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def about(self) -> dict[str, Any]:
        """What tells these rows from others, as JSON."""
        ...


class Span(NamedTuple):
    """A row's first byte, its bytes, and the line that it begins on."""

    offset: int
    length: int
    line: int


class JsonRows:
    """The rows of a JSON list or of JSON lines.

    Raises FileNotFoundError, and ValueError for a list that is cut off, or is none.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no rows at {path}: give a JSON list or JSON lines")
        self._file = RandomFile(self.path)
        with self.path.open("rb") as file:
            self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            # int64 [R, 3]: 24 bytes a row.
            spans = np.fromiter(_spans(file, self.path), np.dtype((np.int64, 3)))
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Row:
        offset, length, line = (int(n) for n in self._spans[index])
        # One byte more than may be tells that a row is too long.
        raw = self._file.read(offset, min(length, MAX_ROW + 1))
        return Row(raw, Place(str(self.path), line, index + 1))

    def about(self) -> dict[str, Any]:
        return {"file": self.path.name, "rows": len(self), "sha256": self._sha256}


class ShardRows:
    """The rows of webdataset shards: KEY.json, beside KEY.jpg or KEY.0.jpg, KEY.1.jpg.

    Raises ValueError where there are none.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._files = [RandomFile(path) for path in paths]
        self._rows: list[tuple[int, int, int, str, tuple[str, ...]]] = []
        for number, path in enumerate(map(Path, paths)):
            for key, group in groupby(members(path), lambda member: _key(member.name)):
                found = {member.name: member for member in group}
                photos = [name for name in found if Path(name).suffix.lower() in _PHOTOS]
                beside = tuple(f"{path.name}/{name}" for name in sorted(photos, key=_by_number))
                row = found.get(f"{key}.json")
                if row is not None:
                    self._rows.append((number, row.offset, row.length, row.name, beside))
        if not self._rows:
            raise ValueError(f"the {len(paths)} shards hold no rows: each is to be a KEY.json")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        number, offset, length, name, beside = self._rows[index]
        file = self._files[number]
        raw = file.read(offset, min(length, MAX_ROW + 1))
        return Row(raw, Place(f"{file.path}/{name}", 1, index + 1), _key(name), beside)

    def about(self) -> dict[str, Any]:
        files = {file.path.name: file.path.stat().st_size for file in self._files}
        return {"shards": files, "rows": len(self)}


class AllRows:
    """Several sources, one behind another."""

    def __init__(self, sources: Sequence[RowSource]):
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self._sources[number][index - before]

    def about(self) -> dict[str, Any]:
        return {"rows": [source.about() for source in self._sources]}


def open_shard_rows(folder: str | Path) -> ShardRows:
    """The rows of a folder's .tar shards, in the order of their names."""
    paths = sorted(Path(folder).glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"no webdataset shards in {folder}: it is to hold .tar files")
    return ShardRows(paths)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _by_number(name: str) -> tuple[int, str]:
    number = name[len(_key(name)) + 1 :].partition(".")[0]
    return (int(number) if number.isdecimal() and len(number) < 10 else 0, name)


def _spans(file: BinaryIO, path: Path) -> Iterator[Span]:
    start = file.read(1 << 16)
    begin = 3 if start.startswith(codecs.BOM_UTF8) else 0
    file.seek(begin)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"{path} is UTF-16: write it as UTF-8")
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    is_list = not lines and start[begin:].lstrip().startswith(b"[")
    return _list_spans(file, path, begin) if is_list else _line_spans(file, begin)


def _line_spans(file: BinaryIO, offset: int) -> Iterator[Span]:
    """Lines that are not blank; none is held whole."""
    line, length, blank = 1, 0, True
    while part := file.readline(_CHUNK):
        length, blank = length + len(part), blank and not part.strip()
        if part.endswith(b"\n"):
            if not blank:
                yield Span(offset, length, line)
            offset, line, length, blank = offset + length, line + 1, 0, True
    if not blank:
        yield Span(offset, length, line)


class _Window:
    """The part of a list that is being looked at. One character is one byte: text is Latin-1."""

    def __init__(self, file: BinaryIO, begin: int):
        self._file = file
        self.text, self.at = "", 0
        self.base, self.line, self.over = begin, 1, False

    def more(self) -> None:
        """Forget what was passed and read on, at least as much as is held."""
        rest = self.text[self.at :]
        part = self._file.read(max(_CHUNK, len(rest)))
        self.base, self.text, self.at = self.base + self.at, rest + part.decode("latin-1"), 0
        self.over = not part

    def pass_to(self, at: int) -> None:
        """Move on within the text."""
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def next(self) -> str:
        """The next character that is not space; "" at the end."""
        while (found := _WORD.search(self.text, self.at)) is None and not self.over:
            self.pass_to(len(self.text))
            self.more()
        self.pass_to(found.start() if found else len(self.text))
        return found[0] if found else ""


def _list_spans(file: BinaryIO, path: Path, begin: int) -> Iterator[Span]:
    """The elements of a list. One that is not JSON ends where its brackets close."""
    window, row = _Window(file, begin), 0
    window.next()
    window.pass_to(window.at + 1)
    while (found := window.next()) != "]":
        row += 1
        if not found:
            raise ValueError(
                f"{path}: the list is cut off after row {row - 1}, at line {window.line}: it has"
                " no closing bracket; fetch or write it again"
            )
        end = _element_end(window, path, row)
        yield Span(window.base + window.at, end - window.at, window.line)
        window.pass_to(end)
        if window.next() == ",":
            window.pass_to(window.at + 1)
    window.pass_to(window.at + 1)
    if window.next():
        raise ValueError(
            f"{path}: line {window.line} goes on behind the end of the list, after row {row}: write"
            " one list, or JSON lines"
        )


def _element_end(window: _Window, path: Path, row: int) -> int:
    scan = json.JSONDecoder().raw_decode
    while True:
        end: int | None
        try:
            _, end = scan(window.text, window.at)
        except (ValueError, RecursionError):
            end = None
        # "3.5e" at the text's end is read as 3.5; and so is what was meant to be 3.5e7.
        if end is None or window.text[end : end + 1] not in _BEHIND:
            end = _closing(window.text, window.at)
        if end is not None and (end < len(window.text) or window.over):
            return end
        if window.over or len(window.text) - window.at > MAX_ROW:
            where = "the file" if window.over else f"{MAX_ROW} bytes"
            raise ValueError(
                f"{path}: row {row}, which begins at line {window.line}, does not end within"
                f" {where}: the list is cut off, or a quote or bracket is missing there"
            )
        window.more()


def _closing(text: str, at: int) -> int | None:
    """The place of the comma or bracket behind an element that is not JSON."""
    depth = 0
    for token in _TOKEN.finditer(text, at):
        sign = token[0][0]
        if sign == '"' and not token[1]:
            return None
        if not depth and sign in ",]":
            return token.start()
        depth = max(0, depth + (sign in "[{") - (sign in "]}"))
    return None
