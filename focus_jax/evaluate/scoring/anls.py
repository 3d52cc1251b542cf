"""ANLS of documents and infographics: edit distance over length, nothing below a half.

The rule of lmms-eval's `anls` (after Qwen-VL's evaluation), which LLaVA-NeXT's figures use.
"""

from collections.abc import Sequence

THRESHOLD = 0.5


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: the fewest insertions, deletions and replacements of one character."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            here = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], here
    return row[-1]


def anls(prediction: str, golds: Sequence[str], threshold: float = THRESHOLD) -> float:
    """1 - distance / length for the nearest gold answer; 0 below the threshold, which counts.

    The distance ignores case and folds white space; the length is that of the longer RAW text in
    upper case, so outer spaces (and a German sharp s) lengthen it. Two empty texts score 1.
    ValueError: no gold answers.
    """
    if not golds:
        raise ValueError("there are no gold answers to compare with")
    score = 1 - min(_share(prediction, gold) for gold in golds)
    return score if score >= threshold else 0.0


def _share(prediction: str, gold: str) -> float:
    length = max(len(gold.upper()), len(prediction.upper()))
    distance = edit_distance(*(" ".join(text.lower().split()) for text in (gold, prediction)))
    return distance / length if length else 0.0
