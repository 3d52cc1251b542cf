"""A data set that `python -m focus_jax data build` wrote, read at random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, Int64

from focus_jax.data.build import FACTS, FORMAT, INDEX
from focus_jax.data.dialogue import Example, Exchange
from focus_jax.data.shard import WORK, checksum


def open_built(folder: str | Path, verify: bool = False) -> "Built":
    """The data set in a folder; `verify` reads all of its files and compares their checksums.

    Raises FileNotFoundError where there is none or it is not finished, ValueError where files are
    missing or damaged; both say how to mend it.
    """
    return Built(folder, verify)


class Built:
    """A `DialogueSource` over the files of a folder; serves several threads and processes.

    `sizes` [N, 3], `characters` [N] (of all texts) and `rows` [N] (numbers in what it was built
    from) are held in memory, all else is read when asked for. See `open_built`.
    """

    sizes: Int32[np.ndarray, "N 3"]
    characters: Int32[np.ndarray, " N"]
    rows: Int64[np.ndarray, " N"]

    def __init__(self, folder: str | Path, verify: bool = False):
        self.folder = Path(folder)
        self._facts = _facts(self.folder)
        _check_files(self.folder, self._facts["files"], verify)
        self.fingerprint = str(self._facts["fingerprint"])
        with np.load(self.folder / INDEX) as index:
            self.sizes, self.characters = index["sizes"], index["characters"]
            self.rows = index["rows"]
        builder = tfds.builder_from_directory(self.folder)
        self._examples = builder.as_data_source("train")
        self._texts = builder.as_data_source("texts")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self._examples[self._checked(index)]
        return Example(row["id"].decode(), tuple(row["images"]), _turns(row))

    def texts(self, index: int) -> tuple[Exchange, ...]:
        """The turns of an example; its images stay on the disk."""
        return _turns(self._texts[self._checked(index)])

    def about(self) -> dict[str, Any]:
        """Counts, sources and settings, as JSON: the contents of build.json."""
        return {"folder": str(self.folder), **self._facts}

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} examples")
        return int(index)

    def __reduce__(self) -> tuple[Any, ...]:
        return Built, (self.folder,)


def _turns(row: dict[str, Any]) -> tuple[Exchange, ...]:
    pairs = zip(row["users"], row["answers"], strict=True)
    return tuple((user.decode(), answer.decode()) for user, answer in pairs)


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    if not path.is_file():
        if (folder / WORK).is_dir():
            raise FileNotFoundError(
                f"{folder} is not finished: its `data build` was stopped; run the same command"
                " again, it goes on where it was"
            )
        raise FileNotFoundError(
            f"{folder} is no data set: it has no {FACTS}; make one with `python -m focus_jax data"
            " build --json FILE --images FOLDER --out DIR`"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = facts["plan"]["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): build {folder} again") from error
    if found != FORMAT:
        raise ValueError(f"{folder} has format {found}, this reads {FORMAT}: build it again")
    return facts


def _check_files(folder: Path, files: dict[str, dict[str, Any]], verify: bool) -> None:
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy it again, or build {folder} again")
        size = path.stat().st_size
        if size != known["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes, {known['bytes']} were written: copy it again, or build"
                f" {folder} again"
            )
        if verify and checksum(path)[1] != known["sha256"]:
            raise ValueError(
                f"{path} is damaged: its checksum is not the written one; copy it again, or build"
                f" {folder} again"
            )
