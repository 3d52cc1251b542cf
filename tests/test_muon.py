"""Muon: which parameters it moves, by how much, and where its state lies."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.experiment import TrainConfig, TrainStage
from focus_jax.models.params import abstract, named_leaves
from focus_jax.sharding import AXES, Layout
from focus_jax.step import State, make_optimiser, state_shardings
from tests.micro import MODEL
from tests.quick import compiled

STAGE = TrainStage(
    "words", "words", steps=10, learning_rate=1e-3, muon=1e-2, train=("decoder.",), warmup=0.1
)
PLAIN = TrainConfig(weight_decay=0.0)
DECODER = replace(MODEL.decoder, layers=3)
# The second sampler cuts the decoder: one stack of a layer, one of two.
METHOD = focusllava(VisionGuided(region=2, scales=(2, 1), budget=8, hidden=4), TextGuided(layer=1))


@pytest.fixture(scope="module")
def shapes():
    """Every leaf of a micro model whose decoder has two stages."""
    return named_leaves(abstract(replace(MODEL, decoder=DECODER), METHOD))


def is_kernel(name):
    return name.startswith("decoder.stages.") and name.endswith(".kernel")


def nesterov_adam():
    """What Muon's authors leave the other parameters to; clipped and scheduled as the stage's."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 1, STAGE.steps, STAGE.final * 1e-3)
    adam = optax.adamw(rate, PLAIN.b1, PLAIN.b2, weight_decay=0.0, nesterov=True)
    return optax.chain(optax.clip_by_global_norm(STAGE.clip), adam)


def second_updates(optimiser, leaves, gradients):
    """The updates of the second step: that of the first is nothing, for the rate warms up."""
    state = optimiser.init(leaves)
    for own in gradients:
        updates, state = optimiser.update(own, state, leaves)
    return updates


def test_stacked_kernels_move_by_orthogonal_updates_and_the_rest_by_adam(shapes):
    rng = np.random.default_rng(0)
    parts = ("embed", "head", "gate", "down", "norm_1")  # few, for each compiles its iterations
    shapes = {name: s for name, s in shapes.items() if name.split(".")[-2] in parts}
    leaves, gradient = (
        {name: rng.normal(size=s.shape).astype(np.float32) for name, s in shapes.items()}
        for _ in range(2)
    )
    kernels = {name for name in shapes if is_kernel(name)}
    for name in kernels:  # Singular values of a tenth to one: small ones need more iterations.
        u, _, v = np.linalg.svd(gradient[name], full_matrices=False)
        gradient[name] = (u * np.geomspace(1, 0.1, u.shape[-1], dtype=np.float32)) @ v
    gradients = [gradient, gradient]
    assert {shapes[name].ndim for name in kernels} == {3} and len(kernels) == 2 * 2
    both = (make_optimiser(PLAIN, STAGE), nesterov_adam())
    run = compiled(lambda *given: [second_updates(own, *given) for own in both])
    updates, others = jax.tree.map(np.asarray, run(leaves, gradients))
    for name in shapes.keys() - kernels:
        np.testing.assert_allclose(updates[name], others[name], rtol=1e-4, err_msg=name)
    for name in kernels:
        for update, other in zip(updates[name], others[name], strict=True):
            sizes, spread = (np.linalg.svd(u, compute_uv=False) for u in (update, other))
            # Five iterations bring singular values near one another; Adam's are far apart.
            assert sizes.max() < 2 * sizes.min() and spread.max() > 4 * spread.min(), name
            # The rate is near its peak, and grows with the square root of outputs over inputs.
            longer = max(1, update.shape[1] / update.shape[0]) ** 0.5
            assert 0.6 < np.median(sizes) / (STAGE.muon * longer) < 1.3, name


def test_moments_lie_beside_their_parameters(shapes):
    optimiser = make_optimiser(PLAIN, STAGE)
    state = jax.eval_shape(lambda own: State(own, optimiser.init(own)), shapes)
    layout = Layout(AbstractMesh((1, 2, 2), AXES))
    places = state_shardings(state, layout)
    found = {name: [] for name in shapes}
    for path, place in jax.tree_util.tree_flatten_with_path(places.optimiser)[0]:
        owner = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ""
        if owner in found:
            found[owner].append(place)
        else:
            assert place.spec == PartitionSpec()  # counters and coefficients
    for name, own in found.items():
        # One momentum of Muon's, two moments of Adam's.
        assert len(own) == (1 if is_kernel(name) else 2), name
        assert set(own) == {places.learning[name]}
    assert any(place.spec != PartitionSpec() for place in places.learning.values())
