"""Dialogues as tokens: hand-made cases, LLaVA's own rule, random conversations read back."""

import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

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
    encode_dialogue,
    encode_prompt,
    render,
)
from tests.data.tokenizers_made import SPECIAL, byte_level, llama_like, spelling

WORDS = ("▁USER", "▁ASSISTANT", "▁red", "red", "▁two", "▁cats", "▁what", "what", "▁is", "▁it")
CHINESE, EMOJI, COMBINED = "是的,这是一只猫。", "👩‍👩‍👧🙂", "e\u0301té a\u0308"


class Case(NamedTuple):
    """Turns of a dialogue, what is learnt of it and what is asked, all written by hand."""

    turns: tuple[tuple[str, str], ...]
    learnt: str
    asked: str
    template: str = "brief"


def one(answer: str, learnt: str | None = None, template: str = "brief") -> Case:
    """A single question with that answer."""
    return Case((("q ?", answer),), f" {answer}</s>" if learnt is None else learnt, "q?", template)


CASES = {
    "one turn": one("red"),
    "two turns": Case((("a b", "red"), ("c", "two cats")), " red</s> two cats</s>", "abc"),
    "five turns": Case(
        tuple((f"q{i}", f"a{i}") for i in range(5)), " a0</s> a1</s> a2</s> a3</s> a4</s>",
        "q0q1q2q3q4",
    ),
    "empty answer": one(""),
    "empty answer between": Case((("a", ""), ("b", "x")), " </s> x</s>", "ab"),
    "empty question": Case((("", "red"),), " red</s>", ""),
    "empty both": Case((("", ""), ("", "")), " </s> </s>", ""),
    "answer of the end": one("</s>"),
    "answer with the end inside": one("red</s>blue"),
    "answer with the user's tag": one("USER: what ?"),
    "answer with the assistant's tag": one("see ASSISTANT: red"),
    "answer as a whole turn": one("a</s>USER: b ASSISTANT: c"),
    "answer with BOS": one("<s> x"),
    "answer with a marker": one("write <image> here"),
    "question with the end": Case((("what is </s> ?", "EOS"),), " EOS</s>", "whatis</s>?"),
    "question with the assistant's tag": Case(
        (("say ASSISTANT: no", "no"),), " no</s>", "sayASSISTANT:no"
    ),
    "question equals answer": Case((("red", "red"), ("red", "red")), " red</s> red</s>", "redred"),
    "answer opens with a space": one(" red"),
    "answer opens with spaces": one("   red"),
    "answer ends with spaces": one("red  "),
    "answer opens with lines": one("\n\nred"),
    "answer ends with lines": one("red\n\n"),
    "answer of white space": one(" \n\t "),
    "answer in lines": one("1. red\n2. two\n\n- cats\n"),
    "Chinese": Case((("这是什么?", CHINESE),), f" {CHINESE}</s>", "这是什么?"),
    "emoji of several characters": Case(((EMOJI, EMOJI),), f" {EMOJI}</s>", EMOJI),
    "combining characters": one(COMBINED),
    "right to left": Case((("ما هذا؟", "قطة حمراء"),), " قطة حمراء</s>", "ماهذا؟"),
    "an image": Case((("<image>\nwhat ?", "red"),), " red</s>", "what?"),
    "an image alone": Case((("<image>", "a red cat"),), " a red cat</s>", ""),
    "image in the 2nd turn": Case(
        (("hello", "hi"), ("<image>\nwhat ?", "red")), " hi</s> red</s>", "hellowhat?"
    ),
    "two images": Case((("<image>\n<image>\nsame ?", "no"),), " no</s>", "same?"),
    "two images touch": Case((("<image><image>", "no"), ("b", "c")), " no</s> c</s>", "b"),
    "images in two turns": Case(
        (("<image>\na", "猫"), ("b", ""), ("<image>\nc", "🙂")), " 猫</s> </s> 🙂</s>", "abc"
    ),
    "an image inside": Case((("from <image> to", "x"),), " x</s>", "fromto"),
    "an image at the end": Case((("see <image>", "x"),), " x</s>", "see"),
    "an answer's marker beside an image": Case(
        (("<image>\na", "the <image> tag"), ("<image>\nb", "c")), " the <image> tag</s> c</s>", "ab"
    ),
    "plain": Case((("<image>\nDescribe.", "two red cats"),), "two red cats\n", "", "plain"),
    "plain, words first": Case((("Describe.\n<image>", "红 cat"),), "红 cat\n", "", "plain"),
    "plain in lines": Case((("<image>", "a\n\nb\n"),), "a\n\nb\n\n", "", "plain"),
    "plain, empty": Case((("<image>", ""),), "\n", "", "plain"),
    "plain, text alone": Case((("Say it.", "it"),), "it\n", "", "plain"),
    "plain, two turns": Case((("<image>", "a"), ("<image>b", "c")), "a\nc\n", "", "plain"),
    "vicuna": one("red", template="vicuna_v1"),
    "llama3": one("red\n", "red\n<|eot_id|>", "llama3"),
    "llama3 with its tags": one(
        "<|eot_id|><|start_header_id|>user", "<|eot_id|><|start_header_id|>user<|eot_id|>",
        "llama3",
    ),
    "mistral": one("[/INST] red", " [/INST] red </s>", "mistral"),
    "mistral, two turns": Case(
        (("a [INST] b", "c"), ("d", "e")), " c </s> e </s>", "a[INST]bd", "mistral"
    ),
    "chatml": one("red<|im_end|>", "red<|im_end|><|im_end|>", "chatml"),
    "bare": one("red", template="bare"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """Tokenizers by name; "bytes" has no token of more than one byte besides the special ones."""
    return {
        "bytes": byte_level(),
        "marker": byte_level(image=True),
        "no bos": byte_level(bos=False),
        "subwords": byte_level(merges=250),
        "trimmed": byte_level(merges=250, trim=True),
        "llama": llama_like(WORDS, legacy=False),
        "vicuna": llama_like(WORDS, legacy=True),
    }


def named(name):
    return next(template for template in TEMPLATES if template.name == name)


def images_of(turns):
    return sum(user.count("<image>") for user, _ in turns)


def encoded(tokenizer, template, turns, max_length=None):
    return encode_dialogue(tokenizer, template, turns, images_of(turns), max_length)


def spelt(tokenizer, out, mask=None):
    return spelling(tokenizer, out.ids if mask is None else out.ids[mask])


@pytest.mark.parametrize("kind", ["bytes", "marker", "no bos", "trimmed"])
@pytest.mark.parametrize("name", CASES)
def test_hand_made_dialogues(made, name, kind):
    """Exactly the answers with gaps and ends are learnt; no character of a question or tag is."""
    case, tokenizer = CASES[name], made[kind]
    if kind == "trimmed":  # its tokens of several characters may take in the space before
        tokenizer = byte_level(trim=True)
    out = encoded(tokenizer, named(case.template), case.turns)
    assert spelt(tokenizer, out, out.label_mask) == case.learnt
    assert spelt(tokenizer, out, out.query_mask) == case.asked
    assert not out.cut
    assert len(out.image_at) == images_of(case.turns)
    assert (out.ids[0] == tokenizer.convert_tokens_to_ids("<s>")) == (kind != "no bos")


@pytest.mark.parametrize("kind", ["bytes", "marker"])
@pytest.mark.parametrize(
    ("template", "turns", "around"),
    [
        (BRIEF, [("<image>\na", "b")], ["<s>USER: ", "\na ASSISTANT: b</s>"]),
        (
            BRIEF,
            [("a", "b"), ("<image>\nc", "d <image>")],
            ["<s>USER: a ASSISTANT: b</s>USER: ", "\nc ASSISTANT: d <image></s>"],
        ),
        (
            MISTRAL,
            [("<image>\n<image>\na", "红"), ("x<image>", "")],
            ["<s>[INST] ", "\n", "\na [/INST] 红 </s>[INST] x", " [/INST]  </s>"],
        ),
        (BARE, [("<image><image>", "b")], ["<s>USER: ", "", " b</s>"]),
        (PLAIN, [("<image>\nSay.", "b")], ["<s>", "b\n"]),
        (PLAIN, [("<image>", "🙂"), ("c <image> d", "e")], ["<s>", "🙂\n", "e\n"]),
        (CHATML, [("a", "b")], ["<s>" + CHATML.system + "<|im_start|>user\na<|im_end|>"
                                "<|im_start|>assistant\nb<|im_end|>"]),
    ],
)  # fmt: skip
def test_text_and_places_of_images(made, kind, template, turns, around):
    out = encoded(made[kind], template, turns)
    cuts = [0, *out.image_at, len(out.ids)]
    pieces = [out.ids[a:b] for a, b in pairwise(cuts)]
    assert [spelling(made[kind], piece) for piece in pieces] == around


def test_tokens_of_an_answer_that_begin_with_its_space(made):
    out = encoded(made["llama"], BRIEF, [("what is it", "two red cats")])
    names = np.array(made["llama"].convert_ids_to_tokens(out.ids))
    assert names[out.label_mask].tolist() == ["▁two", "▁red", "▁cats", "</s>"]
    assert names[out.query_mask].tolist() == ["▁what", "▁is", "▁it"]


def test_pieces_are_tokenised_apart_as_llava_does(made):
    """Each piece is opened by "▁", BOS comes once; ids written by hand."""
    out = encoded(made["vicuna"], BRIEF, [("<image>\nwhat", "red"), ("is it", "two")])
    names = np.array(made["vicuna"].convert_ids_to_tokens(out.ids))
    before = ["<s>", "▁USER", "<0x3A>", "▁"]
    after = ["▁", "<0x0A>", "what", "▁ASSISTANT", "<0x3A>", "▁red", "</s>"]
    later = ["▁USER", "<0x3A>", "▁is", "▁it", "▁ASSISTANT", "<0x3A>", "▁two", "</s>"]
    assert names.tolist() == before + after + later
    assert out.image_at == (len(before),)
    assert names[out.label_mask].tolist() == ["▁red", "</s>", "▁two", "</s>"]
    assert names[out.query_mask].tolist() == ["what", "▁is", "▁it"]
    caption = encoded(made["vicuna"], PLAIN, [("<image>\nwhat", "two red")])
    names = np.array(made["vicuna"].convert_ids_to_tokens(caption.ids))
    assert names.tolist() == ["<s>", "▁two", "▁red", "<0x0A>"]
    assert caption.label_mask.tolist() == [False, True, True, True]
    assert caption.image_at == (1,)


def llava_labels(tokenizer, text):
    """LLaVA's own rule for v1: ids with -200 for images and its labels, by counting the tokens of
    each round and of its instruction apart."""

    def tokens(part):
        ids = [1]
        for number, chunk in enumerate(part.split("<image>")):
            ids += [-200] * (number > 0) + tokenizer(chunk)["input_ids"][1:]
        return ids

    ids = np.array(tokens(text))
    labels, at = ids.copy(), 1
    labels[0] = -100
    for turn in filter(None, text.split("</s>")):
        instruction = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        labels[at : at + len(tokens(instruction)) - 2] = -100
        at += len(tokens(turn))
    assert at == len(ids), "LLaVA would drop this sample"
    return ids, labels


@pytest.mark.parametrize(
    "turns",
    [
        [("<image>\nwhat is it", "red")],
        [("<image>\nwhat is it", "two red cats"), ("is it 红 ?", "是的"), ("what", "red 🙂 it")],
        [("what is it", "it is red"), ("<image>\nwhat", "naïve")],
        [("what ?", "it is\n1. red\n2. two")],
    ],
)
def test_ids_and_labels_equal_those_of_llavas_rule(made, turns):
    tokenizer = made["vicuna"]
    ids, labels = llava_labels(tokenizer, render(VICUNA_V1, turns, image=False).text)
    text = ids != -200
    out = encoded(tokenizer, VICUNA_V1, turns)
    np.testing.assert_array_equal(out.ids, ids[text])
    np.testing.assert_array_equal(out.label_mask, (labels != -100)[text])
    assert out.image_at == tuple(at - i for i, at in enumerate(np.flatnonzero(~text)))


@pytest.mark.parametrize("kind", ["bytes", "marker", "no bos", "subwords", "llama", "vicuna"])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_a_prompt_is_the_start_of_its_dialogue(made, template, kind):
    """What generation is asked with is what training has seen, up to tokens over the border."""
    turns = [("<image>\nwhere is it ?", "red"), ("<image>\nis it ?", "two")]
    prompt = render(template, [turns[0], (turns[1][0], None)], image=False)
    asked = encode_prompt(made[kind], prompt.text, prompt.instruction_spans)
    out = encoded(made[kind], template, turns)
    assert out.image_at == asked.image_at
    same = len(asked.ids) - 1 if kind == "subwords" else len(asked.ids)
    np.testing.assert_array_equal(out.ids[:same], asked.ids[:same])
    np.testing.assert_array_equal(out.query_mask[:same], asked.asks[:same])
    assert not out.label_mask[asked.image_at[-1] : same].any()


TURNS = [("<image>\nwhat ?", "red 红 cat"), ("<image>\nwhere ?", "left")]


@pytest.mark.parametrize(
    ("ending", "learnt", "asked", "images"),
    [
        ("ASSISTANT: red", " red", "what?", 1),
        ("ASSISTANT: red 红 ca", " red 红 ca", "what?", 1),
        ("ASSISTANT: ", " ", "what?", 1),
        ("ASSISTANT:", "", "what?", 1),
        ("\nwh", "", "wh", 1),
        ("cat</s>", " red 红 cat</s>", "what?", 1),
        ("cat</s>USER: ", " red 红 cat</s>", "what?", 1),
        ("cat</s>USER: \n", " red 红 cat</s>", "what?", 2),
        ("where ? ASS", " red 红 cat</s>", "what?where?", 2),
        ("left", " red 红 cat</s> left", "what?where?", 2),
        ("left</s>", " red 红 cat</s> left</s>", "what?where?", 2),
    ],
)
def test_a_cut_takes_the_end_of_ids_masks_and_images(made, ending, learnt, asked, images):
    """In the middle of an answer, of a question, of the tags; before and behind an image."""
    tokenizer = made["bytes"]
    whole = encoded(tokenizer, BRIEF, TURNS)
    kept = spelt(tokenizer, whole).index(ending) + len(ending)
    kept = len(spelt(tokenizer, whole)[:kept].replace("<s>", "1").replace("</s>", "2").encode())
    out = encoded(tokenizer, BRIEF, TURNS, max_length=kept)
    assert spelt(tokenizer, out).endswith(ending)
    assert spelt(tokenizer, out, out.label_mask) == learnt
    assert spelt(tokenizer, out, out.query_mask) == asked
    assert out.image_at == whole.image_at[:images]
    assert out.cut == (kept < len(whole.ids))


def test_a_cut_inside_a_character_keeps_the_bytes_before(made):
    whole = encoded(made["bytes"], PLAIN, [("<image>", "红")])
    assert whole.label_mask.tolist() == [False, True, True, True, True]
    out = encoded(made["bytes"], PLAIN, [("<image>", "红")], max_length=3)
    np.testing.assert_array_equal(out.ids, whole.ids[:3])
    assert out.label_mask.tolist() == [False, True, True]
    assert (out.image_at, out.cut) == ((1,), True)
    assert encoded(made["bytes"], PLAIN, [("<image>", "红")], max_length=1).image_at == ()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_a_dialogue_of_one_image_equals_prefix_and_text(made, template):
    """`encode` of the same conversation, whose ids stand apart before and behind the image."""
    turns = [("<image>" + template.image_gap + "where ?", "red 红"), ("is it", "two")]
    parts = encode(made["vicuna"], render(template, turns))
    out = encoded(made["vicuna"], template, turns)
    np.testing.assert_array_equal(out.ids, np.concatenate([parts.prefix, parts.ids]))
    np.testing.assert_array_equal(out.label_mask[len(parts.prefix) :], parts.label_mask)
    assert out.image_at == (len(parts.prefix),)


@pytest.mark.parametrize("kind", ["bytes", "marker"])
def test_without_images_a_marker_is_text(made, kind):
    """As LLaVA reads rows of text alone; a caption's template drops it with the user's words."""
    turns = [("in <image> tags ?", "red <image>"), ("<image>", "two")]
    out = encode_dialogue(made[kind], BRIEF, turns, 0)
    assert out.image_at == ()
    assert spelt(made[kind], out, out.label_mask) == " red <image></s> two</s>"
    assert spelt(made[kind], out, out.query_mask) == "in<image>tags?<image>"
    caption = encode_dialogue(made[kind], PLAIN, turns, 0)
    assert spelt(made[kind], caption) == "<s>red <image>\ntwo\n"


def test_bad_dialogues_are_refused(made):
    with pytest.raises(ValueError, match="no turns"):
        encode_dialogue(made["bytes"], BRIEF, [], 0)
    with pytest.raises(ValueError, match="1 images and 2 markers <image>"):
        encode_dialogue(made["bytes"], BRIEF, [("<image><image>", "a")], 1)
    with pytest.raises(ValueError, match="1 images and 0 markers <image>"):
        encode_dialogue(made["bytes"], PLAIN, [("a", "<image>")], 1)
    with pytest.raises(ValueError, match="max_length=0"):
        encode_dialogue(made["bytes"], PLAIN, [("a", "b")], 0, max_length=0)


# ------------------------------------------------------------ random conversations, read back

SCRIPTS = (
    "abc XYZ 019 ,.?!'\"-/\\{}[]<>|", "äöüßéñçø", "привет кошка", "猫狗红色是的。,", "ねこカタカナ",
    "고양이한글", "قطةحمراء", "नमस्तेक्षि", "ไทยก็", "e\u0301a\u0308o\u0302\u0323",
    "🙂🐈👩‍👩‍👧🏳️‍🌈", " \n\t ", "\u200b\u00a0\ufeff", "𝔘𝕏𒀀",
)  # fmt: skip
PHRASES = (
    "USER:", "ASSISTANT:", "</s>", "<s>", "[INST]", "[/INST]", "<|im_end|>", "<|eot_id|>", "\n\n",
    "two red cats", "A.", " ",
)  # fmt: skip


def random_text(rng, most=12):
    parts = []
    for _ in range(rng.randrange(most // 4 + 1)):
        script = rng.choice(SCRIPTS)
        parts.append("".join(rng.choice(script) for _ in range(rng.randrange(most))))
        if rng.random() < 0.3:
            parts.append(rng.choice(PHRASES))
    return "".join(parts)


def random_dialogue(rng):
    turns = [(random_text(rng), random_text(rng, 24)) for _ in range(rng.randint(1, 5))]
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(turns))
        turns[at] = ("<image>\n" + turns[at][0], turns[at][1])
    return turns


def runs(mask):
    """Beginnings and ends of the stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return edges.reshape(-1, 2).tolist()


def check_learnt(tokenizer, template, turns):
    """The learnt tokens spell the answers with gaps and ends, and nothing but the white
    space before them, where one token holds both."""
    out = encoded(tokenizer, template, turns)
    if template.caption_only:  # captions follow one another without a tag between them
        check_captions(tokenizer, turns, out)
        return
    learnt = runs(out.label_mask)
    assert len(learnt) == len(turns)
    for (start, end), (user, answer) in zip(learnt, turns, strict=True):
        text, answer = spelling(tokenizer, out.ids[start:end]), template.gap + answer + template.end
        before = template.user + user + template.user_end + template.assistant
        extra = text.removesuffix(answer)
        assert text == extra + answer
        assert before.endswith(extra)
        if extra:
            assert extra.isspace()
            assert len(first_bytes(tokenizer, out.ids[start])) > len(extra.encode())


def check_captions(tokenizer, turns, out):
    """All that stands between images is learnt, with the "▁" that opens a piece of text.

    None opens one that begins with a space or a special token.
    """
    groups = [""]
    for user, answer in turns:
        groups += [""] * user.count("<image>")
        groups[-1] += answer + "\n"
    closed = (" ", *tokenizer.get_added_vocab()) if "▁" in tokenizer.get_vocab() else ("",)
    cuts = [1, *out.image_at, len(out.ids)]
    pieces = [spelling(tokenizer, out.ids[a:b]) for a, b in pairwise(cuts)]
    assert pieces == [g if not g or g.startswith(closed) else " " + g for g in groups]
    assert out.label_mask[1:].all()
    assert not out.label_mask[0]
    assert not out.query_mask.any()


def first_bytes(tokenizer, token):
    """A token's bytes, which may be a part of a character."""
    try:
        return spelling(tokenizer, [token]).encode()
    except UnicodeDecodeError as error:
        return error.object


def check_random(made, count, seed):
    rng = random.Random(seed)
    kinds = ("bytes", "marker", "subwords", "trimmed", "llama")
    for number in range(count):
        turns, kind = random_dialogue(rng), kinds[number % len(kinds)]
        if kind == "trimmed":  # whose tokens do not say which white space at their edges is theirs
            turns = [(user.strip(), answer.strip()) for user, answer in turns]
        for template in TEMPLATES:
            check_learnt(made[kind], template, turns)


def test_learnt_tokens_of_random_dialogues_spell_the_answers(made):
    check_random(made, 60, seed=0)


@pytest.mark.slow
def test_learnt_tokens_of_a_thousand_random_dialogues_spell_the_answers(made):
    check_random(made, 1000, seed=1)


# ------------------------------------------------------------------- the public chat templates

LLAMA3_CHAT = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def chat(tokenizer, template, turns, system=None, prompt=False):
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(
        messages[: -1 if prompt else None], chat_template=template, tokenize=False,
        add_generation_prompt=prompt,
    )  # fmt: skip


@pytest.mark.parametrize("prompt", [True, False])
def test_llama3_equals_the_public_chat_template(made, prompt):
    tokenizer = made["bytes"]
    system = LLAMA3.system.partition("\n\n")[2].removesuffix("<|eot_id|>")
    theirs = chat(tokenizer, LLAMA3_CHAT, TURNS, system, prompt)
    assert "<s>" + render(LLAMA3, TURNS, not prompt, image=False).text == theirs


@pytest.mark.parametrize("prompt", [True, False])
def test_chatml_equals_the_public_chat_template_but_for_line_breaks(made, prompt):
    """LLaVA's writes none behind a message."""
    theirs = chat(made["bytes"], CHATML_CHAT, TURNS, "Answer the questions.", prompt)
    ours = render(CHATML, TURNS, not prompt, image=False).text
    assert ours == theirs.replace("<|im_end|>\n", "<|im_end|>")
    assert ours != theirs


@pytest.mark.parametrize("prompt", [True, False])
def test_mistral_equals_the_public_chat_template_but_for_a_space(made, prompt):
    """LLaVA's writes one before the end of an answer."""
    theirs = chat(made["bytes"], MISTRAL_CHAT, TURNS, prompt=prompt)
    ours = "<s>" + render(MISTRAL, TURNS, not prompt, image=False).text
    assert ours.replace(" </s>", "</s>") == theirs
    assert ours != theirs


def test_special_tokens_of_the_templates_are_tokens_of_the_made_tokenizers(made):
    """So that ends are single tokens here, as in the published tokenizers."""
    for template in TEMPLATES:
        end = template.end.strip()
        assert not end or end in SPECIAL
        assert len(made["bytes"](end, add_special_tokens=False)["input_ids"]) == bool(end)
