"""Batches for training and evaluation, read ahead by threads, from a position that is restorable.

A batch is a function of (seed, batch number) alone, whatever the number of processes; each makes
the rows of it that it holds. So the state of an iterator is one number, the same on every process,
and it serves any other number of them.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from focus_jax.data.batches import Batch, BatchMaker, Shape
from focus_jax.data.conversation import Template
from focus_jax.data.glyphs import KINDS, GlyphsConfig
from focus_jax.data.iterator import LoaderIterator, read_ahead
from focus_jax.data.loader_config import LoaderConfig
from focus_jax.data.rows import BadImages, EvalRows, TrainRows
from focus_jax.data.sources import Record, Source

# The questions of an image follow one another: its record is read once.
_RECORDS = 64

__all__ = ["Gold", "Loader", "LoaderConfig", "LoaderIterator", "make_loader"]


class Gold(NamedTuple):
    """A question with its answer, as strings."""

    question: str
    answer: str
    kind: str
    hops: int


def make_loader(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    config: LoaderConfig,
    train: bool,
    glyphs: GlyphsConfig | None = None,
    answers: bool | None = None,
) -> "Loader":
    """A loader of batches with static shapes (B images, M views, Q questions, N patches).

    B counts the rows that this process makes (`LoaderConfig.rows`). M is 1, or a thumbnail and its
    tiles (`LoaderConfig.across`), as `preprocess` makes them.
    pixels uint8 [B, M, S, S, 3]; patch_valid [B, M, N]; tile_origin [B, M, 2];
    prefix, prefix_valid [B, P]; tokens, token_valid, label_mask, query_mask [B, Q, T], padded on
    the right; row_valid, question, kind [B, Q]; index [B], the position in the source. With
    `glyphs` also cell_words [B, C, 3 or 4] (ids of colour, glyph, place, card), cell_filled, glyph,
    colour [B, C], evidence [B, Q, C] (cells that a question is about): cells of the whole image,
    row-major (`cells.at_patches` says what views show of them). Rows that only fill the last batch
    repeat a real one: index, question and kind are -1, row_valid is False. `answers`: whether texts
    hold their answers, label_mask over them (None: in training alone).

    Raises ValueError for an empty source, a batch larger than the source, sizes that do not match
    `glyphs`; while iterating, when this process meets too many corrupt images.
    """
    return Loader(source, tokenizer, template, config, train, glyphs, answers)


class Loader:
    """An iterable of batches; each iterator starts at the beginning (see `make_loader`)."""

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        config: LoaderConfig,
        train: bool,
        glyphs: GlyphsConfig | None,
        answers: bool | None = None,
    ):
        if len(source) == 0:
            raise ValueError("loader: the source holds no examples: check its path and split")
        _check_glyphs(config, glyphs)
        self._source = source
        self._config = config
        self._train = train
        self.bad_images = BadImages(len(source), config.max_bad_share)
        rows = TrainRows if train else EvalRows
        self._rows: TrainRows | EvalRows = rows(source, config, self.bad_images)
        shape = Shape(
            len(config.held),
            self._rows.questions,
            config.prefix_length,
            config.text_length,
            config.image_size,
            config.patch,
            config.across,
        )
        self._record = lru_cache(_RECORDS)(source.__getitem__)
        told = train if answers is None else answers
        self._make = BatchMaker(tokenizer, template, shape, told, glyphs)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold one pass; the last of them is padded, or shared with the next pass."""
        return self._rows.steps

    def __iter__(self) -> LoaderIterator:
        return read_ahead(self._batch, self._rows.total, self._config, self._fingerprint())

    def gold(self, batch: Batch) -> list[list[Gold | None]]:
        """The strings behind a batch, [B][Q]; None where `row_valid` is False."""
        rows: list[list[Gold | None]] = []
        names = ("index", "question", "row_valid")
        for index, numbers, valid in zip(*(batch[n].tolist() for n in names), strict=True):
            asked = zip(numbers, valid, strict=True)
            if any(valid):
                record = self._record(index)
                rows.append([_gold(record, number) if ok else None for number, ok in asked])
            else:
                rows.append([None for _ in asked])
        return rows

    def _batch(self, number: int) -> Batch:
        return self._make(self._rows(number))

    def _fingerprint(self) -> dict[str, Any]:
        config = self._config
        return {
            "examples": len(self._source),
            "train": self._train,
            "batch": config.batch,
            "questions": config.questions,
            "flat": config.flat,
            "seed": config.seed,
            "shuffle": config.shuffle,
        }


def _gold(record: Record, number: int) -> Gold:
    kind = KINDS[int(record["kind"][number])] if "kind" in record else ""
    hops = int(record["hops"][number]) if "hops" in record else 0
    return Gold(record["question"][number], record["answer"][number], kind, hops)


def _check_glyphs(config: LoaderConfig, glyphs: GlyphsConfig | None) -> None:
    whole = config.image_size * config.across, config.patch
    if glyphs is not None and (glyphs.image_size, glyphs.cell) != whole:
        raise ValueError(
            f"loader: image_size={config.image_size}, patch={config.patch} and across="
            f"{config.across} do not match glyphs of {glyphs.image_size} pixels in cells of"
            f" {glyphs.cell}: a patch is a cell, and an image is one view or k x k tiles, where"
            " (k, k) is one of the model's grids and max_tiles is above k * k"
        )
