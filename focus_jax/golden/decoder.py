"""Recorded decoder runs of other implementations, replayed: embeddings in, hidden rows out.

A case is a directory with `case.json`, `arrays.npz` and a Hugging Face decoder. Its sequence is a
prefix, visual tokens, text, and perhaps one further token to decode.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from focus_jax import hf, hf_config
from focus_jax import safetensors_io as io
from focus_jax.compress.fastv import fastv
from focus_jax.compress.method import (
    Context,
    Entry,
    Method,
    VisualTokens,
    empty_aux,
    merge_aux,
    patch_centres,
)
from focus_jax.compress.pyramiddrop import pyramiddrop
from focus_jax.compress.sparsevlm import rater_scores, sparsevlm
from focus_jax.compress.vtw import vtw
from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
from focus_jax.generate import append
from focus_jax.models.params import with_method
from focus_jax.models.streams import Streams, pack, row_at
from focus_jax.models.vlm import VLM, Decoded, Inputs

HEAD, EMBEDDING = "decoder.head.kernel", "decoder.embed.embedding"


class Case(NamedTuple):
    """One recorded run. `embeds` is [prefix | visual | text], `label` marks supervised text.

    `vocabulary`: columns of the head, 0 where none was recorded.
    """

    directory: Path
    method: str
    knobs: dict[str, Any]
    arrays: dict[str, np.ndarray]
    decoder: DecoderConfig
    vocabulary: int
    embeds: Float[np.ndarray, "B S D"]
    decode: Float[np.ndarray, "B 1 D"] | None
    prefix: int
    visual: int
    label: Bool[np.ndarray, "B T"]


class StageEntry(NamedTuple):
    """The rows of all samples at a decoder stage's entry, behind its cut, and their positions."""

    hidden: Float[np.ndarray, "B S D"]
    position: Int[np.ndarray, "B S"]


class Trace(NamedTuple):
    """What a run gave. Per layer: cached keys, and the position of the token that is decoded.

    `entries`: by the layer of a cut. `maps`: what the cuts report (`fastv/score@2`). `output`:
    all rows behind the final norm; `last` the prompt's last; `logits` its scores, where there is
    a head. `starts`: rows just before supervised spans, counted without cuts. `decoded`: the
    further token behind the final norm, and `kv_grown` the cached keys then.
    """

    entries: dict[int, StageEntry]
    maps: dict[str, np.ndarray]
    output: Float[np.ndarray, "B S D"]
    last: Float[np.ndarray, "B D"]
    logits: Float[np.ndarray, "B W"] | None
    kv_lengths: Int[np.ndarray, " L"]
    decode_position: Int[np.ndarray, " L"]
    starts: Int[np.ndarray, " R"]
    decoded: Float[np.ndarray, "B 1 D"] | None
    kv_grown: Int[np.ndarray, " L"] | None


# ------------------------------------------------------------------------------ reading


def read_case(directory: str | Path) -> Case:
    """A recorded decoder run. ValueError: no embeddings."""
    directory = Path(directory)
    info = hf_config.read_json(directory / "case.json")
    with np.load(directory / "arrays.npz", allow_pickle=False) as file:
        arrays = dict(file)
    embeds = arrays.get("inputs_embeds", arrays.get("inputs_embeds_samples"))
    if embeds is None:
        raise ValueError(
            f"{directory} records {sorted(arrays)}, no inputs_embeds: it is no decoder's run"
        )
    knobs, shapes = info["knobs"], info["shapes"]
    prefix = knobs.get("image_start", shapes.get("S"))
    visual = knobs.get("image_tokens", shapes.get("visual"))
    label = np.zeros((len(embeds), embeds.shape[1] - prefix - visual), bool)
    if "labels" in arrays:
        label = arrays["labels"][:, prefix + visual :] >= 0
    head = io.directory_entries(directory).get("lm_head.weight")
    return Case(
        directory, info["method"], knobs, arrays, hf_config.text_config(directory),
        head.shape[0] if head else 0, embeds, arrays.get("decode_embeds"), prefix, visual, label,
    )  # fmt: skip


