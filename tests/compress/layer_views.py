"""Random rows at a decoder layer's entry for the tests of cuts that look at rows alone."""

from itertools import combinations

import jax.numpy as jnp
import numpy as np

from focus_jax.compress.method import LayerView

VALID = (12, 7, 1)


def random_layer(
    valid: tuple[int, ...] = VALID, questions: int = 2, width: int = 16, seed: int = 0
) -> LayerView:
    """Samples with so many valid visual tokens, the padding behind them large; 5 text rows.

    Some text rows ask; the last question of several has no instruction.
    """
    rng = np.random.default_rng(seed)
    b, q, t, v = len(valid), questions, 5, max(valid)
    seen = np.arange(v) < np.asarray(valid)[:, None]
    visual = rng.standard_normal((b, v, width)) * rng.uniform(0.5, 3, (b, v, 1))
    visual[~seen] *= 100
    asks = rng.random((b, q, t)) < 0.5
    asks[..., 1] = True
    asks[-1, -1] = b * q == 1
    number = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    every = jnp.ones((b, q, t), bool)
    last = jnp.broadcast_to(jnp.arange(t) == t - 1, (b, q, t))
    asks = jnp.asarray(asks)
    return LayerView(
        q=number(b, q, t, 2, 4), k=number(b, q, t, 1, 4), k_prefix=number(b, 1, 1, 4),
        k_visual=number(b, v, 1, 4), visual=jnp.asarray(visual, jnp.float32),
        token=number(b, q, t, width), token_valid=every, prefix_valid=jnp.ones((b, 1), bool),
        visual_valid=jnp.asarray(seen), after=jnp.zeros((b, v), jnp.int32), instruction=asks,
        prompt=every, last=last, starts=last, raters=asks,
        entered=jnp.asarray(valid, jnp.int32),
    )  # fmt: skip


def one_sample(layer: LayerView, b: int) -> LayerView:
    """Sample `b` alone, without the padding behind its visual tokens."""
    v = int(layer.visual_valid[b].sum())
    one = LayerView(*(a[b : b + 1] for a in layer))
    cut = {"k_visual", "visual", "visual_valid", "after"}
    return one._replace(**{name: getattr(one, name)[:, :v] for name in cut})


def kept(selection, b: int, q: int = 0) -> list[int]:
    """The indices in the filled slots, which must stand in front and rise."""
    index, valid = np.asarray(selection.index[b, q]), np.asarray(selection.valid[b, q])
    assert (valid[:-1] >= valid[1:]).all()
    assert (np.diff(index[valid]) > 0).all()
    return index[valid].tolist()


def slow_cosines(rows: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, in float64; exactly 1 of a row with itself."""
    rows = np.asarray(rows, np.float64)
    out = np.eye(len(rows))
    for i, j in combinations(range(len(rows)), 2):
        norms = np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])
        out[i, j] = out[j, i] = rows[i] @ rows[j] / norms if norms else 0.0
    return out
