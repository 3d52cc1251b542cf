"""Conversations as text, and text as tokens that know what is answer and what is question.

Masks come from character offsets of the one rendered text, so tokens and masks cannot drift apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"

Span = tuple[int, int]
Turn = tuple[str, str | None]


@dataclass(frozen=True)
class Template:
    """The fixed text around turns.

    A turn reads: user, the user's text, user_end, assistant, gap, the answer, end, turn_gap. The
    prompt for generation stops right after `assistant`; a model supplies `gap` by itself. `end`
    belongs to what the model learns, `turn_gap` does not. With `image_gap` the image is followed
    by that text. `caption_only` drops the users' text and everything around it.
    """

    name: str
    system: str = ""
    user: str = ""
    user_end: str = ""
    assistant: str = ""
    gap: str = ""
    end: str = ""
    turn_gap: str = ""
    image_gap: str = "\n"
    caption_only: bool = False


# For a closed vocabulary: the answer follows the question's last word.
BARE = Template("bare", user="USER: ", gap=" ", end="</s>")

BRIEF = Template("brief", user="USER: ", user_end=" ", assistant="ASSISTANT:", gap=" ", end="</s>")

# Vicuna has no public chat template. The one of Hugging Face's LLaVA-1.5 leaves out the system's
# text, and ends an answer with a space.
VICUNA_V1 = Template(
    "vicuna_v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user="USER: ",
    user_end=" ",
    assistant="ASSISTANT:",
    gap=" ",
    end="</s>",
)

# The public chat template of Llama 3 with this system message (which it does not have itself); that
# one strips the white space around every message, this one does not.
LLAMA3 = Template(
    "llama3",
    system=(
        "<|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using "
        "natural language.<|eot_id|>"
    ),
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    user_end="<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
)

# The public chat template, but that LLaVA-NeXT writes a space before the end of an answer too.
MISTRAL = Template(
    "mistral", user="[INST] ", user_end=" ", assistant="[/INST]", gap=" ", end=" </s>"
)

# As LLaVA-NeXT's 34B model has it: the public chat template writes a line break after the end of
# every message, this one none.
CHATML = Template(
    "chatml",
    system="<|im_start|>system\nAnswer the questions.<|im_end|>",
    user="<|im_start|>user\n",
    user_end="<|im_end|>",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
)

# LLaVA's first stage: an image and its caption, of which all is learnt.
PLAIN = Template("plain", end="\n", image_gap="", caption_only=True)

TEMPLATES = (BARE, BRIEF, VICUNA_V1, LLAMA3, MISTRAL, CHATML, PLAIN)


class Rendered(NamedTuple):
    """Text without an image marker, and character spans in it.

    `answer_spans`: each answer with its end; `instruction_spans`: each turn's text of the user
    alone; `image_at`: where the image goes, None for a conversation without one; `markers`: where
    each "<image>" of the users begins, in a text that was left with them.
    """

    text: str
    answer_spans: tuple[Span, ...]
    instruction_spans: tuple[Span, ...]
    image_at: int | None
    markers: tuple[int, ...] = ()


class Encoded(NamedTuple):
    """Token ids before the image (with BOS) and after it, with masks over the latter."""

    prefix: Int32[np.ndarray, " P"]
    ids: Int32[np.ndarray, " T"]
    label_mask: Bool[np.ndarray, " T"]
    query_mask: Bool[np.ndarray, " T"]


def render(
    template: Template, turns: Sequence[Turn], with_answers: bool = True, image: bool = True
) -> Rendered:
    """Write (user, answer) turns as one text.

    The image goes to the front of the turn that holds "<image>", or of the first; with
    `image=False` the users' texts stay as they are, markers and all. An answer is None only in the
    last turn; without answers the last one is left out too, and the text ends right after the
    assistant's tag. Raises ValueError for no turns, two images, a missing answer.
    """
    _check_turns(turns)
    image_turn = _image_turn(turns) if image else None
    text = "" if template.caption_only else template.system
    answers: list[Span] = []
    instructions: list[Span] = []
    markers: list[int] = []
    image_at = None
    for number, (user, answer) in enumerate(turns):
        user = user.replace(IMAGE, "").strip() if image else user
        if not template.caption_only:
            text += template.user
        if number == image_turn:
            image_at = len(text)
            text += template.image_gap
        if template.caption_only:
            user = IMAGE * user.count(IMAGE)
        else:
            instructions.append((len(text), len(text) + len(user)))
        markers += (len(text) + match.start() for match in re.finditer(IMAGE, user))
        text += user if template.caption_only else user + template.user_end + template.assistant
        last = number == len(turns) - 1
        if answer is None or (last and not with_answers):
            break
        text += template.gap
        answers.append((len(text), len(text) + len(answer) + len(template.end)))
        text += answer + template.end + ("" if last else template.turn_gap)
    return Rendered(text, tuple(answers), tuple(instructions), image_at, tuple(markers))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Rendered,
    max_length: int | None = None,
    add_bos: bool = True,
) -> Encoded:
    """Tokenise a rendered conversation.

    `label_mask` is True at tokens of answers and of their ends, `query_mask` at tokens of the
    user's text in the last turn. At most `max_length` tokens after the image are kept, the first
    ones. Without an image everything follows a prefix that holds BOS alone.
    """
    split = rendered.image_at or 0
    before, after = _pieces(tokenizer, rendered.text, [(split, split)], start=False)
    bos = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
    offsets = after.offsets[:max_length]
    return Encoded(
        prefix=np.concatenate([bos, before.ids]).astype(np.int32),
        ids=after.ids[:max_length].astype(np.int32),
        label_mask=_touches(offsets, rendered.answer_spans),
        query_mask=_touches(offsets, rendered.instruction_spans[-1:]),
    )


class Prompt(NamedTuple):
    """A prompt as token ids without its image markers.

    `asks` marks the user's own words, `image_at` how many ids stand before each image, rising.
    """

    ids: Int32[np.ndarray, " T"]
    asks: Bool[np.ndarray, " T"]
    image_at: tuple[int, ...] = ()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    instruction_spans: Sequence[Span] = (),
    start: bool = True,
) -> Prompt:
    """Tokenise a prompt in which every "<image>" stands where its image goes.

    A tokenizer that has the marker among its tokens sees the text whole, as Hugging Face's
    processors do; for others the pieces between the markers are tokenised apart, as the original
    code does. `start`: the text opens a conversation, and gets what the tokenizer puts before one.
    """
    markers = [match.start() for match in re.finditer(IMAGE, text)]
    (ids, offsets), image_at = _around_images(tokenizer, text, markers, start)
    asks = _touches(offsets, _all_words(text, instruction_spans, markers))
    return Prompt(ids.astype(np.int32), asks, image_at)


class EncodedDialogue(NamedTuple):
    """A dialogue as token ids without its images, and masks over them.

    `label_mask`: answers with the gaps before them and their ends; `query_mask`: the users' own
    words of all turns; `image_at`: how many ids stand before each image, rising; `cut`: the end
    was cut off. `spans`: where the characters of each id begin and end in the rendered text.
    """

    ids: Int32[np.ndarray, " T"]
    label_mask: Bool[np.ndarray, " T"]
    query_mask: Bool[np.ndarray, " T"]
    image_at: tuple[int, ...]
    cut: bool
    spans: Int32[np.ndarray, "T 2"]


def render_dialogue(template: Template, turns: Sequence[Turn], images: int) -> Rendered:
    """Write turns as one text in which the users' markers stay where they are.

    Without images there are none: "<image>" is text like any other, as LLaVA reads such rows.
    """
    if images:
        return render(template, turns, image=False)
    if template.caption_only:
        turns = [("", answer) for _, answer in turns]
    return render(template, turns, image=False)._replace(markers=())


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    turns: Sequence[Turn],
    images: int,
    max_length: int | None = None,
) -> EncodedDialogue:
    """Tokenise a dialogue in which "<image>" in the users' texts stands where each image goes.

    The ids are those of `encode_prompt`, answers included: what the tokenizer puts before a
    conversation (BOS, if anything), then the text around the images. Every token that shares a
    character with an answer is learnt, and so is the gap before it, which a model writes itself:
    most tokenizers join it to the first word. "<image>" in an answer is text, and so it is in a
    dialogue without images.

    At most `max_length` ids are kept, the first ones. Images behind the cut go with their text:
    the first `len(image_at)` remain, each followed by at least one id. A cut may leave no labels.

    Raises ValueError for no turns, a missing answer, other than `images` markers, max_length < 1.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length}: give at least 1, or None to keep all")
    rendered = render_dialogue(template, turns, images)
    if len(rendered.markers) != images:
        raise ValueError(
            f"dialogue has {images} images and {len(rendered.markers)} markers {IMAGE} in its "
            "users' texts: give one marker for each image"
        )
    text = rendered.text
    (ids, offsets), image_at = _around_images(tokenizer, text, rendered.markers, start=True)
    cut = max_length is not None and len(ids) > max_length
    if cut:
        ids, offsets = ids[:max_length], offsets[:max_length]
        image_at = tuple(at for at in image_at if at < len(ids))
    learnt = [(begin - len(template.gap), end) for begin, end in rendered.answer_spans]
    return EncodedDialogue(
        ids=ids.astype(np.int32),
        label_mask=_touches(offsets, learnt),
        query_mask=_touches(
            offsets, _all_words(text, rendered.instruction_spans, rendered.markers)
        ),
        image_at=image_at,
        cut=cut,
        spans=offsets.astype(np.int32),
    )