def method_of(case: Case) -> Method:
    """The method that a case was recorded with, counts rounded as officially.

    That is int(n * share) in binary fractions. ValueError: one that is not replayed here, a version
    of SparseVLM other than 1, or a search over layers, which has no method.
    """
    knobs, visual = case.knobs, case.visual
    if case.method == "fastv":
        return fastv(knobs["K"], int(visual * (1 - knobs["ratio"])) / visual)
    if case.method == "pyramiddrop":
        shares = knobs["image_token_ratio_list"][1:]
        keep = tuple(int(visual * share) / visual for share in shares)
        return pyramiddrop(tuple(knobs["layer_list"]), keep)
    if case.method == "sparsevlm":
        if not str(knobs["version"]).startswith("1"):
            raise ValueError(f"SparseVLM version {knobs['version']!r}: only version 1 is here")
        # A count above what is there keeps all but one, at each layer.
        counts = tuple(min(count, visual - i) for i, count in enumerate(knobs["keep_per_layer"]))
        return sparsevlm(layers=tuple(knobs["pruning_layers"]), keep=counts, of=visual)
    if case.method != "vtw":
        known = "fastv, pyramiddrop, sparsevlm, vtw"
        raise ValueError(f"{case.directory} is a run of {case.method!r}: use {known}")
    if "K" not in knobs:
        raise ValueError(f"{case.directory} searches for a layer: replay it with each vtw(layer)")
    return vtw(knobs["K"])


def load(case: Case, method: Method) -> VLM:
    """The recorded decoder with a method; the token embedding holds the case's own rows.

    Ids count the samples' texts one behind another, then the tokens to decode. The tower is empty.
    """
    rows = texts(case)
    size = max(len(rows), case.vocabulary)
    decoder = replace(case.decoder, tie_embeddings=not case.vocabulary)
    vision = VisionConfig(
        image_size=isqrt(case.visual), patch_size=1, width=2, layers=1, heads=1, mlp_width=2,
        feature_layer=-1,
    )  # fmt: skip
    cfg = ModelConfig(vision=vision, decoder=decoder, projector="linear")
    wanted = hf.shapes(cfg)
    tree = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
    tree |= decoder_tree(case, cfg, wanted)
    if HEAD in tree:
        tree[HEAD] = jnp.pad(tree[HEAD], [(0, 0), (0, size - case.vocabulary)])
    tree[EMBEDDING] = jnp.pad(jnp.asarray(rows), [(0, size - len(rows)), (0, 0)])
    cfg = replace(cfg, decoder=replace(decoder, vocab_size=size))
    return with_method(cfg, tree, method)


