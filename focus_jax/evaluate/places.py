"""A batch on the devices that answer it: one, or all of a layout in one process or several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Int

from focus_jax.evaluate.runner import own_rows
from focus_jax.generate import Generator, room_for, run_prefill
from focus_jax.models.vlm import Inputs
from focus_jax.prompts import Arrays
from focus_jax.sharding import Layout, put_batch


@dataclass(frozen=True)
class Places:
    """`batch` rows on the devices of `layout`; None is jax's default device."""

    layout: Layout | None
    batch: int

    @property
    def devices(self) -> int:
        """How many there are."""
        return 1 if self.layout is None else self.layout.mesh.size

    def held(self) -> Int[np.ndarray, " R"]:
        """The rows of a batch that this process's devices hold."""
        return np.array(range(self.batch) if self.layout is None else self.layout.rows(self.batch))

    def put(self, arrays: Arrays) -> Inputs:
        """The held rows as the batch that the model takes."""
        if self.layout is None:
            return Inputs(**jax.device_put(arrays))
        return Inputs(**put_batch(arrays, self.layout))

    def own(self, tokens: jax.Array) -> Int[np.ndarray, "R N"]:
        """What a batch's answers say in the held rows."""
        if self.layout is None:
            return np.asarray(tokens)
        return own_rows(laid(self.layout.sharding("batch"))(tokens))

    def keys(self, numbers: Sequence[int]) -> jax.Array:
        """A key of each number's own [B], all on all devices."""
        where = None if self.layout is None else self.layout.sharding()
        return folded(where)(jax.random.key(0), np.array(numbers, np.uint32))


@cache
def laid(where: Sharding) -> Callable[[jax.Array], jax.Array]:
    """Brings an array to where its rows are wanted."""
    return jax.jit(lambda x: x, out_shardings=where)


@cache
def folded(where: Sharding | None) -> Callable[..., jax.Array]:
    """`fold_in` of several numbers, whose keys lie there."""
    return jax.jit(jax.vmap(jax.random.fold_in, (None, 0)), out_shardings=where)


def compiled(generate: Generator, inputs: Inputs, key: jax.Array) -> None:
    """Make the programs of a shape, so that the clock does not see it: a prompt, and no token."""
    limit = generate.sampling.max_new_tokens
    room = room_for(limit)
    start = run_prefill(generate.vlm, inputs, key, room=room)
    state = generate.advance(generate.start(start, key, room), key, 1)
    jax.block_until_ready(state.out[:, :limit])
