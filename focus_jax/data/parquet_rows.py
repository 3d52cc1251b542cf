"""Rows of parquet files with their images inside, as LLaVA-NeXT-Data is published."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from focus_jax.data.image_store import MissingImage, shown
from focus_jax.data.row_files import Place, Row

_COLUMNS = ("id", "conversations", "image")


class ParquetRows:
    """The rows of parquet files, and a store of the images in them.

    Columns: `conversations`, a list of {from, value}; `id` and `image`, which may be missing or
    null. An image is {bytes, path} or the bytes; one without bytes is looked for by its path in
    other stores; a list of them is several. One group of rows is held at a time.

    Raises FileNotFoundError, and ValueError for what is no whole parquet file or lacks the turns.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [Path(path) for path in paths]
        files = [_open(path) for path in self.paths]
        self._columns = [[c for c in _COLUMNS if c in file.schema_arrow.names] for file in files]
        groups = [(n, g) for n, file in enumerate(files) for g in range(file.num_row_groups)]
        self._groups = groups
        counts = [files[n].metadata.row_group(g).num_rows for n, g in groups]
        self._ends = np.cumsum(counts, dtype=np.int64)
        # Where each file begins.
        rows = [file.metadata.num_rows for file in files]
        self._starts = np.cumsum([0, *rows], dtype=np.int64)
        self._held: tuple[int, pyarrow.Table] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        path = self.paths[number]
        place = Place(str(path), 0, index - int(self._starts[number]) + 1)
        try:
            row = self._row(index)
        except UnicodeDecodeError:
            return Row(b"\xff", place)  # what says of itself that it is not UTF-8
        images = _listed(row.pop("image", None))
        names = tuple(
            f"{path.name}/{index}/{k}" if _bytes_of(image) is not None else _path_of(image)
            for k, image in enumerate(images)
        )
        return Row(json.dumps(row, default=str).encode(), place, beside=names)

    def read(self, name: str) -> bytes:
        """An image by the name that its row has for it. Raises MissingImage."""
        file, *at = name.rsplit("/", 2)
        known = {path.name for path in self.paths}
        if file not in known or len(at) != 2 or not all(part.isdecimal() for part in at):
            raise MissingImage(f"{shown(name)} is not in the parquet files")
        row, k = map(int, at)
        found = _listed(self._row(row).get("image")) if row < len(self) else []
        encoded = _bytes_of(found[k]) if k < len(found) else None
        if encoded is None:
            raise MissingImage(f"{shown(name)} is not in the parquet files")
        return encoded

    def about(self) -> dict[str, Any]:
        """Names and sizes: checksums of a hundred gigabytes would take long."""
        sizes = {path.name: path.stat().st_size for path in self.paths}
        return {"parquet": sizes, "rows": len(self)}

    def _row(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        with self._lock:
            if self._held is None or self._held[0] != group:
                self._held = None  # before the next one comes
                self._held = group, self._table(group)
            table = self._held[1]
        first = int(self._ends[group - 1]) if group else 0
        return table.slice(index - first, 1).to_pylist()[0]

    def _table(self, group: int) -> pyarrow.Table:
        number, within = self._groups[group]
        path = self.paths[number]
        try:
            return _open(path).read_row_group(within, columns=self._columns[number])
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: its group {within + 1} of rows cannot be read ({error}): fetch it again"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetRows, (self.paths,)


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    if not path.is_file():
        raise FileNotFoundError(f"no rows at {path}: give parquet files")
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole parquet file ({error}): fetch it again") from error
    names = file.schema_arrow.names
    if "conversations" not in names:
        raise ValueError(f"{path} has no column 'conversations', but {', '.join(names)}")
    return file


def _listed(images: Any) -> list[Any]:
    return images if isinstance(images, list) else [] if images is None else [images]


def _bytes_of(image: Any) -> bytes | None:
    found = image.get("bytes") if isinstance(image, dict) else image
    return found if isinstance(found, bytes) else None


def _path_of(image: Any) -> str:
    found = image.get("path") if isinstance(image, dict) else image
    return found if isinstance(found, str) else ""
