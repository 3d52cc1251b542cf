"""FocusLLaVA's claims, each with the comparisons that could refute it and the verdict of these."""

from focus_jax.study.comparisons import (
    at_equal_slots,
    compared,
    gate_of,
    only,
    routed,
    tokens_an_image,
)
from focus_jax.study.cuts import guided, middle, source
from focus_jax.study.results import Results
from focus_jax.study.statistics import spearman
from focus_jax.study.verdicts import (
    EQUAL,
    FINER,
    FOLLOWS,
    IGNORES,
    TIME,
    Check,
    Claim,
    Rule,
    finer,
    follows,
    in_time,
    percent,
    rule_text,
)

PAPER = 0.39  # of the tokens: the paper's headline
LEAN = ("random", "uniform", "pool", "downsample")


def claims(r: Results) -> list[Claim]:
    """All of them, in the order of the page."""
    return [
        lossless(r), adaptive(r), guided(r), middle(r), source(r), router(r), ingredients(r),
        timely(r),
    ]  # fmt: skip


# -------------------------------------------------------------------------- claims 1 and 2


def lossless(r: Results) -> Claim:
    """1: so few of the tokens lose nothing; the paper says so of 39 %."""
    own = r.of_role("ours") + r.of_role("budget")
    near = min(own, key=lambda row: abs(row.mean_share - PAPER), default=None)
    checks = [
        compared(
            r, f"{row.name} ({row.mean_share:.0%} of the slots) minus full", row, r.full, "no loss",
            decides=row is near,
        )
        for row in own
    ]  # fmt: skip
    notes = [] if near is None else [
        f"The arm nearest to {PAPER:.0%} decides: {near.name} with {near.mean_share:.1%}."
    ]  # fmt: skip
    spent = "Fewer" if near is None else f"{near.mean_share:.0%}"
    return Claim(
        f"{spent} of the tokens lose nothing",
        f"With both samplers {spent} of the visual tokens answer as well as all of them; the paper "
        f"says so of {PAPER:.0%}.",
        "The same steps from the same base with all tokens.",
        f"Accuracy minus full's: {rule_text('no loss')}.",
        tuple(checks),
        tuple(notes),
    )


def adaptive(r: Results) -> Claim:
    """2: compression must be adaptive."""
    ours = only(r.of_role("ours"))
    checks = [
        at_equal_slots(
            r, f"trained with: {ours.name if ours else 'ours'} minus {row.name}", ours, row
        )
        for row in r.of_role("plain")
    ]
    weights = r.full.name
    for share in dict.fromkeys(row.share for row in r.rows if row.share):
        own = r.row("focusllava", weights, share)
        for name in LEAN:
            control = r.row(name, weights, share)
            if own is not None and control is not None:
                what = f"untrained, {share:.0%}: focusllava minus {name}"
                checks.append(at_equal_slots(r, what, own, control))
    return Claim(
        "Compression must be adaptive",
        "Choosing by image and question beats schemes that look at neither.",
        "Random patches, evenly spaced ones, pooling and a smaller image, at equal mean slots: on "
        "weights trained with all tokens, and trained with in the same steps.",
        f"Accuracy of FocusLLaVA minus the control's: {rule_text('better')}. A control counts "
        f"where its mean slots are within {EQUAL:.0%} of FocusLLaVA's own, or where it spends more "
        "and is beaten all the same, or less and wins all the same.",
        tuple(checks),
        ("Untrained, regions are ranked by the measured loss: the router has no weights there.",),
    )


# ------------------------------------------------------------------------- claims 6, 7, 8


def router(r: Results) -> Claim:
    """6: the learned router finds content."""
    ours = only(r.of_role("ours"))
    name = ours.name if ours else "ours"
    checks = routing_checks(r, name)
    trained = [(f"trained with: {row.name}", row) for row in r.of_role("gate")]
    placed = [
        (f"on the same weights: {row.name}", row) for row in r.rows
        if row.weights == name and not row.trained and not row.share
    ]  # fmt: skip
    for head, row in [*placed, *trained]:
        rule: Rule = "better" if gate_of(row.asked) in ("random", "uniform") else "no loss"
        what = f"{name} minus {head}"
        checks.append(compared(r, what, ours, row, rule, decides=rule == "better"))
    return Claim(
        "The learned router finds what there is to see",
        "Regions with content get the fine scale, empty ones the coarse.",
        "Random, uniform and oracle routing at equal budget, on the same weights and trained with.",
        f"The correlation of a region's tokens with its glyphs held if at least {FOLLOWS} in every "
        f"seed, did NOT hold if under {IGNORES} in one. The share of regions at the finest scale "
        f"held if filled ones have it at least {FINER:g} times as often as empty ones, did NOT "
        f"hold if no oftener. Against random and uniform routing: {rule_text('better')}. Against "
        f"the oracle and the measured loss, which decide nothing: {rule_text('no loss')}.",
        tuple(checks),
        tuple(left_empty(r, name)),
    )


