"""Cross-entropy over a large vocabulary, a stretch of text at a time.

fp32 scores of all tokens never exist. Where gradients are asked for, a stretch's are made while its
scores are there, so nothing is computed twice. On a mesh each device works on its own samples and
its own part of the vocabulary; devices exchange a few numbers a token, the gradients of tokens, and
once the kernel and its gradient.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from focus_jax.sharding import Layout, MeshAxes

SCORES = 1 << 23  # fp32 numbers of a stretch on one device: 32 MiB


class Text(NamedTuple):
    """Normed rows before the tokens, the tokens, and which of them count."""

    hidden: Float[Array, "R T D"]
    target: Int[Array, "R T"]
    asked: Bool[Array, "R T"]


class Grads(NamedTuple):
    """Gradients of the summed loss; None where nobody asks. Also: which ones are wanted."""

    hidden: Any
    kernel: Any


class Split(NamedTuple):
    """Mesh axes that hold the vocabulary, the kernel's rows where it is kept, and samples."""

    vocab: MeshAxes = ()
    embed: MeshAxes = ()
    batch: MeshAxes = ()


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def vocabulary_loss(
    hidden: Float[Array, "R T D"],
    kernel: Float[Array, "D W"],
    target: Int[Array, "R T"],
    asked: Bool[Array, "R T"],
    layout: Layout | None = None,
) -> tuple[Float[Array, ""], Bool[Array, " R"]]:
    """Sum of the cross-entropy of `asked` tokens, and whether a row gets all of them right.

    Products in `hidden`'s dtype, all else in fp32. Reverse mode only.
    """
    return everywhere(Text(hidden, target, asked), kernel, Grads(False, False), layout)[0]


def everywhere(
    text: Text, kernel: Array, wanted: Grads, layout: Layout | None
) -> tuple[tuple[Array, Array], Grads]:
    """(loss, hits) and the gradients that are wanted, on one device or on a mesh."""
    cast = kernel.astype(text.hidden.dtype)
    if layout is None:
        out, grads = stretches(text, cast, wanted, Split())
    else:
        split = split_of(layout, kernel.shape)
        batch, vocab = layout.spec("batch"), split.vocab or None
        kept = PartitionSpec(split.embed or None, vocab)
        grads_at = Grads(batch if wanted.hidden else None, kept if wanted.kernel else None)
        work = partial(stretches, wanted=wanted, split=split)
        inputs, outputs = (batch, PartitionSpec(None, vocab)), ((PartitionSpec(), batch), grads_at)
        out, grads = layout.local(work, inputs, outputs)(text, cast)
    if wanted.kernel:
        grads = grads._replace(kernel=grads.kernel.astype(kernel.dtype))
    return out, grads


def split_of(layout: Layout, shape: tuple[int, ...]) -> Split:
    """Where a kernel [D W] lies: dimensions that do not divide stay whole."""
    spec = layout.stored("decoder.head.kernel", shape).spec
    embed, vocab = ((part,) if isinstance(part, str) else tuple(part or ()) for part in spec)
    batch = layout.mesh_axes("batch") or ()
    # Only among devices that hold other samples can a gradient be added and split at once.
    return Split(vocab, embed if set(embed) <= set(batch) else (), batch)


def stretches(
    text: Text, kernel: Array, wanted: Grads, split: Split
) -> tuple[tuple[Array, Array], Grads]:
    """`everywhere` on one device: its samples, its part of the vocabulary."""
    rows, length, width = text.hidden.shape
    size = stretch(rows, length, kernel.shape[1])
    nothing = (
        jnp.zeros(()), jnp.ones(rows, bool),
        jnp.zeros(kernel.shape, jnp.float32) if wanted.kernel else None,
    )  # fmt: skip
    work = partial(one_stretch, kernel=kernel, wanted=wanted, split=split)
    if size == length:
        (loss, right, by_kernel), by_hidden = work(nothing, text)
    else:

        def cut(a: Array) -> Array:
            a = jnp.pad(a, ((0, 0), (0, -length % size)) + ((0, 0),) * (a.ndim - 2))
            return a.reshape(rows, -1, size, *a.shape[2:]).swapaxes(0, 1)

        (loss, right, by_kernel), by_hidden = jax.lax.scan(work, nothing, jax.tree.map(cut, text))
        if wanted.hidden:
            by_hidden = by_hidden.swapaxes(0, 1).reshape(rows, -1, width)[:, :length]
    grads = Grads(
        added(by_hidden, split.vocab) if wanted.hidden else None,
        added_and_split(by_kernel, split) if wanted.kernel else None,
    )
    return (added(loss, split.batch), right), grads


