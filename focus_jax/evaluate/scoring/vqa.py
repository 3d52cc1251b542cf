"""VQA accuracy: EvalAI's normalisation of answers, and their agreement with ten people's.

The rule of LLaVA's m4c evaluator (TextVQA) and of lmms-eval's VQAv2, TextVQA and VizWiz tasks.
Its quirks are part of every published score, so they are kept and named here.
"""

import re
import statistics
from collections.abc import Sequence

# Written without an apostrophe -> with. Keys with capitals never match the lower-cased words.
_APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Two apostrophes, of which people leave out either one.
_DOUBLE = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've you'd've
"""
CONTRACTIONS = (
    {word.replace("'", ""): word for word in _APOSTROPHES.split()}
    | {"".join(word.rsplit("'", 1)): word for word in _DOUBLE.split()}
    | {word.replace("'", "", 1): word for word in _DOUBLE.split()}
    | {
        "twas": "'twas", "let's": "let's", "she's": "she's", "somebody'd": "somebodyd",
        "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
        "yall'll": "y'all'll", "y'allll": "y'all'll", "y'alld've": "y'all'd've",
    }
)  # fmt: skip
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,+\d")
# A look-behind for a digit was meant to come first; misspelt, it asks only that a period is not
# "<=" and a digit. So "5." loses its period, and one before a digit stays (".5").
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# re.UNICODE, handed over where the number of replacements belongs: no more periods go than this.
MOST_PERIODS = 32


def normalise(answer: str) -> str:
    """EvalAI's normalisation, as LLaVA's evaluator and its converters for the servers apply it."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_one_line(text)))


def normalise_vqav2(answer: str) -> str:
    """lmms-eval's VQAv2: without the first step, so commas and "?" go by the punctuation rule."""
    return _words(_punctuation(_one_line(answer)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    """A mark goes if it touches a space anywhere or a number has a comma; else it is a space."""
    out = text
    comma_in_number = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        goes = comma_in_number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    return PERIOD.sub("", out, count=MOST_PERIODS)


def _words(text: str) -> str:
    """Numbers as digits, no articles, contractions with their apostrophes, single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(answer: str, golds: Sequence[str]) -> list[float]:
    """For each person left out, min(1, n / 3): n of the others gave this answer.

    All are normalised already. ValueError: no gold answers.
    """
    if not golds:
        raise ValueError("there are no gold answers to compare with")
    same = [gold == answer for gold in golds]
    return [min(1.0, (sum(same) - mine) / 3) for mine in same]


def accuracy(prediction: str, golds: Sequence[str]) -> float:
    """LLaVA's TextVQA evaluator: mean over the people left out, summed in their order."""
    shares = leave_one_out(normalise(prediction), [normalise(gold) for gold in golds])
    return sum(shares) / len(shares)


def accuracy_lmms_eval(prediction: str, golds: Sequence[str]) -> float:
    """lmms-eval's TextVQA and VizWiz: as `accuracy`, the mean without rounding in between."""
    return statistics.mean(
        leave_one_out(normalise(prediction), [normalise(gold) for gold in golds])
    )


def accuracy_vqav2(prediction: str, golds: Sequence[str]) -> float:
    """lmms-eval's VQAv2: its own normalisation, the mean without rounding in between."""
    return statistics.mean(
        leave_one_out(normalise_vqav2(prediction), [normalise_vqav2(gold) for gold in golds])
    )
