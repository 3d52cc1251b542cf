"""The claims about cuts: what attention picks (3), at which layer (4), and which rows ask (5)."""

from collections.abc import Sequence

from focus_jax.study.comparisons import (
    between,
    compared,
    curve,
    keeps,
    layer_of,
    layers,
    loss_of,
    to_full,
)
from focus_jax.study.placement import Curve
from focus_jax.study.results import Results
from focus_jax.study.statistics import difference
from focus_jax.study.verdicts import (
    BAR_FULL,
    BAR_RANDOM,
    MARGIN,
    PLACED_MARGIN,
    Check,
    Claim,
    Rule,
    Verdict,
    judge,
    rule_text,
)


def guided(r: Results) -> Claim:
    """3: text guidance picks tokens better than chance."""
    at = r.chosen.get("at", r.cut_layer)
    checks = []
    for keep in keeps(r):
        top, head = curve(r, at, keep, "top"), f"layer {at}, keep {keep:.0%}: highest minus"
        for rank in ("random", "least"):
            checks.append(between(f"{head} {rank}", top, curve(r, at, keep, rank), "better"))
        oracle = curve(r, at, keep, "oracle")
        checks.append(between(f"{head} oracle", top, oracle, "no loss", decides=False))
        checks.append(to_full(r, f"{head} full", top, "no loss", decides=False))
    for without, with_ in r.parts:
        one, control = r.row(with_), r.row(without)
        if one is not None and one.role == "cut":
            what = f"trained with: {with_} minus {without}"
            checks.append(compared(r, what, one, control, "better"))
    return Claim(
        "Text guidance picks the tokens that matter",
        "The tokens with the most attention from the instruction are worth more than others.",
        "As many tokens drawn at random, or those with the least attention, behind the same layer; "
        "the cells that the question is about show what there is to win.",
        f"Accuracy of the highest minus the control's at the sampler's layer: "
        f"{rule_text('better')}. Random and least decide; the oracle and full do not: "
        f"{rule_text('no loss', PLACED_MARGIN)}.",
        tuple(checks),
        (bar_words(r, at),) if r.curves else (),
    )


def meets_bar(r: Results, layer: int, keep: float) -> bool:
    """Whether the highest attention wins enough over chance and loses little to full tokens."""
    top, chance = curve(r, layer, keep, "top"), curve(r, layer, keep, "random")
    if top is None or chance is None:
        return False
    won, lost = difference(top.correct, chance.correct), loss_of(r, top)
    return won.low >= BAR_RANDOM and lost.value >= -BAR_FULL


def bar_words(r: Results, at: int) -> str:
    """Where the bar is met: at the sampler's layer, and anywhere."""
    met = {
        layer: [f"{keep:.0%}" for keep in keeps(r) if meets_bar(r, layer, keep)]
        for layer in layers(r)
    }
    here = f"met with {', '.join(met[at])}" if met.get(at) else "met with no share"
    others = [f"layer {n} at {', '.join(found)}" for n, found in met.items() if found and n != at]
    elsewhere = f"other layers that meet it: {'; '.join(others)}" if others else "no other layer"
    return (
        f"The bar for a good choice is at least {100 * BAR_RANDOM:g} points over random (the "
        f"interval's lower end) and at most {100 * BAR_FULL:g} point under full (the mean). At "
        f"layer {at} it is {here} of the tokens kept; {elsewhere}."
    )


def vacuous(r: Results, keep: float) -> int | None:
    """The first measured layer from which on the LOWEST attention loses nothing to full tokens."""
    found = None
    for layer in reversed(layers(r)):
        if lowest(r, layer, keep) != "did NOT hold":
            break
        found = layer
    return found


def lowest(r: Results, layer: int, keep: float) -> Verdict:
    """Whether it matters at a layer which tokens stay, by those with the lowest attention."""
    least = curve(r, layer, keep, "least")
    if least is None:
        return "not measured"
    return judge("matters", loss_of(r, least), PLACED_MARGIN)


