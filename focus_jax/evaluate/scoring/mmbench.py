"""MMBench: an option read from an answer, and questions that count only in every rotation.

The rules of MMBench's evaluator without a language model, as in lmms-eval's "static" mode
(`lmms_eval/tasks/mmbench/mmbench_evals.py` and `_task_utils/mcq_extract.py`): first a letter among
the words or the only option whose text is contained; where that finds none, a more lenient letter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

# Rotation j of a question has the question's index + j * ROTATION.
ROTATION = 1_000_000
LETTERS = "ABCDE"
# What may stand around a letter, in the order in which it is looked for.
AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is",
    "the best answer is", "best answer is", "the correct option is", "correct option is",
    "the best option is", "best option is", "the choice is", "choice is", "the correct choice is",
    "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


# ------------------------------------------------------------------------------- one answer


def read_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """The option that an answer names: `infer`, else `likeliest`; None where neither finds one.

    `choices`: option texts by letter, those alone that are there.
    """
    return infer(answer, choices) or likeliest(answer, sorted(choices))


def infer(answer: str, choices: Mapping[str, str]) -> str | None:
    """The first pass: the only option letter among the words, else the only option text."""
    return letter_among_words(answer) or only_text(answer, choices)


def letter_among_words(answer: str) -> str | None:
    """The one letter of A to E that stands alone, or with the same signs around it.

    A bare letter is not taken where "A" is one of more than three words: it may be the article.
    """
    words = answer.split()
    bare = [letter for letter in LETTERS if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, behind in AROUND:
        found = [letter for letter in LETTERS if before + letter + behind in words]
        if len(found) == 1:
            return found[0]
    return None


def only_text(answer: str, choices: Mapping[str, str]) -> str | None:
    """The only option whose text the answer contains, in any case."""
    answer = answer.lower()
    found = [letter for letter, text in choices.items() if str(text).lower() in answer]
    return found[0] if len(found) == 1 else None


def likeliest(answer: str, letters: Sequence[str]) -> str | None:
    """The letter in the most telling place, of equals the last: the lenient second pass.

    Most telling: at the start, at the end, behind words such as "the answer is", in brackets,
    before a period, a colon, a bracket, a space; failing all of these, anywhere.
    """
    if not answer.strip():
        return None
    stripped = answer.strip()
    for sign in ",.!?;:'\"":
        stripped = stripped.strip(sign)
    text = f" {stripped} "
    found = list(places(text, letters)) or [(0, text.rfind(c), c) for c in letters if c in text]
    # max keeps the first of equals, which is the order of the official sort.
    return max(found, key=lambda place: place[:2])[2] if found else None


def places(text: str, letters: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(rank, position, letter) of every place in which a letter stands; `text` has outer spaces."""
    for rank, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        for letter in letters:
            if (sought := form.format(letter)) in text:
                yield rank, text.rfind(sought), letter
    lowered = text.lower()
    for phrase in PHRASES:
        if (at := lowered.find(phrase)) >= 0:
            for letter in letters:
                if (position := text.find(letter, at + len(phrase))) >= 0:
                    yield 7, position, letter
    bare = text.strip()
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            yield 10, 0, letter
    for letter in letters:
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            yield 9, len(text) - 1, letter


# ------------------------------------------------------------------------------- all answers


class Rotation(NamedTuple):
    """One rotation of a question, by its index in the table, and whether its answer is right."""

    number: int
    right: bool
    category: str = ""
    l2_category: str = ""

    @property
    def question(self) -> int:
        """The index that all rotations of one question share."""
        return self.number % ROTATION


def circular(rotations: Iterable[Rotation]) -> dict[int, bool]:
    """Questions in the order of their index: hit only where every rotation is right.

    As officially, a question counts where its first rotation (index below 1e6) is there.
    """
    rotations = list(rotations)
    hits = {row.number: True for row in sorted(rotations) if row.number < ROTATION}
    for row in rotations:
        if row.question in hits:
            hits[row.question] &= row.right
    return hits


def hit_rates(rotations: Sequence[Rotation]) -> dict[str, dict[str, float]]:
    """Shares of questions hit: `overall` (under ""), by `category` and by `l2_category`.

    A question's categories are those of its first rotation. ValueError: no question is there.
    """
    hits = circular(rotations)
    if not hits:
        raise ValueError("no question is there with its first rotation (an index below 1,000,000)")
    first = {row.number: row for row in rotations if row.number < ROTATION}
    return {
        "overall": shares({index: "" for index in hits}, hits),
        "category": shares({index: first[index].category for index in hits}, hits),
        "l2_category": shares({index: first[index].l2_category for index in hits}, hits),
    }


def shares(group: Mapping[int, str], hits: Mapping[int, bool]) -> dict[str, float]:
    """The share of hits within each group, by the groups' names in order."""
    return {
        name: sum(hits[i] for i in members) / len(members)
        for name in sorted(set(group.values()))
        if (members := [i for i in hits if group[i] == name])
    }
