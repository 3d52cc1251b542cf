"""Rendering of templates and the masks that follow from it."""

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from focus_jax.data.conversation import (
    BARE,
    BRIEF,
    CHATML,
    LLAMA3,
    MISTRAL,
    PLAIN,
    TEMPLATES,
    VICUNA_V1,
    encode,
    encode_prompt,
    place_images,
    render,
)
from focus_jax.data.tokenizer import build_tokenizer

TURNS = [("where is it ?", "top left"), ("what colour ?", "red")]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [user + " " + answer for user, answer in TURNS] + ["naïve größe 红 色"]
    return build_tokenizer(texts, special=("USER:", "ASSISTANT:"))


def words(tokenizer, encoded, mask=None):
    ids = encoded.ids if mask is None else encoded.ids[mask]
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_vicuna_reads_as_published():
    expected = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
        "where is it ? ASSISTANT: top left</s>USER: what colour ? ASSISTANT:"
    )
    rendered = render(VICUNA_V1, TURNS, with_answers=False)
    text, at = rendered.text, rendered.image_at
    assert text[:at] + "<image>" + text[at:] == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (BARE, "USER: <image>\nq a</s>"),
        (BRIEF, "USER: <image>\nq ASSISTANT: a</s>"),
        (MISTRAL, "[INST] <image>\nq [/INST] a </s>"),
        (PLAIN, "<image>a\n"),
        (
            CHATML,
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nq"
            "<|im_end|><|im_start|>assistant\na<|im_end|>",
        ),
    ],
)
def test_one_turn_of_each_template(template, expected):
    rendered = render(template, [("q", "a")])
    assert rendered.text[: rendered.image_at] + "<image>" + rendered.text[rendered.image_at :] == (
        expected
    )


def test_llama3_reads_as_published():
    text = render(LLAMA3, [("q", "a")]).text
    assert text.startswith("<|start_header_id|>system<|end_header_id|>\n\nYou are")
    assert text.endswith(
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
    )


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_spans_hold_exactly_answers_with_ends_and_questions(template):
    rendered = render(template, TURNS)
    cut = [rendered.text[start:end] for start, end in rendered.answer_spans]
    assert cut == [answer + template.end for _, answer in TURNS]
    asked = [rendered.text[start:end] for start, end in rendered.instruction_spans]
    assert asked == ([] if template.caption_only else [user for user, _ in TURNS])


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_prompt_is_the_start_of_the_training_text(template):
    full, prompt = render(template, TURNS), render(template, TURNS, with_answers=False)
    assert full.text.startswith(prompt.text)
    assert prompt.text.endswith(template.assistant)
    assert len(prompt.answer_spans) == len(TURNS) - 1


def test_multi_turn_masks(tokenizer):
    encoded = encode(tokenizer, render(BRIEF, TURNS))
    assert tokenizer.convert_ids_to_tokens(encoded.prefix.tolist()) == ["<s>", "USER:"]
    assert words(tokenizer, encoded) == (
        "where is it ? ASSISTANT: top left </s> USER: what colour ? ASSISTANT: red </s>"
    )
    assert words(tokenizer, encoded, encoded.label_mask) == "top left </s> red </s>"
    assert words(tokenizer, encoded, encoded.query_mask) == "what colour ?"


def test_prompt_tokens_precede_the_answer_tokens(tokenizer):
    full = encode(tokenizer, render(BRIEF, TURNS))
    prompt = encode(tokenizer, render(BRIEF, TURNS, with_answers=False))
    count = len(prompt.ids)
    np.testing.assert_array_equal(full.ids[:count], prompt.ids)
    np.testing.assert_array_equal(full.query_mask[:count], prompt.query_mask)
    assert words(tokenizer, prompt).endswith("ASSISTANT:")
    assert full.label_mask[count:].all()


def test_empty_answer_supervises_the_end_alone(tokenizer):
    encoded = encode(tokenizer, render(BRIEF, [("what colour ?", "")]))
    assert words(tokenizer, encoded, encoded.label_mask) == "</s>"


def test_answer_that_contains_separators(tokenizer):
    turns = [("what colour ?", "red</s>USER: what ? ASSISTANT: red"), ("where ?", "left")]
    encoded = encode(tokenizer, render(BRIEF, turns))
    assert words(tokenizer, encoded, encoded.label_mask) == (
        "red </s> USER: what ? ASSISTANT: red </s> left </s>"
    )
    assert words(tokenizer, encoded, encoded.query_mask) == "where ?"


def test_unicode_keeps_masks_in_place(tokenizer):
    encoded = encode(tokenizer, render(BRIEF, [("naïve größe ?", "红 色"), ("🙂 it ?", "größe")]))
    assert words(tokenizer, encoded, encoded.label_mask) == "红 色 </s> größe </s>"
    assert words(tokenizer, encoded, encoded.query_mask) == "<unk> it ?"


