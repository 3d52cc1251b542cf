"""POPE: answers read as yes or no, and accuracy, precision, recall, F1 and the share of yes.

Two rules: LLaVA's (`llava/eval/eval_pope.py`) and lmms-eval's (`lmms_eval/tasks/pope/utils.py`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

CATEGORIES = ("adversarial", "popular", "random")
NO = {"No", "not", "no"}


def parse(answer: str) -> Literal["yes", "no"]:
    """LLaVA's rule: "no" where the first sentence has "No", "not" or "no" as a word, else "yes".

    The sentence ends at the first ".", commas are deleted, and words are parted by spaces alone:
    "NO", "Not", "No!" and "no\\n" count as yes, and so does an empty answer.
    """
    sentence = answer.split(".")[0].replace(",", "")
    return "no" if NO & set(sentence.split(" ")) else "yes"


def parse_lmms_eval(answer: str) -> str:
    """lmms-eval's rule: the whole answer in lower case, stripped; "yes." is neither yes nor no."""
    return answer.lower().strip()


class Counts(NamedTuple):
    """Answers by what they say (positive: yes) and whether that is true.

    `total` and `right` also count answers that are neither yes nor no. `yes`: what the share of
    yes counts.
    """

    tp: int
    fp: int
    tn: int
    fn: int
    right: int
    yes: int
    total: int

    def figures(self) -> dict[str, float]:
        """Shares of 1. What has nothing to divide by is 0."""
        precision, recall = share(self.tp, self.tp + self.fp), share(self.tp, self.tp + self.fn)
        return {
            "accuracy": share(self.right, self.total), "precision": precision, "recall": recall,
            "f1": share(2 * precision * recall, precision + recall),
            "yes_ratio": share(self.yes, self.total),
        }  # fmt: skip


def share(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0


def count(parsed: Sequence[str], labels: Sequence[str], *, yes_of_labels: bool = False) -> Counts:
    """Parsed answers beside the labels "yes" and "no".

    `yes_of_labels`: lmms-eval's share of yes is that of the labels, not of the answers.
    """
    pairs = list(zip(parsed, labels, strict=True))
    return Counts(
        tp=pairs.count(("yes", "yes")), fp=pairs.count(("yes", "no")),
        tn=pairs.count(("no", "no")), fn=pairs.count(("no", "yes")),
        right=sum(said == label for said, label in pairs),
        yes=list(labels if yes_of_labels else parsed).count("yes"), total=len(pairs),
    )  # fmt: skip
