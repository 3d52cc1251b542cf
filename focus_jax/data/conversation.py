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

# LLaVA-NeXT writes a space before the end of an answer.
MISTRAL = Template(
    "mistral", user="[INST] ", user_end=" ", assistant="[/INST]", gap=" ", end=" </s>"
)

# As LLaVA-NeXT's 34B model has it: no line break after the end of a message.
CHATML = Template(
    "chatml",
    system="<|im_start|>system\nAnswer the questions.<|im_end|>",
    user="<|im_start|>user\n",
    user_end="<|im_end|>",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
)

PLAIN = Template("plain", end="\n", image_gap="", caption_only=True)

TEMPLATES = (BARE, BRIEF, VICUNA_V1, LLAMA3, MISTRAL, CHATML, PLAIN)


class Rendered(NamedTuple):
    """Text without an image marker, and character spans in it.

    `answer_spans`: each answer with its end; `instruction_spans`: each turn's text of the user
    alone; `image_at`: where the image goes, None for a conversation without one.
    """

    text: str
    answer_spans: tuple[Span, ...]
    instruction_spans: tuple[Span, ...]
    image_at: int | None


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

    The image goes to the front of the turn that holds "<image>", or of the first. An answer is
    None only in the last turn; without answers the last one is left out too, and the text ends
    right after the assistant's tag. Raises ValueError for no turns, two images, a missing answer.
    """
    _check_turns(turns)
    image_turn = _image_turn(turns) if image else None
    text = "" if template.caption_only else template.system
    answers: list[Span] = []
    instructions: list[Span] = []
    image_at = None
    for number, (user, answer) in enumerate(turns):
        user = user.replace(IMAGE, "").strip() if image else user
        if not template.caption_only:
            text += template.user
        if number == image_turn:
            image_at = len(text)
            text += template.image_gap
        if not template.caption_only:
            instructions.append((len(text), len(text) + len(user)))
            text += user + template.user_end + template.assistant
        last = number == len(turns) - 1
        if answer is None or (last and not with_answers):
            break
        text += template.gap
        answers.append((len(text), len(text) + len(answer) + len(template.end)))
        text += answer + template.end + ("" if last else template.turn_gap)
    return Rendered(text, tuple(answers), tuple(instructions), image_at)


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
    before = tokenizer(rendered.text[:split], add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if add_bos and tokenizer.bos_token_id is not None else []
    after = tokenizer(rendered.text[split:], add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(after["input_ids"][:max_length], np.int32)
    offsets = np.array(after["offset_mapping"][:max_length], np.int64).reshape(-1, 2) + split
    return Encoded(
        prefix=np.array(bos + before, np.int32),
        ids=ids,
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
    marker = tokenizer.convert_tokens_to_ids(IMAGE)
    known = isinstance(marker, int) and marker != tokenizer.unk_token_id
    first = 0
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    for piece in [text] if known else text.split(IMAGE):
        pieces.append(_tokens(tokenizer, piece, first, special=start and not pieces))
        first += len(piece) + len(IMAGE)
    ids = np.concatenate([ids for ids, _ in pieces])
    offsets = np.concatenate([offsets for _, offsets in pieces])
    asks = _touches(offsets, [word for span in instruction_spans for word in _words(text, span)])
    if known:
        at = np.flatnonzero(ids == marker)
        image_at = (at - np.arange(at.size)).tolist()
        ids, asks = np.delete(ids, at), np.delete(asks, at)
    else:
        image_at = np.cumsum([len(ids) for ids, _ in pieces])[:-1].tolist()
    return Prompt(ids.astype(np.int32), asks, tuple(image_at))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, first: int, special: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a text that begins at `first`, and their character offsets [T 2]."""
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = np.array(out["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(out["input_ids"], np.int64), offsets + first


def _words(text: str, span: Span) -> list[Span]:
    """The words of a span; image markers are none."""
    found = re.finditer(r"\S+", text[slice(*span)].replace(IMAGE, " " * len(IMAGE)))
    return [(span[0] + match.start(), span[0] + match.end()) for match in found]


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
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= np.maximum(offsets[:, 0], start) < np.minimum(offsets[:, 1], end)
    return mask


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