def decoder_tree(
    case: Case, cfg: ModelConfig, wanted: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """The recorded weights but the embedding, by our names."""
    entries = [
        # A decoder alone calls its layers `layers.0`, one with a head `model.layers.0`.
        e if e.name.startswith(("model.", "lm_head.")) else e._replace(name=f"model.{e.name}")
        for e in io.directory_entries(case.directory).values()
        if not e.name.endswith("embed_tokens.weight")
    ]
    here = {k: v for k, v in wanted.items() if k.startswith("decoder.") and k != EMBEDDING}
    return hf.load(cfg, entries, here, case.directory, None, workers=1)


def texts(case: Case) -> Float[np.ndarray, "R D"]:
    """Embeddings of all that is no visual token: of each sample prefix and text, then decoded."""
    width = case.embeds.shape[-1]
    visual = slice(case.prefix, case.prefix + case.visual)
    rows = [np.delete(case.embeds, visual, axis=1).reshape(-1, width)]
    if case.decode is not None:
        rows.append(case.decode.reshape(-1, width))
    return np.concatenate(rows).astype(np.float32)


# ------------------------------------------------------------------------------ running


def inputs_of(case: Case) -> tuple[Inputs, VisualTokens]:
    """A batch of the case's samples, and the visual tokens that stand for its images."""
    b, text = case.label.shape
    ids = jnp.arange(b * (case.prefix + text), dtype=jnp.int32).reshape(b, -1)
    side, label = isqrt(case.visual), jnp.asarray(case.label[:, None])
    true = lambda *shape: jnp.ones(shape, bool)  # noqa: E731
    # An image that is no square ends in a row that is not full.
    centre = patch_centres(-(-case.visual // side), side)[: case.visual]
    tokens = Inputs(
        pixels=jnp.zeros((b, 1, side, side, 3), jnp.uint8),
        patch_valid=true(b, 1, case.visual),
        origin=jnp.zeros((b, 1, 2), jnp.int32),
        prefix=ids[:, : case.prefix],
        prefix_valid=true(b, case.prefix),
        tokens=ids[:, None, case.prefix :],
        token_valid=true(b, 1, text),
        instruction=~label,
        label=label,
    )
    visual = VisualTokens(
        features=jnp.asarray(case.embeds[:, case.prefix : case.prefix + case.visual]),
        valid=true(b, case.visual),
        centre=jnp.broadcast_to(jnp.asarray(centre), (b, case.visual, 2)),
        side=jnp.ones((b, case.visual)),
        view=jnp.zeros((b, case.visual), jnp.int32),
        newline=~true(b, case.visual),
    )
    return tokens, visual


def replay(case: Case, method: Method | None = None) -> Trace:
    """Run a case with its own method, or another one, in fp32 with full-precision products."""
    vlm = load(case, method or method_of(case))
    tokens, visual = inputs_of(case)
    with jax.default_matmul_precision("highest"):
        found = run(vlm, tokens, visual, bool(case.knobs.get("training")), case.decode is not None)
    found = jax.tree.map(np.asarray, found)
    edges = (0, *vlm.method.bounds, case.decoder.layers)
    by_layer = lambda a: np.repeat(a, [b - a for a, b in pairwise(edges)])  # noqa: E731
    return Trace(
        entries={layer: trimmed(*entry) for layer, entry in found["entries"].items()},
        maps=found["maps"],
        output=trimmed(*found["output"]).hidden,
        last=found["last"],
        logits=found["logits"][:, : case.vocabulary] if case.vocabulary else None,
        kv_lengths=by_layer(np.stack(found["lengths"])[:, 0]),
        decode_position=by_layer(np.stack(found["positions"])[:, 0]),
        starts=case.prefix + case.visual + np.flatnonzero(found["starts"][0, 0]),
        decoded=found.get("decoded"),
        kv_grown=by_layer(np.stack(found["grown"])[:, 0]) if "grown" in found else None,
    )


@partial(jax.jit, static_argnames=("train", "further"))
def run(
    vlm: VLM, tokens: Inputs, visual: VisualTokens, train: bool, further: bool
) -> dict[str, Any]:
    """Prefill, the rows behind each cut, and one more token where there is one."""
    ctx = Context(jax.random.key(0), train=train)
    slots, stages = visual.valid.shape[1], range(len(vlm.decoder.stages))
    part = Decoded(vlm.begin(tokens, visual), (), empty_aux(), (), None)
    entries, caches, aux, first = {}, part.caches, part.aux, 0
    for stage in stages:
        cut = vlm.method.cut_before(stage)
        if cut is None and stage < stages[-1]:
            continue
        ran = range(first, stage + 1)
        part = vlm.decode(part.streams, ran, slots, ctx, keep=1, before=part.entry)
        caches, aux, first = caches + part.caches, merge_aux(aux, part.aux), stage + 1
        if cut is not None and part.entry is not None:
            entries[cut.layer] = packed_rows(part.entry)
    hidden, position, length = packed_rows(part.streams)
    last = row_at(part.streams.token[:, 0], part.streams.last[:, 0])
    found: dict[str, Any] = {
        "entries": entries,
        "maps": aux.maps,
        "output": (vlm.decoder.norm(hidden), position, length),
        "starts": part.streams.starts,
        "last": vlm.decoder.norm(last),
        "logits": vlm.decoder.logits(last),
        "lengths": [cache.length for cache in caches],
        "positions": [cache.position for cache in caches],
    }
    if further:
        b, texts = len(tokens.tokens), tokens.prefix.size + tokens.tokens.size
        ids = texts + jnp.arange(b)[:, None]
        rows, grown = append(vlm, vlm.decoder.embed(ids), jnp.ones((b, 1), bool), caches)
        found |= {"decoded": vlm.decoder.norm(rows), "grown": [cache.length for cache in grown]}
    return found


def packed_rows(s: Streams) -> tuple[Array, Array, Array]:
    """Hidden rows and positions in the decoder's order, valid ones first; how many are valid."""
    packed = pack(s)
    return packed.hidden, packed.position, packed.rows.length


def trimmed(hidden: np.ndarray, position: np.ndarray, length: np.ndarray) -> StageEntry:
    """Without padding; a case's samples are equally long."""
    return StageEntry(hidden[:, : length[0]], position[:, : length[0]])


# ------------------------------------------------------------------------------ answers


def answers(case: Case, trace: Trace) -> dict[str, np.ndarray]:
    """What a run of the case's own method gave, with the names and shapes of its arrays."""
    own = {
        "fastv": of_fastv, "pyramiddrop": of_pyramiddrop, "vtw": of_vtw, "sparsevlm": of_sparsevlm
    }  # fmt: skip
    found = own[case.method](case, trace)
    found |= {"prefill_output": trace.output, "kv_lengths": trace.kv_lengths}
    if trace.decoded is not None and trace.kv_grown is not None:
        found |= {"decode_output": trace.decoded, "kv_lengths_after_decode": trace.kv_grown}
    return {name: array for name, array in found.items() if name in case.arrays}


def of_fastv(case: Case, trace: Trace) -> dict[str, np.ndarray]:
    """Scores and choice of the one cut."""
    layer = case.knobs["K"]
    return {
        "scores": trace.maps[f"fastv/score@{layer}"][0, 0],
        "kept_indices": trace.maps[f"fastv/index@{layer}"][0, 0],
        "kept_positions": trace.entries[layer].position[0],
        "hidden_layerK": trace.entries[layer].hidden,
        "kv_lengths_clean": trace.kv_lengths,
    }


def of_pyramiddrop(case: Case, trace: Trace) -> dict[str, np.ndarray]:
    """Each stage's scores and choice, among what stands there and among all."""
    found = {"decode_position_per_layer": trace.decode_position, "query_rows": trace.starts}
    raster = np.arange(case.visual)
    for stage, layer in enumerate(case.knobs["layer_list"]):
        kept = trace.maps[f"pyramiddrop/index@{layer}"][0, 0]
        raster = raster[kept]
        found |= {
            f"scores_stage{stage}": trace.maps[f"pyramiddrop/score@{layer}"][0, 0],
            f"keep_local_stage{stage}": kept,
            f"keep_raster_stage{stage}": raster,
            f"hidden_stage{stage}": trace.entries[layer].hidden,
            f"position_ids_stage{stage}": trace.entries[layer].position,
        }
    return found


def of_vtw(case: Case, trace: Trace) -> dict[str, np.ndarray]:
    """What stands behind the withdrawal."""
    entry = trace.entries[case.knobs["K"]]
    return {"hidden_layerK": entry.hidden, "positions_after": entry.position[0]}


def of_sparsevlm(case: Case, trace: Trace) -> dict[str, np.ndarray]:
    """Raters, and each stage's scores, choice and clusters; a cut stands behind its layer."""
    layers = case.knobs["pruning_layers"]
    rates = trace.maps[f"sparsevlm/raters@{layers[0] + 1}"][0, 0]
    found = {"rater_indices": np.flatnonzero(rates), "rater_scores": rated(case)[0, 0]}
    for layer in layers:
        name = lambda part, at=layer + 1: trace.maps[f"sparsevlm/{part}@{at}"][0, 0]  # noqa: E731
        some = name("recycled") >= 0
        found |= {
            f"scores_layer{layer}": name("score"),
            f"keep_layer{layer}": name("index"),
            f"recycled_layer{layer}": name("recycled")[some],
            f"cluster_centres_layer{layer}": name("centres"),
            f"cluster_assignment_layer{layer}": name("assignment")[some],
            f"merged_layer{layer}": name("merged")[None],
            f"hidden_layer{layer}": trace.entries[layer + 1].hidden,
        }
    return found


def rated(case: Case) -> Float[np.ndarray, "B 1 T"]:
    """The scores that raters are chosen by."""
    behind = case.prefix + case.visual
    visual, text = case.embeds[:, case.prefix : behind], case.embeds[:, behind:]
    valid, asking = np.ones(visual.shape[:2], bool), ~case.label[:, None]
    entry = Entry(*map(jnp.asarray, (visual, valid, text[:, None], asking)))
    return np.asarray(rater_scores(entry))
