"""Rows of LLaVA's JSON with their images, as they lie: read where they are, for looking at them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from focus_jax.data.dialogue import Dialogue, Example, Exchange
from focus_jax.data.image_store import ImageStore, MissingImage
from focus_jax.data.images import CorruptImage
from focus_jax.data.llava import BadRow, parse_row
from focus_jax.data.row_files import AllRows, Row, RowSource
from focus_jax.data.shard import checked_size

Size = tuple[int, int, int]


class Unbuilt:
    """A `DialogueSource` over rows that no build has read yet; `bad` lists those that are left out.

    Every row is parsed once at the start, and of each image its header (with `decode` all of it).
    Without `images` no image is looked for: their sizes are (count, 0, 0). `chosen`: only these
    rows. `tell` hears of every row.
    """

    sizes: Int32[np.ndarray, "N 3"]
    fingerprint = ""

    def __init__(
        self,
        rows: Sequence[RowSource],
        images: ImageStore | None,
        max_pixels: int,
        decode: bool = False,
        chosen: Sequence[int] | None = None,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ):
        self._rows, self._images = AllRows(rows), images
        self._max_pixels, self._decode = max_pixels, decode
        self.bad: list[BadRow] = []
        wanted = range(len(self._rows)) if chosen is None else chosen
        good: list[int] = []
        sizes: list[Size] = []
        for done, number in enumerate(wanted, start=1):
            found = self._look(self._rows[number])
            if isinstance(found, BadRow):
                self.bad.append(found)
            else:
                good.append(number)
                sizes.append(found)
            tell(done, len(wanted))
        self._good = good
        self.sizes = np.array(sizes, np.int32).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._good)

    def __getitem__(self, index: int) -> Example:
        """Raises MissingImage where there are none to read."""
        dialogue = self._dialogue(index)
        images = tuple(self._read(name) for name in dialogue.images)
        return Example(dialogue.id, images, dialogue.turns)

    def texts(self, index: int) -> tuple[Exchange, ...]:
        """The turns of a row; its images stay where they are."""
        return self._dialogue(index).turns

    def about(self) -> dict[str, Any]:
        """Where the rows and images come from, as JSON."""
        images = None if self._images is None else self._images.about()
        return {"sources": self._rows.about(), "images": images}

    def _dialogue(self, index: int) -> Dialogue:
        found = parse_row(self._rows[self._good[index]])
        assert isinstance(found, Dialogue)
        return found

    def _look(self, row: Row) -> Size | BadRow:
        """Its images' count, and the largest one's width and height."""
        found = parse_row(row)
        if isinstance(found, BadRow):
            return found
        if self._images is None:
            return len(found.images), 0, 0
        sizes = [(0, 0)]
        try:
            for name in found.images:
                encoded = self._read(name)
                sizes.append(checked_size(encoded, name, self._max_pixels, self._decode))
        except MissingImage as error:
            return BadRow(row.place, found.id, "missing image", str(error))
        except CorruptImage as error:
            return BadRow(row.place, found.id, "corrupt image", str(error))
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        return len(found.images), width, height

    def _read(self, name: str) -> bytes:
        if self._images is None:
            raise MissingImage(f"{name!r}: no images were given")
        return self._images.read(name)
