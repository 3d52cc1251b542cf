"""What the measurements of a sweep come to: ratios to full tokens, and the pages that show them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from focus_jax.benchmark.methods import DEPTH, words_of
from focus_jax.benchmark.record import Line, Record
from focus_jax.benchmark.report import ratio_cell, spread
from focus_jax.benchmark.sweep import GROUP, Cell, Sweep
from focus_jax.charts import speed_plot
from focus_jax.evaluate.study import write_json
from focus_jax.report import markdown_table
from focus_jax.workdir import write_text

SHARE, REACHED = 0.03, 0.85  # the most of a prefill for samplers; the least of a planned speed-up
HF = "transformers, full"
Row = dict[str, Any]


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """One row for each method at each size that has been timed; methods as they were asked for.

    They may have been timed in another order: a run goes on where one stopped.
    """
    cells = {cell_of(line) for line in lines if line["kind"] == "time"}
    asked = dict.fromkeys(line["method"] for line in lines if line["kind"] == "count")
    out: list[Row] = []
    for tiles, batch, layers in sorted(cells, key=lambda cell: (cell[0] * cell[1], cell)):
        here = [line for line in lines if cell_of(line) == (tiles, batch, layers)]
        fulls = [line for line in here if line["kind"] == "again" or line["method"] == "full"]
        timed = {line["method"] for line in here if line["kind"] == "time"}
        if not fulls:
            continue
        out += [row_of(name, here, fulls, lines) for name in asked if name in timed]
        out += other_row(lines, fulls, (tiles, batch, layers))
    return out


def cell_of(line: Line) -> tuple[Any, ...]:
    """Which size a line is about."""
    return tuple(line.get(name) for name in ("tiles", "batch", "layers"))


def nearest(fulls: Iterable[Line], at: float) -> float:
    """Seconds of the prefill with all tokens that ran at the nearest time."""
    return min(fulls, key=lambda line: abs(line["at"] - at))["prefill"]


def row_of(name: str, here: Sequence[Line], fulls: Sequence[Line], lines: Sequence[Line]) -> Row:
    """One method at one size: medians over the rounds, ratios round by round."""
    mine = [line for line in here if line["kind"] == "time" and line["method"] == name]
    base = [line for line in here if line["kind"] == "time" and line["method"] == "full"]
    tiles, batch, layers = cell_of(mine[0])
    plan, whole = (
        next(
            line for line in lines
            if line["kind"] == "count" and line["method"] == method
            and (line["tiles"], line["layers"]) == (tiles, layers)
        )
        for method in (name, "full")
    )  # fmt: skip
    speedups = [nearest(fulls, line["at"]) / line["prefill"] for line in mine]
    stage = median(line["stage"] for line in mine) - median(line["stage"] for line in base)
    cuts = median(sum(line["cuts"].values()) for line in mine)
    sampler = max(stage, 0.0) + cuts
    share = sampler / (median(line["prefill"] for line in fulls) / layers * DEPTH)
    speedup, wanted = spread(speedups), whole["plan_flops"] / plan["plan_flops"]
    reached = median(speedups) / wanted
    return {
        "method": name, "tiles": tiles, "batch": batch, "layers": layers, "rounds": len(mine),
        "entering": plan["entering"], "mean_slots": plan["mean_slots"],
        "plan_flops": plan["plan_flops"], "plan_ratio": plan["plain_flops"] / whole["plain_flops"],
        "compiled_ratio": plan["compiled_flops"] / whole["compiled_flops"],
        "compiled_over_plan": plan["compiled_flops"] / plan["plain_flops"],
        "sampler": sampler, "vision_sampler": stage, "cuts": cuts, "sampler_share": share,
        "prefill": median(line["prefill"] for line in mine), "speedup": speedup,
        "planned_speedup": wanted, "reached": reached,
        "decode": median(line["decode"] for line in mine),
        "cache_bytes": mine[0]["cache_bytes"], "missed": missed(name, share, reached),
    }  # fmt: skip


def missed(name: str, share: float, reached: float) -> str:
    """Which of the two bars a method misses."""
    if name == "full":
        return ""
    found = [("samplers", share > SHARE), ("speed-up", reached < REACHED)]
    return ", ".join(bar for bar, misses in found if misses)


def other_row(lines: Sequence[Line], fulls: Sequence[Line], cell: tuple[Any, ...]) -> list[Row]:
    """transformers with all tokens, as far as it was measured at this size and depth."""
    tiles, batch, layers = cell
    hf = [line for line in lines if line["kind"] == "hf" and line["layers"] == layers]
    prefill, decode = f"prefill:{tiles}", f"decode:{batch}"
    pairs = [
        (nearest(fulls, line["at"]), line["measured"][prefill])
        for line in hf
        if batch == 1 and prefill in line["measured"]
    ]
    rates = [
        line["measured"][decode]
        for line in hf
        if line["decode_tiles"] == tiles and decode in line["measured"]
    ]
    if not pairs and not rates:
        return []
    row: Row = dict.fromkeys(key for key, _, _ in COLUMNS)
    return [
        row
        | {
            "method": HF, "tiles": tiles, "batch": batch, "layers": layers, "missed": "",
            "prefill": median(seconds for _, seconds in pairs) if pairs else None,
            "speedup": spread([ours / seconds for ours, seconds in pairs]),
            "decode": median(rates) if rates else None,
        }
    ]  # fmt: skip


# --------------------------------------------------------------------------------- pages


def speedup_cell(value: Mapping[str, float]) -> str:
    """With the spread where there is one."""
    return ratio_cell(value) if value["min"] < value["max"] else f"{value['median']:.2f}"


COLUMNS: tuple[tuple[str, str, Any], ...] = (
    ("method", "method", ""),
    ("entering", "slots entering", "d"),
    ("mean_slots", "mean slots", ".0f"),
    ("plan_ratio", "FLOPs, planned", ".3f"),
    ("compiled_ratio", "FLOPs, compiled", ".3f"),
    ("sampler", "samplers, ms", lambda seconds: f"{1e3 * seconds:.1f}"),
    ("sampler_share", "of 32 layers", ".1%"),
    ("prefill", "prefill, s", ".3g"),
    ("speedup", "speed-up", speedup_cell),
    ("planned_speedup", "planned", ".2f"),
    ("reached", "measured / planned", ".2f"),
    ("decode", "decode, tokens/s", ".3g"),
    ("cache_bytes", "cache = plan, MiB", lambda size: f"{size / 2**20:.1f}"),
    ("missed", "misses", ""),
)
ABOUT = """
Every method beside all tokens in one process on one set of weights; the prefill with all tokens was
timed before and behind each group of {group} methods, and speed-ups are ratios to the nearest of
them: the median, with the least and the most of the rounds. Prefill: what generating runs behind
the tower. FLOPs: decoder, head and cuts of one image, as a share of all tokens'; the compiler's
with attention without loops, as it counts a loop's body once (so it does of greedy selections).
Samplers: seconds of the vision stage beyond that of all tokens, and of the cuts, as programs of
their own; their share is of {depth} such layers with all tokens.
Misses: samplers above {share:.0%}, or less than {reached:.2f} of the planned speed-up.
"""


def report_of(sweep: Sweep, record: Record, out: Path | None) -> str:
    """The page of all that the record holds; with `out` also methods.json, .md and .png there."""
    rows, settings = rows_of(record.lines), sweep.settings()
    asked = {name: words_of(name, sweep.config) for name in sweep.methods}
    machine = settings.pop("machine")
    text = page(rows, asked, settings | machine)
    if out is not None:
        values = {"settings": settings, "machine": machine, "asked": asked, "rows": rows}
        write_json(out / "methods.json", values | {"measurements": record.lines})
        write_text(out / "methods.md", text)
        speed_plot(out / "methods.png", panels(rows))
    return text


def panels(rows: Sequence[Row]) -> dict[str, list[tuple[str, float, float]]]:
    """Points of each size: (method, planned operations, time), as shares of all tokens'."""
    out: dict[str, list[tuple[str, float, float]]] = {}
    for row in rows:
        if row["method"] != HF:
            point = (row["method"], 1 / row["planned_speedup"], 1 / row["speedup"]["median"])
            out.setdefault(Cell(*cell_of(row)).words, []).append(point)
    return out


def page(rows: Sequence[Row], asked: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """Markdown: a table for each size, and how each method is asked for on a command line."""
    told = ", ".join(f"{key} {value}" for key, value in about.items() if value != "")
    notes = ABOUT.format(group=GROUP, depth=DEPTH, share=SHARE, reached=REACHED).strip()
    parts = [f"# Methods, measured\n\n{told}.\n\n{notes}\n"]
    for cell in dict.fromkeys(cell_of(row) for row in rows):
        title = f"{Cell(*cell).words}, {cell[2]} decoder layers"
        here = [row for row in rows if cell_of(row) == cell]
        parts.append(f"## {title}\n\n{markdown_table(here, COLUMNS)}")
    words = [{"method": name, "asked": f"`{text}`"} for name, text in asked.items()]
    columns = (("method", "method", ""), ("asked", "at most layers, asked for as", ""))
    parts.append(f"## Methods\n\n{markdown_table(words, columns)}")
    return "\n".join(parts)
