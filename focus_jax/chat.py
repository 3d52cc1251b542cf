"""A conversation about photos: answers come in pieces, the caches stay between turns."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from focus_jax.data.conversation import IMAGE, Prompt, Template, encode_prompt, place_images, render
from focus_jax.data.images import Tiles
from focus_jax.generate import (
    Caches,
    Decoding,
    Generator,
    Prefilled,
    rewind,
    room_for,
    run_anew,
    run_extend,
    run_prefill,
    run_with_room,
    texts,
)
from focus_jax.models.streams import Streams
from focus_jax.models.vlm import VLM
from focus_jax.prompts import bucket, check_context, make_inputs
from focus_jax.sampling import Sampling

# Tokens between two looks at a streamed answer, and rows by which full caches grow.
PIECE, GROWTH = 4, 256


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and what they took.

    `new`: prompt tokens that this turn ran. `visual`: visual tokens in each decoder stage.
    `prefill` seconds include compilation where there was any; `decode`: those behind the first
    token.
    """

    question: str
    answer: str
    new: int
    visual: tuple[int, ...]
    tokens: tuple[int, ...]
    prefill: float
    decode: float

    @property
    def rate(self) -> float:
        """Tokens per second behind the first."""
        return (len(self.tokens) - 1) / self.decode if len(self.tokens) > 1 else 0.0


