"""A recorded case: what another implementation computed of given inputs, in a directory.

`case.json` names the method, its knobs and every array; `arrays.npz` holds them; `config.json` and
`model.safetensors` are a network's, where one was run; `items.json` has a metric's items.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focus_jax.hf_config import read_json

CASE, ARRAYS = "case.json", "arrays.npz"


class Recorded(NamedTuple):
    """One case. `info` is all of case.json, `arrays` what was recorded, by name."""

    directory: Path
    method: str
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def knobs(self) -> dict[str, Any]:
        return self.info["knobs"]

    @property
    def expected(self) -> list[str]:
        """Names of all arrays: those that case.json lists, then those that it does not."""
        return list({**self.info.get("array_shapes", {}), **self.arrays})

    def array(self, name: str) -> np.ndarray:
        """An input. ValueError where the case lacks it."""
        if name not in self.arrays:
            raise ValueError(f"{self.directory / ARRAYS} has no {name}, which is needed to run it")
        return self.arrays[name]

    def misshapen(self, name: str) -> str:
        """How an array differs from what case.json says of it; empty where it does not."""
        listed = self.info.get("array_shapes", {}).get(name)
        if listed is None:
            return ""
        there = self.arrays[name]
        found, said = (str(there.dtype), *there.shape), tuple(listed)
        return "" if found == said else f"recorded as {words(found)}, case.json says {words(said)}"


def words(described: Sequence[Any]) -> str:
    """`float32 [1, 5]`"""
    return f"{described[0]} {list(described[1:])}"


def find(roots: Sequence[str | Path]) -> dict[str, Path]:
    """All cases below some directories, in order, each once; names are paths below theirs.

    FileNotFoundError: a directory that is not there, or has no case.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for root in map(Path, roots):
        if not root.is_dir():
            raise FileNotFoundError(f"there is no directory {root}")
        below = list(directories(root))
        if not below:
            raise FileNotFoundError(f"{root} holds no recorded case: there is no {CASE} below it")
        for place in below:
            name = place.relative_to(root).as_posix()
            name = place.resolve().name if name == "." else name
            found.setdefault(place.resolve(), (name, place))
    names = [name for name, _ in found.values()]
    return {
        name if names.count(name) == 1 else place.as_posix(): place
        for name, place in found.values()
    }


def directories(root: Path) -> Iterator[Path]:
    """Directories with a case.json, links followed, in alphabetical order."""
    seen: set[Path] = set()
    for place, below, files in os.walk(root, followlinks=True):
        if (real := Path(place).resolve()) in seen:
            below.clear()  # a link that leads back
            continue
        seen.add(real)
        below.sort()
        if CASE in files:
            yield Path(place)


def read(directory: Path) -> Recorded:
    """A case. ValueError or OSError naming the file that is missing or broken."""
    info = read_json(directory / CASE)
    method = info.get("method") if isinstance(info, dict) else None
    if not isinstance(method, str) or not isinstance(info.get("knobs"), dict):
        raise ValueError(f"{directory / CASE} lacks a method's name, or its knobs")
    return Recorded(directory, method, info, read_arrays(directory / ARRAYS))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file. FileNotFoundError; ValueError: broken, or holding Python objects."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    name = ""
    try:
        # Opened here: NumPy leaves a file that it cannot read open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            out = {}
            for name in file.files:
                out[name] = file[name]
            return out
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        at = f" (array {name})" if name else ""
        raise ValueError(f"{path} cannot be read{at}: {error}") from error
