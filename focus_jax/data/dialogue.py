"""Conversations about images as data: what readers hand out and data sets hold."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32

# A user's text and the answer to it.
Exchange = tuple[str, str]


@dataclass(frozen=True)
class Dialogue:
    """One row of LLaVA's JSON: the names of its images and its turns.

    "<image>" stands in the users' texts where an image belongs, as many times as there are images.
    `where`: file and line (or row), for messages.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Exchange, ...]
    where: str = ""


class Example(NamedTuple):
    """A dialogue with its images' files."""

    id: str
    images: tuple[bytes, ...]
    turns: tuple[Exchange, ...]


class DialogueSource(Protocol):
    """A data set of dialogues with random access.

    `sizes`: each example's images as (count, width, height), the largest image's; zeros for
    text alone. `fingerprint` changes with the contents. `texts(index)` reads no image.
    """

    sizes: Int32[np.ndarray, "N 3"]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def texts(self, index: int) -> tuple[Exchange, ...]: ...

    def about(self) -> dict[str, Any]: ...
