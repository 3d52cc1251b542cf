"""How the next token is chosen, and when an answer ends."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, else drawn from the `top_k` likeliest tokens (0: all).

    `top_p` keeps the smallest set of tokens with that probability. No `stop` token is chosen
    before `min_new_tokens`; an answer ends with the first one, which belongs to it, or at
    `max_new_tokens`.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: give 0..{self.max_new_tokens} "
                "(max_new_tokens)"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p}: give top_k >= 0 and 0 < top_p <= 1"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def rules(self) -> "Rules":
        """The same as arrays, so that other values are no other program."""
        return Rules(
            jnp.asarray(self.max_new_tokens, jnp.int32),
            jnp.asarray(self.min_new_tokens, jnp.int32),
            jnp.asarray(self.temperature, jnp.float32),
            jnp.asarray(self.top_k, jnp.int32),
            jnp.asarray(self.top_p, jnp.float32),
            jnp.asarray(self.stop or (-1,), jnp.int32),
        )


class Rules(NamedTuple):
    """`Sampling` as arrays; `stop` [-1] where nothing stops."""

    limit: Int[Array, ""]
    least: Int[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    stop: Int[Array, " E"]

    def ends(self, token: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Which tokens end an answer."""
        return (token[:, None] == self.stop).any(-1)


def choose(
    logits: Float[Array, "B W"], said: Int[Array, ""], rules: Rules, key: Array, greedy: bool
) -> Int[Array, " B"]:
    """The next token of each row, `said` tokens into the answer.

    A row's draw depends on the key, its place in the batch and `said` alone.
    """
    early = jnp.isin(jnp.arange(logits.shape[-1]), rules.stop) & (said < rules.least)
    logits = jnp.where(early, -jnp.inf, logits)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits / rules.temperature, rules.top_k, rules.top_p)
    keys = jax.random.split(jax.random.fold_in(key, said), logits.shape[0])
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def restrict(
    logits: Float[Array, "B W"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B W"]:
    """-inf for all but the `top_k` likeliest, of which the first that reach `top_p` together stay.

    The likeliest token always stays; equal ones at the border stay together.
    """
    order = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(order.shape[-1])
    inside = (rank < top_k) | (top_k == 0)
    share = jax.nn.softmax(jnp.where(inside, order, -jnp.inf), axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    inside &= (before < top_p) | (rank == 0)
    least = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
