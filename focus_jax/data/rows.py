"""Which images and questions make up a batch: shuffling, shares of processes, unreadable images.

A batch is the same whatever the number of processes; each makes the rows that it holds. So all have
equally many batches: neither a remainder nor an unreadable image lets one run ahead of the others.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np

from focus_jax.data.images import CorruptImage, decode
from focus_jax.data.loader_config import LoaderConfig, ReadingConfig
from focus_jax.data.sources import Record, Source

T = TypeVar("T")

# Purposes of random draws: each has its own stream for a seed.
_ORDER, _QUESTIONS, _SUBSTITUTE = range(3)
# Past so many corrupt images in a row something else is wrong.
_SUBSTITUTES = 100
# Threads read ahead over the end of an epoch, so several orders are in use.
_ORDERS = 4
_ENDLESS = 1 << 60


@dataclass(frozen=True)
class Row:
    """One image and the numbers of the questions asked about it.

    `valid` False is padding; `image` is None where the file is corrupt.
    """

    index: int
    record: Record
    image: np.ndarray | None
    questions: Sequence[int]
    valid: bool = True


class BadImages:
    """Positions of corrupt images met so far; too large a share of the source is an error."""

    def __init__(self, examples: int, max_share: float):
        self._examples = examples
        self._limit = max_share
        self._found: set[int] = set()
        self._lock = threading.Lock()

    @property
    def indices(self) -> tuple[int, ...]:
        """Positions in the source, ascending."""
        with self._lock:
            return tuple(sorted(self._found))

    def read(self, index: int, decoded: Callable[[], T]) -> T | None:
        """What `decoded` makes of an example's images, or None, counted, if one is corrupt.

        ValueError past the limit.
        """
        try:
            return decoded()
        except CorruptImage as error:
            with self._lock:
                self._found.add(index)
                found = sorted(self._found)
            if len(found) > self._limit * self._examples:
                raise ValueError(
                    f"{len(found)} of {self._examples} images are corrupt, more than"
                    f" max_bad_share={self._limit} allows; the first: {found[:5]} ({error}):"
                    " repair the data or raise max_bad_share"
                ) from error
            return None


class TrainRows:
    """Epochs one behind another, each with every image once in an order of its own.

    Where an epoch ends inside a batch the next one begins there: no image is left out. With
    `epochs` the last batch is filled up with rows that are not valid. In place of a corrupt image
    comes another one, drawn at random.
    """

    def __init__(self, source: Source, config: LoaderConfig, bad: BadImages):
        examples = len(source)
        if config.batch > examples:
            raise ValueError(
                f"loader: batch={config.batch} is larger than the {examples} examples: lower batch"
            )
        self._places = _ENDLESS if config.epochs is None else config.epochs * examples
        self.steps = -(-examples // config.batch)
        self.total = -(-self._places // config.batch)
        self.questions = config.questions
        self._source = source
        self._config = config
        self._bad = bad
        self._order = lru_cache(_ORDERS)(self._make_order)

    def __call__(self, number: int) -> list[Row]:
        """This process's rows of batch `number`, counted over all epochs."""
        return [self._row(place) for place in places_of(self._config, number)]

    def _row(self, place: int) -> Row:
        if place >= self._places:
            return replace(self._row(0), valid=False)
        epoch, step = divmod(place, len(self._source))
        wanted = int(self._order(epoch)[step])
        index, record, image = self._readable(epoch, wanted)
        stored = len(record["question"])
        if stored == 0:
            raise ValueError(f"example {index} has no questions: remove it from the source")
        rng = np.random.default_rng((self._config.seed, _QUESTIONS, epoch, wanted))
        chosen = rng.permutation(stored)[: self.questions].tolist()
        return Row(index, record, image, chosen)

    def _readable(self, epoch: int, wanted: int) -> tuple[int, Record, np.ndarray]:
        rng = np.random.default_rng((self._config.seed, _SUBSTITUTE, epoch, wanted))
        index = wanted
        for _ in range(_SUBSTITUTES):
            record = self._source[index]
            image = self._bad.read(index, partial(decode, record["image"]))
            if image is not None:
                return index, record, image
            index = int(self._order(epoch)[rng.integers(len(self._source))])
        raise ValueError(
            f"{_SUBSTITUTES} images drawn in place of example {wanted} are all corrupt:"
            " repair the data"
        )

    def _make_order(self, epoch: int) -> np.ndarray:
        config, examples = self._config, len(self._source)
        if not config.shuffle:
            return np.arange(examples)
        return np.random.default_rng((config.seed, _ORDER, epoch)).permutation(examples)


class EvalRows:
    """Every image (or, flat, every question) once, in order; the last batch is padded.

    A corrupt image stays, black and not valid. Padding repeats the first example.
    """

    def __init__(self, source: Source, config: LoaderConfig, bad: BadImages):
        self._stored = len(source[0]["question"])
        if self._stored == 0:
            raise ValueError("example 0 has no questions: remove it from the source")
        self.questions = 1 if config.flat else self._stored
        self._places = len(source) * self._stored if config.flat else len(source)
        self.steps = self.total = -(-self._places // config.batch)
        self._source = source
        self._config = config
        self._bad = bad

    def __call__(self, number: int) -> list[Row]:
        """This process's rows of batch `number`."""
        return [self._row(place) for place in places_of(self._config, number)]

    def _row(self, place: int) -> Row:
        real = place < self._places
        index, question = place if real else 0, 0
        if self._config.flat:
            index, question = divmod(index, self._stored)
        record = self._source[index]
        found = len(record["question"])
        if found != self._stored:
            raise ValueError(
                f"example {index} has {found} questions, example 0 has {self._stored}:"
                " evaluation needs equally many for every image"
            )
        asked = [question] if self._config.flat else list(range(self._stored))
        image = self._bad.read(index, partial(decode, record["image"]))
        return Row(index, record, image, asked, valid=real and image is not None)


def places_of(config: ReadingConfig, number: int) -> list[int]:
    """The places, counted over the whole job's batches, of this process's rows of one of them."""
    return [number * config.batch + row for row in config.held]