class Chat:
    """One conversation.

    With `cuts="keep"` later questions find the visual tokens that the first one left; with
    "anew" the stages behind the first cut run again for all that was said, with the new question
    choosing. Without cuts both are one.
    """

    def __init__(
        self,
        vlm: VLM,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        images: Sequence[Tiles],
        sampling: Sampling,
        cuts: Literal["keep", "anew"] = "keep",
        seed: int = 0,
    ):
        if cuts not in ("keep", "anew"):
            raise ValueError(f"cuts={cuts!r}: choose 'keep' or 'anew'")
        self.vlm, self.tokenizer, self.template = vlm, tokenizer, template
        self.images, self.sampling = list(images), sampling
        self.turns: list[Turn] = []
        self._first_cut = vlm.method.entry_stage(len(vlm.decoder.stages))
        self._anew = cuts == "anew" and self._first_cut < len(vlm.decoder.stages)
        self._key, self._room = jax.random.key(seed), room_for(sampling.max_new_tokens)
        self._text = 0  # text tokens in the caches of the first stage
        self._entry: Streams | None = None
        self._state: Decoding | None = None

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces. What was taken of it is what the conversation remembers.

        ValueError for an empty question, images in a later one, a context too long: nothing has
        changed then.
        """
        key = jax.random.fold_in(self._key, len(self.turns))
        start = time.perf_counter()
        prompt, prefilled = self._first(question, key) if not self.turns else self._later(
            question, key
        )  # fmt: skip
        visual = tuple(int(cache.length[0]) - self._text for cache in prefilled.caches)
        generator = Generator(self.vlm, self.sampling)
        state = jax.block_until_ready(generator.start(prefilled, key, self._room))
        middle = time.perf_counter()
        answer = ""
        try:
            while True:
                whole = self._said(state)
                if piece := whole[len(answer) :]:
                    answer = whole
                    yield piece
                if self._ended(state):
                    break
                state = generator.advance(state, key, int(state.step) + PIECE)
        finally:
            self._state = state
            tokens = tuple(int(t) for t in np.asarray(state.out[0]) if t >= 0)
            took = middle - start, time.perf_counter() - middle
            self.turns.append(Turn(question, answer, len(prompt.ids), visual, tokens, *took))

    # ------------------------------------------------------------------ prompts

    def _first(self, question: str, key: jax.Array) -> tuple[Prompt, Prefilled]:
        """The whole prompt with its images."""
        check_question(question)
        text = place_images(question, len(self.images))
        rendered = render(self.template, [(text, None)], with_answers=False, image=False)
        prompt = encode_prompt(self.tokenizer, rendered.text, rendered.instruction_spans)
        cfg, limit = self.vlm.cfg, self.sampling.max_new_tokens
        check_context(cfg, self.vlm.method, [prompt], [self.images], limit)
        inputs = make_inputs(cfg, [prompt], [self.images])
        out = run_prefill(self.vlm, inputs, key, room=self._room + GROWTH, entry=self._anew)
        self._entry, self._text = out.entry, len(prompt.ids)
        return prompt, out

    def _later(self, question: str, key: jax.Array) -> tuple[Prompt, Prefilled]:
        """What stands behind the last answer's tokens that the caches hold."""
        assert self._state is not None
        words = self._words(question)
        said, state = list(self.turns[-1].tokens), self._state
        if said[-1] not in self.sampling.stop:
            end = encode_prompt(self.tokenizer, self.template.end, start=False)
            said += end.ids.tolist()
        held = len(self.turns[-1].tokens) - 1  # the last token was never run
        caches = state.caches[: self._first_cut] if self._anew else state.caches
        if self._anew:
            caches, held = rewind(caches, jnp.asarray([held])), 0
        new = Prompt(
            np.concatenate([said[held:], words.ids]).astype(np.int32),
            np.concatenate([np.zeros(len(said) - held, bool), words.asks]),
        )
        self._check_context(new, held)
        out = self._run(new, self._with_room(caches, bucket(len(new.ids))), key)
        self._text += len(said) + len(words.ids)
        return new, out

    def _words(self, question: str) -> Prompt:
        """A later turn as tokens, from the user's tag to the assistant's."""
        check_question(question)
        place_images(question, 0)
        t = self.template
        lead = t.turn_gap + t.user
        span = (len(lead), len(lead) + len(question.strip()))
        text = lead + question.strip() + t.user_end + t.assistant
        return encode_prompt(self.tokenizer, text, [span], start=False)

    def _run(self, new: Prompt, caches: Caches, key: jax.Array) -> Prefilled:
        """Run tokens behind the caches, padded to a bucket."""
        count, size = len(new.ids), bucket(len(new.ids))
        pad = lambda a: jnp.asarray(np.pad(a, (0, size - count)))[None]  # noqa: E731
        tokens, valid, asks = pad(new.ids), pad(np.ones(count, bool)), pad(new.asks)
        if not self._anew:
            return run_extend(self.vlm, tokens, valid, caches)
        room = self._room + GROWTH
        out = run_anew(self.vlm, self._entry, caches, tokens, valid, asks, key, room=room)
        self._entry = out.entry
        return out

    def _with_room(self, caches: Caches, rows: int) -> Caches:
        """Caches that have room for `rows` more and an answer behind them."""
        if not caches:
            return caches
        needed = max(int(c.length[0]) + rows + self._room - c.size for c in caches)
        more = -(-needed // GROWTH) * GROWTH
        return run_with_room(caches, room=more) if needed > 0 else caches

    def _check_context(self, new: Prompt, held: int) -> None:
        """ValueError where the conversation would exceed the model's context."""
        limit, answer = self.vlm.cfg.decoder.max_position, self.sampling.max_new_tokens
        length = self._text + self.turns[0].visual[0] + held + len(new.ids)
        if length + answer > limit:
            raise ValueError(
                f"the conversation has {length} tokens and the answer up to {answer}; the model's "
                f"context is {limit}: begin a new one, or lower max_new_tokens"
            )

    # ------------------------------------------------------------------ answers

    def _ended(self, state: Decoding) -> bool:
        return bool(state.done[0]) or int(state.step) >= self.sampling.max_new_tokens

    def _said(self, state: Decoding) -> str:
        """The answer so far; a character of which bytes are still to come is held back."""
        text = texts(self.tokenizer, np.asarray(state.out))[0].lstrip()
        if self._ended(state):
            return text.rstrip()
        return text.rstrip("\ufffd").rstrip()


def check_question(text: str) -> None:
    """ValueError for a question without words."""
    if not text.replace(IMAGE, "").strip():
        raise ValueError("the question is empty: ask something")
