"""Where in the decoder visual tokens may leave: a trained `full` model cut at every layer.

Each cut keeps a share of the visual tokens, ranked by attention as FocusLLaVA's sampler does, or by
a control: the lowest ranked ones, ones drawn at random, and the cells that the question is about
(an oracle). Nothing is trained for the cut. The layers before it run once for all rankings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.method import Context, Kept, LayerView, Method, block_key
from focus_jax.compress.select import keep_count, keep_slots, top_k_in_order
from focus_jax.compress.text_guided import TextGuided
from focus_jax.data.cells import first_tile, tiles_across, views
from focus_jax.models.params import canonical, named_leaves, with_method
from focus_jax.models.streams import Streams, pack, renumber, select_visual, unpack
from focus_jax.models.vlm import VLM
from focus_jax.objectives import inputs_of
from focus_jax.study.answers import Batch, all_right, device_part, gathered, image_keys

Rank = Literal["top", "least", "random", "oracle"]
Queries = Literal["last", "instruction", "peak", ""]


@dataclass(frozen=True)
class Ranking:
    """How visual tokens are ranked: `top` and `least` by the attention of the rows `queries`.

    ValueError: one of these without rows, or another rank with them.
    """

    rank: Rank
    queries: Queries = ""

    def __post_init__(self) -> None:
        if (self.rank in ("top", "least")) != bool(self.queries):
            raise ValueError(
                f"ranking {self.rank!r} with queries={self.queries!r}: top and least read attention"
                " of last, instruction or peak; random and oracle read none"
            )


RANKINGS = (
    Ranking("top", "last"), Ranking("top", "instruction"), Ranking("top", "peak"),
    Ranking("least", "last"), Ranking("least", "instruction"), Ranking("least", "peak"),
    Ranking("random"), Ranking("oracle"),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Answers when `keep` of the visual tokens go on behind the entry of `layer`.

    `correct` [I Q] as in `Answers`; `queries` is "" for random and oracle.
    """

    layer: int
    keep: float
    rank: Rank
    queries: Queries
    correct: Bool[np.ndarray, "I Q"]


def place(
    model: VLM,
    batches: Sequence[Batch],
    layers: Sequence[int],
    keeps: Sequence[float],
    key: Array | None = None,
    rankings: Sequence[Ranking] = RANKINGS,
    cut: TextGuided | None = None,
) -> list[Curve]:
    """Answers to the questions of `read_batches` with a cut at each of `layers`.

    One curve for each layer, share and ranking, in this order. The model keeps all visual tokens
    and has no cut. `cut` says how heads are reduced, what the softmax spans and whether positions
    close up (None: TextGuided's own); nothing else of it is read. One program a layer,
    which models that differ in weights alone share.
    ValueError: a model with another method, a layer or share outside its range, no evidence.
    """
    check_model(model)
    if any(r.rank == "oracle" for r in rankings):
        check_evidence(batches)
    asked = replace(cut or TextGuided(), mode="top_k", sharing="per_question")
    key = jax.random.key(0) if key is None else key
    shares, kinds = tuple(keeps), tuple(rankings)
    tree, curves = canonical(named_leaves(model)), []
    for layer in layers:
        method = Method("placed", model.method.vision, (replace(asked, layer=layer),))
        staged = with_method(model.cfg, tree, method, None, model.layout)
        parts = [
            np.asarray(answer_cut(staged, device_part(b), image_keys(key, b), shares, kinds))
            for b in batches
        ]
        curves += curves_of(layer, shares, kinds, batches, parts)
    return curves


def curves_of(
    layer: int,
    shares: tuple[float, ...],
    kinds: tuple[Ranking, ...],
    batches: Sequence[Batch],
    parts: Sequence[Bool[np.ndarray, "S K B Q"]],
) -> list[Curve]:
    """The curves of one layer: share by share, in each the rankings."""
    return [
        Curve(layer, share, kind.rank, kind.queries, gathered(batches, found).correct)
        for i, share in enumerate(shares)
        for j, kind in enumerate(kinds)
        for found in [[part[i, j] for part in parts]]
    ]


def check_model(model: VLM) -> None:
    """ValueError unless every patch is a visual token at every layer."""
    method = model.method
    if method.cuts or method.vision.selects or method.compute is not None:
        raise ValueError(
            f"placement cuts a model that keeps every visual token, and this one has the method "
            f"{method.name!r}: give the run's model with method full"
        )


