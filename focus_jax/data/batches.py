"""Rows of images and questions as arrays of static shape."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from focus_jax.data.cells import views
from focus_jax.data.conversation import Template, encode, render
from focus_jax.data.glyphs import GlyphsConfig, cell_words
from focus_jax.data.iterator import Batch
from focus_jax.data.preprocess import ImageConfig, preprocess
from focus_jax.data.rows import Row
from focus_jax.data.sources import Record
from focus_jax.data.tokenizer import token_ids

# A closed vocabulary repeats its questions; this many rows of tokens are a few MB.
_CACHED_TEXTS = 1 << 16


class Shape(NamedTuple):
    """Static sizes of a batch: images, questions, tokens before and after the image, pixels.

    `image_size` and `patch` are of a view, of which an image is `across` wide and high.
    """

    batch: int
    questions: int
    prefix_length: int
    text_length: int
    image_size: int
    patch: int
    across: int


class _Text(NamedTuple):
    ids: np.ndarray
    prefix: np.ndarray
    # [3, T]: token_valid, label_mask, query_mask
    masks: np.ndarray


class BatchMaker:
    """Turns rows into a batch; `answers` says whether texts hold them (training) or stop before."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        shape: Shape,
        answers: bool,
        glyphs: GlyphsConfig | None,
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._shape = shape
        self._answers = answers
        self._text = lru_cache(_CACHED_TEXTS)(self._encode)
        self._words = None if glyphs is None else _CellTables(tokenizer, glyphs)
        self._photos = _photos(shape)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of `rows`, as many as the shape's `batch` (see `make_loader`)."""
        arrays = self._empty()
        for place, row in enumerate(rows):
            self._put_image(arrays, place, row)
            self._put_texts(arrays, place, row)
            if self._words is not None:
                self._words.put(arrays, place, row.record)
        return arrays

    def _empty(self) -> Batch:
        b, q, p, t, size, patch, across = self._shape
        m, patches = views(across), (size // patch) ** 2
        arrays: Batch = {
            "pixels": np.zeros((b, m, size, size, 3), np.uint8),
            "patch_valid": np.ones((b, m, patches), bool),
            "tile_origin": np.zeros((b, m, 2), np.int32),
            "prefix": np.full((b, p), self._tokenizer.pad_token_id or 0, np.int32),
            "prefix_valid": np.zeros((b, p), bool),
            "tokens": np.full((b, q, t), self._tokenizer.pad_token_id or 0, np.int32),
            "token_valid": np.zeros((b, q, t), bool),
            "label_mask": np.zeros((b, q, t), bool),
            "query_mask": np.zeros((b, q, t), bool),
            "row_valid": np.zeros((b, q), bool),
            "index": np.full(b, -1, np.int64),
            "question": np.full((b, q), -1, np.int32),
            "kind": np.full((b, q), -1, np.int32),
        }
        if self._words is not None:
            cells = across**2 * patches
            arrays |= {
                "cell_words": np.zeros((b, cells, self._words.count), np.int32),
                "cell_filled": np.zeros((b, cells), bool),
                "glyph": np.zeros((b, cells), np.int32),
                "colour": np.zeros((b, cells), np.int32),
                "evidence": np.zeros((b, q, cells), bool),
            }
        return arrays

    def _put_image(self, arrays: Batch, place: int, row: Row) -> None:
        arrays["index"][place] = row.index if row.valid else -1
        if row.image is None:
            return
        tiles = preprocess(row.image, self._photos)
        arrays["pixels"][place] = tiles.pixels
        arrays["patch_valid"][place] = tiles.patch_valid
        arrays["tile_origin"][place] = tiles.origin

    def _put_texts(self, arrays: Batch, place: int, row: Row) -> None:
        record, asked = row.record, row.questions
        for slot in range(self._shape.questions):
            # A slot without a question repeats the first: no row of attention is ever empty.
            real = slot < len(asked)
            number = asked[slot if real else 0]
            text = self._text(record["question"][number], record["answer"][number])
            count = len(text.ids)
            arrays["tokens"][place, slot, :count] = text.ids
            arrays["token_valid"][place, slot, :count] = text.masks[0]
            arrays["query_mask"][place, slot, :count] = text.masks[2]
            if not (real and row.valid):
                continue
            arrays["label_mask"][place, slot, :count] = text.masks[1]
            # In training an answer cut off by `text_length` leaves nothing to learn.
            arrays["row_valid"][place, slot] = text.masks[1].any() or not self._answers
            arrays["question"][place, slot] = number
            if "kind" in record:
                arrays["kind"][place, slot] = record["kind"][number]
            if "evidence" in arrays:
                cells = record["evidence"][number]
                arrays["evidence"][place, slot, cells[cells >= 0]] = True
        arrays["prefix"][place, : len(text.prefix)] = text.prefix
        arrays["prefix_valid"][place, : len(text.prefix)] = True

    def _encode(self, question: str, answer: str) -> _Text:
        shape = self._shape
        rendered = render(self._template, [(question, answer)], with_answers=self._answers)
        encoded = encode(self._tokenizer, rendered)
        if len(encoded.prefix) > shape.prefix_length:
            raise ValueError(
                f"prefix_length={shape.prefix_length}: template {self._template.name!r} puts"
                f" {len(encoded.prefix)} tokens before the image; give at least that many"
            )
        if len(encoded.ids) > shape.text_length and not self._answers:
            raise ValueError(
                f"text_length={shape.text_length}: the prompt {question!r} has"
                f" {len(encoded.ids)} tokens; give at least that many"
            )
        cut = slice(shape.text_length)
        masks = np.stack([np.ones(len(encoded.ids), bool), encoded.label_mask, encoded.query_mask])
        return _Text(encoded.ids[cut], encoded.prefix, masks[:, cut])


def _photos(shape: Shape) -> ImageConfig:
    """One view, or the one grid of tiles that the shape has room for."""
    if shape.across == 1:
        return ImageConfig("squash", shape.image_size, shape.patch)
    whole = shape.across * shape.image_size
    return ImageConfig("anyres", shape.image_size, shape.patch, ((whole, whole),))


class _CellTables:
    """Token ids of the words that describe each cell."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, glyphs: GlyphsConfig):
        words = cell_words(glyphs)
        self._colour = np.array(token_ids(tokenizer, words.colour), np.int32)
        self._glyph = np.array(token_ids(tokenizer, words.glyph), np.int32)
        self._place = np.array(token_ids(tokenizer, words.place), np.int32)
        self._card = np.array(token_ids(tokenizer, words.card), np.int32)

    @property
    def count(self) -> int:
        """Words of a cell."""
        return 3 + bool(len(self._card))

    def put(self, arrays: Batch, place: int, record: Record) -> None:
        glyph, colour = record["glyph"], record["colour"]
        words = arrays["cell_words"][place]
        words[:, 0] = self._colour[colour]
        words[:, 1] = self._glyph[glyph]
        words[:, 2] = self._place
        if len(self._card):
            words[:, 3] = self._card[record["card"]]
        arrays["cell_filled"][place] = glyph > 0
        arrays["glyph"][place] = glyph
        arrays["colour"][place] = colour
