"""Recorded decoder runs as cases: what is read, which rows enter, which method is meant."""

from pathlib import Path

import numpy as np
import pytest

from focus_jax.compress.fastv import fastv
from focus_jax.compress.pyramiddrop import pyramiddrop
from focus_jax.compress.sparsevlm import sparsevlm
from focus_jax.compress.vtw import vtw
from focus_jax.golden.decoder import inputs_of, load, method_of, read_case, texts

RECORDED = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("fastv/k3_r50", fastv(3, 0.5)),
        ("pyramiddrop/ratios_default", pyramiddrop((2, 4, 6))),
        ("sparsevlm/v1_192", sparsevlm(192)),
        ("vtw/k4", vtw(4)),
    ],
)
def test_a_case_names_its_method(name, method):
    assert method_of(read_case(RECORDED / name)) == method


def test_rows_of_several_samples_and_the_head():
    """Ids find a sample's own rows, visual rows enter beside them, the head keeps its columns."""
    case = read_case(RECORDED / "vtw/kl_search")
    assert (case.prefix, case.visual, case.vocabulary) == (35, 576, 50)
    inputs, visual = inputs_of(case)
    rows = texts(case)
    vlm = load(case, vtw(5))
    np.testing.assert_array_equal(vlm.decoder.embed.embedding[...][: len(rows)], rows)
    for b, embeds in enumerate(case.embeds):
        whole = [rows[inputs.prefix[b]], visual.features[b], rows[inputs.tokens[b, 0]]]
        np.testing.assert_array_equal(np.concatenate(whole), embeds)
    head = np.asarray(vlm.decoder.head.kernel[...])
    assert head.shape == (32, 132)
    assert head[:, :50].any(0).all()
    assert not head[:, 50:].any()


def test_what_is_no_run_of_a_method_is_refused():
    with pytest.raises(ValueError, match="searches for a layer"):
        method_of(read_case(RECORDED / "vtw/kl_search"))
    with pytest.raises(ValueError, match="no inputs_embeds"):
        read_case(RECORDED / "anyres/packing")
    case = read_case(RECORDED / "vtw/k4")
    with pytest.raises(ValueError, match="a run of 'yopo': use fastv"):
        method_of(case._replace(method="yopo"))
