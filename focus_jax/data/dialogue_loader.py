"""Batches of dialogues with their images, in a few static shapes, for training.

A batch is a function of (seed, batch number) alone, whatever the number of processes; see
`dialogue_plan` for which rows share one.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from focus_jax.data.conversation import EncodedDialogue, Template, encode_dialogue
from focus_jax.data.dialogue import DialogueSource, Example
from focus_jax.data.dialogue_lengths import token_lengths, tokenizer_digest
from focus_jax.data.dialogue_plan import NOBODY, DialoguePlan, Shape, needs_of
from focus_jax.data.images import Tiles
from focus_jax.data.iterator import Batch, LoaderIterator, read_ahead
from focus_jax.data.loader_config import DialogueConfig
from focus_jax.data.preprocess import ImageConfig, preprocess_many
from focus_jax.data.rows import BadImages

# Past so many corrupt rows in a row something else is wrong.
_SUBSTITUTES = 100
_ENDLESS = 1 << 60


class Row(NamedTuple):
    """A dialogue, by its number in the source, ready for a batch; `valid` False is padding."""

    number: int
    text: EncodedDialogue
    tiles: Sequence[Tiles]
    valid: bool


def make_dialogue_loader(
    source: DialogueSource,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    config: DialogueConfig,
    images: ImageConfig,
    folder: Path | None = None,
) -> "DialogueLoader":
    """A loader of batches of a few static shapes: B rows of I images with M / I views each, T
    tokens; I and M are 0 for text alone. `accumulate` batches in a row have one shape.

    B counts the rows that this process makes (`DialogueConfig.rows`).
    pixels uint8 [B, M, S, S, 3]; patch_valid [B, M, N]; tile_origin [B, M, 2]; tile_rows [B, M, R];
    image_at [B, I]; prefix, prefix_valid [B, 0]; tokens, token_valid, label_mask, query_mask
    [B, 1, T], padded on the right; row_valid, question, kind [B, 1]; index [B], the position in the
    source. query_mask marks the users' words of all turns: a text-guided sampler then chooses by
    later questions too. A dialogue whose answers are cut off is not valid. Rows that only fill the
    last batch repeat a real one: index and question are -1, row_valid is False.

    `folder`: where counts of tokens are kept (see `dialogue_lengths`). Raises ValueError for an
    empty source, fewer rows than a step has; while iterating, when this process meets too many
    corrupt images.
    """
    return DialogueLoader(source, tokenizer, template, config, images, folder)


class DialogueLoader:
    """An iterable of batches; each iterator starts at the beginning."""

    def __init__(
        self,
        source: DialogueSource,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        config: DialogueConfig,
        images: ImageConfig,
        folder: Path | None,
    ):
        if len(source) == 0:
            raise ValueError("loader: the data set holds no dialogues: build it anew")
        self._source, self._config, self._images = source, config, images
        self._encode = partial(encode_dialogue, tokenizer, template, max_length=config.lengths[-1])
        self.bad_images = BadImages(len(source), config.max_bad_share)
        self._lengths = token_lengths(source, tokenizer, template, folder)
        self._needs = needs_of(source.sizes, self._lengths, config.lengths, images)
        patches = (images.size // images.patch) ** 2
        self.plan = DialoguePlan(
            self._needs, config.group, patches, config.seed, config.shuffle, config.epochs
        )
        self._text = tokenizer_digest(tokenizer), template.name

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold one pass; the last step of them is shared with the next pass."""
        return self.plan.steps * self._config.accumulate

    def __iter__(self) -> LoaderIterator:
        steps = self.plan.total
        total = _ENDLESS if steps is None else steps * self._config.accumulate
        return read_ahead(self._batch, total, self._config, self._fingerprint())

    def longest(self) -> list[Shape]:
        """For each number of images and views that rows have, the most tokens of such a row."""
        text = np.minimum(self._lengths, self._config.lengths[-1])
        kinds, inverse = np.unique(self._needs[:, :2], axis=0, return_inverse=True)
        most = np.zeros(len(kinds), np.int64)
        np.maximum.at(most, inverse.ravel(), text)
        return [
            Shape(images, tiles, many)
            for (images, tiles), many in zip(kinds.tolist(), most.tolist(), strict=True)
        ]

    def about(self) -> str:
        """Shapes, with their steps an epoch, and what they pad."""
        padding = self.plan.padding(self._needs, self._lengths)
        cut = int((self._lengths > self._config.lengths[-1]).sum())
        lines = [
            f"{len(self._source)} dialogues, {self.plan.steps} steps of {self._config.group} an "
            f"epoch; padding: text {padding.text:.1%}, views {padding.tiles:.1%}; cut at "
            f"{self._config.lengths[-1]} tokens: {cut}"
        ]
        for shape, count in self.plan.counts().items():
            views = f"{shape.images} x {shape.tiles} views" if shape.images else "text alone"
            lines.append(f"  {views}, {shape.text} tokens: {count} steps")
        return "\n".join(lines)

    def _batch(self, number: int) -> Batch:
        step, part = divmod(number, self._config.accumulate)
        shape, rows, epoch = self.plan.group(step)
        own = rows[part * self._config.batch :][list(self._config.held)]
        made = [self._row(row, epoch, shape) for row in own.tolist()]
        return make_batch(made, shape, self._images)

    def _row(self, wanted: int, epoch: int, shape: Shape) -> Row:
        if wanted == NOBODY:
            first = int(self.plan.group(0).rows[0])
            blank = self._encode(self._source.texts(first), int(self._needs[first, 0]))
            return Row(first, blank._replace(image_at=()), (), False)
        for index in (wanted, *self.plan.substitutes(epoch, wanted, _SUBSTITUTES)):
            example = self._source[index]
            tiles = self.bad_images.read(index, partial(self._tiles, example))
            if tiles is not None:
                text = self._encode(example.turns, len(example.images))
                check_fits(index, example, text, tiles, shape)
                return Row(index, text, tiles[: len(text.image_at)], True)
        raise ValueError(
            f"{_SUBSTITUTES} dialogues drawn in place of number {wanted} all have corrupt images:"
            " repair the data"
        )

    def _tiles(self, example: Example) -> list[Tiles]:
        return preprocess_many(example.images, self._images)

    def _fingerprint(self) -> dict[str, Any]:
        config, (words, template) = self._config, self._text
        return {
            "data": self._source.fingerprint,
            "examples": len(self._source),
            "tokenizer": words,
            "template": template,
            "images": repr(self._images),
            "lengths": list(config.lengths),
            "batch": config.batch,
            "accumulate": config.accumulate,
            "seed": config.seed,
            "shuffle": config.shuffle,
        }


