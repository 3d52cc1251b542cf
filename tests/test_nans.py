"""The operation that makes a NaN is named with its line; infinities that masks need are not."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from focus_jax.models.decoder import Rotary, rotate
from focus_jax.nans import naming_nans, unrolled
from focus_jax.watch import NonFiniteLoss


def turned(x):
    return rotate(x, Rotary(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1))))


def test_operation_and_line_are_named():
    lines, first = inspect.getsourcelines(rotate)
    line = first + next(i for i, text in enumerate(lines) if "a * cos - b * sin" in text)
    run = jax.jit(lambda x: turned(x).sum())
    message = rf"\(nan\) encountered in sub \(focus_jax/models/decoder\.py:{line} in rotate\)"
    with pytest.raises(FloatingPointError, match=message), naming_nans():
        run(jnp.full((1, 1, 1, 2), jnp.inf))


def test_an_operation_inside_a_loop_is_named():
    def loop(x):
        return jax.lax.scan(lambda carry, _: (turned(carry), None), x, length=3)[0]

    finite, infinite = (jnp.full((1, 1, 1, 2), value) for value in (1.0, jnp.inf))
    with naming_nans():
        assert (jax.jit(unrolled(loop))(finite) == jax.jit(loop)(finite)).all()
        with pytest.raises(FloatingPointError, match="in scan"):
            jax.jit(loop)(infinite)
    with pytest.raises(FloatingPointError, match=r"in sub .* in rotate"), naming_nans():
        jax.jit(unrolled(loop))(infinite)


def test_infinities_pass_and_the_check_ends_with_the_block():
    run = jax.jit(lambda x: jnp.log(x))
    with naming_nans():
        assert run(jnp.zeros(())) == -jnp.inf
    assert jnp.isnan(run(-jnp.ones(())))


def test_a_loss_that_is_not_finite_keeps_its_words():
    with pytest.raises(NonFiniteLoss, match=r"^step 3$"), naming_nans():
        raise NonFiniteLoss("step 3")
