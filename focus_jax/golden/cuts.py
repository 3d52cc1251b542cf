"""Recorded decoder runs with cuts: FastV, PyramidDrop, SparseVLM, and VTW with its search."""

from functools import partial

import jax
import numpy as np

from focus_jax.calibration import first_within, withdrawal_curve
from focus_jax.compress.baselines import full
from focus_jax.golden import decoder
from focus_jax.golden.case import Recorded
from focus_jax.golden.decoder import HEAD, Case
from focus_jax.models.params import named_leaves, with_leaves
from focus_jax.models.vlm import VLM

GIVEN = "inputs_embeds|inputs_embeds_samples|decode_embeds|labels|eta"


def replay(recorded: Recorded) -> dict[str, np.ndarray]:
    """The arrays of a case, by its own method."""
    case = decoder.read_case(recorded.directory)
    if recorded.method == "vtw" and "first_layer" in case.knobs:
        return search(case)
    trace = decoder.replay(case)
    found = decoder.answers(case, trace)
    if recorded.method == "fastv":
        # The official cache holds the keys of the layer that ranks twice.
        twice = np.where(np.arange(case.decoder.layers) == case.knobs["K"] - 1, 2, 1)
        found["kv_lengths_official"] = trace.kv_lengths * twice
        if trace.kv_grown is not None:
            found["kv_lengths_official_after_decode"] = trace.kv_grown * twice
    if "labels" in case.arrays:
        found["labels_out"] = labels_left(case, found)
    return found


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
    vlm = with_vocabulary(decoder.load(case, full()), case.vocabulary)
    first = case.knobs["first_layer"]
    curve = jax.jit(partial(of_samples, first=first))(vlm, *decoder.inputs_of(case))
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
