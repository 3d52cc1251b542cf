"""What a training stage minimises: each objective maps a model and a batch to a loss.

`answers` is the real one (LLaVA's two stages). `words` trains the embedded job's decoder from
nothing, `describe` its tower and projector; they stand for pre-training. `route` teaches a router
alone.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.alignment import unexplained
from focus_jax.compress.method import Context, VisualTokens, block_key
from focus_jax.compress.select import top_k_in_order
from focus_jax.data.cells import at_patches
from focus_jax.models.streams import Streams
from focus_jax.models.vlm import VLM, Inputs
from focus_jax.vocabulary_loss import vocabulary_loss

ObjectiveName = Literal["answers", "words", "describe", "route"]
Batch = Mapping[str, Array]


class Loss(NamedTuple):
    """A scalar to minimise and what to report beside it."""

    value: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


def inputs_of(batch: Batch) -> Inputs:
    """The model's view of a loader's batch; dialogues tell where their images stand.

    Batches with the tables of glyphs tell what each patch holds: a thumbnail's, if any of its cells
    does.
    """
    filled, patches = batch.get("cell_filled"), batch["patch_valid"].shape[-1]
    return Inputs(
        pixels=batch["pixels"], patch_valid=batch["patch_valid"], origin=batch["tile_origin"],
        prefix=batch["prefix"], prefix_valid=batch["prefix_valid"], tokens=batch["tokens"],
        token_valid=batch["token_valid"], instruction=batch["query_mask"],
        label=batch["label_mask"], row_valid=batch.get("tile_rows"),
        image_at=batch.get("image_at"),
        content=None if filled is None else at_patches(filled, patches).astype(jnp.float32),
    )  # fmt: skip


def answer_loss(
    vlm: VLM,
    hidden: Float[Array, "R T D"],
    tokens: Int[Array, "R T"],
    label: Bool[Array, "R T"],
) -> Loss:
    """Mean cross-entropy of the supervised tokens, each from the row before it.

    `accuracy`: of rows with supervised tokens, how many get all of them right.
    """
    decoder, mask = vlm.decoder, label[:, 1:]
    total, right = vocabulary_loss(
        decoder.norm(hidden[:, :-1]), decoder.head_kernel(), tokens[:, 1:], mask, vlm.layout
    )
    rows = mask.any(-1)
    accuracy = (right & rows).sum() / jnp.maximum(rows.sum(), 1)
    return Loss(total / jnp.maximum(mask.sum(), 1), {"accuracy": accuracy})


def answers(vlm: VLM, batch: Batch, ctx: Context) -> Loss:
    """Answer questions about images, through the method; sampler losses added."""
    return answer(vlm, batch, ctx, None)


def answer(
    vlm: VLM,
    batch: Batch,
    ctx: Context,
    visual: VisualTokens | None,
    places: Int[Array, "B V"] | None = None,
) -> Loss:
    """Answer loss over the batch, the image given by pixels or by ready visual tokens."""
    out = vlm(inputs_of(batch), ctx, visual=visual, places=places)
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    hidden = out.hidden
    if "image_at" in batch:
        hidden = behind_images(hidden, out.streams, batch["image_at"])
    loss = answer_loss(vlm, hidden, flat(batch["tokens"]), flat(batch["label_mask"]))
    extra = out.aux.losses
    metrics = {"loss_answers": loss.value, **loss.metrics, **out.aux.metrics}
    metrics |= {f"loss_{name}": value for name, value in extra.items()}
    return Loss(loss.value + sum(extra.values(), jnp.zeros(())), metrics)


def behind_images(
    hidden: Float[Array, "B T D"], s: Streams, image_at: Int[Array, "B I"]
) -> Float[Array, "B T D"]:
    """Rows from which the next token is told: an image's last one where it stands in between.

    So a caption's first word is told from its image. An image before all text (`image_at` 0) tells
    nothing: no row of text stands before it whose place it could take.
    """
    v = s.visual.shape[1]
    if not v or not image_at.shape[1]:
        return hidden
    own = s.visual_valid[:, None] & (s.after[:, None] == image_at[..., None])  # [B I V]
    last = jnp.where(own, jnp.arange(v), -1).max(-1)
    rows = jnp.take_along_axis(s.visual, jnp.maximum(last, 0)[..., None], axis=1)
    place = jnp.where((last >= 0) & (image_at > 0), image_at - 1, hidden.shape[1])
    put = lambda h, at, row: h.at[at].set(row.astype(h.dtype), mode="drop")  # noqa: E731
    return jax.vmap(put)(hidden, place, rows)


WORD_SLOTS = 24  # filled cells and a few empty ones


def words(vlm: VLM, batch: Batch, ctx: Context) -> Loss:
    """The same questions over scenes told in words: a cell is the sum of its words' embeddings.

    All filled cells and a varying number of empty ones, at their places or closed up, so that
    the decoder meets the positions of a compressed stream as well.
    """
    keys = jax.random.split(block_key(ctx, "words"), 3)
    filled = batch["cell_filled"]
    b = filled.shape[0]
    score = filled * 2.0 + jax.random.uniform(keys[0], filled.shape)
    spare = jax.random.randint(keys[1], (b,), 0, WORD_SLOTS)
    count = jnp.maximum(filled.sum(-1), jnp.minimum(filled.sum(-1) + spare, WORD_SLOTS))
    chosen = top_k_in_order(score, jnp.ones_like(filled), WORD_SLOTS, count)
    told = jnp.take_along_axis(batch["cell_words"], chosen.index[..., None], axis=1)
    zeros, features = jnp.zeros(chosen.valid.shape), vlm.decoder.embedded(told).sum(-2)
    visual = VisualTokens(
        features, chosen.valid, jnp.zeros((*chosen.valid.shape, 2)), zeros,
        zeros.astype(jnp.int32), zeros.astype(bool),
    )  # fmt: skip
    # Between closed up (0) and each cell at its raster place (1).
    rank = jnp.arange(WORD_SLOTS)
    gaps = jnp.maximum(chosen.index - rank, 0) * jax.random.uniform(keys[2], (b, 1))
    return answer(vlm, batch, ctx, visual, rank + gaps.astype(jnp.int32))


def route(vlm: VLM, batch: Batch, ctx: Context) -> Loss:
    """The losses of the vision stage alone: its router learns before any answer depends on it."""
    _, aux = vlm.see(inputs_of(batch), ctx)
    if not aux.losses:
        raise ValueError(
            f"objective 'route': the method {vlm.method.name!r} has no router to teach; leave the "
            "stage out, or use the gate 'distortion'"
        )
    metrics = {**aux.metrics, **{f"loss_{name}": value for name, value in aux.losses.items()}}
    return Loss(sum(aux.losses.values(), jnp.zeros(())), metrics)


def describe(vlm: VLM, batch: Batch, ctx: Context) -> Loss:
    """Tower and projector tell each patch in the decoder's words (see alignment.py)."""
    share = unexplained(vlm, batch)
    return Loss(share, {"unexplained": share})


OBJECTIVES: dict[str, Callable[[VLM, Batch, Context], Loss]] = {
    "answers": answers,
    "words": words,
    "describe": describe,
    "route": route,
}
