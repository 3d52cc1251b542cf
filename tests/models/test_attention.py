"""Masks and attention against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.models import blocked_attention as blocked
from focus_jax.models import chunked_attention as chunked
from focus_jax.models.attention import Rows, attend, attention, is_maskless, visible
from tests.quick import compiled


def slow_attention(q, k, v, mask):
    b, s, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for i in range(b):
        for row in range(s):
            keys = np.flatnonzero(mask[i, row])
            for h in range(heads):
                logits = k[i, keys, h // group] @ q[i, row, h] / np.sqrt(width)
                weights = np.exp(logits - logits.max())
                out[i, row, h] = weights / weights.sum() @ v[i, keys, h // group]
    return out


@pytest.fixture
def qkv():
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((6, 7, 4, 5)),
        rng.standard_normal((6, 7, 2, 5)),
        rng.standard_normal((6, 7, 2, 5)),
    )


def test_visible_by_hand():
    length, segment = [4, 2], np.array([[0, 1, 2, 1], [0, 0, 0, 0]])
    mask = visible(Rows(jnp.asarray(length), jnp.asarray(segment)), 4)
    for b, row, key in np.ndindex(2, 4, 4):
        seen = segment[b, key] in (0, segment[b, row])
        assert mask[b, row, key] == (key <= row and key < length[b] and seen)
    both = visible(Rows(jnp.asarray(length), causal=False), 4)
    assert jnp.broadcast_to(both, (2, 4, 4)).sum((1, 2)).tolist() == [16, 8]


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_attention_is_what_a_loop_gives(qkv, impl, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 3 * 4 * 7 * 7)  # three samples at a time
    rows = Rows(jnp.array([7, 5, 1, 7, 2, 7]), jnp.asarray([[0, 0, 1, 1, 2, 2, 3]] * 6))
    mask = visible(rows, 7)
    got = attention(*(jnp.asarray(a, jnp.float32) for a in qkv), rows, mask, impl)
    want = slow_attention(*qkv, np.asarray(mask))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_blocks_of_rows_are_what_a_loop_gives(qkv, monkeypatch):
    """Without a mask; rows that are padding stand behind, and what they give is not looked at."""
    monkeypatch.setattr(blocked, "ROWS", 3)
    rows = Rows(jnp.array([7, 5, 1, 7, 2, 7]))
    assert is_maskless(rows, "blocked")
    got = attention(*(jnp.asarray(a, jnp.float32) for a in qkv), rows, None, "blocked")
    mask = np.asarray(visible(rows, 7))
    want = slow_attention(*qkv, mask)
    for i, length in enumerate(rows.length):
        np.testing.assert_allclose(got[i, :length], want[i, :length], rtol=1e-5, atol=1e-5)


def test_head_by_head_every_row_sees_all(qkv):
    q, k, v = qkv[0], *(np.repeat(a, 2, axis=2) for a in qkv[1:])
    got = blocked.by_heads(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)))
    want = slow_attention(q, k, v, np.ones((6, 7, 7), bool))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_blocked_takes_a_mask_where_questions_stand_apart(qkv):
    rows = Rows(jnp.array([7, 5, 1, 7, 2, 7]), jnp.asarray([[0, 0, 1, 1, 2, 2, 3]] * 6))
    assert not is_maskless(rows, "blocked")
    mask = visible(rows, 7)
    got = attention(*(jnp.asarray(a, jnp.float32) for a in qkv), rows, mask, "blocked")
    want = slow_attention(*qkv, np.asarray(mask))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_chunked_gradient_is_the_oracles(qkv, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 2 * 4 * 7 * 7)
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    rows = Rows(jnp.array([7, 5, 1, 7, 2, 7]))
    mask = visible(rows, 7)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def grads(impl):
        def loss(q, k, v):
            return (attention(q, k, v, rows, mask, impl) * weight).sum()

        return compiled(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for ours, oracle in zip(jax.tree.leaves(grads("chunked")), jax.tree.leaves(grads("xla")),
                            strict=True):  # fmt: skip
        np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-5)


def test_one_mask_serves_all_samples(qkv):
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    rows = Rows(jnp.full(6, 7))
    causal = jnp.tril(jnp.ones((1, 7, 7), bool))
    got = attention(q, k, v, rows, causal, "chunked")
    np.testing.assert_allclose(got, attend(q, k, v, causal), rtol=1e-5, atol=1e-5)


def test_a_row_without_keys_is_finite(qkv):
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    nothing = jnp.zeros((6, 7, 7), bool)
    for impl in ("xla", "chunked"):
        assert jnp.isfinite(attention(q, k, v, Rows(jnp.zeros(6, int)), nothing, impl)).all()


def test_cudnn_refuses_segments(qkv):
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    rows = Rows(jnp.full(6, 7), jnp.ones((6, 7), int))
    with pytest.raises(ValueError, match=r"data\.questions=1"):
        attention(q, k, v, rows, None, "cudnn")
