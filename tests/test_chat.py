"""A conversation equals fresh runs on all that was said; the image is seen once."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from focus_jax import chat as chat_module
from focus_jax.chat import Chat
from focus_jax.compress.baselines import full
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.data.conversation import BRIEF, Prompt, encode_prompt, place_images, render
from focus_jax.generate import Generator
from focus_jax.prompts import make_inputs
from focus_jax.sampling import Sampling
from tests.hf_models import write_processor
from tests.models.tiny_models import TILED, random_model, random_tree
from tests.test_generate import random_tiles

CFG = replace(TILED, decoder=replace(TILED.decoder, vocab_size=320, max_position=600))
CUTS = focusllava(
    VisionGuided(budget=28, hidden=8), (TextGuided(1, keep=0.5), TextGuided(2, keep=0.2))
)
AT_ENTRY = focusllava(text=TextGuided(layer=0, keep=0.2, renumber=True))
METHODS = {"full": full(), "cuts": CUTS, "at_entry": AT_ENTRY}
SAMPLING = Sampling(max_new_tokens=7, stop=(2,))
QUESTIONS = ("What is that?", "And left of it, <what> is there?", "Why?")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_processor(directory, tiled=True)
    return AutoTokenizer.from_pretrained(str(directory))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    return [random_tiles(rng, 3), random_tiles(rng, 4)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.slow] * (n == "at_entry")) for n in METHODS],
)
def model(request):
    return sharp_model(METHODS[request.param])


def sharp_model(method=None):
    """Random weights whose attention is sharp, so that answers depend on what is said."""
    tree = random_tree(CFG, method)
    for name in ("q", "out", "down"):
        tree[f"decoder.layers.{name}.kernel"] *= 4
    return random_model(CFG, method, tree=tree)


def said(chat: Chat, question: str) -> str:
    return "".join(chat.ask(question))


def whole_dialogue(tokenizer, turns, question: str, images: int) -> Prompt:
    """Everything up to the next answer, as one prompt in which the new question asks."""
    first = render(BRIEF, [(place_images(turns[0].question, images), None)], False, image=False)
    prompt = encode_prompt(tokenizer, first.text)
    ids, asks = [prompt.ids], []
    for turn, text in zip(turns, [*(t.question for t in turns[1:]), question], strict=True):
        more = Prompt(np.asarray(turn.tokens, np.int32), np.zeros(len(turn.tokens), bool))
        ended = turn.tokens[-1] in SAMPLING.stop
        end = [] if ended else encode_prompt(tokenizer, BRIEF.end, start=False).ids
        span = (len(BRIEF.user), len(BRIEF.user) + len(text))
        words = f"{BRIEF.user}{text}{BRIEF.user_end}{BRIEF.assistant}"
        asked = encode_prompt(tokenizer, words, [span], start=False)
        ids += [more.ids, end, asked.ids]
        asks = asked.asks
    joined = np.concatenate(ids).astype(np.int32)
    behind = np.zeros(len(joined), bool)
    behind[len(joined) - len(asks) :] = asks
    return Prompt(joined, behind, prompt.image_at)


@pytest.mark.parametrize("cuts", ["keep", "anew"])
def test_every_answer_is_that_of_a_fresh_run(model, tokenizer, images, cuts, monkeypatch):
    """With `anew`, or nothing to choose; with `keep` and cuts the first choice goes on."""
    chat = Chat(model, tokenizer, BRIEF, images, SAMPLING, cuts)
    generate = Generator(model, SAMPLING)
    same = []
    for number, question in enumerate(QUESTIONS):
        turns = list(chat.turns)
        assert said(chat, question) == chat.turns[-1].answer
        if number:
            monkeypatch.setattr(chat_module, "run_prefill", None)  # the image is seen once
            prompt = whole_dialogue(tokenizer, turns, question, len(images))
            fresh = np.asarray(generate(make_inputs(CFG, [prompt], [images]), jax.random.key(0)))
            tokens = tuple(int(t) for t in fresh[0] if t >= 0)
            same.append(tokens == chat.turns[-1].tokens)
    if cuts == "anew" or model.method == full():
        assert all(same)
    assert len({turn.tokens for turn in chat.turns}) > 1


def test_visual_tokens_of_each_stage_are_told(tokenizer, images):
    chat = Chat(sharp_model(CUTS), tokenizer, BRIEF, images, SAMPLING)
    said(chat, QUESTIONS[0])
    entering, *kept = chat.turns[0].visual
    # At most 28 tokens a tile; each image's two rows of regions end in newlines.
    assert 28 * 2 + 4 < entering <= 28 * (3 + 4) + 4
    assert kept == [int(np.ceil(entering * 0.5)), int(np.ceil(entering * 0.2))]
    said(chat, QUESTIONS[1])
    assert chat.turns[1].visual == chat.turns[0].visual


def test_what_was_taken_of_an_answer_is_remembered(tokenizer, images):
    """An answer broken off after its first piece stands as it is in the conversation."""
    model = sharp_model()
    chat = Chat(model, tokenizer, BRIEF, images, SAMPLING)
    stream = chat.ask(QUESTIONS[0])
    next(stream)
    stream.close()
    broken = chat.turns[0]
    assert 1 <= len(broken.tokens) < 7
    said(chat, QUESTIONS[1])
    prompt = whole_dialogue(tokenizer, [broken], QUESTIONS[1], len(images))
    fresh = np.asarray(
        Generator(model, SAMPLING)(make_inputs(CFG, [prompt], [images]), jax.random.key(0))
    )
    assert chat.turns[1].tokens == tuple(int(t) for t in fresh[0] if t >= 0)


def test_a_question_that_cannot_be_asked_changes_nothing(tokenizer, images):
    chat = Chat(sharp_model(), tokenizer, BRIEF, images, SAMPLING)
    with pytest.raises(ValueError, match="question is empty"):
        said(chat, " <image>\n")
    with pytest.raises(ValueError, match=r"3 markers <image> and 2 images"):
        said(chat, "<image><image><image> which?")
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens .* context is 600"):
        said(chat, "word " * 300)
    assert not chat.turns
    said(chat, QUESTIONS[0])
    with pytest.raises(ValueError, match=r"1 markers <image> and 0 images"):
        said(chat, "And <image> that?")
    with pytest.raises(ValueError, match=r"conversation has \d+ tokens .* context is 600"):
        said(chat, "word " * 300)
    assert len(chat.turns) == 1
    said(chat, QUESTIONS[1])
    with pytest.raises(ValueError, match="cuts='other'"):
        Chat(sharp_model(), tokenizer, BRIEF, images, SAMPLING, "other")  # type: ignore[arg-type]


def test_a_conversation_without_an_image(tokenizer):
    chat = Chat(sharp_model(CUTS), tokenizer, BRIEF, [], SAMPLING, "anew")
    said(chat, QUESTIONS[0])
    said(chat, QUESTIONS[1])
    assert chat.turns[1].visual == (0, 0, 0)