def routing_checks(r: Results, name: str) -> list[Check]:
    """Whether the tokens of ours follow the glyphs, by rank and by its finest scale."""
    rank, finest = (
        f"rank correlation of {name}'s tokens with glyphs, by seed",
        f"{name}'s finest scale: share on filled, on empty regions",
    )
    one = routed(r, name)
    if one is None:
        return [Check(rank, "-", "not measured"), Check(finest, "-", "not measured")]
    values = ", ".join("none" if c is None else f"{c:.2f}" for c in one.correlations)
    filled, empty = one.routing.filled, one.routing.empty
    shares = ", ".join("none" if c is None else f"{c:.1%}" for c in (filled, empty))
    return [
        Check(rank, values, follows(one.correlations)), Check(finest, shares, finer(filled, empty)),
    ]  # fmt: skip


def left_empty(r: Results, name: str) -> list[str]:
    """A note where uniform routing spends less than ours: from what was really spent."""
    ours = routed(r, name)
    uniform = next((one for one in r.routed if gate_of(one.asked) == "uniform"), None)
    if ours is None or uniform is None:
        return []
    own, theirs = tokens_an_image(r, ours), tokens_an_image(r, uniform)
    if theirs >= own:
        return []
    return [
        f"Uniform routing leaves some slots empty, because no whole step to a finer scale fits "
        f"into what remains: {theirs:.1f} tokens an image, {name} {own:.1f}."
    ]


def ingredients(r: Results) -> Claim:
    """7: balance loss, noise, alignment."""
    checks = []
    for without, with_ in r.parts:
        one, control = r.row(with_), r.row(without)
        if one is None or one.role != "cut":
            checks.append(compared(r, f"{with_} minus {without}", one, control, "better"))
    ours = only(r.of_role("ours"))
    for row in r.of_role("router"):
        name = ours.name if ours else "ours"
        checks.append(compared(r, f"{name} minus {row.name}", ours, row, "better", decides=False))
    return Claim(
        "Balance loss, Gumbel noise and alignment each help",
        "The router needs a balancing loss, stochastic training and a stage of alignment.",
        "The same training without the part. " + aligned_words(r),
        f"With the part minus without: {rule_text('better')}. Other learned gates decide nothing.",
        tuple(checks),
    )


def aligned_words(r: Results) -> str:
    """For which gate alignment is tested."""
    ours = only(r.of_role("ours"))
    gate = gate_of(ours.asked) if ours else ""
    own = f"`{gate}`, the gate under study" if gate else "the gate under study"
    return (
        f"Alignment is tested for {own}, and for the switch gate, which has nothing but its "
        "balance loss to align by; balance for the switch gate without alignment; noise for the "
        "gate that has it."
    )


def timely(r: Results) -> Claim:
    """8: saved slots are saved time."""
    checks = []
    for row in [*r.of_role("ours"), *r.of_role("budget")]:
        saved = row.time_saved(r.full)
        if saved is None or row.mean_share >= 1:
            continue
        slots, flops = 1 - row.mean_share, 1 - row.flops / r.full.flops
        figure = (
            f"{slots:.0%} of the slots, {flops:.0%} of the operations, {percent(saved)} of the time"
        )
        checks.append(Check(f"saved by {row.name}", figure, in_time(slots, saved), estimate=saved))
    timed = [row for row in r.rows if row.ms is not None]
    notes = []
    if len(timed) > 2:
        notes = [
            f"All {len(timed)} timed rows ran once in each of {len(r.full.rounds)} rounds, in "
            "another order each time (first seed). What a row saves is the median of its ratios "
            "to full in the same round; the interval is that median's."
        ]
        ranks = (
            spearman([get(row) for row in timed], [row.ms for row in timed])
            for get in (lambda row: row.mean_slots, lambda row: row.flops)
        )
        by_slots, by_flops = ("none" if rank is None else f"{rank:.2f}" for rank in ranks)
        notes.append(
            f"Rank correlation of time with mean slots {by_slots}, with operations {by_flops}."
        )
    return Claim(
        "Saved slots are saved time",
        "Fewer visual tokens make answers cheaper.",
        "The measured time of one question's prefill beside the planned slots and operations.",
        f"The share of time saved against {TIME:.0%} of the share of slots saved: held if its "
        "whole 95 % interval lies at or above, did NOT hold if it lies below, otherwise not told "
        "apart.",
        tuple(checks),
        tuple(notes),
    )
