"""Verdicts: rules that turn a measured difference into plain words, so that text follows data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from focus_jax.study.statistics import Estimate

Verdict = Literal["held", "did NOT hold", "not told apart", "not measured"]
Rule = Literal["better", "no loss", "matters"]

MARGIN = 0.01  # of all answers: the loss that "no loss" may hide on the whole test split
PLACED_MARGIN = 0.02  # the same behind a cut, where fewer images are asked about
EQUAL = 0.05  # of ours' mean share: how near a control's must be to count as equal
FOLLOWS, IGNORES = 0.5, 0.2  # rank correlations of tokens with content
FINER = 2.0  # times as often at the finest scale: filled regions to empty ones
TIME = 0.8  # of the saved slots' share that must be saved in time
BAR_RANDOM, BAR_FULL = 0.10, 0.01  # what a good choice wins over chance, what it may lose to full


def rule_text(rule: Rule, margin: float = MARGIN) -> str:
    """A rule in words, as `judge` follows it."""
    lost = f"-{margin * 100:g}"
    texts: dict[Rule, str] = {
        "better": "held if the whole 95 % interval of the difference is above 0, did NOT hold if "
        "it is below 0, otherwise not told apart; between two trainings either only if the "
        "difference has that sign in every seed",
        "no loss": f"held if the whole 95 % interval lies at or above {lost} points; otherwise did "
        "NOT hold if it is below 0, else not told apart",
        "matters": f"did NOT hold if the whole 95 % interval lies at or above {lost} points "
        "(whatever stays serves as well); otherwise held if it is below 0, else not told apart",
    }
    return texts[rule]


@dataclass(frozen=True)
class Check:
    """One comparison: what it is, its figure in words, its verdict, and whether that counts.

    A check that does not decide stands in the table for the reader alone. `estimate`: the
    difference behind the figure, where it is one.
    """

    what: str
    figure: str
    verdict: Verdict
    decides: bool = True
    estimate: Estimate | None = None


def judge(rule: Rule, d: Estimate, margin: float = MARGIN) -> Verdict:
    """The verdict of a rule on a difference. Equivalence comes first: a loss too small to matter
    is none, however surely it is there. `matters` says the opposite of `no loss`."""
    if rule == "better":
        return "held" if d.low > 0 else "did NOT hold" if d.high < 0 else "not told apart"
    equal, lost = d.low >= -margin, d.high < 0
    if not equal and not lost:
        return "not told apart"
    return "held" if equal == (rule == "no loss") else "did NOT hold"


def in_every_seed(verdict: Verdict, differences: Sequence[float]) -> Verdict:
    """The verdict `better` on two trainings: no seed may say the opposite."""
    if verdict == "held" and min(differences) <= 0:
        return "not told apart"
    if verdict == "did NOT hold" and max(differences) >= 0:
        return "not told apart"
    return verdict


def together(checks: Sequence[Check]) -> Verdict:
    """Of the checks that decide: one that did not hold refutes, all must hold.

    What was not measured decides nothing.
    """
    found = [c.verdict for c in checks if c.decides and c.verdict != "not measured"]
    if not found:
        return "not measured"
    if "did NOT hold" in found:
        return "did NOT hold"
    return "held" if set(found) == {"held"} else "not told apart"


@dataclass(frozen=True)
class Claim:
    """A claim, what could have refuted it, by which rule, and every comparison made."""

    title: str
    said: str
    control: str
    rule: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return together(self.checks)


def follows(correlations: Sequence[float | None]) -> Verdict:
    """Whether tokens follow content in every seed; no correlation at all counts as 0."""
    values = [value or 0.0 for value in correlations]
    if not values:
        return "not measured"
    if min(values) >= FOLLOWS:
        return "held"
    return "did NOT hold" if min(values) < IGNORES else "not told apart"


def finer(filled: float | None, empty: float | None) -> Verdict:
    """Whether filled regions have the finest scale much oftener than empty ones."""
    if filled is None or empty is None:
        return "not measured"
    if filled <= empty:
        return "did NOT hold"
    return "held" if filled >= FINER * empty else "not told apart"


def in_time(slots: float, time: Estimate) -> Verdict:
    """Whether the share of time saved is near the share of slots saved."""
    if time.low >= TIME * slots:
        return "held"
    return "did NOT hold" if time.high < TIME * slots else "not told apart"


def points(d: Estimate) -> str:
    """`+1.2 points (-0.3 to +2.7)`."""
    return f"{100 * d.value:+.1f} points ({100 * d.low:+.1f} to {100 * d.high:+.1f})"


def percent(e: Estimate) -> str:
    """`51.2% (49.0% to 53.4%)`."""
    return f"{e.value:.1%} ({e.low:.1%} to {e.high:.1%})"
