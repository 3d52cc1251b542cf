"""Generation: prefill and decode compiled apart, one cache per decoder stage."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focus_jax.compress.method import Context
from focus_jax.models.streams import row_at
from focus_jax.models.vlm import VLM, Inputs, StageCache


class Prefilled(NamedTuple):
    """What decode needs: scores of the first new token, a cache for each stage."""

    logits: Float[Array, "B W"]
    caches: tuple[StageCache, ...]


class Decoding(NamedTuple):
    """State of the decode loop."""

    step: Int[Array, ""]
    token: Int[Array, " B"]
    out: Int[Array, "B N"]
    done: Bool[Array, " B"]
    caches: tuple[StageCache, ...]


def prefill(vlm: VLM, inputs: Inputs, key: Array, room: int) -> Prefilled:
    """Run the prompt (one question a sample); caches get room for `room` new tokens."""
    if inputs.tokens.shape[1] != 1:
        raise ValueError(
            f"generation takes one question a sample, not {inputs.tokens.shape[1]}: repeat the "
            "image for each question"
        )
    out = vlm(inputs, Context(key), keep=room)
    hidden = row_at(out.hidden, out.streams.last[:, 0])
    return Prefilled(vlm.decoder.logits(hidden), out.caches)


def decode_step(
    vlm: VLM, token: Int[Array, " B"], caches: tuple[StageCache, ...]
) -> tuple[Float[Array, "B W"], tuple[StageCache, ...]]:
    """One token a sample through all stages; each stage has its own length and position."""
    hidden = vlm.decoder.embed(token)[:, None]
    grown = []
    for stage, cache in enumerate(caches):
        hidden, kv = vlm.decoder.step(stage, hidden, cache.position, cache.kv, cache.length)
        grown.append(StageCache(kv, cache.length + 1, cache.position + 1))
    return vlm.decoder.logits(hidden[:, 0]), tuple(grown)


def decode(vlm: VLM, start: Prefilled, max_new_tokens: int, eos: int) -> Int[Array, "B N"]:
    """Greedy tokens until `eos` in every row or `max_new_tokens`; `eos` fills up behind the end."""
    first = jnp.argmax(start.logits, axis=-1).astype(jnp.int32)
    b = first.shape[0]
    out = jnp.full((b, max_new_tokens), eos, jnp.int32).at[:, 0].set(first)
    state = Decoding(jnp.ones((), jnp.int32), first, out, first == eos, start.caches)

    def going(s: Decoding) -> Array:
        return (s.step < max_new_tokens) & ~s.done.all()

    def advance(s: Decoding) -> Decoding:
        logits, caches = decode_step(vlm, s.token, s.caches)
        token = jnp.where(s.done, eos, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        out = jax.lax.dynamic_update_slice(s.out, token[:, None], (0, s.step))
        return Decoding(s.step + 1, token, out, s.done | (token == eos), caches)

    return jax.lax.while_loop(going, advance, state).out


class Generator:
    """Compiled prefill and decode for one model; batches of one shape compile once."""

    def __init__(self, vlm: VLM, max_new_tokens: int, eos: int):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1")
        self.vlm = vlm
        self._prefill = jax.jit(lambda v, i, k: prefill(v, i, k, max_new_tokens))
        self._decode = jax.jit(lambda v, s: decode(v, s, max_new_tokens, eos))

    def __call__(self, inputs: Inputs, key: Array) -> Int[Array, "B N"]:
        """Greedy answers to a batch of prompts; `key` serves random methods."""
        return self._decode(self.vlm, self._prefill(self.vlm, inputs, key))
