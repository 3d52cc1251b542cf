"""The loss in stretches against the plain formula, and what never exists."""

import json
import re
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from focus_jax import vocabulary_loss as module
from focus_jax.vocabulary_loss import stretch, vocabulary_loss
from tests.quick import compiled
from tests.test_sharding import python

ROWS, TEXT, WIDTH, WORDS = 4, 13, 8, 24


def example(share=0.5):
    """hidden, kernel, target and asked; the last row asks nothing."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((ROWS, TEXT, WIDTH)).astype(np.float32)
    kernel = rng.standard_normal((WIDTH, WORDS)).astype(np.float32)
    target = rng.integers(0, WORDS, (ROWS, TEXT))
    asked = rng.random((ROWS, TEXT)) < share
    asked[-1] = False
    # The first row is right everywhere.
    asked[0] = share > 0
    target[0] = (hidden[0] @ kernel).argmax(-1)
    return tuple(map(jnp.asarray, (hidden, kernel, target, asked)))


def slow(hidden, kernel, target, asked):
    """Sum of the loss, hits, and gradients by hidden and kernel, token by token in fp64."""
    hidden, kernel = np.asarray(hidden, float), np.asarray(kernel, float)
    total, right = 0.0, np.ones(len(hidden), bool)
    by_hidden, by_kernel = np.zeros_like(hidden), np.zeros_like(kernel)
    for r, t in zip(*np.nonzero(asked), strict=True):
        z = hidden[r, t] @ kernel
        share = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        total -= np.log(share[target[r, t]])
        right[r] &= z.argmax() == target[r, t]
        share[target[r, t]] -= 1
        by_hidden[r, t] = kernel @ share
        by_kernel += np.outer(hidden[r, t], share)
    return total, right, by_hidden, by_kernel


@pytest.mark.parametrize("scores", [1 << 23, ROWS * 5 * WORDS, 1])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_stretches_are_the_plain_formula(scores, share, monkeypatch):
    """In one stretch, in some that do not divide the text, a token at a time."""
    monkeypatch.setattr(module, "SCORES", scores)
    hidden, kernel, target, asked = example(share)
    assert stretch(ROWS, TEXT, WORDS) == {1 << 23: TEXT, ROWS * 5 * WORDS: 5, 1: 1}[scores]

    def loss(hidden, kernel):
        total, right = vocabulary_loss(hidden, kernel, target, asked)
        return 3 * total, (total, right)

    grads, (total, right) = compiled(jax.grad(loss, (0, 1), has_aux=True))(hidden, kernel)
    want = slow(hidden, kernel, target, asked)
    np.testing.assert_allclose(total, want[0], rtol=1e-5)
    np.testing.assert_array_equal(right, want[1])
    np.testing.assert_allclose(grads[0], 3 * want[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], 3 * want[3], rtol=1e-4, atol=1e-5)
    alone = compiled(vocabulary_loss)(hidden, kernel, target, asked)
    np.testing.assert_allclose(alone[0], want[0], rtol=1e-5)


def test_ties_are_right_only_for_the_first_word():
    hidden, kernel = jnp.zeros((2, 1, WIDTH)), jnp.ones((WIDTH, WORDS))
    _, right = vocabulary_loss(hidden, kernel, jnp.array([[0], [3]]), jnp.ones((2, 1), bool))
    assert right.tolist() == [True, False]


def test_low_precision_keeps_its_dtypes():
    """Scores in fp32 from bf16 products; gradients come back in the dtypes of what they are of."""
    hidden, kernel, target, asked = example()
    low = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    loss = lambda h, k: vocabulary_loss(h, k, target, asked)[0]  # noqa: E731
    grads = compiled(jax.grad(loss, (0, 1)))(low[0], kernel)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    want = slow(*(a.astype(jnp.float32) for a in low), target, asked)
    for got, exact in zip(grads, want[2:], strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=0.02, atol=0.05)


def arrays(jaxpr):
    """Every array that a jaxpr makes, inner ones too."""
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from arrays(inner)


def products(jaxpr):
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    inner = (i for eqn in jaxpr.eqns for i in jaxprs_in_params(eqn.params))
    return own + sum(map(products, inner))


def test_scores_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(module, "SCORES", ROWS * 5 * WORDS)
    hidden, kernel, target, asked = example()
    loss = lambda h, k: vocabulary_loss(h, k, target, asked)[0]  # noqa: E731
    largest = max(
        prod(a.shape)
        for a in arrays(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(hidden, kernel).jaxpr)
    )
    assert largest == ROWS * 5 * WORDS


def test_a_frozen_kernel_costs_no_gradient():
    hidden, kernel, target, asked = example()
    loss = lambda h, k: vocabulary_loss(h, k, target, asked)[0]  # noqa: E731
    count = lambda function: products(jax.make_jaxpr(function)(hidden, kernel).jaxpr)  # noqa: E731
    assert count(loss) == 1
    assert count(jax.grad(loss, 0)) == 2
    assert count(jax.grad(loss, (0, 1))) == 3


SPLIT = """
    import json, re, sys
    import jax, numpy as np
    from focus_jax import vocabulary_loss as module
    from focus_jax.sharding import in_use, make_layout
    from tests.test_vocabulary_loss import ROWS, TEXT, WIDTH, WORDS, example

    module.SCORES = 2 * 5 * WORDS // 2
    hidden, kernel, target, asked = example()
    out = {}
    for mesh in ("fsdp=2,tensor=2", "data=2,fsdp=2", "data"):
        layout = make_layout(mesh)
        rows = layout.sharding("batch")

        def loss(hidden, kernel, target, asked):
            table = in_use(layout, {"kernel": kernel}, "decoder.head.")["kernel"]
            total, right = module.vocabulary_loss(hidden, table, target, asked, layout)
            return total, right

        places = (rows, layout.stored("decoder.head.kernel", kernel.shape), rows, rows)
        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), in_shardings=places)
        program = step.lower(hidden, kernel, target, asked).compile()
        (total, right), grads = program(hidden, kernel, target, asked)
        assert grads[1].sharding.is_equivalent_to(places[1], 2)
        moved = re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter)\\(", program.as_text())
        others = re.findall(r"(all-to-all|collective-permute)\\(", program.as_text())
        out[mesh] = [float(total), right.tolist(), *(np.asarray(g).tolist() for g in grads), moved,
                     others]
    json.dump(out, sys.stdout)
    """


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
    want = slow(*example())
    found = json.loads(python(SPLIT))
    assert len(found) == 3
    for mesh, (total, right, by_hidden, by_kernel, moved, others) in found.items():
        np.testing.assert_allclose(total, want[0], rtol=1e-5)
        np.testing.assert_array_equal(right, want[1])
        np.testing.assert_allclose(by_hidden, want[2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(by_kernel, want[3], rtol=1e-4, atol=1e-5)
        assert moved and not others
        # No scores: only the kernel has an axis of words.
        for shapes, kind in moved:
            for shape in part_shapes(shapes):
                words = WORDS in shape or WORDS // 2 in shape
                assert not words or len(shape) == 2, (mesh, kind, shape)


def part_shapes(text):
    """Shapes in `(f32[2,3]{1,0}, f32[2]{0})`."""
    return [tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", text)]
