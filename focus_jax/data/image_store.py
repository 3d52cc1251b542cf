"""Where images lie: folders, zip and tar archives, webdataset shards; all read by name.

Names come from files that others wrote: one that leads out of its store is not there.
"""

import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from lzma import LZMAError
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from focus_jax.data.random_file import RandomFile

# No photo is larger; what is (or says so in an archive's list) is not read.
MAX_BYTES = 1 << 28
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}
# Opening a pipe must not wait for its other end.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
    EOFError,
    OSError,
    RuntimeError,  # it asks for a password; NotImplementedError for an unknown compression
    ValueError,
)


class MissingImage(LookupError):
    """An image that a store does not have, or cannot read; the message names it and says why."""


class ImageStore(Protocol):
    """Encoded images by name; serves several threads and can be sent to other processes."""

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises MissingImage."""
        ...

    def about(self) -> dict[str, Any]:
        """What tells this store from another, as JSON."""
        ...


class Member(NamedTuple):
    """Where a file lies in a tar archive."""

    name: str
    offset: int
    length: int


def open_stores(paths: Sequence[str | Path]) -> "Several":
    """Several stores, asked in this order; see `open_store`."""
    return Several([open_store(path) for path in paths])


def open_store(path: str | Path) -> ImageStore:
    """A folder of images, a .zip, a .tar, or a folder of .tar shards.

    `NAME=PATH` puts a store below a folder's name: with `coco=train2017.zip` the name
    `coco/train2017/1.jpg` is `train2017/1.jpg` of the archive. In a folder that holds .tar files
    these are asked first.
    Raises FileNotFoundError and ValueError naming the store.
    """
    prefix, sign, rest = str(path).partition("=")
    if sign and not Path(path).exists():
        return Mounted(prefix.strip("/"), open_store(rest))
    path = Path(path)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return Several([Shards(shards), Folder(path)]) if shards else Folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no images at {path}: give a folder, a .zip, a .tar or a folder of .tar shards"
        )
    zipped = path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)
    return ZipStore(path) if zipped else Shards([path])


class Folder:
    """Image files below a folder. Links are followed, for data sets are often put together so."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self, name: str) -> bytes:
        try:
            descriptor = os.open(self.path / inner_name(name), _FLAGS)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise MissingImage(f"{shown(name)} is not in {self.path} ({why})") from error
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise MissingImage(f"{shown(name)} in {self.path} is not a file")
            _check_length(name, info.st_size, self.path)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(info.st_size)
        except OSError as error:
            raise MissingImage(f"{shown(name)} in {self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def about(self) -> dict[str, Any]:
        return {"folder": str(self.path.resolve())}


class ZipStore:
    """The files of a zip archive. Raises ValueError when it is none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._archive = zipfile.ZipFile(self.path)
        except _BROKEN_ZIP as error:
            raise ValueError(
                f"{path} is not a whole zip archive ({error}): fetch it again"
            ) from error

    def read(self, name: str) -> bytes:
        inner = inner_name(name)
        files = self._archive.NameToInfo
        info = files.get(inner) or files.get(f"./{inner}")
        if info is None or info.is_dir():
            first = next((path for path in files if not path.endswith("/")), "")
            raise MissingImage(
                f"{shown(name)} is not in {self.path}, whose names are like {shown(first)}"
            )
        _check_length(name, info.file_size, self.path)
        try:
            return self._archive.read(info)
        except _BROKEN_ZIP as error:
            raise MissingImage(f"{shown(name)} in {self.path}: {error}") from error

    def about(self) -> dict[str, Any]:
        return {"zip": self.path.name, "bytes": self.path.stat().st_size}

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipStore, (self.path,)


class Shards:
    """The files of tar archives, found by one list of all that is made at once.

    A name in several shards is the first one's; `SHARD.tar/NAME` names one of them. Raises
    ValueError for what is not a plain tar.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [Path(path) for path in paths]
        self._files = [RandomFile(path) for path in self.paths]
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, path in enumerate(self.paths):
            # Behind one another a name stands for the last file, as unpacking leaves it.
            found = {posixpath.normpath(m.name): (number, *m[1:]) for m in members(path)}
            for name, place in found.items():
                self._places.setdefault(name, place)
                self._places[f"{path.name}/{name}"] = place

    def read(self, name: str) -> bytes:
        place = self._places.get(inner_name(name))
        if place is None:
            raise MissingImage(f"{shown(name)} is not in {self._where()}")
        number, offset, length = place
        _check_length(name, length, self.paths[number])
        try:
            return self._files[number].read(offset, length)
        except OSError as error:
            raise MissingImage(f"{shown(name)}: {error}") from error

    def about(self) -> dict[str, Any]:
        return {"tar": {path.name: path.stat().st_size for path in self.paths}}

    def _where(self) -> str:
        first = str(self.paths[0])
        return first if len(self.paths) == 1 else f"the {len(self.paths)} archives from {first} on"


class Mounted:
    """A store below a folder's name."""

    def __init__(self, prefix: str, store: ImageStore):
        self.prefix, self.store = prefix, store

    def read(self, name: str) -> bytes:
        inner = inner_name(name)
        if not inner.startswith(f"{self.prefix}/"):
            raise MissingImage(f"{shown(name)} is not below {self.prefix}/")
        return self.store.read(inner.removeprefix(f"{self.prefix}/"))

    def about(self) -> dict[str, Any]:
        return {"below": self.prefix, **self.store.about()}


class Several:
    """Stores that are asked one after another."""

    def __init__(self, stores: Sequence[ImageStore]):
        self.stores = tuple(stores)

    def read(self, name: str) -> bytes:
        inner_name(name)
        reasons = []
        for store in self.stores:
            try:
                return store.read(name)
            except MissingImage as error:
                reasons.append(str(error))
        raise MissingImage("; ".join(reasons) or f"{shown(name)}: no images were given")

    def about(self) -> dict[str, Any]:
        return {"stores": [store.about() for store in self.stores]}


def members(path: Path) -> Iterator[Member]:
    """The plain files of a tar archive, in its order; its headers alone are read.

    Raises ValueError for an archive that is compressed, cut off or none at all.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
            end = archive.offset
        rest = RandomFile(path).read(end, min(512, path.stat().st_size - end))
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{path} is not a whole tar archive ({error}){_unpack(path)}") from error
    if rest.strip(b"\0"):
        raise ValueError(f"{path} is damaged: byte {end} begins no file: fetch it again")


def inner_name(name: str) -> str:
    """A name as a path below its store, "./" taken off. Raises MissingImage where it leads out."""
    parts = name.split("/")
    if not name or "\0" in name:
        raise MissingImage(f"{shown(name)} is no file's name")
    if name.startswith("/") or ".." in parts:
        raise MissingImage(f"{shown(name)} leads out of the images: names are relative to them")
    return posixpath.normpath(name)


def shown(name: str) -> str:
    """A name for a message: quoted, short, without control characters."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _check_length(name: str, length: int, path: Path) -> None:
    if length > MAX_BYTES:
        many = f"{length} bytes, more than {MAX_BYTES}"
        raise MissingImage(f"{shown(name)} in {path} has {many}: it is not read")


def _unpack(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start in _COMPRESSED:
        return f": it is compressed, unpack it with `{_COMPRESSED[start]} {path.name}`"
    return ": fetch it again"
