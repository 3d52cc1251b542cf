"""Comparisons of what the study measured: rows with rows, cuts with cuts, each with its verdict."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from focus_jax.study.placement import Curve
from focus_jax.study.results import Results, Routed, Row
from focus_jax.study.statistics import Estimate, difference
from focus_jax.study.verdicts import (
    EQUAL,
    PLACED_MARGIN,
    Check,
    Rule,
    in_every_seed,
    judge,
    points,
)

# ----------------------------------------------------------------------------------- rows


def only(rows: Sequence[Row]) -> Row | None:
    return rows[0] if rows else None


def layer_of(row: Row) -> int:
    """The layer of an arm's text-guided cut."""
    found = re.search(r"text\.layer=(\d+)", row.asked)
    return int(found[1]) if found else 0


def gate_of(asked: str) -> str:
    """The gate that a method names; "" for the base's own."""
    found = re.search(r"vision\.gate=(\w+)", asked)
    return found[1] if found else ""


def by_seed(r: Results, correct: Bool[np.ndarray, "I Q"]) -> Bool[np.ndarray, "S I Q"]:
    """Stacked answers, a seed each."""
    return correct.reshape(len(r.seeds), -1, correct.shape[-1])


def compared(
    r: Results, what: str, a: Row | None, b: Row | None, rule: Rule, decides: bool = True
) -> Check:
    """Row a minus row b under a rule; not measured where one is lacking.

    Two trainings must differ the same way in every seed to be told apart by `better`.
    """
    if a is None or b is None:
        return Check(what, "-", "not measured", decides)
    d = a.minus(b)
    verdict, figure = judge(rule, d), points(d)
    if a.weights != b.weights:
        means = [by_seed(r, row.correct).mean((1, 2)) for row in (a, b)]
        each = (means[0] - means[1]).tolist()
        verdict = in_every_seed(verdict, each) if rule == "better" else verdict
        if len(each) > 1:
            figure += "; by seed " + ", ".join(f"{100 * value:+.1f}" for value in each)
    return Check(what, figure, verdict, decides, d)


def at_equal_slots(r: Results, what: str, ours: Row | None, control: Row | None) -> Check:
    """`better` at equal mean slots.

    A control with another share counts where this makes the outcome stronger: it spends more and
    is beaten all the same, or less and beats ours all the same.
    """
    check = compared(r, what, ours, control, "better")
    if ours is None or control is None:
        return check
    more = control.mean_share / ours.mean_share - 1
    if abs(more) <= EQUAL:
        return check
    spent = f"; spends {control.mean_share:.1%}, not {ours.mean_share:.1%}"
    counts = check.verdict == ("held" if more > 0 else "did NOT hold")
    word = ": counts all the same" if counts else ": does not count"
    return Check(what, check.figure + spent + word, check.verdict, counts, check.estimate)


# ----------------------------------------------------------------------------------- cuts


def curve(r: Results, layer: int, keep: float, rank: str) -> Curve | None:
    """A curve; `top` and `least` are asked by the rows that validation chose."""
    asks = r.chosen.get("queries") if rank in ("top", "least") else ""
    found = (
        c for c in r.curves
        if (c.layer, c.keep, c.rank, c.queries) == (layer, keep, rank, asks)
    )  # fmt: skip
    return next(found, None)


def between(what: str, a: Curve | None, b: Curve | None, rule: Rule, decides: bool = True) -> Check:
    """Curve a minus curve b under a rule, with the margin of placed images."""
    if a is None or b is None:
        return Check(what, "-", "not measured", decides)
    d = difference(a.correct, b.correct)
    return Check(what, points(d), judge(rule, d, PLACED_MARGIN), decides, d)


def to_full(r: Results, what: str, c: Curve | None, rule: Rule, decides: bool = True) -> Check:
    """A curve minus full tokens under a rule, with the margin of placed images."""
    if c is None:
        return Check(what, "-", "not measured", decides)
    d = loss_of(r, c)
    return Check(what, points(d), judge(rule, d, PLACED_MARGIN), decides, d)


def on_placed(r: Results, row: Row, c: Curve) -> Bool[np.ndarray, "I Q"]:
    """A row's answers on the images that a curve is about: the first ones of each seed."""
    images = len(c.correct) // len(r.seeds)
    return by_seed(r, row.correct)[:, :images].reshape(c.correct.shape)


def loss_of(r: Results, c: Curve) -> Estimate:
    """A curve minus full tokens on the same weights and images."""
    return difference(c.correct, on_placed(r, r.full, c))


def keeps(r: Results) -> list[float]:
    return list(dict.fromkeys(c.keep for c in r.curves))


def layers(r: Results) -> list[int]:
    return sorted({c.layer for c in r.curves})


# ---------------------------------------------------------------------------------- gates


def routed(r: Results, name: str, weights: str | None = None) -> Routed | None:
    """What a gate did: of an arm on its own weights, or of a control gate on the given ones."""
    on = name if weights is None else weights
    return next((one for one in r.routed if (one.name, one.weights) == (name, on)), None)


def tokens_an_image(r: Results, one: Routed) -> float:
    """What a gate really spends, which may be less than its slots."""
    return one.routing.tokens / r.images


def shown_gates(r: Results, gates: Sequence[str]) -> list[Routed]:
    """Ours, then every other learned gate, then the control gates named, each once.

    Of a control gate: the arm trained with it, else the gate on the weights of ours.
    """
    ours = only(r.of_role("ours"))
    names = [ours.name] if ours else []
    names += [row.name for row in r.of_role("router")]
    arms = {gate_of(row.asked): row.name for row in r.of_role("gate")}
    found = [routed(r, name) for name in names]
    for gate in gates:
        own = routed(r, arms[gate]) if gate in arms else None
        found.append(own or (routed(r, gate, ours.name) if ours else None))
    return [one for one in found if one is not None]
