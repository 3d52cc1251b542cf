"""OCRBench: a gold answer must stand within the prediction; points of 1000 by category.

The authors' rule (Yuliang-Liu/MultimodalOCR, OCRBench/example.py), and that of lmms-eval's task.
"""

from collections.abc import Sequence

# Handwritten formulas: case means something there, spaces do not.
FORMULAS = "HME100k"
RECOGNITION = tuple(
    f"{kind} Recognition"
    for kind in (
        "Regular Text", "Irregular Text", "Artistic Text", "Handwriting", "Digit String",
        "Non-Semantic Text",
    )
)  # fmt: skip
# Every type of question with the group whose points the paper prints.
GROUPS = dict.fromkeys(RECOGNITION, "recognition") | {
    "Scene Text-centric VQA": "scene",
    "Doc-oriented VQA": "document",
    "Key Information Extraction": "information",
    "Handwritten Mathematical Expression Recognition": "formulas",
}
# Full-width ASCII and the ideographic space, as Chinese text has them.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def contains(prediction: str, golds: Sequence[str], dataset: str) -> float:
    """1 where any gold answer is a part of the prediction, case ignored; spaces for formulas."""
    fold = _formula if dataset == FORMULAS else _text
    guess = fold(prediction)
    return float(any(fold(gold) in guess for gold in golds))


def contains_lmms_eval(prediction: str, golds: Sequence[str], dataset: str) -> float:
    """lmms-eval's: full-width letters count as the usual ones, but in formulas."""
    if dataset != FORMULAS:
        prediction, *golds = (text.translate(_HALF_WIDTH) for text in (prediction, *golds))
    return contains(prediction.strip(), golds, dataset)


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")
