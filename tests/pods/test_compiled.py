"""What the compiler says of memory."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from focus_jax.pods.compiled import Memory, compile_program

GIB = 2**30


def refusing(message):
    """A program that the compiler refuses."""

    def compile_it():
        raise jax.errors.JaxRuntimeError(message)

    return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=compile_it))


def argument():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct((GIB // 4,), jnp.float32, sharding=sharding)


@pytest.mark.parametrize(
    ("message", "temporary"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (25.25G) "
            "exceeds available HBM (15.75G).",
            25.25,
        ),
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.\nmore", 19.5),
        ("Out of it.", 0),
    ],
)
def test_a_program_that_does_not_fit_is_an_answer(message, temporary):
    done = compile_program(refusing(f"RESOURCE_EXHAUSTED: {message}"), (argument(),))
    assert done.refused == f"RESOURCE_EXHAUSTED: {message}".splitlines()[0] and not done.text
    assert done.memory == Memory(GIB, 0, 0, round(temporary * GIB))
    assert done.memory.total == GIB + round(temporary * GIB)


def test_other_errors_stay_errors():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_program(refusing("INTERNAL: a bug"), (argument(),))


def test_what_a_program_takes_and_its_text(tmp_path):
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    done = compile_program(add, (argument(),), dump=tmp_path / "text")
    assert done.memory.argument == done.memory.output == done.memory.aliased == GIB
    assert done.memory.total < 1.01 * GIB and not done.refused
    assert done.text.startswith("HloModule") and (tmp_path / "text").read_text() == done.text
