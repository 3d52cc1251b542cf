"""Settings of the loader."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made. `batch` counts images per process.

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
    process_index: int = 0
    process_count: int = 1
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
            "process_count",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"loader: {name}={getattr(self, name)}: give 1 or more")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"loader: epochs={self.epochs}: give 1 or more, or None for endless")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"loader: process_index={self.process_index}: give 0 to {self.process_count - 1}"
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
