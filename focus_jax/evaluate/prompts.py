"""What LLaVA's evaluation appends to questions, and options as it lists them."""

from collections.abc import Sequence

SHORT = "\nAnswer the question using a single word or phrase."
MCQ = "\nAnswer with the option's letter from the given choices directly."
MCQ_CN = "\n请直接回答选项字母。"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    """Options a line each: `A. red`. ValueError: more than there are letters."""
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options; letters reach for {len(LETTERS)}")
    return "\n".join(form.format(*pair) for pair in zip(LETTERS, options, strict=False))


def letter(index: int, options: Sequence[str]) -> str:
    """The letter of an option counted from 0. ValueError: no option has that place."""
    if not 0 <= index < min(len(options), len(LETTERS)):
        raise ValueError(f"the answer is option {index} (from 0) of {len(options)}")
    return LETTERS[index]
