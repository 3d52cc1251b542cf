"""Generation: prefill and decode compiled apart, one cache per decoder stage.

A prompt may go on: `extend` appends rows to all caches (the cuts stay as they were), `anew` makes
the cuts again for the whole conversation. Shapes are static throughout; what changes from call to
call (limits, temperature, stop tokens) is data.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from focus_jax.compress.method import Context
from focus_jax.models.streams import Streams, last_of_prompt, renumber, row_at
from focus_jax.models.vlm import VLM, Inputs, StageCache
from focus_jax.sampling import Rules, Sampling, choose

Caches = tuple[StageCache, ...]


class Prefilled(NamedTuple):
    """What decode needs: scores of the first new token, a cache for each stage.

    `entry`: the streams as they stand before the method's first cut, where asked for; `anew`
    starts from them.
    """

    logits: Float[Array, "B W"]
    caches: Caches
    entry: Streams | None = None


class Decoding(NamedTuple):
    """State of the decode loop.

    `step` tokens of each row are chosen, all but the last of them are in the caches; `said` of
    them belong to the answer, its stop token included. Behind the answer `out` holds -1.
    """

    step: Int[Array, ""]
    token: Int[Array, " B"]
    out: Int[Array, "B N"]
    said: Int[Array, " B"]
    done: Bool[Array, " B"]
    caches: Caches


# ---------------------------------------------------------------------------- prompts


def prefill(vlm: VLM, inputs: Inputs, key: Array, room: int, entry: bool = False) -> Prefilled:
    """Run the prompt (one question a sample); caches get room for `room` new rows.

    With `entry` also what `anew` needs.
    """
    if inputs.tokens.shape[1] != 1:
        raise ValueError(
            f"generation takes one question a sample, not {inputs.tokens.shape[1]}: repeat the "
            "image for each question"
        )
    ctx = Context(key)
    streams = vlm.begin(inputs, vlm.see(inputs, ctx)[0])
    stages = len(vlm.decoder.stages)
    first = min(vlm.method.entry_stage(stages), stages - 1) if entry else 0
    slots = streams.visual.shape[1]
    begun = vlm.decode(streams, range(first), slots, ctx, room)
    streams = begun.streams
    hidden, behind = vlm.last_row(streams, range(first, stages), slots, ctx, room)
    caches = begun.caches + behind
    return Prefilled(vlm.decoder.logits(hidden), caches, streams if entry else None)


def append(
    vlm: VLM, rows: Float[Array, "B T D"], valid: Bool[Array, "B T"], caches: Caches, first: int = 0
) -> tuple[Float[Array, "B T D"], Caches]:
    """Run rows behind those in the caches, through stages `first`, `first` + 1, ...

    Valid rows stand first and count; what is behind them is written, never seen, and written
    over. The caches need room for all T.
    """
    grown = []
    steps, count = jnp.arange(rows.shape[1]), valid.sum(-1, dtype=jnp.int32)
    for stage, cache in enumerate(caches, first):
        position = cache.position[:, None] + steps
        lacking = vlm.lacking(stage)
        absent = None if cache.visual is None or lacking is None else (cache.visual, lacking)
        rows, kv = vlm.decoder.step(stage, rows, position, cache.kv, cache.length, absent)
        grown.append(StageCache(kv, cache.length + count, cache.position + count, cache.visual))
    return rows, tuple(grown)


def extend(
    vlm: VLM, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], caches: Caches
) -> Prefilled:
    """More of the prompt behind what is in the caches; the cuts stay as they are."""
    rows, caches = append(vlm, vlm.decoder.embed(tokens), valid, caches)
    last = jnp.arange(tokens.shape[1]) == valid.sum(-1, keepdims=True) - 1
    return Prefilled(vlm.decoder.logits(row_at(rows, last)), caches)


def anew(
    vlm: VLM,
    entry: Streams,
    caches: Caches,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    instruction: Bool[Array, "B T"],
    key: Array,
    room: int,
) -> Prefilled:
    """More of the prompt, with the cuts made again for the whole conversation.

    `caches` are those of the stages before the first cut; they need room for T rows. Equals a
    prefill of everything said so far with `instruction` as the asking words.
    """
    first, stages = len(caches), len(vlm.decoder.stages)
    rows, before = append(vlm, vlm.decoder.embed(tokens), valid, caches)
    streams = joined(entry, rows, valid, instruction)
    streams = streams if first else vlm.rated(streams)
    slots, ctx = streams.visual.shape[1], Context(key)
    hidden, behind = vlm.last_row(streams, range(first, stages), slots, ctx, room)
    return Prefilled(vlm.decoder.logits(hidden), before + behind, streams)


def joined(
    s: Streams, rows: Float[Array, "B T D"], valid: Bool[Array, "B T"], asks: Bool[Array, "B T"]
) -> Streams:
    """Streams before any cut with more text behind; only the new words ask."""
    behind = lambda a, b: jnp.concatenate([a, b[:, None]], axis=2)  # noqa: E731
    token_valid = behind(s.token_valid, valid)
    s = s._replace(
        token=behind(s.token, rows),
        token_valid=token_valid,
        token_position=jnp.zeros(token_valid.shape, jnp.int32),
        instruction=(instruction := behind(jnp.zeros_like(s.instruction), asks & valid)),
        prompt=token_valid,
        last=(last := last_of_prompt(token_valid, jnp.zeros_like(token_valid))),
        starts=last,
        raters=instruction,
    )
    return renumber(s)


def rewind(caches: Caches, rows: Int[Array, " B"]) -> Caches:
    """Forget the last `rows` valid rows of each sample."""
    return tuple(c._replace(length=c.length - rows, position=c.position - rows) for c in caches)


def with_room(caches: Caches, room: int) -> Caches:
    """Caches with `room` more rows behind; copies them."""
    return tuple(cache.with_room(room) for cache in caches)


# ---------------------------------------------------------------------------- answers


def begin(
    logits: Float[Array, "B W"], caches: Caches, rules: Rules, key: Array, size: int, greedy: bool
) -> Decoding:
    """Choose the first token of each answer; answers have at most `size` tokens."""
    b = logits.shape[0]
    token = choose(logits, jnp.zeros((), jnp.int32), rules, key, greedy)
    out = jnp.full((b, size), -1, jnp.int32).at[:, 0].set(token)
    one = jnp.ones((), jnp.int32)
    return Decoding(one, token, out, jnp.ones((b,), jnp.int32), rules.ends(token), caches)


def decode(
    vlm: VLM, state: Decoding, until: Int[Array, ""], rules: Rules, key: Array, greedy: bool
) -> Decoding:
    """Choose tokens until every row is done or `until` (at most the limit) are chosen."""
    until = jnp.minimum(until, jnp.minimum(rules.limit, state.out.shape[1]))

    def going(s: Decoding) -> Array:
        return (s.step < until) & ~s.done.all()

    def advance(s: Decoding) -> Decoding:
        alive = jnp.ones_like(s.done)[:, None]
        rows, caches = append(vlm, vlm.decoder.embed(s.token)[:, None], alive, s.caches)
        token = choose(vlm.decoder.logits(rows[:, 0]), s.step, rules, key, greedy)
        kept = jnp.where(s.done, -1, token)
        out = jax.lax.dynamic_update_slice(s.out, kept[:, None], (0, s.step))
        done = s.done | rules.ends(token)
        return Decoding(s.step + 1, token, out, s.said + ~s.done, done, caches)

    return jax.lax.while_loop(going, advance, state)


# Compiled once for all: programs are found again by the model's structure and the shapes.
run_prefill = jax.jit(prefill, static_argnames=("room", "entry"))
run_extend = jax.jit(extend, donate_argnames=("caches",))
run_anew = jax.jit(anew, static_argnames=("room",), donate_argnames=("caches",))
run_begin = jax.jit(begin, static_argnames=("size", "greedy"), donate_argnames=("caches",))
run_decode = jax.jit(decode, static_argnames=("greedy",), donate_argnames=("state",))
run_with_room = jax.jit(with_room, static_argnames=("room",))


def texts(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterable[np.ndarray], special: bool = False
) -> list[str]:
    """What rows of token ids say; -1 is padding. Special tokens stay with `special`."""
    rows = [[int(t) for t in row if t >= 0] for row in tokens]
    return tokenizer.batch_decode(rows, skip_special_tokens=not special)


ROOM = 64  # new tokens are bounded by a multiple of it, so that another limit is no new program


def room_for(new_tokens: int) -> int:
    """Rows of room for so many new tokens."""
    return -(-new_tokens // ROOM) * ROOM if new_tokens > ROOM // 8 else ROOM // 8


class Generator:
    """Answers to batches of prompts; batches of one shape compile once."""

    def __init__(self, vlm: VLM, sampling: Sampling):
        self.vlm, self.sampling, self._rules = vlm, sampling, sampling.rules()

    def __call__(self, inputs: Inputs, key: Array) -> Int[Array, "B N"]:
        """Token ids of the answers, -1 behind their ends; `key` also serves random methods."""
        room = room_for(self.sampling.max_new_tokens)
        start = run_prefill(self.vlm, inputs, key, room=room)
        state = self.start(start, key, room)
        limit = self.sampling.max_new_tokens
        return self.advance(state, key, limit).out[:, :limit]

    def start(self, start: Prefilled, key: Array, size: int) -> Decoding:
        """The first token of each answer; takes the caches over."""
        greedy = self.sampling.greedy
        return run_begin(start.logits, start.caches, self._rules, key, size=size, greedy=greedy)

    def advance(self, state: Decoding, key: Array, until: int) -> Decoding:
        """Go on until `until` tokens are chosen; takes the state over."""
        limit = jnp.asarray(until, jnp.int32)
        return run_decode(self.vlm, state, limit, self._rules, key, greedy=self.sampling.greedy)