def vacuous_words(r: Results, keep: float) -> str:
    """The layer past which a cut is vacuous, in words."""
    measured, layer = layers(r), vacuous(r, keep)
    before = [n for n in measured if layer is None or n < layer]
    open_ = [n for n in before if lowest(r, n, keep) == "not told apart"]
    alike = [n for n in before if lowest(r, n, keep) == "did NOT hold"]
    if layer is not None:
        said = (
            f"from layer {layer} on (of those measured) those with the LOWEST attention serve as "
            "well as all tokens: a cut there is vacuous, and a good score there is no sign of a "
            "good choice"
        )
    else:
        said = "at the last layer measured the lowest attention does not serve as well for certain"
        if all(lowest(r, n, keep) == "held" for n in measured):
            said = (
                "none of the layers measured is late enough for the lowest attention to serve as "
                "well: which tokens stay matters at all of them"
            )
    parts = [f"With {keep:.0%} of the tokens, {said}"]
    if open_:
        parts.append(f"whether it matters is not told apart at layer {listed(open_)}")
    if alike:
        parts.append(f"the lowest serves as well at layer {listed(alike)}, but not at a later one")
    return "; ".join(parts) + "."


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def middle(r: Results) -> Claim:
    """4: a middle layer is the best place."""
    places, at = layers(r), r.chosen.get("at", r.cut_layer)
    checks: list[Check] = []
    inside = bool(places) and places[0] < at < places[-1]
    for keep in keeps(r) if inside else ():
        here = curve(r, at, keep, "top")
        first, last = (curve(r, layer, keep, "top") for layer in (places[0], places[-1]))
        head = f"keep {keep:.0%}: layer {at}"
        checks.append(between(f"{head} minus layer {places[0]}", here, first, "better"))
        checks.append(between(f"{head} minus layer {places[-1]}", here, last, "no loss"))
        least = curve(r, at, keep, "least")
        checks.append(to_full(r, f"{head}, lowest attention minus full", least, "matters"))
    checks += trained_cuts(r, at)
    notes = [vacuous_words(r, keep) for keep in keeps(r)]
    if r.chosen:
        notes.append(
            f"The layer judged is the config's, {at}; on validation layer {r.chosen['layer']} is "
            "the best one (mean over shares)."
        )
    return Claim(
        "A middle layer is the best place for the cut",
        "Early layers do not know yet what is asked for, late ones save little.",
        "The same cut at the first and at the last layer; the lowest attention at the same layer.",
        f"Middle minus first: {rule_text('better')}. Middle minus last: "
        f"{rule_text('no loss', PLACED_MARGIN)} (trained with: "
        f"{100 * MARGIN:g} point instead of {100 * PLACED_MARGIN:g}). Lowest attention minus full: "
        f"{rule_text('matters', PLACED_MARGIN)}.",
        tuple(checks),
        tuple(notes),
    )


def trained_cuts(r: Results, at: int) -> list[Check]:
    """The arms of one cut each: the one nearest the sampler's layer beside earlier, later ones."""
    rows = {layer_of(row): row for row in r.of_role("cut")}
    if len(rows) < 3:
        return []
    middle_ = min(sorted(rows)[1:-1], key=lambda layer: abs(layer - at))
    checks = []
    for layer, row in sorted(rows.items()):
        if layer != middle_:
            what = f"trained with: layer {middle_} minus layer {layer}"
            rule: Rule = "better" if layer < middle_ else "no loss"
            checks.append(compared(r, what, rows[middle_], row, rule))
    return checks


def source(r: Results) -> Claim:
    """5: where the score comes from."""
    at, own = r.chosen.get("at", r.cut_layer), r.cut_queries
    checks = []
    for keep in keeps(r):
        tops: dict[str, Curve] = {
            c.queries: c for c in r.curves if (c.layer, c.keep, c.rank) == (at, keep, "top")
        }
        for other in (name for name in tops if name != own):
            what = f"layer {at}, keep {keep:.0%}: {own} minus {other}"
            checks.append(between(what, tops.get(own), tops[other], "no loss"))
    best = r.chosen.get("queries")
    return Claim(
        f"Asking with `{own}` is as good as any other source of the score",
        "Which rows ask (the prompt's last token, the mean over the instruction, or its peak) is "
        "not said by the paper; this is the repository's choice.",
        "The other two sources at the same layer and share.",
        f"The config's source minus the other: {rule_text('no loss', PLACED_MARGIN)}.",
        tuple(checks),
        (f"Judged is the config's source; on validation `{best}` is the best one.",)
        if best
        else (),
    )
