"""Settings of the loader."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made.

    `batch` counts the whole job's images, whatever the number of processes; `rows` says
    which of them this process makes, by their numbers in rising order; None: all.
    Training asks `questions` of each image's questions, drawn anew each epoch; evaluation asks
    all of them in order, or with `flat` one per row. `text_length` and `prefix_length` count
    tokens after and before the image. `epochs` = None is endless; evaluation is one pass, never
    shuffled. `threads` = 0 reads in the caller's thread; `prefetch` counts batches.
    """

    batch: int = 32
    questions: int = 4
    text_length: int = 24
    prefix_length: int = 4
    image_size: int = 128
    patch: int = 8
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    flat: bool = False
    rows: tuple[int, ...] | None = None
    threads: int = 2
    prefetch: int = 4
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        for name in (
            "batch",
            "questions",
            "text_length",
            "prefix_length",
            "image_size",
            "patch",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"loader: {name}={getattr(self, name)}: give 1 or more")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"loader: epochs={self.epochs}: give 1 or more, or None for endless")
        held = self.held
        rising = all(a < b for a, b in pairwise(held))
        if not held or not rising or held[0] < 0 or held[-1] >= self.batch:
            raise ValueError(
                f"loader: rows={self.rows} of a batch of {self.batch}: give numbers from 0 to "
                f"{self.batch - 1} in rising order"
            )
        if self.image_size % self.patch:
            raise ValueError(
                f"loader: image_size={self.image_size} is not a multiple of patch={self.patch}"
            )
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"loader: max_bad_share={self.max_bad_share}: give a share 0 to 1")
        if self.threads < 0 or self.prefetch < 1:
            raise ValueError(
                f"loader: threads={self.threads}, prefetch={self.prefetch}: give threads >= 0"
                " and prefetch >= 1"
            )

    @property
    def held(self) -> tuple[int, ...]:
        """The rows of each batch that this process makes."""
        return tuple(range(self.batch)) if self.rows is None else self.rows