class _Piece(NamedTuple):
    """Token ids [T], and where in the whole text each begins and ends [T 2]."""

    ids: np.ndarray
    offsets: np.ndarray


def _around_images(
    tokenizer: PreTrainedTokenizerBase, text: str, markers: Sequence[int], start: bool
) -> tuple[_Piece, tuple[int, ...]]:
    """The tokens of a text without the image markers that begin at `markers`, and how many of
    them stand before each image."""
    spans = [(at, at + len(IMAGE)) for at in markers]
    marker = tokenizer.convert_tokens_to_ids(IMAGE)
    if isinstance(marker, int) and marker != tokenizer.unk_token_id:
        whole = _tokens(tokenizer, text, 0, special=start)
        at = np.flatnonzero((whole.ids == marker) & _touches(whole.offsets, spans))
        rest = _Piece(np.delete(whole.ids, at), np.delete(whole.offsets, at, axis=0))
        return rest, tuple((at - np.arange(at.size)).tolist())
    pieces = _pieces(tokenizer, text, spans, start)
    image_at = np.cumsum([len(piece.ids) for piece in pieces])[:-1]
    joined = _Piece(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))
    return joined, tuple(image_at.tolist())


def _pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, holes: Sequence[Span], start: bool
) -> list[_Piece]:
    """The text before, between and behind the holes, tokenised apart; only the first piece gets
    what opens a conversation, if it is its start."""
    first = [0, *(end for _, end in holes)]
    last = [*(begin for begin, _ in holes), len(text)]
    return [
        _tokens(tokenizer, text[a:b], a, special=start and number == 0)
        for number, (a, b) in enumerate(zip(first, last, strict=True))
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, first: int, special: bool) -> _Piece:
    """The tokens of a text that begins at character `first`."""
    out = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    offsets = np.array(out["offset_mapping"], np.int64).reshape(-1, 2)
    added = np.array(out["special_tokens_mask"], bool)
    offsets = _with_white_space(offsets, added, len(text))
    return _Piece(np.array(out["input_ids"], np.int64), offsets + first)


