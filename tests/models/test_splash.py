"""The TPU kernel against the oracle, run by an interpreter, and which blocks it computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from focus_jax.models import splash
from focus_jax.models.attention import RESIDUALS, Rows, attend, visible
from focus_jax.models.splash import block_size, blocks_run, splash_attention
from tests.quick import compiled

LENGTH = jnp.array([200, 131])


def arrays(rows=200, heads=4, groups=2, width=16):
    """q, k, v and a weight of the result that leaves padding out."""
    rng = np.random.default_rng(0)
    make = lambda n: jnp.asarray(rng.standard_normal((2, rows, n, width)), jnp.float32)  # noqa: E731
    valid = jnp.arange(rows) < LENGTH[:, None]
    return make(heads), make(groups), make(groups), make(heads) * valid[..., None, None]


def interpreted(q, k, v, causal):
    return splash_attention(q, k, v, LENGTH, causal=causal, block=128, interpret=True)


def oracle(q, k, v, causal):
    return attend(q, k, v, visible(Rows(LENGTH, causal=causal), q.shape[1]))


@pytest.mark.parametrize(
    ("causal", "fused"),
    [(True, True)] + [pytest.param(*case, marks=pytest.mark.slow)
                      for case in ((True, False), (False, True), (False, False))],
)  # fmt: skip
def test_results_and_gradients_are_the_oracles(causal, fused, monkeypatch):
    """Ragged rows that fill no block, two query heads to a key head."""
    monkeypatch.setattr(splash, "FUSED", 8 if fused else 0)
    q, k, v, weight = arrays()

    def grads(function):
        def loss(q, k, v):
            return (function(q, k, v, causal) * weight).sum()

        return compiled(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    ours, want = grads(interpreted), grads(oracle)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def calls(jaxpr):
    """Names of the Pallas kernels in a jaxpr, inner ones too; what returns nothing never runs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn.params["name"]
        for inner in jaxprs_in_params(eqn.params):
            if eqn.outvars:
                yield from calls(inner)


@pytest.mark.parametrize(("saved", "forwards"), [(RESIDUALS, 1), ("nothing", 2)])
def test_a_remat_policy_spares_the_second_forward_kernel(saved, forwards):
    policy = jax.checkpoint_policies.save_only_these_names(saved)
    q, k, v, _ = arrays()

    def loss(q, k, v):
        return jax.checkpoint(partial(interpreted, causal=True), policy=policy)(q, k, v).sum()

    names = list(calls(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v).jaxpr))
    assert sum("fwd" in name for name in names) == forwards
    assert sum("dkv" in name for name in names) == 1


@pytest.mark.parametrize(("rows", "block"), [(1, 128), (128, 128), (700, 128), (2161, 384)])
def test_blocks_run_are_those_with_something_to_see(rows, block):
    first = np.arange(0, rows, block)
    last = first + block - 1
    assert blocks_run(rows, block) == (last[:, None] >= first).sum()
    assert blocks_run(rows, block, causal=False) == len(first) ** 2


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_less_than_a_block_and_stays_as_it_is(causal):
    for rows in range(1, 6000, 37):
        block = block_size(rows, causal)
        padded = -(-rows // block) * block
        assert block % 128 == 0 and rows <= padded < rows + block
        # A reader of the compiled program sees padded rows alone.
        assert block_size(padded, causal) == block


def test_lengths_of_llava_next_pad_little():
    for rows in (2161, 2880, 3952):
        block = block_size(rows)
        assert -(-rows // block) * block <= 1.07 * rows
    assert block_size(577, causal=False) == 640
