"""A word-level tokenizer for the closed vocabulary of the embedded data set."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Digits, Punctuation, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as Pipeline
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"


def build_tokenizer(
    texts: Iterable[str], words: Sequence[str] = (), special: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer that knows exactly the words of `texts`; others become "<unk>".

    Text splits at white space and punctuation, and each digit stands alone. `words` enter the
    vocabulary whole, for look-up by name ("row12"), though text never splits that way.
    `special` are matched whole in running text ("USER:"). Padding is 0.
    """
    pieces = _pieces()
    found: dict[str, None] = {}
    for text in texts:
        for mark in (BOS, EOS, *special):
            text = text.replace(mark, " ")
        found.update(dict.fromkeys(piece for piece, _ in pieces.pre_tokenize_str(text)))
    names = dict.fromkeys([PAD, BOS, EOS, UNK, *special, *words, *sorted(found)])
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNK))
    core.pre_tokenizer = pieces
    core.add_special_tokens([AddedToken(name, normalized=False) for name in (PAD, BOS, EOS, UNK)])
    core.add_tokens([AddedToken(name, normalized=False) for name in special])
    core.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, list(names).index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Ids of whole words. Raises ValueError naming the words that have no token of their own."""
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in words if word not in vocabulary]
    if missing:
        raise ValueError(
            f"tokenizer has no token for {missing[:5]} ({len(missing)} words in all):"
            " build it from the vocabulary of this data set"
        )
    return [vocabulary[word] for word in words]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write the tokenizer's files into `directory`, replacing what it held before."""
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tokenizer.save_pretrained(staging)
        target.mkdir(exist_ok=True)
        for file in sorted(staging.iterdir()):
            file.replace(target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer that `save_tokenizer` wrote. Raises FileNotFoundError, ValueError."""
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer in {directory}: tokenizer.json is missing;"
            " give the directory of a trained model, or write one with save_tokenizer"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    # The Rust parser raises a bare Exception for a damaged file.
    except Exception as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise ValueError(f"{file} is damaged ({reason}): write it again") from error


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of any checkpoint's directory. FileNotFoundError where there is none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((directory / name).is_file() for name in names):
        raise FileNotFoundError(
            f"no tokenizer in {directory} ({', '.join(names)}): copy its files there, or name the "
            "directory of another one as tokenizer"
        )
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def _pieces() -> Pipeline:
    return Pipeline([WhitespaceSplit(), Punctuation("isolated"), Digits(individual_digits=True)])
