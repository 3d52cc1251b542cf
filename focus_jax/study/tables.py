"""The tables of the study's page."""

from collections.abc import Sequence
from typing import Any

from focus_jax.report import markdown_table
from focus_jax.study.comparisons import (
    curve,
    keeps,
    layers,
    loss_of,
    shown_gates,
    tokens_an_image,
)
from focus_jax.study.placement import Curve
from focus_jax.study.results import Results, Row
from focus_jax.study.routing import Group
from focus_jax.study.statistics import Estimate, difference, share_right
from focus_jax.study.verdicts import Check, Claim, percent, points

DECILED = ("random", "oracle")  # control gates in the table of tenths


def summary(found: Sequence[Claim]) -> str:
    """One line for each claim."""
    rows = [
        {"number": str(i), "claim": claim.title, "verdict": f"**{claim.verdict}**"}
        for i, claim in enumerate(found, start=1)
    ]
    return markdown_table(
        rows, [("number", "#", ""), ("claim", "claim", ""), ("verdict", "verdict", "")]
    )


def checks_table(checks: Sequence[Check]) -> str:
    """Every comparison with its own verdict."""
    rows = [
        {
            "what": c.what, "figure": c.figure, "verdict": c.verdict,
            "decides": "yes" if c.decides else "no",
        }
        for c in checks
    ]  # fmt: skip
    return markdown_table(
        rows,
        [
            ("what", "comparison", ""), ("figure", "measured", ""), ("verdict", "verdict", ""),
            ("decides", "decides", ""),
        ],
    )  # fmt: skip


# ---------------------------------------------------------------------------------- cuts


def placement_table(r: Results) -> str:
    """All layers and shares: accuracy by what stays; the highest and the lowest beside others."""
    rows = []
    for keep in keeps(r):
        for layer in layers(r):
            found = {k: curve(r, layer, keep, k) for k in ("top", "random", "least", "oracle")}
            values = {k: share_right(c.correct).value if c else None for k, c in found.items()}
            top, chance = found["top"], found["random"]
            won = difference(top.correct, chance.correct) if top and chance else None
            rows.append(
                {
                    "keep": keep, "layer": layer, **values,
                    "won": brief(won), "lost": brief(lost(r, top)),
                    "least_lost": brief(lost(r, found["least"])),
                }
            )  # fmt: skip
    table = markdown_table(
        rows,
        [
            ("keep", "keep", ".0%"), ("layer", "layer", "d"), ("top", "highest", ".1%"),
            ("random", "random", ".1%"), ("least", "lowest", ".1%"), ("oracle", "oracle", ".1%"),
            ("won", "highest minus random", ""), ("lost", "highest minus full", ""),
            ("least_lost", "lowest minus full", ""),
        ],
    )  # fmt: skip
    images, questions = r.curves[0].correct.shape
    return (
        f"{table}\n{images * questions} questions about {images} images; differences in points.\n"
    )


def lost(r: Results, c: Curve | None) -> Estimate | None:
    return loss_of(r, c) if c else None


def brief(d: Estimate | None) -> str | None:
    """`+1.2 (-0.3 to +2.7)`, in points."""
    return points(d).replace(" points", "") if d else None


def source_table(r: Results) -> str:
    """Accuracy of the highest scores by the rows that ask."""
    tops = [c for c in r.curves if c.rank == "top"]
    names = list(dict.fromkeys(c.queries for c in tops))
    rows: dict[tuple[float, int], dict[str, Any]] = {}
    for c in tops:
        empty: dict[str, Any] = dict.fromkeys(names)
        row = rows.setdefault((c.keep, c.layer), {"keep": c.keep, "layer": c.layer, **empty})
        row[c.queries] = share_right(c.correct).value
    return markdown_table(
        list(rows.values()),
        [("keep", "keep", ".0%"), ("layer", "layer", "d"), *((n, n, ".1%") for n in names)],
    )


# --------------------------------------------------------------------------------- gates