@pytest.mark.parametrize("template", [VICUNA_V1, LLAMA3, MISTRAL, CHATML], ids=lambda t: t.name)
def test_subwords_follow_the_same_spans(template):
    # Byte-level subwords: tokens take in the space before, and share characters of many bytes.
    core = Tokenizer(BPE())
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet())
    core.train_from_iterator(["where is it ? top left red"] * 3, trainer)
    core.add_special_tokens(list(dict.fromkeys([template.end.strip(), "</s>", "<s>"])))
    subwords = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", clean_up_tokenization_spaces=False
    )
    turns = [("where ?", "red 红"), ("is 🙂 größe ?", "top left 色")]
    encoded = encode(subwords, render(template, turns))
    labelled = subwords.decode(encoded.ids[encoded.label_mask])
    end = template.end.strip()
    assert labelled.replace(" ", "") == f"red红{end}topleft色{end}"
    assert subwords.decode(encoded.ids[encoded.query_mask]).strip() == "is 🙂 größe ?"


def test_truncation_cuts_ids_and_masks_alike(tokenizer):
    rendered = render(BRIEF, TURNS)
    whole = encode(tokenizer, rendered)
    # Position 6 lies between "top" and "left".
    cut = encode(tokenizer, rendered, max_length=6)
    for short, long in zip(cut[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(short, long[:6])
    assert words(tokenizer, cut, cut.label_mask) == "top"
    assert not cut.query_mask.any()
    assert encode(tokenizer, rendered, max_length=0).ids.shape == (0,)


def test_the_image_goes_to_the_front_of_its_turn(tokenizer):
    turns = [("where ?", "left"), ("what <image>\ncolour ?", "red")]
    encoded = encode(tokenizer, render(BRIEF, turns))
    before = tokenizer.convert_ids_to_tokens(encoded.prefix.tolist())
    assert before == ["<s>", "USER:", "where", "?", "ASSISTANT:", "left", "</s>", "USER:"]
    # What comes before the image is context, without labels.
    assert words(tokenizer, encoded, encoded.label_mask) == "red </s>"


def test_without_an_image_everything_follows_bos(tokenizer):
    encoded = encode(tokenizer, render(BRIEF, TURNS[:1], image=False))
    assert encoded.prefix.tolist() == [tokenizer.bos_token_id]
    assert words(tokenizer, encoded).startswith("USER: where")
    assert words(tokenizer, encoded, encoded.query_mask) == "where is it ?"


def test_bad_conversations_are_refused():
    with pytest.raises(ValueError, match="no turns"):
        render(BRIEF, [])
    with pytest.raises(ValueError, match="turn 0 of 2 has no answer"):
        render(BRIEF, [("a", None), ("b", "c")])
    with pytest.raises(ValueError, match="2 markers"):
        render(BRIEF, [("<image> <image>", "c")])


def with_marker(tokenizer):
    """The same tokenizer, to which "<image>" is one token."""
    own = build_tokenizer([], tuple(tokenizer.get_vocab()), special=("USER:", "ASSISTANT:"))
    own.add_tokens(["<image>"], special_tokens=True)
    return own


@pytest.mark.parametrize("known", [True, False])
def test_images_stand_where_the_prompt_says(tokenizer, known):
    """Whether the tokenizer has the marker or the text is cut at it."""
    tokenizer = with_marker(tokenizer) if known else tokenizer
    text = "USER: where <image> is it ? <image><image> red ASSISTANT:"
    span = (len("USER: "), len(text) - len(" ASSISTANT:"))
    prompt = encode_prompt(tokenizer, text, [span])
    assert words(tokenizer, prompt) == "<s> USER: where is it ? red ASSISTANT:"
    assert prompt.image_at == (3, 6, 6)
    assert words(tokenizer, prompt, prompt.asks) == "where is it ? red"
    later = encode_prompt(tokenizer, text, [span], start=False)
    assert words(tokenizer, later) == "USER: where is it ? red ASSISTANT:"
    assert later.image_at == (2, 5, 5)


def test_a_prompt_that_begins_or_ends_with_an_image(tokenizer):
    for known in (tokenizer, with_marker(tokenizer)):
        prompt = encode_prompt(known, "<image>red<image>")
        assert words(known, prompt) == "<s> red"
        assert prompt.image_at == (1, 2)
        assert not prompt.asks.any()
        assert encode_prompt(known, "<image>", start=False).image_at == (0,)


def test_what_opens_a_conversation_is_the_tokenizers_own(tokenizer):
    """As in Hugging Face's processors: a start token that is written out comes twice."""
    assert words(tokenizer, encode_prompt(tokenizer, "<s>red")) == "<s> <s> red"
    without = build_tokenizer(["red"])
    without.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    assert words(without, encode_prompt(without, "red")) == "red"


def test_images_without_a_place_stand_in_front():
    assert place_images("what?", 0) == "what?"
    assert place_images("what?", 2) == "<image>\n<image>\nwhat?"
    assert place_images("a <image> b", 2) == "<image>\na <image> b"
    with pytest.raises(ValueError, match=r"2 markers <image> and 1 images"):
        place_images("<image><image>", 1)
