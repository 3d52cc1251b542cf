"""A split's answers by one forward pass an image, all of its questions at once.

Greedy decoding says the right answer exactly when, given the tokens of the right answer before it,
each next one is the most likely, the end included. So no token need be generated, and the questions
of an image share its visual work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.method import Context
from focus_jax.data.glyphs import HOPS, KINDS
from focus_jax.data.loader import Loader, make_loader
from focus_jax.evaluate.runner import Trained, first_images
from focus_jax.models.vlm import VLM
from focus_jax.objectives import inputs_of
from focus_jax.training import HOST_ONLY
from focus_jax.vocabulary_loss import vocabulary_loss
from focus_jax.workdir import TEMPLATES, data_source, loader_config

Batch = Mapping[str, Array | np.ndarray]
# The cells that questions are about are hidden from training; here an oracle reads them.
ON_HOST = tuple(name for name in HOST_ONLY if name != "evidence")
# How many hops a question of each kind takes; none for a question without a kind.
HOPS_OF = np.array([HOPS[kind] for kind in KINDS] + [0], np.int32)


class Answers(NamedTuple):
    """Whether each question of each image is answered right, in the order of the split.

    Images that only fill a batch, or that cannot be read, are left out. `kind` is an index of
    `data.glyphs.KINDS` (-1: none), `hops` the steps that the question takes.
    """

    correct: Bool[np.ndarray, "I Q"]
    kind: Int[np.ndarray, "I Q"]
    hops: Int[np.ndarray, "I Q"]


def read_batches(run: Trained, split: str, limit: int = 0, batch: int = 16) -> list[Batch]:
    """A split in order, on the default device: all questions of an image with their answers.

    What the model reads is on the device; index [B], kind and row_valid [B Q] stay on the host.
    Made once, they serve every method and every run on the same data. `limit`: the first images
    alone (0: all). `batch` counts images.
    ValueError where an answer does not fit the text's length, or there is no such split.
    """
    cfg = run.config
    source = first_images(data_source(cfg, split), limit)
    config = replace(loader_config(cfg, batch, 1, 0), shuffle=False)
    template, glyphs = TEMPLATES[cfg.data.template], cfg.data.glyphs
    loader = make_loader(source, run.tokenizer, template, config, False, glyphs, answers=True)
    end = run.tokenizer.eos_token_id
    return [on_device(checked(found, loader, end)) for found in loader]


def on_device(batch: Mapping[str, np.ndarray]) -> Batch:
    """What the model reads as arrays of the default device; the rest as it is."""
    return {k: a if k in ON_HOST else jnp.asarray(a) for k, a in batch.items()}


def checked(
    batch: Mapping[str, np.ndarray], loader: Loader, end: int | None
) -> Mapping[str, np.ndarray]:
    """The batch, or a ValueError naming a question whose answer was cut off by `text_length`."""
    label = batch["label_mask"]
    last = label.shape[-1] - 1 - np.argmax(label[..., ::-1], axis=-1)
    token = np.take_along_axis(batch["tokens"], last[..., None], axis=-1)[..., 0]
    asked = (batch["question"] >= 0) & (batch["index"] >= 0)[:, None]
    lost = asked & ~(label.any(-1) & (token == end))
    if lost.any():
        row, number = np.argwhere(lost)[0]
        shown = {**batch, "row_valid": asked}
        gold = loader.gold(shown)[row][number]
        assert gold is not None
        raise ValueError(
            f"the question {gold.question!r} with its answer {gold.answer!r} is longer than "
            f"text_length={label.shape[-1]} tokens: raise data.text_length in the run's config"
        )
    return batch


def answer(model: VLM, batches: Sequence[Batch], key: Array | None = None) -> Answers:
    """The questions of `read_batches` answered by a model with its method in place.

    An image draws what is random from `key` and its own place in the split: the batch does not
    matter. Models that differ in weights alone share one compiled program.
    """
    key = jax.random.key(0) if key is None else key
    correct = [right(model, device_part(batch), image_keys(key, batch)) for batch in batches]
    return gathered(batches, [np.asarray(part) for part in correct])


def right_answers(vlm: VLM, batch: Mapping[str, Array], keys: Array) -> Bool[Array, "B Q"]:
    """Whether each question's answer is the most likely one, token by token; `keys` [B]."""
    hidden = vlm(inputs_of(batch), Context(keys)).hidden
    return all_right(vlm, hidden, batch)


right = jax.jit(right_answers)


def all_right(
    vlm: VLM, hidden: Float[Array, "BQ T D"], batch: Mapping[str, Array]
) -> Bool[Array, "B Q"]:
    """Whether every supervised token is the first choice of the row before it."""
    tokens, label = batch["tokens"], batch["label_mask"]
    flat = lambda a: a.reshape(-1, a.shape[-1])[:, 1:]  # noqa: E731
    rows = vlm.decoder.norm(hidden[:, :-1])
    _, hit = vocabulary_loss(rows, vlm.decoder.head_kernel(), flat(tokens), flat(label), vlm.layout)
    return hit.reshape(label.shape[:2]) & label.any(-1)


def device_part(batch: Batch) -> dict[str, Array]:
    """The arrays of a batch that a compiled program takes."""
    return {name: array for name, array in batch.items() if isinstance(array, jax.Array)}


def image_keys(key: Array, batch: Batch) -> Array:
    """A key [B] for each image, by its place in the split."""
    return fold(key, np.asarray(batch["index"]).astype(np.uint32))


fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def gathered(batches: Sequence[Batch], correct: Sequence[Bool[np.ndarray, "B Q"]]) -> Answers:
    """What was found batch by batch as one, without the rows that are no questions of the split.

    ValueError where there is no batch, or none of its images can be read.
    """
    valid = [np.asarray(batch["row_valid"]) for batch in batches]
    if not any(rows.any() for rows in valid):
        raise ValueError("there is no image to answer questions about: mend the data or the limit")
    seen = [rows.any(-1) for rows in valid]
    kind = [np.asarray(batch["kind"]) for batch in batches]
    parts = ([a[rows] for a, rows in zip(found, seen, strict=True)] for found in (correct, kind))
    right_, kinds = (np.concatenate(part) for part in parts)
    return Answers(right_, kinds, HOPS_OF[kinds])
