"""The study's page: each claim with its measurement, its control and the verdict of a rule."""

from collections.abc import Sequence
from pathlib import Path

from focus_jax.study.claims import claims
from focus_jax.study.results import Results
from focus_jax.study.tables import (
    arms_table,
    best_first,
    checks_table,
    deciles_table,
    kinds_table,
    methods_table,
    placement_table,
    routing_table,
    source_table,
    summary,
)
from focus_jax.study.verdicts import Check, Claim

__all__ = ["page", "summary"]

TITLES = {
    "placement": "accuracy over the layer of the cut",
    "routing": "share of the finest scale by content",
    "slots": "accuracy over mean slots",
    "time": "accuracy over measured time",
}
PICTURED = {3: ("placement",), 4: ("placement",), 6: ("routing",), 2: ("slots",), 8: ("time",)}


LANGUAGE = """The language model was pre-trained once (`configs/glyphs_language.py`) and is shared
by all seeds: a seed is of the images and their order, and of the tower, the projector, the router
and the joint training."""


def page(r: Results, command: str, pictures: dict[str, Path]) -> str:
    """The whole page; `pictures` by the names of `TITLES`, as the page shall name them."""
    found = claims(r)
    parts = [intro(r), f"## In short\n\n{summary(found)}\n{again(command)}"]
    extra = tables_of_claims(r)
    for number, claim in enumerate(found, start=1):
        shown = [
            f"![{TITLES[n]}]({pictures[n]})" for n in PICTURED.get(number, ()) if n in pictures
        ]
        parts.append(section(number, claim, extra.get(number, ""), shown, command))
    parts.append(f"## All arms\n\n{arms_text(r)}\n\n{arms_table(r)}\n{again(command)}")
    parts.append(f"## By kind of question\n\n{kinds(r)}\n{again(command)}")
    for share in shares(r):
        parts.append(
            f"## Every method at {share:.0%} of the slots, not trained for\n\n"
            f"{methods_table(r, share)}\n{again(command)}"
        )
    return "\n".join(parts)


def intro(r: Results) -> str:
    """What was done, and how to read it."""
    seeds = ", ".join(map(str, r.seeds))
    best = r.chosen.get("layer")
    aside = f" (on validation the best one is {best})" if best is not None else ""
    asks = r.chosen.get("queries")
    chosen = f" (`{asks}`)" if asks else ""
    language = "Each trains its own language model." if r.size == "gpu" else LANGUAGE
    return f"""# What each part of FocusLLaVA brings, with controls

Each claim stands beside the control that could refute it. Verdicts are computed from the data by
the rule that is printed with them: nobody wrote them. Size `{r.size}`: {r.kind.size} questions
about {r.images} images of the test split in all, {r.patches} patches an image, {r.layers} decoder
layers, on {r.device}. A question counts as right if greedy decoding would say the whole answer.

Seeds {seeds}. {language} All arms of a seed start from the same base and take equally many steps in
the last stage; arms with a router to train had the alignment stage, of the router alone, before it,
but for one that tests its absence.

Which rows ask in the cuts of claims 3 and 4 was read off the validation split{chosen}; the layer of
the cut is the config's, {r.cut_layer}{aside}; claim 5 judges the config's rows, `{r.cut_queries}`.

Intervals are of 95 %, paired by question and clustered by image; over seeds they tell of the images
and of these seeds' weights, not of all seeds that might be. Many comparisons are made: one in forty
would be told apart in each direction by chance alone. The study took {r.seconds / 60:.0f} minutes.
"""


def again(command: str) -> str:
    """The command that makes a table."""
    return f"```\n{command}\n```\n"


def section(number: int, claim: Claim, extra: str, shown: Sequence[str], command: str) -> str:
    """A claim with all that bears on it."""
    lines = [
        f"## {number}. {claim.title}\n",
        f"**Verdict: {claim.verdict}.** {because(claim)}\n",
        f"*Claim.* {claim.said}\n",
        f"*Control.* {claim.control}\n",
        f"*Rule.* {claim.rule}\n",
    ]
    if claim.checks:
        lines.append(checks_table(claim.checks))
    lines += [note + "\n" for note in claim.notes]
    if extra:
        lines.append(extra)
    lines += [picture + "\n" for picture in shown]
    return "\n".join([*lines, again(command)])


def because(claim: Claim) -> str:
    """The comparisons behind a verdict, in plain words."""
    deciding = [c for c in claim.checks if c.decides]
    against = [c for c in deciding if c.verdict == "did NOT hold"]
    open_ = [c for c in deciding if c.verdict == "not told apart"]
    if claim.verdict == "did NOT hold":
        return f"The data refute it: {told(against)}."
    if claim.verdict == "not told apart":
        return f"The data neither show nor refute it: {told(open_)}."
    if claim.verdict == "held":
        held = sum(c.verdict == "held" for c in deciding)
        return f"Every check that decides and was measured holds ({held})."
    return "Nothing was measured that could decide it."


def told(checks: Sequence[Check]) -> str:
    return "; ".join(f"{check.what}, {check.figure}" for check in checks)


def tables_of_claims(r: Results) -> dict[int, str]:
    """Tables that stand in a claim's section, by its number."""
    out: dict[int, str] = {}
    if r.curves:
        out[4] = placement_table(r)
        out[5] = source_table(r)
    if r.routed:
        out[6] = "\n".join((routing_table(r), deciles_table(r)))
    return out


def arms_text(r: Results) -> str:
    return (
        "Slots, operations and cache bytes are of one question's prefill, by the plan; ms: the "
        "median over rounds (first seed alone, some rows only), on cores that other work may "
        "share. "
        f"Differences are to `{r.full.name}`; `real`: their interval does not hold 0."
    )


def kinds(r: Results) -> str:
    """Accuracy by kind: arms and control gates, then every share's methods folded away."""
    parts = [kinds_table(r, [row for row in r.rows if not row.share])]
    for share in shares(r):
        table = kinds_table(r, best_first(r, share))
        head = f"<summary>Every method at {share:.0%} of the slots</summary>"
        parts.append(f"<details>\n{head}\n\n{table}\n</details>\n")
    return "\n".join(parts)


def shares(r: Results) -> list[float]:
    return list(dict.fromkeys(row.share for row in r.rows if row.share))