def routing_table(r: Results) -> str:
    """What each gate did with the regions."""
    rows = []
    for one in r.routed:
        found = one.routing
        by_count: dict[str, float | None] = {f"n{i}": None for i in range(5)}
        by_count |= {f"n{min(group.low, 4)}": group.share for group in found.counts}
        rows.append(
            {
                "name": one.name, "weights": one.weights, "rank": found.correlation,
                "tokens": tokens_an_image(r, one), "filled": found.filled, "empty": found.empty,
                **by_count,
            }
        )  # fmt: skip
    counts = [(f"n{i}", f"{i} glyphs" if i < 4 else "4 or more", ".0%") for i in range(5)]
    table = markdown_table(
        rows,
        [
            ("name", "gate or arm", ""), ("weights", "weights", ""),
            ("tokens", "tokens an image", ".1f"), ("rank", "rank correlation", ".2f"),
            ("filled", "finest on filled", ".0%"), ("empty", "finest on empty", ".0%"), *counts,
        ],
    )  # fmt: skip
    return f"{table}\nThe last columns: share of the finest scale by the glyphs of a region.\n"


def deciles_table(r: Results) -> str:
    """The share of the finest scale by tenths of content: a column for each gate."""
    shown = shown_gates(r, DECILED)
    if not shown:
        return ""
    rows, done, regions = [], 0, shown[0].routing.regions
    for group in shown[0].routing.deciles:
        start, done = done, done + group.n
        glyphs = f"{group.low}" if group.low == group.high else f"{group.low} to {group.high}"
        shares = {f"g{i}": share_at(one.routing.deciles, group) for i, one in enumerate(shown)}
        part = f"{start / regions:.0%} to {done / regions:.0%}"
        rows.append({"part": part, "glyphs": glyphs, "n": group.n, **shares})
    names = [
        one.name if one.name == one.weights else f"{one.name} on {one.weights}" for one in shown
    ]
    table = markdown_table(
        rows,
        [
            ("part", "regions by content", ""), ("glyphs", "glyphs", ""), ("n", "regions", "d"),
            *((f"g{i}", name, ".0%") for i, name in enumerate(names)),
        ],
    )  # fmt: skip
    return (
        f"{table}\nShare of the finest scale by tenths of the regions, those with the fewest "
        "glyphs first. Regions with equally many glyphs are never parted: where ties span several "
        "tenths, these are merged.\n"
    )


def share_at(groups: Sequence[Group], like: Group) -> float | None:
    """The share of the group with the same glyphs."""
    return next((g.share for g in groups if (g.low, g.high) == (like.low, like.high)), None)


# ------------------------------------------------------------------------------- methods


def cells(r: Results, row: Row) -> dict[str, Any]:
    """A row of a table of methods."""
    d = row.minus(r.full)
    return {
        "name": row.name,
        "weights": row.weights,
        "accuracy": percent(row.accuracy),
        "full": points(d),
        "real": "yes" if d.low > 0 or d.high < 0 else "no",
        "slots": f"{row.mean_slots:.1f} ({row.mean_share:.1%})",
        "flops": row.flops / 1e9,
        "kv": row.kv_bytes / 2**10,
        "ms": row.ms,
        "asked": f"`{row.asked}`",
    }


COLUMNS: list[tuple[str, str, Any]] = [
    ("name", "method", ""), ("weights", "weights", ""), ("accuracy", "accuracy", ""),
    ("full", "to full", ""), ("real", "real", ""), ("slots", "mean slots", ""),
    ("flops", "GFLOPs", ".3f"), ("kv", "KV KiB", ".0f"), ("ms", "ms", ".2f"),
    ("asked", "--method", ""),
]  # fmt: skip


def arms_table(r: Results) -> str:
    """All arms, and control gates on the weights of ours."""
    return markdown_table([cells(r, row) for row in r.rows if not row.share], COLUMNS)


def methods_table(r: Results, share: float) -> str:
    """Every method at one share that nothing was trained for, best first."""
    return markdown_table([cells(r, row) for row in best_first(r, share)], COLUMNS)


def best_first(r: Results, share: float) -> list[Row]:
    rows = [row for row in r.rows if row.share == share]
    return sorted(rows, key=lambda row: -row.accuracy.value)


def kinds_table(r: Results, rows: Sequence[Row]) -> str:
    """Accuracy of rows on each kind of question."""
    lines = [{"name": row.name, "weights": row.weights, **r.by_kind(row)} for row in rows]
    kinds = list(r.by_kind(r.full))
    head = [("name", "method", ""), ("weights", "weights", "")]
    return markdown_table(lines, [*head, *((k, k, ".1%") for k in kinds)])
