"""Which images and questions make up a batch: shuffling, sharding, unreadable images.

Processes always have equally many batches: neither a remainder nor an unreadable image lets one
run ahead of the others.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from focus_jax.data.images import CorruptImage, decode
from focus_jax.data.loader_config import LoaderConfig
from focus_jax.data.sources import Record, Source

# Purposes of random draws: each has its own stream for a seed.
_ORDER, _QUESTIONS, _SUBSTITUTE = range(3)
# Past so many corrupt images in a row something else is wrong.
_SUBSTITUTES = 100


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

    def decode(self, index: int, record: Record) -> np.ndarray | None:
        """An example's image, or None, counted, if it is corrupt. ValueError past the limit."""
        try:
            return decode(record["image"])
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
    """Full batches in a new order each epoch, dealt out to the processes.

    In place of a corrupt image comes another one of the same process, drawn at random.
    """

    def __init__(self, source: Source, config: LoaderConfig, bad: BadImages):
        share = len(source) // config.process_count
        if config.batch > share:
            raise ValueError(
                f"loader: batch={config.batch} is larger than the {share} examples of a process"
                f" ({len(source)} over {config.process_count}): lower batch"
            )
        self.steps = share // config.batch
        self.questions = config.questions
        self._share = share
        self._source = source
        self._config = config
        self._bad = bad
        # Threads read ahead over the end of an epoch, so two orders are in use.
        self._order = lru_cache(2)(self._make_order)

    def __call__(self, number: int) -> list[Row]:
        """The rows of batch `number`, counted over all epochs."""
        epoch, step = divmod(number, self.steps)
        batch = self._config.batch
        wanted = self._order(epoch)[step * batch : (step + 1) * batch]
        return [self._row(epoch, place) for place in wanted.tolist()]

    def _row(self, epoch: int, wanted: int) -> Row:
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
            image = self._bad.decode(index, record)
            if image is not None:
                return index, record, image
            index = int(self._order(epoch)[rng.integers(self._share)])
        raise ValueError(
            f"{_SUBSTITUTES} images drawn in place of example {wanted} are all corrupt:"
            " repair the data"
        )

    def _make_order(self, epoch: int) -> np.ndarray:
        config, examples = self._config, len(self._source)
        order = np.arange(examples)
        if config.shuffle:
            order = np.random.default_rng((config.seed, _ORDER, epoch)).permutation(examples)
        return order[config.process_index :: config.process_count][: self._share]


class EvalRows:
    """Every image (or, flat, every question) once, in order; the last batches are padded.

    A corrupt image stays, black and not valid. Padding repeats the first example.
    """

    def __init__(self, source: Source, config: LoaderConfig, bad: BadImages):
        self._stored = len(source[0]["question"])
        if self._stored == 0:
            raise ValueError("example 0 has no questions: remove it from the source")
        self.questions = 1 if config.flat else self._stored
        self._places = len(source) * self._stored if config.flat else len(source)
        share = -(-self._places // config.process_count)
        self.steps = -(-share // config.batch)
        self._source = source
        self._config = config
        self._bad = bad

    def __call__(self, number: int) -> list[Row]:
        """The rows of batch `number`."""
        config = self._config
        first = number * config.batch
        return [
            self._row(place * config.process_count + config.process_index)
            for place in range(first, first + config.batch)
        ]

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
        image = self._bad.decode(index, record)
        return Row(index, record, image, asked, valid=real and image is not None)
