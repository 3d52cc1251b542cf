"""MME: yes or no read from an answer, and a score of 0 to 200 for every category.

The rule of MME's own tool as lmms-eval has it (`lmms_eval/tasks/mme/utils.py`).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip


def parse(answer: str) -> Literal["yes", "no", "other"]:
    """Yes or no, in any case and without periods; else what the first four characters hold.

    A single "y" or "n" counts. "The answer is yes" does not; "now" and "snow" are no.
    """
    text = cleaned(answer)
    if len(text) == 1:
        return "yes" if text == "y" else "no" if text == "n" else "other"
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def cleaned(text: str) -> str:
    """Lower case, stripped, then all periods deleted: so answers and labels are compared."""
    return text.lower().strip().replace(".", "")


class Answered(NamedTuple):
    """A question of an image, with its score: 1.0 or 0.0."""

    category: str
    image: str
    score: float


def by_category(answered: Sequence[Answered]) -> dict[str, float]:
    """A category's score: the mean over images of 100 x accuracy + 100 where all is right.

    Every image has two questions; of an incomplete run what is there counts. Categories come in
    the order in which they are met.
    """
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question in answered:
        scores[question.category][question.image].append(question.score)
    return {
        category: sum(map(of_image, images.values())) / len(images)
        for category, images in scores.items()
    }


def of_image(scores: Sequence[float]) -> float:
    """Accuracy in percent, and 100 more where every question is answered right."""
    return sum(scores) / len(scores) * 100.0 + (sum(scores) == len(scores)) * 100.0


def totals(categories: dict[str, float]) -> dict[str, float]:
    """Perception (of 2000) and cognition (of 800): sums over the categories that are there."""
    return {
        "perception": sum(categories[name] for name in PERCEPTION if name in categories),
        "cognition": sum(categories[name] for name in COGNITION if name in categories),
    }
