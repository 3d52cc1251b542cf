"""MMMU: an option, or numbers and words, read from an answer.

The rules of MMMU's own evaluation (`mmmu/utils/eval_utils.py`), and the two further steps of
lmms-eval's (`tasks/_task_utils/mmmu_mcq_utils.py`) for options.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence

# What may introduce an answer in an open response; "=" only in its last part.
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 3.5
)


def parse_option(
    answer: str, options: Mapping[str, str], rng: random.Random, *, lmms_eval: bool = False
) -> str:
    """The letter that an answer names; a random one where it names none.

    Letters in brackets first, then between spaces; of several, the last. In answers of more than
    five words also an option's text. `options`: texts by letter. `rng`: draws the random letter,
    so seed it. `lmms_eval`: a letter may end a word ("plan B") or stand before a period.
    """
    for sign in ",.!?;:'":
        answer = answer.strip(sign)
    text = f" {answer} "
    forms = ("({})", "{} ", "{}.") if lmms_eval else ("({})", " {} ")
    for form in forms:
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            # Of several, the last counts; where none is between spaces all are at -1, and the
            # first is taken.
            where = form if form == "({})" else " {} "
            return max(found, key=lambda letter: text.rfind(where.format(letter)))
    if len(text.split()) > 5:
        lowered = text.lower()
        found = [letter for letter, option in options.items() if option.lower() in lowered]
        if found:
            return max(found, key=lambda letter: lowered.rfind(options[letter].lower()))
    return rng.choice(list(options))


def parse_open(answer: str) -> list[str | float]:
    """Words and numbers that an open answer may mean, without duplicates, in order of finding."""
    parts = key_parts(answer)
    numbers = [n for part in parts for pattern in NUMBERS for n in re.findall(pattern, part)]
    return list(dict.fromkeys(v for part in [*parts, *numbers] for v in normalised(part)))


def key_parts(answer: str) -> list[str]:
    """What stands behind the last key word of each line; the whole answer where none does."""
    whole = answer.strip().strip(".").lower()
    # Officially also split before capitals, of which lower case has none.
    lines = re.split(r"\.\s(?=[A-Z])|\n", whole)
    parts = []
    for number, line in enumerate(lines):
        keys = (*KEYS, "=") if number == len(lines) - 1 else KEYS
        if (part := shortest_tail(line, keys)) and part not in TRIVIAL:
            parts.append(part)
    return parts or [whole]


def shortest_tail(line: str, keys: Iterable[str]) -> str:
    """The shortest text behind any key, empty ones passed over until a longer one is met."""
    shortest = ""
    for key in keys:
        if key in line:
            tail = line.split(key)[-1].strip()
            # As officially, an empty text is replaced by whatever comes next.
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def normalised(text: str) -> list[str | float]:
    """A number rounded to two places, else lower case; a single character beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_right(parsed: Sequence[str | float], gold: str | Sequence[str]) -> bool:
    """Whether a parsed text contains a right answer, or a parsed number is one."""
    golds = [gold] if isinstance(gold, str) else gold
    right = [value for text in golds for value in normalised(text)]
    words = [value for value in right if isinstance(value, str)]
    return any(
        any(word in said for word in words) if isinstance(said, str) else said in right
        for said in parsed
    )