def check_fits(
    index: int, example: Example, text: EncodedDialogue, tiles: Sequence[Tiles], shape: Shape
) -> None:
    """ValueError where a row is larger than the data set's index and counts promised."""
    views = max((len(own.pixels) for own in tiles), default=0)
    found = Shape(len(tiles), views, len(text.ids))
    if not shape.covers(found):
        raise ValueError(
            f"example {index} (id {example.id!r}) has (images, views, tokens) {tuple(found)}, its "
            f"index promised at most {tuple(shape)}: build the data set anew"
        )


def make_batch(rows: Sequence[Row], shape: Shape, images: ImageConfig) -> Batch:
    """Rows as arrays of one shape (see `make_dialogue_loader`)."""
    arrays = empty_batch(len(rows), shape, images)
    for place, row in enumerate(rows):
        put_text(arrays, place, row)
        for number, tiles in enumerate(row.tiles):
            first = number * shape.tiles
            at = (place, slice(first, first + len(tiles.pixels)))
            arrays["pixels"][at] = tiles.pixels
            arrays["patch_valid"][at] = tiles.patch_valid
            arrays["tile_origin"][at] = tiles.origin
            arrays["tile_rows"][at] = tiles.row_valid
    return arrays


def empty_batch(b: int, shape: Shape, images: ImageConfig) -> Batch:
    """A batch without text and images."""
    m, side, asked = shape.images * shape.tiles, images.size // images.patch, (b, 1, shape.text)
    return {
        "pixels": np.zeros((b, m, images.size, images.size, 3), np.uint8),
        "patch_valid": np.zeros((b, m, side**2), bool),
        "tile_origin": np.zeros((b, m, 2), np.int32),
        "tile_rows": np.zeros((b, m, side), bool),
        "image_at": np.zeros((b, shape.images), np.int32),
        "prefix": np.zeros((b, 0), np.int32),
        "prefix_valid": np.zeros((b, 0), bool),
        "tokens": np.zeros(asked, np.int32),
        **{name: np.zeros(asked, bool) for name in ("token_valid", "label_mask", "query_mask")},
        "row_valid": np.zeros((b, 1), bool),
        "index": np.full(b, -1, np.int64),
        "question": np.full((b, 1), -1, np.int32),
        "kind": np.full((b, 1), -1, np.int32),
    }


def put_text(arrays: Batch, place: int, row: Row) -> None:
    """One row's tokens; images that it does not have stand at its end."""
    count = len(row.text.ids)
    arrays["tokens"][place, 0, :count] = row.text.ids
    arrays["token_valid"][place, 0, :count] = True
    arrays["query_mask"][place, 0, :count] = row.text.query_mask
    arrays["image_at"][place] = count
    arrays["image_at"][place, : len(row.text.image_at)] = row.text.image_at
    if row.valid:
        arrays["label_mask"][place, 0, :count] = row.text.label_mask
        arrays["row_valid"][place, 0] = row.text.label_mask.any()
        arrays["index"][place] = row.number
        arrays["question"][place, 0] = 0
