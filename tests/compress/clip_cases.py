"""Reference outputs of other methods' own code on small CLIP towers, and our tower on them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from focus_jax.compress.method import Dims, Views
from focus_jax.golden.vision import tower
from focus_jax.models.vision import VisionTower
from tests.quick import compiled

GOLDEN = Path(__file__).parents[1] / "golden"


def arrays(case: str) -> dict[str, np.ndarray]:
    """What `tests/golden/<case>` holds."""
    return dict(np.load(GOLDEN / case / "arrays.npz"))


@compiled
def run_tower(vision: VisionTower, pixels: jax.Array) -> dict[str, jax.Array]:
    """All that the methods ask of a tower."""
    requests = (
        "cls_query@-1", "keys@-1", "cls_attention@-1", "hidden@-1", "cls_attention@-2", "keys@-2",
    )  # fmt: skip
    with jax.default_matmul_precision("highest"):
        return vision(pixels, requests)


def seen(directory: Path, pixel_values: np.ndarray) -> Views:
    """Images of one tile each through the tower of a case: [B 3 S S]."""
    out = run_tower(tower(directory), jnp.asarray(pixel_values).transpose(0, 2, 3, 1))
    return views({name: np.asarray(a)[:, None] for name, a in out.items()})


def views(named: dict[str, np.ndarray]) -> Views:
    """Everything valid; `features` [B 1 N C] among the named."""
    given = {name: jnp.asarray(a) for name, a in named.items()}
    features = given.pop("features")
    b, m, n, _ = features.shape
    valid = jnp.ones((b, m, n), bool)
    rows = jnp.ones((b, m, round(n**0.5)), bool)
    return Views(features, valid, rows, jnp.zeros((b, m, 2), jnp.int32), given)


def dims_of(views: Views) -> Dims:
    """Square tiles, and a decoder that does not matter."""
    m, n, c = views.features.shape[1:]
    side = round(n**0.5)
    return Dims(side, side, m, (), c, c, layers=2, newline=False)