def _with_white_space(offsets: np.ndarray, added: np.ndarray, length: int) -> np.ndarray:
    """Offsets in which tokens of white space alone have their characters.

    Byte-level tokenizers that trim offsets give them none: such a token reaches from the end of
    the token before it, or to the start of the next (spaces at the edges of words stay trimmed).
    What the tokenizer `added` has no characters.
    """
    start, end = offsets.T
    empty = (start == end) & ~added
    if not empty.any():
        return offsets
    start = np.where(empty, np.maximum.accumulate(np.append(0, end[:-1])), start)
    empty &= start == end
    return np.stack([start, np.where(empty, np.append(offsets[1:, 0], length), end)], axis=1)


def _all_words(text: str, spans: Sequence[Span], markers: Sequence[int]) -> list[Span]:
    """The words of spans; the image markers that begin at `markers` are none."""
    for at in markers:
        text = text[:at] + " " * len(IMAGE) + text[at + len(IMAGE) :]
    return [
        (first + match.start(), first + match.end())
        for first, end in spans
        for match in re.finditer(r"\S+", text[first:end])
    ]


def place_images(text: str, images: int) -> str:
    """The text with markers for all its images: "<image>" and a line break before it for each
    that it does not place itself.

    ValueError for more markers than images.
    """
    placed = text.count(IMAGE)
    if placed > images:
        raise ValueError(
            f"the prompt has {placed} markers {IMAGE} and {images} images: give as many images, "
            "or take markers out"
        )
    return f"{IMAGE}\n" * (images - placed) + text


def _touches(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens share a character with a span: their offsets may take in a space before."""
    inside = np.zeros(1 + max(offsets.max(initial=0), *(end for _, end in spans), 0), bool)
    for start, end in spans:
        inside[start + 1 : end + 1] = True
    before = np.cumsum(inside)  # characters of the spans before each position
    return before[offsets[:, 1]] > before[offsets[:, 0]]


def _check_turns(turns: Sequence[Turn]) -> None:
    if not turns:
        raise ValueError("conversation has no turns: give one (user, answer) pair or more")
    for number, (_, answer) in enumerate(turns[:-1]):
        if answer is None:
            raise ValueError(
                f"turn {number} of {len(turns)} has no answer: only the last turn may lack one"
            )


def _image_turn(turns: Sequence[Turn]) -> int:
    holders = [number for number, (user, _) in enumerate(turns) for _ in range(user.count(IMAGE))]
    if len(holders) > 1:
        raise ValueError(f"{len(holders)} markers {IMAGE} in one conversation: one is supported")
    return holders[0] if holders else 0
