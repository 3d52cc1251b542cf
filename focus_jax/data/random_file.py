"""A file that is read at any place, by several threads, and can be sent to another process."""

import os
from pathlib import Path
from typing import Any


class RandomFile:
    """Bytes of a file by their place; opened when first read, anew in every process."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._descriptor: int | None = None

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on. OSError where the file ends before."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        out = os.pread(self._descriptor, length, offset)
        if len(out) != length:
            raise OSError(
                f"{self.path} ends {length - len(out)} bytes too early: it was cut off or changed"
                " since it was opened"
            )
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