def check_evidence(batches: Sequence[Batch]) -> None:
    """ValueError unless the batches tell which of the cells in view a question is about."""
    for batch in batches:
        if "evidence" not in batch:
            raise ValueError(
                "the oracle needs `evidence` [B, Q, C] in every batch, which the loader of the "
                "embedded set gives with `glyphs`: use it, or leave the oracle out of `rankings`"
            )
        cells, (m, n) = batch["evidence"].shape[-1], batch["patch_valid"].shape[1:]
        if m != views(tiles_across(cells, n)):
            raise ValueError(
                f"the oracle knows the {cells} cells of an image, and {m} views of {n} patches are "
                "none of these: leave it out of `rankings`"
            )


@partial(jax.jit, static_argnames=("shares", "kinds"))
def answer_cut(
    vlm: VLM,
    batch: Mapping[str, Array],
    keys: Array,
    shares: tuple[float, ...],
    kinds: tuple[Ranking, ...],
) -> Bool[Array, "S K B Q"]:
    """Right answers for every share and ranking, with the cut that the model's method names."""
    [cut] = vlm.method.cuts
    assert isinstance(cut, TextGuided)
    stage, ctx = int(cut.layer > 0), Context(keys)
    visual, _ = vlm.see(inputs_of(batch), ctx)
    before = vlm.begin(inputs_of(batch), visual)
    entering = before.visual.shape[1]
    before = vlm.decode(before, range(stage), entering, ctx).streams
    view = vlm.layer_view(before, stage)
    own = Context(block_key(ctx, f"cut{cut.layer}"))  # as the cut itself would draw
    score = jnp.stack([score_of(kind, cut, view, before, batch, own) for kind in kinds])

    def run(share: float, ranked: Float[Array, "B Q V"]) -> Bool[Array, "B Q"]:
        count = keep_count(view.entered, share)
        kept = chosen(before, ranked, keep_slots(entering, share), count)
        kept = renumber(kept) if cut.renumber else kept
        after = finish(vlm, kept, stage, entering)
        b, q, t, d = after.token.shape
        return all_right(vlm, after.token.reshape(b * q, t, d), batch)

    return jnp.stack([jax.lax.map(partial(run, share), score) for share in shares])


def chosen(
    s: Streams, score: Float[Array, "B Q V"], slots: int, count: Int[Array, " B"]
) -> Streams:
    """The streams with each question's `count` highest visual tokens, a sample a question."""
    valid = jnp.broadcast_to(s.visual_valid[:, None], score.shape)
    count = jnp.broadcast_to(count[:, None], score.shape[:2])
    return select_visual(s, Kept(top_k_in_order(score, valid, slots, count)))


def finish(vlm: VLM, s: Streams, stage: int, entering: int) -> Streams:
    """The last decoder stage, without the method's cut at its entry."""
    packed = pack(s)
    hidden, _, _ = vlm.run_stage(stage, s, packed, entering)
    return unpack(s, packed, hidden)


def score_of(
    kind: Ranking, cut: TextGuided, view: LayerView, s: Streams, batch: Batch, ctx: Context
) -> Float[Array, "B Q V"]:
    """What a ranking gives each visual token; the highest stay."""
    if kind.queries:
        score = replace(cut, rank="most", queries=kind.queries).score(view, ctx)
        return score if kind.rank == "top" else -score
    noise = replace(cut, rank="random").score(view, ctx)  # in [0, 1)
    if kind.rank == "random":
        return noise
    return evidence_at(s, jnp.asarray(batch["evidence"]), batch["patch_valid"].shape[-1]) + noise


def evidence_at(s: Streams, evidence: Bool[Array, "B Q C"], patches: int) -> Float[Array, "B Q V"]:
    """1 at the visual tokens of the cells that a question is about, else 0; newlines are none.

    For views of `patches` patches, each of them a token. A thumbnail's are no evidence: its scale
    is taken for unreadable.
    """
    side = isqrt(evidence.shape[-1])
    tile = s.view >= first_tile(tiles_across(evidence.shape[-1], patches))
    at = (s.centre[..., 0] * side + s.centre[..., 1]).astype(jnp.int32)  # [B V]
    at = jnp.broadcast_to(at[:, None], (*evidence.shape[:2], at.shape[-1]))
    found = jnp.take_along_axis(evidence, at, axis=-1)
    return (found & (tile & ~s.newline)[:, None]).astype(jnp.float32)
