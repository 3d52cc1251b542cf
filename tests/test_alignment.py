"""The projector in closed form, against least squares in NumPy."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.special import erf

from focus_jax.alignment import fit_projector, unexplained
from focus_jax.compress.baselines import full
from focus_jax.models.params import initialise, named_leaves, with_leaves
from tests.micro import MODEL
from tests.quick import compiled

RIDGE = 1e-3
CELLS = 16


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    filled = rng.random((5, 3, CELLS)) < 0.3
    return [
        {
            "pixels": rng.integers(0, 256, (3, 1, 32, 32, 3), dtype=np.uint8),
            "cell_words": rng.integers(0, 64, (3, CELLS, 3), dtype=np.int32),
            "cell_filled": cells,
        }
        for cells in filled
    ]


@pytest.fixture(
    scope="module", params=[pytest.param("linear", marks=pytest.mark.slow), "mlp2x_gelu"]
)
def model(request):
    vision = replace(MODEL.vision, feature_layer=-1)
    return initialise(replace(MODEL, vision=vision, projector=request.param), full(), seed=0)


def rows(model, batches):
    """Inputs of the last layer, targets and weights of all cells: [rows F+1], [rows D], [rows]."""
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(model).items()}
    inputs, targets, weights = [], [], []
    for batch in batches:
        x = np.asarray(model.vision(batch["pixels"][:, 0])["features"], np.float64)
        if "projector.linear_2.kernel" in leaves:
            x = x @ leaves["projector.linear_1.kernel"] + leaves["projector.linear_1.bias"]
            x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
        filled = batch["cell_filled"].reshape(-1)
        inputs.append(np.concatenate([x.reshape(filled.size, -1), np.ones((filled.size, 1))], 1))
        words = leaves["decoder.embed.embedding"][batch["cell_words"]]
        targets.append(words.sum(-2).reshape(filled.size, -1))
        # Filled and empty cells of a batch weigh the same in total, and all batches the same.
        weights.append(np.where(filled, 0.5 / filled.sum(), 0.5 / (~filled).sum()) / len(batches))
    return np.concatenate(inputs), np.concatenate(targets), np.concatenate(weights)


def test_the_fit_is_weighted_ridge_regression(model, batches):
    x, y, weight = rows(model, batches)
    root = np.sqrt(weight)[:, None]
    # Ridge regression is least squares with rows of the penalty below.
    penalty = RIDGE * (weight[:, None] * x**2).sum() / x.shape[1]
    below = np.sqrt(penalty) * np.eye(x.shape[1])
    stacked = np.concatenate([root * x, below])
    best = np.linalg.lstsq(stacked, np.concatenate([root * y, 0 * y[: x.shape[1]]]), rcond=None)[0]
    leaves, unexplained = fit_projector(model, iter(batches), len(batches), ridge=RIDGE)
    kernel, bias = (leaves[name] for name in sorted(leaves, reverse=True))
    np.testing.assert_allclose(x[:, :-1] @ kernel + bias, x @ best, atol=2e-3 * np.abs(y).max())
    left = (weight[:, None] * (y - x @ best) ** 2).sum()
    spread = (weight[:, None] * (y - weight @ y) ** 2).sum()
    assert unexplained == pytest.approx(left / spread, rel=1e-2)


def test_the_fit_is_the_last_layer_and_of_use(model, batches):
    leaves, _ = fit_projector(model, batches, len(batches), ridge=RIDGE)
    last = max(name.split(".")[1] for name in named_leaves(model) if "projector" in name)
    assert set(leaves) == {f"projector.{last}.kernel", f"projector.{last}.bias"}
    old = named_leaves(model)
    assert all(leaves[name].shape == old[name].shape for name in leaves)
    assert all(leaves[name].dtype == old[name].dtype for name in leaves)
    fitted = with_leaves(model, {**old, **leaves})

    def gap(vlm):
        _, y, weight = rows(vlm, batches)
        made = np.concatenate(
            [vlm.projector(vlm.vision(b["pixels"][:, 0])["features"]) for b in batches]
        )
        return (weight[:, None] * (made.reshape(y.shape) - y) ** 2).sum()

    assert gap(fitted) < 0.9 * gap(model)


def test_describing_lowers_the_share_that_is_not_told(model, batches):
    batch = batches[0]
    _, y, weight = rows(model, [batch])
    made = np.asarray(model.projector(model.vision(batch["pixels"][:, 0])["features"]))
    left = (weight[:, None] * (made.reshape(y.shape) - y) ** 2).sum()
    spread = (weight[:, None] * (y - weight @ y) ** 2).sum()
    leaves = named_leaves(model)
    share = lambda own: unexplained(with_leaves(model, own), batch)  # noqa: E731
    step = compiled(jax.value_and_grad(share))
    value, grads = step(leaves)
    assert value == pytest.approx(left / spread, rel=1e-4)
    # The decoder's words are what is to be told: they do not move towards it.
    assert not any(np.asarray(g).any() for n, g in grads.items() if n.startswith("decoder."))
    for part in ("vision.", "projector."):
        own = {name: grad for name, grad in grads.items() if name.startswith(part)}
        norm = sum(float((grad**2).sum()) for grad in own.values()) ** 0.5
        assert norm > 0
        # A short way down: its slope is the gradient's length.
        rate = 1e-3 * float(value) / norm**2
        moved = {name: leaves[name] - rate * grad for name, grad in own.items()}
        fallen = float(value) - float(step({**leaves, **moved})[0])
        assert fallen == pytest.approx(rate * norm**2, rel=0.2)


def test_no_more_batches_are_read_than_asked_for(model, batches):
    endless = iter(batches)
    fit_projector(model, endless, 2)
    assert len(list(endless)) == len(batches) - 2


def test_cells_that_are_all_filled_do_no_harm(model, batches):
    cells = [{**b, "cell_filled": np.ones_like(b["cell_filled"])} for b in batches]
    leaves, unexplained = fit_projector(model, cells, len(cells), ridge=RIDGE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(leaves))
    assert 0 <= unexplained <= 1.01


@pytest.fixture(scope="module")
def tiled():
    """Images of 2 x 2 tiles behind a thumbnail, and the same ones with another thumbnail."""
    rng = np.random.default_rng(1)
    first = {
        "pixels": rng.integers(0, 256, (3, 5, 32, 32, 3), dtype=np.uint8),
        "cell_words": rng.integers(0, 64, (3, 4 * CELLS, 3), dtype=np.int32),
        "cell_filled": rng.random((3, 4 * CELLS)) < 0.3,
    }
    pixels = first["pixels"].copy()
    pixels[:, 0] ^= 255
    return first, {**first, "pixels": pixels}


def by_cell(features):
    """Rows of cells, raster order, from features [B, 5, 16, F]: cell by cell."""
    out = np.empty((len(features), 64, features.shape[-1]), features.dtype)
    for cell in range(64):
        row, col = divmod(cell, 8)
        tile = 1 + 2 * (row // 4) + col // 4
        out[:, cell] = features[:, tile, 4 * (row % 4) + col % 4]
    return out


def test_cells_of_tiles_are_described_where_they_lie(model, tiled):
    batch, other = tiled
    flat = batch["pixels"].reshape(-1, 32, 32, 3)
    made = np.asarray(model.projector(model.vision(flat)["features"])).reshape(3, 5, 16, -1)
    made = by_cell(made).reshape(3 * 64, -1)
    table = np.asarray(named_leaves(model)["decoder.embed.embedding"])
    y = table[batch["cell_words"]].sum(-2).reshape(made.shape)
    filled = batch["cell_filled"].reshape(-1)
    weight = np.where(filled, 0.5 / filled.sum(), 0.5 / (~filled).sum())
    left = (weight[:, None] * (made - y) ** 2).sum()
    spread = (weight[:, None] * (y - weight @ y) ** 2).sum()
    assert float(unexplained(model, batch)) == pytest.approx(left / spread, rel=1e-4)
    # What the thumbnail shows has no part in it.
    assert float(unexplained(model, other)) == float(unexplained(model, batch))


def test_the_fit_to_tiles_is_that_to_their_cells(model, tiled):
    """Each cell weighs the same wherever it lies: cut into views of their own, tiles fit alike."""
    batch, other = tiled
    leaves, left = fit_projector(model, [batch], 1, ridge=RIDGE)
    again, _ = fit_projector(model, [other], 1, ridge=RIDGE)
    cells = np.arange(64).reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16)
    alone = {
        "pixels": batch["pixels"][:, 1:].reshape(12, 1, 32, 32, 3),
        "cell_words": batch["cell_words"][:, cells].reshape(12, 16, 3),
        "cell_filled": batch["cell_filled"][:, cells].reshape(12, 16),
    }
    wanted, same = fit_projector(model, [alone], 1, ridge=RIDGE)
    assert left == pytest.approx(same, rel=1e-4)
    for name, leaf in wanted.items():
        np.testing.assert_allclose(leaves[name], leaf, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(again[name], leaves[name])
