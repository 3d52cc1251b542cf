"""Medians, ratios with their spread, and the table."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from focus_jax.benchmark.job import Measured

# transformers; this package with all visual tokens; with a text-guided cut.
SIDES = {"hf": "transformers", "full": "focus_jax", "cut": "focus_jax, cut"}


def label(name: str) -> tuple[str, str]:
    """What a measurement is called in the table, and its unit."""
    what, _, count = name.partition(":")
    tiles = tiles_words(count)
    return {
        "load": ("load the checkpoint", "s"),
        "tower": (f"vision tower and projector, {tiles}", "s"),
        "prefill": (f"decoder prefill, {tiles}", "s"),
        "decode": (f"decode, batch {count}", "tokens/s"),
        "memory": ("peak memory", "GiB"),
    }[what]


def tiles_words(count: int | str) -> str:
    """`1 tile`, `5 tiles`."""
    return f"{count} tile{'s' if str(count) != '1' else ''}"


def ratios(rounds: Sequence[Mapping[str, Measured]], name: str, a: str, b: str) -> list[float]:
    """How many times better `b` is than `a`, round by round; above 1 is better."""
    pairs = [(r[a][name], r[b][name]) for r in rounds if name in r.get(a, {}) and name in r[b]]
    more = name.startswith("decode")
    return [(y / x if more else x / y) for x, y in pairs if x and y]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def summary(
    rounds: Sequence[Mapping[str, Measured]], plans: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each measurement: every side's median, and ratios with their spread."""
    out = []
    for name in rounds[0]["full"]:
        sides = {
            side: spread([r[side][name] for r in rounds]) for side in SIDES if side in rounds[0]
        }
        out.append(
            {
                "name": name,
                "label": label(name)[0],
                "unit": label(name)[1],
                "sides": sides,
                "full_over_hf": spread(ratios(rounds, name, "hf", "full")),
                "cut_over_hf": spread(ratios(rounds, name, "hf", "cut")),
                "cut_over_full": spread(ratios(rounds, name, "full", "cut")),
                "planned_cut_over_full": plans.get(name),
            }
        )
    return out


def table(rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> str:
    """Markdown; ratios above 1 are better, with the least and the most of all rounds."""
    compare = [("full_over_hf", "focus_jax / transformers"), ("cut_over_hf", "cut / transformers")]
    compare = compare if "hf" in sides else []
    compare.append(("cut_over_full", "cut / full"))
    heads = ["", *(SIDES[s] for s in sides), *(text for _, text in compare), "planned cut / full"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        scale = 2.0**30 if row["unit"] == "GiB" else 1.0
        cells = [f"{row['label']}, {row['unit']}"]
        cells += [f"{row['sides'][side]['median'] / scale:.3g}" for side in sides]
        cells += [ratio_cell(row[name]) for name, _ in compare]
        plan = row["planned_cut_over_full"]
        lines.append(f"| {' | '.join([*cells, f'{plan:.2f}' if plan else ''])} |")
    return "\n".join(lines) + "\n"


def ratio_cell(value: Mapping[str, float] | None) -> str:
    """`1.52 (1.48..1.60)`."""
    return f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})" if value else ""


def words(measured: Measured) -> str:
    """One side's round on one line."""
    scale = lambda name: 2.0**30 if name == "memory" else 1.0  # noqa: E731
    return ", ".join(f"{name} {value / scale(name):.3g}" for name, value in measured.items())
