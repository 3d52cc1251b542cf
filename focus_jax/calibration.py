"""What calibration measures: the divergence that withdrawal costs, and who attends to images.

Both look at prompts under the model as it is: no cut, every visual row in every layer.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from focus_jax.compress.method import Context
from focus_jax.models.attention import (
    NEG_INF,
    Rows,
    is_maskless,
    repeat_groups,
    softmax,
    visible,
)
from focus_jax.models.decoder import Decoder, DecoderLayer, rotary
from focus_jax.models.streams import Packed, Streams, pack, row_at, unpack, withdraw_visual
from focus_jax.models.vlm import VLM, Inputs

# The official search begins at this layer, and stops at these divergences (nats).
OFFICIAL_FIRST = 5
PUBLISHED_ETA = {
    "llava-v1.5-7b": 0.003,
    "llava-v1.5-13b": 0.0005,
    "llava-v1.6-vicuna-7b": 0.0001,
}

# A batch, and how many of its first samples count.
Batch = tuple[Inputs, int]
Progress = Callable[[int], None]


class Curve(NamedTuple):
    """A prompt's next token when all visual tokens leave before layer `first`, `first` + 1, ...

    `kl`: KL(withdrawn || full) in nats. `last_hidden`: the prompt's last row behind the final norm.
    `full_logits`: without withdrawal.
    """

    kl: Float[Array, "S K"]
    last_hidden: Float[Array, "S K D"]
    full_logits: Float[Array, "S W"]


class HeadAttention(NamedTuple):
    """Attention weights summed over the rows that ask, to visual and to text columns."""

    visual: Float[Array, "S L H"]
    text: Float[Array, "S L H"]


class HeadChoice(NamedTuple):
    """Heads that stay for visual tokens.

    `mask`: the choice. `importance`: the mean ratio over samples. `above`: the share of samples
    whose ratio exceeds `threshold`. Heads of one key head share all three.
    """

    mask: Bool[np.ndarray, "L H"]
    importance: Float[np.ndarray, "L H"]
    above: Float[np.ndarray, "L H"]
    threshold: float


# -------------------------------------------------------------------------------- withdrawal


def withdrawal_curve(vlm: VLM, s: Streams, first: int) -> Curve:
    """What withdrawing the visual tokens of S prompts before each layer from `first` on changes.

    VTW's search (Lin et al. 2024, arXiv 2405.05803): sum of p_withdrawn (log p_withdrawn - log
    p_full) at the prompt's last position, text keeping its positions. The official code runs the
    model once for each layer. Here one pass serves all: the text rows that enter a layer set off
    on their own, and go through each later layer beside those that left before, as one batch.
    ValueError: a method with cuts, several questions an image, `first` outside 0..L-1.
    """
    check(vlm, s)
    decoder = vlm.decoder
    check_first(first, decoder.cfg.layers)
    packed, text = pack(s), pack(withdraw_visual(s))
    hidden, withdrawn = packed.hidden, jnp.zeros((0, *text.hidden.shape), text.hidden.dtype)
    for number, layer in enumerate(layers_of(decoder)):
        if number >= first:
            leaving = pack(withdraw_visual(unpack(s, packed, hidden))).hidden[None]
            withdrawn = jnp.concatenate([withdrawn, leaving])
            withdrawn = run_copies(decoder, layer, withdrawn, text)
        hidden = run_copies(decoder, layer, hidden[None], packed)[0]
    full = decoder.logits(last_row(s, packed, hidden))
    rows = jax.vmap(lambda x: last_row(withdraw_visual(s), text, x), out_axes=1)(withdrawn)
    kl = divergence(decoder.logits(rows), full[:, None])
    return Curve(kl, decoder.norm(rows), full)


def run_copies(
    decoder: Decoder, layer: DecoderLayer, x: Float[Array, "C B S D"], packed: Packed
) -> Float[Array, "C B S D"]:
    """One layer on C versions of the same packed rows."""
    copies, b, s, d = x.shape
    rows = Rows(jnp.tile(packed.rows.length, copies))
    by = rotary(decoder.cfg, jnp.tile(packed.position, (copies, 1)))
    mask = None if is_maskless(rows, decoder.impl) else visible(rows, s)
    return layer(x.reshape(copies * b, s, d), by, rows, mask)[0].reshape(x.shape)


def layers_of(decoder: Decoder) -> list[DecoderLayer]:
    """The layers of a decoder that has one stage, in order."""
    [stage] = decoder.stages
    if isinstance(stage, nnx.List):
        return [decoder.use(layer) for layer in stage]
    every = range(decoder.cfg.layers)
    return [decoder.use(jax.tree.map(lambda a, i=i: a[i], stage)) for i in every]


def last_row(s: Streams, packed: Packed, hidden: Float[Array, "B S D"]) -> Float[Array, "B D"]:
    """The row of the prompt's last token among packed ones."""
    return row_at(unpack(s, packed, hidden).token[:, 0], s.last[:, 0])


