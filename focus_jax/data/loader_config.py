"""Settings of the loaders."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class ReadingConfig:
    """What all loaders share: order, shares of processes, reading ahead.

    `batch` counts the whole job's rows, whatever the number of processes; `rows` says which of them
    this process makes, by their numbers in rising order; None: all. `epochs` = None is endless.
    `threads` = 0 reads in the caller's thread; `prefetch` counts batches.
    """

    batch: int = 32
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    rows: tuple[int, ...] | None = None
    threads: int = 2
    prefetch: int = 4
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        self.check_counts("batch")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"loader: epochs={self.epochs}: give 1 or more, or None for endless")
        held = self.held
        rising = all(a < b for a, b in pairwise(held))
        if not held or not rising or held[0] < 0 or held[-1] >= self.batch:
            raise ValueError(
                f"loader: rows={self.rows} of a batch of {self.batch}: give numbers from 0 to "
                f"{self.batch - 1} in rising order"
            )
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"loader: max_bad_share={self.max_bad_share}: give a share 0 to 1")
        if self.threads < 0 or self.prefetch < 1:
            raise ValueError(
                f"loader: threads={self.threads}, prefetch={self.prefetch}: give threads >= 0"
                " and prefetch >= 1"
            )

    def check_counts(self, *names: str) -> None:
        """ValueError naming a field below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"loader: {name}={getattr(self, name)}: give 1 or more")

    @property
    def held(self) -> tuple[int, ...]:
        """The rows of each batch that this process makes."""
        return tuple(range(self.batch)) if self.rows is None else self.rows


@dataclass(frozen=True)
class LoaderConfig(ReadingConfig):
    """How batches of images with questions are made.

    Training asks `questions` of each image's questions, drawn anew each epoch; evaluation asks
    all of them in order, or with `flat` one per row, in one pass, never shuffled. `text_length` and
    `prefix_length` count tokens after and before the image. `image_size`, `patch`: sides of a view
    and of its patches in pixels. `across`: an image is so many views wide and high; above 1 it is
    shown as these tiles behind a thumbnail.
    """

    questions: int = 4
    text_length: int = 24
    prefix_length: int = 4
    image_size: int = 128
    patch: int = 8
    across: int = 1
    flat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(
            "questions", "text_length", "prefix_length", "image_size", "patch", "across"
        )
        if self.image_size % self.patch:
            raise ValueError(
                f"loader: image_size={self.image_size} is not a multiple of patch={self.patch}"
            )


@dataclass(frozen=True)
class DialogueConfig(ReadingConfig):
    """How batches of dialogues are made.

    `lengths`: sizes that text is padded to, rising; what is longer than the last is cut.
    `accumulate`: batches of an optimiser step, which all have one shape.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048)
    accumulate: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("accumulate")
        rising = all(a < b for a, b in pairwise(self.lengths))
        if not self.lengths or not rising or self.lengths[0] < 1:
            raise ValueError(
                f"loader: lengths={self.lengths}: give numbers of tokens in rising order"
            )

    @property
    def group(self) -> int:
        """Rows of an optimiser step."""
        return self.batch * self.accumulate
