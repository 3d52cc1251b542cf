"""How far a recorded array and ours may be apart, as its case says, and how far they are."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

VALUE = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?"
NUMBER = re.compile(rf"\b(atol|rtol)\s*=?\s*({VALUE})", re.IGNORECASE)
# What is relative where a case says nothing, by a word of its name: probabilities, shares of them.
RELATIVE = {"score", "scores", "attn", "attention", "threshold", "ratio", "percentiles", "q1_q3"}


class Tolerance(NamedTuple):
    """As NumPy's: |ours - recorded| <= atol + rtol |recorded|. Both 0: exact."""

    atol: float = 0.0
    rtol: float = 0.0

    def __str__(self) -> str:
        parts = [f"{n} {v:g}" for n, v in zip(self._fields, self, strict=True) if v]
        return ", ".join(parts) or "exact"


class Difference(NamedTuple):
    """One recorded array beside ours.

    `error`: the largest difference, relative where the tolerance is purely so; of arrays that must
    be equal, how many entries are not. None: there is no number. `fault`: what is wrong, or empty.
    """

    error: float | int | None
    allowed: Tolerance
    fault: str = ""

    def __str__(self) -> str:
        return self.fault or ("exact" if self.allowed == Tolerance() else f"{self.error:.1e}")

    def to_json(self) -> dict[str, Any]:
        """Plain values; `within` tells whether it is close enough."""
        out = {"error": self.error, "allowed": str(self.allowed), "within": not self.fault}
        return out | ({"fault": self.fault} if self.fault else {})


# --------------------------------------------------------------------------- what is allowed


def parse(stated: Mapping[str, str]) -> dict[str, Tolerance]:
    """Tolerances by the names that a case gives them: `exact`, `atol 2e-4, rtol 1e-4`, `the same`.

    A number alone (`1e-6`) is absolute. What stands behind a semicolon or in brackets is a remark.
    ValueError: words without a meaning.
    """
    out: dict[str, Tolerance] = {}
    for name, text in stated.items():
        rule = re.split(r"[;(]", str(text))[0].strip()
        if re.fullmatch(VALUE, rule, re.IGNORECASE):
            rule = f"atol {rule}"
        numbers = {kind.lower(): float(value) for kind, value in NUMBER.findall(rule)}
        if numbers:
            out[name] = Tolerance(**numbers)
        elif rule.startswith("exact"):
            out[name] = Tolerance()
        elif rule == "the same" and out:
            out[name] = list(out.values())[-1]
        else:
            raise ValueError(f"tolerances.{name} is {text!r}: give 'exact', 'atol X' or 'rtol X'")
    return out


def tolerance_of(name: str, array: np.ndarray, stated: Mapping[str, Tolerance]) -> Tolerance:
    """The tolerance of an array: exact for whole numbers, bools and text, else as stated.

    A stated name is the array's own (`tokens`), several short ones (`q23_k23`), or words that the
    array's name has, numbers aside (`scores` for `scores_stage0`); most words win. Else attention,
    thresholds and ratios have rtol 1e-4, everything else atol 1e-4.
    """
    if array.dtype.kind not in "fc":
        return Tolerance()
    if name in stated:
        return stated[name]
    own = {name, *words(name)}
    fits = [key for key in stated if name in pairs(key) or set(words(key)) <= own]
    if fits:
        return stated[max(fits, key=lambda key: len(words(key)))]
    return Tolerance(rtol=1e-4) if own & RELATIVE else Tolerance(atol=1e-4)


def words(name: str) -> list[str]:
    """The words of a name without their numbers."""
    return re.findall(r"[a-z]+", name.lower())


def pairs(key: str) -> list[str]:
    """The short names that a stated one is made of: q23 and k23."""
    return key.split("_") if re.fullmatch(r"[a-z]\d+(_[a-z]\d+)+", key) else []


# ------------------------------------------------------------------------------- what is found


def compare(ours: Any, recorded: np.ndarray, allowed: Tolerance) -> Difference:
    """Two arrays. NaN equals NaN, an infinity itself."""
    ours = np.asarray(ours)
    if ours.shape != recorded.shape:
        return Difference(None, allowed, f"{list(ours.shape)} instead of {list(recorded.shape)}")
    if allowed == Tolerance():
        return compare_exactly(ours, recorded)
    ours, recorded = (np.asarray(a, np.float64) for a in (ours, recorded))
    same = (ours == recorded) | (np.isnan(ours) & np.isnan(recorded))
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.where(same, 0.0, np.abs(ours - recorded))
        relative = np.where(same, 0.0, apart / np.abs(recorded))
        beyond = ~same & ~(apart <= allowed.atol + allowed.rtol * np.abs(recorded))
    # Nothing but itself is near an infinity, though a relative tolerance there is one too.
    beyond |= ~same & ~np.isfinite(recorded)
    worst = float((relative if allowed.atol == 0 else apart).max(initial=0.0))
    number = worst if np.isfinite(worst) else None
    if not beyond.any():
        return Difference(number, allowed)
    shown = f"{worst:.1e}" if number is not None else "not finite"
    count = f"{beyond.sum()} of {beyond.size} beyond {allowed}"
    return Difference(number, allowed, f"{shown} ({count})")


def compare_exactly(ours: np.ndarray, recorded: np.ndarray) -> Difference:
    """Indices, counts, bools, text, and what was only copied."""
    differ = np.asarray(ours != recorded)
    if recorded.dtype.kind in "fc" and ours.dtype.kind in "fc":
        differ &= ~(np.isnan(ours) & np.isnan(recorded))
    count = int(differ.sum())
    if not count:
        return Difference(0, Tolerance())
    first = tuple(int(i) for i in np.argwhere(differ)[0])
    shown = f"{count} of {differ.size} differ, first {list(first)}: {ours[first]}"
    return Difference(count, Tolerance(), f"{shown} instead of {recorded[first]}")
