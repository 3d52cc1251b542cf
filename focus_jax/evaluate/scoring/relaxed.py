"""ChartQA's relaxed accuracy: numbers within 5 %, anything else to the letter.

The rule of lmms-eval's ChartQA task (after Pix2Struct's and Qwen-VL's evaluations).
"""

TOLERANCE = 0.05


def relaxed(prediction: str, gold: str, tolerance: float = TOLERANCE) -> float:
    """1 where |prediction - gold| / |gold| is within the tolerance, in float64.

    Texts are compared, lower-cased, where either is no number, and where the gold one is 0: a
    relative error of nothing has no meaning, so "0.0" is wrong for "0".
    """
    guess, target = number(prediction), number(gold)
    if guess is None or not target:
        return float(prediction.lower() == gold.lower())
    return float(abs(guess - target) / abs(target) <= tolerance)


def number(text: str) -> float | None:
    """What Python's float reads ("1e3", " 5 ", "nan", not "1,000"); a last "%" divides by 100."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
