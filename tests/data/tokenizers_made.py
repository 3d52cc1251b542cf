"""Small tokenizers that can spell any text, of the kinds that decoders come with.

`spelling` is how tests read tokens back: byte by byte, without any decoder's tidying.
"""

import json
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<unk>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|im_start|>", "<|im_end|>",
)  # fmt: skip
TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant. USER: where is it ?",
    "ASSISTANT: two red cats\n\nжёлтый\n是的,这是一只猫。\n  नमस्ते  قطة 고양이 e\u0301 🙂👩‍👩‍👧\n",
)


def byte_level(
    merges: int = 0, bos: bool = True, trim: bool = False, image: bool = False
) -> PreTrainedTokenizerFast:
    """Bytes, as Llama 3 and Qwen have them, with so many merges.

    `trim`: offsets leave out white space. `image`: "<image>" is a token.
    """
    special = [*SPECIAL, *(["<image>"] if image else [])]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges > 0)
    trainer = BpeTrainer(
        vocab_size=len(special) + 256 + merges, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator(list(TEXTS) * 2 if merges else [], trainer)
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if bos:
        steps.append(opening())
    core.post_processor = processors.Sequence(steps)
    return wrapped(core, "<s>" if bos else None)


def llama_like(words: Sequence[str], legacy: bool) -> PreTrainedTokenizerFast:
    """Sentencepiece's manner: "▁" for spaces, known words whole, all else as tokens of bytes.

    A piece of text is opened by "▁"; with `legacy`, as Vicuna has it, the text behind every
    special token as well.
    """
    vocabulary = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    spelt = [a + b for a, b in merges]
    vocabulary += dict.fromkeys([*(c for word in words for c in word), *spelt])
    ids = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    core = Tokenizer(
        models.BPE(ids, list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if legacy:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[:3]])
    core.post_processor = opening()
    return wrapped(core, "<s>")


def opening() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def wrapped(core: Tokenizer, bos: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def spelling(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    """The text that tokens stand for, "▁" as a space."""
    level = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    bytewise = bool(level) and level["type"] == "ByteLevel"
    out = b""
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in tokenizer.get_added_vocab():
            out += token.encode()
        elif bytewise:
            out += bytes(BYTES[character] for character in token)
        elif token.startswith("<0x"):
            out += bytes([int(token[3:5], 16)])
        else:
            out += token.replace("▁", " ").encode()
    return out.decode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + number): byte for number, byte in enumerate(rest)
    }


BYTES = byte_alphabet()
