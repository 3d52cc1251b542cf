"""Masks and attention against loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from focus_jax.config import llava_next_llama3_8b
from focus_jax.models import blocked_attention as blocked
from focus_jax.models import chunked_attention as chunked
from focus_jax.models.attention import (
    Rows,
    attend,
    attention,
    check_heads,
    is_maskless,
    visible,
)
from focus_jax.sharding import Layout, ShardingRules, make_layout
from tests.quick import compiled
from tests.test_sharding import python


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


@pytest.mark.parametrize("impl", ["cudnn", "splash"])
def test_fused_kernels_refuse_segments(qkv, impl):
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    rows = Rows(jnp.full(6, 7), jnp.ones((6, 7), int))
    assert is_maskless(Rows(jnp.full(6, 7)), impl) and not is_maskless(rows, impl)
    with pytest.raises(ValueError, match=rf"{impl}.*data\.questions=1"):
        attention(q, k, v, rows, None, impl)


@pytest.mark.parametrize("layout", [None, make_layout()])
def test_splash_is_refused_where_no_tpu_is(qkv, layout):
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv)
    with pytest.raises(ValueError, match=r"kernel for TPUs.*'cpu'.*model\.attention='xla'"):
        attention(q, k, v, Rows(jnp.full(6, 7)), None, "splash", layout)


def abstract(tensor, rules=None):
    mesh = AbstractMesh((2, 2, tensor), ("data", "fsdp", "tensor"))
    return Layout(mesh, rules or ShardingRules())


@pytest.mark.parametrize(
    ("tensor", "vision", "message"),
    [
        (16, {}, r"model\.decoder\.kv_heads 8 does not divide over tensor=16: .* 8 ways"),
        (3, {}, r"model\.decoder\.heads 32 does not divide over tensor=3"),
        (8, {"heads": 4, "width": 1024}, r"model\.vision\.heads 4 does not divide over tensor=8"),
        (8, {"mlp_width": 4100}, r"model\.vision\.mlp_width 4100 .* tensor=8: .* 4 ways"),
    ],
)
def test_heads_that_do_not_divide_are_refused(tensor, vision, message):
    cfg = llava_next_llama3_8b()
    cfg = replace(cfg, vision=replace(cfg.vision, **vision))
    check_heads(cfg, abstract(4))
    with pytest.raises(ValueError, match=message):
        check_heads(cfg, abstract(tensor))


def test_queries_and_keys_must_be_split_alike():
    cfg = llava_next_llama3_8b()
    rules = ShardingRules(kv_heads=())
    check_heads(cfg, abstract(1, rules))
    with pytest.raises(ValueError, match=r"rules\.kv_heads .* set both alike"):
        check_heads(cfg, abstract(4, rules))


SPLIT = """
    import re
    from functools import partial
    import jax, jax.numpy as jnp, numpy as np
    from focus_jax.models import attention as module, blocked_attention, splash
    from focus_jax.models.attention import Rows, attention, visible
    from focus_jax.sharding import make_layout

    # The TPU's kernel, run by an interpreter.
    splash.splash_attention = partial(splash.splash_attention, interpret=True)
    module.platform_of = lambda layout: "tpu"
    blocked_attention.ROWS = 3
    layout = make_layout("fsdp=2,tensor=2")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 7, n, 5)), jnp.float32) for n in (8, 4, 4))
    length, segment = jnp.array([7, 5, 1, 7]), jnp.asarray([[0, 0, 1, 1, 2, 2, 3]] * 4)
    valid = jnp.arange(7) < length[:, None]
    weight = jnp.asarray(rng.standard_normal(q.shape), jnp.float32) * valid[..., None, None]
    plain, asked, free = Rows(length), Rows(length, segment), Rows(length, causal=False)
    tril = jnp.tril(jnp.ones((1, 7, 7), bool))
    cases = [
        ("xla", plain, visible(plain, 7)), ("xla", asked, visible(asked, 7)), ("xla", plain, tril),
        ("chunked", asked, visible(asked, 7)), ("chunked", plain, tril),
        ("blocked", plain, None), ("blocked", asked, visible(asked, 7)),
        ("splash", plain, None), ("splash", free, None),
    ]
    for impl, rows, mask in cases:
        def loss(q, k, v, impl, mask, rows, layout):
            return (attention(q, k, v, rows, mask, impl, layout) * weight).sum()

        def grads(*case):
            inner = lambda q, k, v: jax.value_and_grad(loss, (0, 1, 2))(q, k, v, *case)
            if case[-1] is None:
                return jax.jit(inner)(q, k, v)
            place = layout.sharding("batch", None, "heads")
            program = jax.jit(inner, in_shardings=place).lower(q, k, v).compile()
            moved = re.findall("(all-gather|all-to-all|collective-permute)", program.as_text())
            assert not moved, (impl, moved)
            return program(q, k, v)

        oracle = visible(rows, 7) if mask is None else mask
        for got, want in zip(
            jax.tree.leaves(grads(impl, mask, rows, layout)),
            jax.tree.leaves(grads("xla", oracle, rows, None)), strict=True,
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=impl)
    print(len(cases), "cases")
    """


@pytest.mark.slow
def test_each_device_attends_with_its_own_samples_and_heads():
    assert python(SPLIT).strip() == "9 cases"