def stretch(rows: int, length: int, vocabulary: int) -> int:
    """Tokens of each row whose scores exist at a time; stretches are about equal."""
    count = min(-(-rows * length * vocabulary // SCORES), length)
    return -(-length // max(count, 1))


def one_stretch(
    sums: tuple[Array, Array, Any], text: Text, kernel: Array, wanted: Grads, split: Split
) -> tuple[tuple[Array, Array, Any], Any]:
    """Add a stretch to (loss, hits, gradient of the kernel); the rows' own gradient beside."""
    loss, right, by_kernel = sums
    hidden, target, asked = text
    scores = jnp.einsum("rtd,dw->rtw", hidden, kernel, preferred_element_type=jnp.float32)
    first = jax.lax.axis_index(split.vocab) * kernel.shape[1] if split.vocab else 0
    hit = jnp.arange(kernel.shape[1]) == (target - first)[..., None]
    top, best = top_of(scores, first, split.vocab)
    exp = jnp.exp(scores - top[..., None])
    total, of_target = added((exp.sum(-1), jnp.where(hit, scores, 0).sum(-1)), split.vocab)
    loss += jnp.where(asked, jnp.log(total) + top - of_target, 0).sum()
    right &= jnp.where(asked, best == target, True).all(-1)
    by_score = jnp.where(asked[..., None], exp / total[..., None] - hit, 0).astype(hidden.dtype)
    if wanted.kernel:
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        by_kernel += product("rtd,rtw->dw", hidden, by_score)
    by_hidden = jnp.einsum("rtw,dw->rtd", by_score, kernel) if wanted.hidden else None
    return (loss, right, by_kernel), by_hidden


def top_of(scores: Array, first: Array | int, vocab: MeshAxes) -> tuple[Array, Array]:
    """The largest score of each row over the whole vocabulary, and the first word that has it."""
    own, best = scores.max(-1), jnp.argmax(scores, -1) + first
    if not vocab:
        return own, best
    top = jax.lax.pmax(own, vocab)
    return top, jax.lax.pmin(jnp.where(own == top, best, jnp.iinfo(jnp.int32).max), vocab)


def added(tree: Any, axes: MeshAxes) -> Any:
    """The sum over mesh axes; () leaves it."""
    return jax.lax.psum(tree, axes) if axes else tree


def added_and_split(by_kernel: Array, split: Split) -> Array:
    """The kernel's gradient over all samples, each device keeping the rows that it keeps."""
    if split.embed:
        by_kernel = jax.lax.psum_scatter(by_kernel, split.embed, scatter_dimension=0, tiled=True)
    return added(by_kernel, tuple(axis for axis in split.batch if axis not in split.embed))


def _forward(hidden, kernel, target, asked, layout):
    text = Text(hidden.value, target.value, asked.value)
    return everywhere(text, kernel.value, Grads(hidden.perturbed, kernel.perturbed), layout)


def _backward(layout, grads, cotangent):
    factor = cotangent[0]
    if isinstance(factor, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    scaled = jax.tree.map(lambda grad: (grad * factor).astype(grad.dtype), grads)
    return scaled.hidden, scaled.kernel, None, None


vocabulary_loss.defvjp(_forward, _backward, symbolic_zeros=True)
