"""ScienceQA: a letter read from an answer.

LLaVA's rule (`llava/eval/eval_science_qa.py`) and lmms-eval's
(`lmms_eval/tasks/scienceqa/utils.py`). IMG accuracy is that of the questions with an image.
"""

import re

LETTERS = "ABCDE"
FAILED = "FAILED"
# The last "." is any character, as officially: "The answer is B" at the end of a text is no match.
STATED = re.compile(r"The answer is ([A-Z]).")


def parse(answer: str) -> str:
    """LLaVA's rule: a letter of A to E alone; or in front of ". "; or stated once; else FAILED.

    Nothing is stripped: "A " fails. What is stated may be any capital letter.
    """
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if answer[:1] and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    stated = STATED.findall(answer)
    return stated[0] if len(stated) == 1 else FAILED


def index_of(letter: str, choices: int) -> int:
    """The option's place, -1 for what is none of the first `choices` letters, or beyond E."""
    place = LETTERS.find(letter) if len(letter) == 1 else -1
    return place if place < choices else -1


def right_by_lmms_eval(answer: str, gold: str) -> bool:
    """lmms-eval's rule: stripped, the letter in any case; or a capital letter in front of "."."""
    text = answer.strip()
    if text.lower() == gold.lower():
        return True
    return len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0] == gold