def divergence(p: Float[Array, "*B W"], q: Float[Array, "*B W"]) -> Float[Array, "*B"]:
    """KL(p || q) in nats of two distributions given by logits; rounding never makes it negative."""
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0)


def usual_first(layers: int) -> int:
    """Where the search begins: the official layer 5, a quarter of the depth of shallow decoders."""
    return min(OFFICIAL_FIRST, max(layers // 4, 1), layers - 1)


def check_first(first: int, layers: int) -> None:
    """ValueError for a first layer that leaves nothing to search."""
    if not 0 <= first < layers:
        raise ValueError(
            f"first={first} is outside the decoder's {layers} layers: search from one of "
            f"0..{layers - 1}"
        )


def first_within(mean_kl: Float[np.ndarray, " K"], first: int, eta: float) -> int | None:
    """The first layer whose divergence is at most `eta`; `mean_kl[0]` is that of layer `first`."""
    within = np.flatnonzero(np.asarray(mean_kl) <= eta)
    return first + int(within[0]) if within.size else None


# ------------------------------------------------------------------------------- importance


def head_attention(vlm: VLM, s: Streams) -> HeadAttention:
    """How much of each decoder head's attention goes to visual tokens, of S prompts.

    Rows: the prompt's text behind the last image. Their softmax weights (fp32, over all that a row
    sees) are summed over the visual columns, and over all others: text before the image (system)
    and behind it (the row itself included). Newlines of a stitched image count as text, as they do
    for YOPO's masks. ValueError: a method with cuts, several questions an image.
    """
    check(vlm, s)
    packed = pack(s)
    watch = asking_rows(s, packed)
    _, _, sums = vlm.decoder.run(0, packed.hidden, packed.position, packed.rows, observe=watch)
    assert sums is not None
    return HeadAttention(*sums.transpose(3, 1, 0, 2))


def asking_rows(s: Streams, packed: Packed):
    """An observer for `Decoder.run`: weights from the text behind the image, summed [B H 2]."""
    lead, t = s.prefix.shape[1] + s.visual.shape[1], s.token.shape[2]
    behind = jnp.where(s.visual_valid, s.after, 0).max(-1)
    asks = s.prompt[:, 0] & (jnp.arange(t) >= behind[:, None])
    at = jnp.argsort(packed.order, axis=1)[:, lead:]
    image = jnp.zeros((len(at), lead + t), bool)
    image = image.at[:, s.prefix.shape[1] : lead].set(s.visual_valid & ~s.newline)
    image = jnp.take_along_axis(image, packed.order, axis=1)
    columns = jnp.stack([image, ~image], axis=1).astype(jnp.float32)

    def observe(q: Array, k: Array, mask: Array) -> Float[Array, "B H 2"]:
        pick = lambda a: jnp.take_along_axis(a, at.reshape(*at.shape, *[1] * (a.ndim - 2)), 1)  # noqa: E731
        q, k = pick(q) * q.shape[-1] ** -0.5, repeat_groups(k, q.shape[2])
        logits = jnp.einsum("bthd,bjhd->bhtj", q, k, preferred_element_type=jnp.float32)
        weights = softmax(jnp.where(pick(mask)[:, None], logits, NEG_INF))
        return jnp.einsum("bhtj,bcj,bt->bhc", weights, columns, asks.astype(jnp.float32))

    return observe


def ratios(seen: HeadAttention, kv_heads: int) -> Float[np.ndarray, "S L H"]:
    """Attention to visual tokens over attention to text, the mean over the heads of a key head.

    ValueError naming the sample that has no image, or no text behind it.
    """
    visual, text = (np.asarray(a, np.float64) for a in seen)
    for number, (to_image, to_text) in enumerate(zip(visual, text, strict=True)):
        if not (to_image + to_text).any():
            raise ValueError(
                f"sample {number} has no text behind its image, and those rows are looked at: put "
                "the image in front of the question"
            )
        if not to_image.any():
            raise ValueError(f"sample {number} has no image: give one for each question")
    s, layers, heads = visual.shape
    ratio = visual / np.maximum(text, 1e-6)  # a bound where nothing at all is left for text
    groups = ratio.reshape(s, layers, kv_heads, -1).mean(-1)
    return np.repeat(groups, heads // kv_heads, axis=-1)


def choose_heads(
    ratio: Float[np.ndarray, "S L H"],
    threshold: float | None = None,
    keep: float | None = None,
    share: float = 0.4,
    whole: int = 2,
    layers: int | None = None,
) -> HeadChoice:
    """The heads that attend to images: YOPO's choice (Zhang et al. 2024, arXiv 2410.06169).

    A head stays when its ratio exceeds `threshold` in more than `share` of the samples (official:
    more than 40 of 100; thresholds 0.2, 0.077, 0.035 leave about 10, 20, 30 of the 40 heads of a
    13B model). `keep` instead asks for that part of the heads, on average over the layers that are
    chosen in: each head has a level, the highest threshold at which it would stay, and the
    threshold lies midway between the last level that stays and the next; among equal levels fewer
    stay. Layers before `whole` and from `layers` on keep all and do not count.
    ValueError: neither or both of `threshold` and `keep`, shares and layers that do not fit.
    """
    samples, depth, _ = ratio.shape
    last = depth if layers is None else layers
    if (threshold is None) == (keep is None):
        raise ValueError("choose heads by threshold= or by keep=: give one of them")
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: a head stays above it, give 0 <= share < 1")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is a part of each layer's heads: give 0 < keep <= 1")
    if not 0 <= whole < last <= depth:
        raise ValueError(
            f"layers {whole}..{last - 1} of a decoder of {depth}: there is none to choose heads "
            f"in; give whole=0..{depth - 1}, layers behind it and at most {depth}"
        )
    needed = int(share * samples + 1e-9) + 1
    level = np.sort(ratio, axis=0)[samples - needed]
    if keep is not None:
        threshold = threshold_for(level[whole:last], keep)
    assert threshold is not None
    mask = level > threshold
    mask[:whole] = mask[last:] = True
    return HeadChoice(mask, ratio.mean(0), (ratio > threshold).mean(0), float(threshold))


def threshold_for(level: Float[np.ndarray, "L H"], keep: float) -> float:
    """Midway between the lowest level that stays, with a part `keep` of all, and the next."""
    ranked = np.append(np.sort(level, axis=None)[::-1], -1.0)  # behind all: a level below any
    count = max(round(keep * level.size), 1)
    return float(ranked[count - 1] + ranked[count]) / 2


# ---------------------------------------------------------------------------------- running


def check(vlm: VLM, s: Streams) -> None:
    """ValueError unless the model runs whole, on one question a sample."""
    method = vlm.method
    if method.cuts or method.compute is not None:
        raise ValueError(
            f"calibration needs every visual row in every layer, and method {method.name!r} spares "
            "some: use full, or a method that only has a vision stage"
        )
    if s.token.shape[1] != 1:
        raise ValueError(f"calibration takes one question a sample, not {s.token.shape[1]}")


def over_samples(
    measure: Callable[[VLM, Streams], Any],
    vlm: VLM,
    batches: Iterable[Batch],
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """What `measure` finds on all samples, as NumPy arrays; `progress(samples)` after each batch.

    Batches of one shape compile once; `seed` serves random vision stages. ValueError: no batch.
    """

    @jax.jit
    def run(vlm: VLM, inputs: Inputs, key: Array) -> Any:
        return measure(vlm, vlm.begin(inputs, vlm.see(inputs, Context(key))[0]))

    parts: list[Any] = []
    for inputs, count in batches:
        out = jax.device_get(run(vlm, inputs, jax.random.fold_in(jax.random.key(seed), len(parts))))
        parts.append(jax.tree.map(lambda a, n=count: a[:n], out))
        if progress is not None:
            progress(count)
    if not parts:
        raise ValueError("there are no samples to calibrate on: give at least one")
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)
