"""Choosing tokens: against a slow NumPy version, and by how often they come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.sampling import Sampling, choose, restrict

LOGITS = np.log(np.array([[0.05, 0.4, 0.3, 0.05, 0.2], [0.6, 0.1, 0.1, 0.15, 0.05]]))


def kept(logits: np.ndarray, top_k: int, top_p: float) -> list[set[int]]:
    """Tokens that may be drawn: take the likeliest until there are k, or p is reached."""
    out = []
    for row in logits:
        order = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or None]
        weight = np.exp(row[order]) / np.exp(row[order]).sum()
        chosen, total = set(), 0.0
        for i, w in zip(order, weight, strict=True):
            if chosen and total >= top_p:
                break
            chosen.add(i)
            total += w
        out.append(chosen)
    return out


@pytest.mark.parametrize("top_k", [0, 1, 3, 9])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.75, 1.0])
def test_restricted_to_the_likeliest(top_k, top_p):
    logits = LOGITS + np.arange(5) * 1e-4  # no ties
    got = restrict(jnp.asarray(logits), jnp.asarray(top_k), jnp.asarray(top_p))
    assert [set(np.flatnonzero(np.isfinite(row))) for row in got] == kept(logits, top_k, top_p)


def test_tokens_come_as_often_as_they_should():
    rules = Sampling(temperature=2.0, top_k=3).rules()
    logits = jnp.tile(jnp.asarray(LOGITS[:1]), (4000, 1))
    drawn = choose(logits, jnp.asarray(0), rules, jax.random.key(0), greedy=False)
    want = np.sqrt([0, 0.4, 0.3, 0, 0.2]) / np.sqrt([0.4, 0.3, 0.2]).sum()
    share = np.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(share, want, atol=0.03)


def test_greedy_takes_the_likeliest():
    rules = Sampling().rules()
    got = choose(jnp.asarray(LOGITS), jnp.asarray(0), rules, jax.random.key(0), greedy=True)
    assert got.tolist() == [1, 0]


@pytest.mark.parametrize("greedy", [True, False])
def test_no_stop_before_the_shortest_answer(greedy):
    rules = Sampling(min_new_tokens=2, temperature=1.0, top_k=1, stop=(1, 3)).rules()
    tokens = [
        choose(jnp.asarray(LOGITS), jnp.asarray(said), rules, jax.random.key(0), greedy)[0]
        for said in range(4)
    ]
    assert tokens == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens=4: give 0..3"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
