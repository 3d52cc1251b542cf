"""Recorded decoder runs with cuts: FastV, PyramidDrop, SparseVLM, and VTW with its search."""

from functools import partial

import jax
import numpy as np

from focus_jax import golden_decoder
from focus_jax.calibration import first_within, withdrawal_curve
from focus_jax.compress.baselines import full
from focus_jax.compress.fastv import fastv
from focus_jax.compress.method import Method
from focus_jax.compress.pyramiddrop import pyramiddrop
from focus_jax.compress.sparsevlm import sparsevlm
from focus_jax.golden_case import Recorded, Replay
from focus_jax.golden_decoder import HEAD, Case
from focus_jax.models.params import named_leaves, with_leaves
from focus_jax.models.vlm import VLM

GIVEN = frozenset({"inputs_embeds", "inputs_embeds_samples", "decode_embeds", "labels", "eta"})


def replay(recorded: Recorded) -> Replay:
    """A case's own method; what it takes for itself of the arrays is not compared."""
    case = golden_decoder.read_case(recorded.directory)
    inputs = GIVEN & {*recorded.expected}
    if recorded.method == "vtw" and "first_layer" in case.knobs:
        return Replay(inputs, search(case))
    trace = golden_decoder.replay(case, method_of(case))
    found = golden_decoder.answers(case, trace)
    if recorded.method == "fastv":
        # The official cache holds the keys of the layer that ranks twice.
        twice = np.where(np.arange(case.decoder.layers) == case.knobs["K"] - 1, 2, 1)
        found["kv_lengths_official"] = trace.kv_lengths * twice
        if trace.kv_grown is not None:
            found["kv_lengths_official_after_decode"] = trace.kv_grown * twice
    if "labels" in case.arrays:
        found["labels_out"] = labels_left(case, found)
    return Replay(inputs, found)


def method_of(case: Case) -> Method:
    """The method of a case, counts rounded as officially: int(n * share) in binary fractions.

    ValueError: a version of SparseVLM other than 1.
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
    return golden_decoder.method_of(case)


def labels_left(case: Case, found: dict[str, np.ndarray]) -> np.ndarray:
    """Labels of the rows that are left behind the last cut."""
    last = len(case.knobs["layer_list"]) - 1
    behind = case.prefix + case.visual
    rows = np.r_[
        : case.prefix, case.prefix + found[f"keep_raster_stage{last}"],
        behind : case.embeds.shape[1],
    ]  # fmt: skip
    return case.arrays["labels"][:, rows]


def search(case: Case) -> dict[str, np.ndarray]:
    """VTW's search: the divergence of each layer, and the first within each threshold (or -1)."""
    vlm = with_vocabulary(golden_decoder.load(case, full()), case.vocabulary)
    first = case.knobs["first_layer"]
    curve = jax.jit(partial(of_samples, first=first))(vlm, *golden_decoder.inputs_of(case))
    kl, last_hidden, logits = (np.asarray(a) for a in curve)
    mean = kl.mean(0, dtype=np.float64)
    chosen = [first_within(mean, first, eta) for eta in case.arrays.get("eta", ())]
    return {
        "kl": kl, "last_hidden_per_layer": last_hidden, "logits_full_last": logits,
        "mean_kl": mean, "chosen_k": np.array([-1 if k is None else k for k in chosen]),
    }  # fmt: skip


def of_samples(vlm: VLM, tokens, visual, first: int):
    """The search's curve on prompts."""
    return withdrawal_curve(vlm, vlm.begin(tokens, visual), first)


def with_vocabulary(vlm: VLM, size: int) -> VLM:
    """Without the columns of the head that only pad it: they would count as words."""
    leaves = named_leaves(vlm)
    return with_leaves(vlm, leaves | {HEAD: leaves[HEAD][:, :size]})
