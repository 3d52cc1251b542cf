"""Density-peak clustering against loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.density_peaks import density_peaks
from tests.quick import compiled

run = compiled(density_peaks, static_argnums=3)


def slow_density_peaks(x: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Centres and assignment of rows that are all valid, in double precision."""
    n, width = x.shape
    distance = np.asarray([[np.linalg.norm(a - b) / width**0.5 for b in x] for a in x])
    spread = [np.mean(np.sort(distance[i])[:count] ** 2) for i in range(n)]
    score = []
    for i in range(n):
        denser = [j for j in range(n) if (spread[j], j) < (spread[i], i)]
        parent = min(distance[i, j] for j in denser) if denser else distance.max()
        score.append(parent * np.exp(-spread[i]))
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:count]
    assign = [int(np.argmin([distance[i, c] for c in centres])) for i in range(n)]
    for place, c in enumerate(centres):
        assign[c] = place
    return centres, assign


@pytest.mark.parametrize("offset", [0.0, 100.0])  # far from the origin, as hidden rows may lie
def test_rows_of_a_batch_cluster_as_alone(offset):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 14, 6)).astype(np.float32) + np.float32(offset)
    valid = np.arange(14) < np.asarray([[14, 9, 1], [5, 12, 0]])[..., None]
    valid = rng.permuted(valid, axis=-1)
    count = np.asarray([[4, 3, 1], [5, 2, 0]])
    got = run(jnp.asarray(x), jnp.asarray(valid), jnp.asarray(count), 6)
    assert got.centre.index.shape == (2, 3, 6)
    for at in np.ndindex(2, 3):
        places = np.flatnonzero(valid[at])
        centres, assign = slow_density_peaks(x[at][places].astype(np.float64), count[at])
        filled = np.asarray(got.centre.valid[at])
        assert filled.tolist() == [i < count[at] for i in range(6)]
        assert np.asarray(got.centre.index[at])[filled].tolist() == places[centres].tolist()
        want = np.full(14, -1)
        want[places] = assign if count[at] else -1
        np.testing.assert_array_equal(got.assign[at], want)


def test_equal_rows_and_mutual_neighbours_go_to_the_first():
    """Two pairs of close rows: the second of a pair is as dense as the first, and no centre."""
    x = jnp.asarray([[0.0, 0.0], [0.25, 0.0], [8.0, 0.0], [8.25, 0.0]])
    ok = jnp.ones(4, bool)
    got = run(x, ok, jnp.asarray(2), 2)
    assert got.centre.index.tolist() == [0, 2]
    assert got.assign.tolist() == [0, 0, 1, 1]
    got = run(jnp.ones((4, 2)), ok, jnp.asarray(2), 2)  # all one point: every score is 0
    assert got.centre.index.tolist() == [0, 1]
    assert got.assign.tolist() == [0, 1, 0, 0]
    got = run(x, ok, jnp.asarray(1), 2)  # one cluster: only itself is near, all are as dense
    assert got.centre.index[0] == 0
    assert got.assign.tolist() == [0, 0, 0, 0]


def test_no_gradient_and_no_nan():
    x = jnp.ones((5, 3))

    def loss(x):
        centre, _ = density_peaks(x, jnp.arange(5) < 4, jnp.asarray(2), 3)
        return (x[centre.index] ** 2).sum()

    assert jnp.isfinite(compiled(jax.grad(loss))(x)).all()
