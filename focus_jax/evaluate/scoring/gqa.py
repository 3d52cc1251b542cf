"""GQA: the whole answer, by LLaVA's conversion or lmms-eval's exact match."""

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def converted(prediction: str) -> str:
    """What LLaVA hands to GQA's script: every trailing "." removed, lower case, spaces kept."""
    return prediction.rstrip(".").lower()


def exact(prediction: str, gold: str) -> float:
    """1 where the converted prediction is the answer, to the letter."""
    return float(converted(prediction) == gold)


def exact_lmms_eval(prediction: str, gold: str) -> float:
    """lmms-eval: lower case and no ASCII punctuation on both sides."""
    sides = [text.lower().translate(_NO_PUNCTUATION) for text in (prediction, gold)]
    return float(sides[0] == sides[1])
