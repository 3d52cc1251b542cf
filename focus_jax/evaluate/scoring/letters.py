"""An option's letter read from an answer: SEED-Bench and AI2D."""

import re
import string

LETTER_FIRST = re.compile(r"\s*([A-Z])\.")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def same_letter(answer: str, gold: str) -> bool:
    """LLaVA's rule for SEED-Bench (`scripts/convert_seed_for_submission.py`): the letter alone."""
    return answer == gold


def first_letter(answer: str, gold: str) -> bool:
    """lmms-eval's rule for SEED-Bench (`tasks/seedbench/utils.py`).

    The first character of the stripped answer, in any case: "A photo" counts as A.
    """
    return answer.strip()[:1].lower() == gold.strip().lower()


def ai2d_letter(answer: str) -> str:
    """What lmms-eval compares for AI2D (`tasks/ai2d`): in lower case, without punctuation.

    Of "B. leaf" the letter alone; any other answer whole, so that "(B)" is b and "B leaf" fails.
    """
    if match := LETTER_FIRST.match(answer):
        answer = match[1]
    return answer.lower().translate(PUNCTUATION)
