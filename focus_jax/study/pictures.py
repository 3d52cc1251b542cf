"""The study's pictures: where a cut may stand, what routers look at, accuracy over cost."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from focus_jax.report import save
from focus_jax.study.comparisons import layer_of, on_placed, shown_gates
from focus_jax.study.placement import Curve
from focus_jax.study.results import Results, Row
from focus_jax.study.statistics import share_right

# Okabe-Ito, told apart by colour-blind readers; as in charts.py.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^vDPX"
RANKS = {
    "top": ("highest attention", COLOURS[0]),
    "random": ("random", COLOURS[4]),
    "least": ("lowest attention", COLOURS[1]),
    "oracle": ("oracle", COLOURS[2]),
}
LINES = 7  # of one plot, at most
GATES = ("random", "uniform", "oracle", "measured")


def draw(r: Results, folder: Path, stem: str) -> dict[str, Path]:
    """All pictures that the data allow, as `folder/stem_NAME.png`; their paths by name."""
    makers: dict[str, Callable[[Results, Path], bool]] = {
        "placement": placement_plot, "routing": routing_plot, "slots": slots_plot,
        "time": time_plot,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{stem}_{name}.png" for name in makers}
    return {name: paths[name] for name, make in makers.items() if make(r, paths[name])}


def framed(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=10)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def placement_plot(r: Results, path: Path) -> bool:
    """The panels of `placement_panels`, asked by the rows that validation chose.

    Whatever stands beside the curves is about the same images as they.
    """
    asks = ("", r.chosen.get("queries"))
    found = [c for c in r.curves if c.queries in asks]
    if not found:
        return False
    full = share_right(on_placed(r, r.full, found[0])).value
    trained = [replace(row, correct=on_placed(r, row, found[0])) for row in r.of_role("cut")]
    placement_panels(path, found, full, trained)
    return True


def placement_panels(
    path: Path, found: Sequence[Curve], full: float, trained: Sequence[Row] = ()
) -> None:
    """A panel for each share: accuracy over the cut's layer, by what stays.

    `found`: one curve for each layer, share and rank; `full`: the accuracy with all tokens, dashed;
    `trained`: arms that were trained with one cut.
    """
    shares = list(dict.fromkeys(c.keep for c in found))
    figure = Figure(
        figsize=(4.4 * len(shares), 4.4), dpi=120, facecolor="white", layout="constrained"
    )
    first: Axes | None = None
    for i, keep in enumerate(shares, start=1):
        axes = figure.add_subplot(1, len(shares), i, sharey=first)
        first = first or axes
        curves(axes, [c for c in found if c.keep == keep])
        trained_points(axes, trained, keep)
        axes.axhline(100 * full, ls="--", lw=1.2, color="#555555", label="full")
        axes.set_title(f"{keep:.0%} of the tokens stay", fontsize=11, loc="left", weight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        framed(axes, "cut before layer", "accuracy (%)" if i == 1 else "")
    assert first is not None
    first.legend(frameon=False, fontsize=8)
    save(figure, path)


def curves(axes: Axes, found: Sequence[Curve]) -> None:
    """The lines of one panel, each with its interval."""
    for marker, (rank, (name, colour)) in zip(MARKERS, RANKS.items(), strict=False):
        own = sorted((c for c in found if c.rank == rank), key=lambda c: c.layer)
        if not own:
            continue
        values = 100 * np.array([share_right(c.correct) for c in own])
        at = [c.layer for c in own]
        axes.plot(at, values[:, 0], marker, ls="-", ms=4, lw=1.6, color=colour, label=name)
        axes.fill_between(at, values[:, 1], values[:, 2], color=colour, alpha=0.15, lw=0)


def trained_points(axes: Axes, trained: Sequence[Row], keep: float) -> None:
    """Arms that were trained with a cut of this share."""
    named = rf"text\.keep={re.escape(f'{keep:g}')}(,|$)"
    rows = [row for row in trained if re.search(named, row.asked)]
    if rows:
        values = 100 * np.array([row.accuracy for row in rows])
        reach = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
        axes.errorbar(
            [layer_of(row) for row in rows], values[:, 0], yerr=reach, fmt="s", ms=7, capsize=3,
            mfc="none", color=COLOURS[3], label="trained with it",
        )  # fmt: skip


def routing_plot(r: Results, path: Path) -> bool:
    """Share of regions at the finest scale over the glyphs that they hold: learned gates, and
    control gates dashed."""
    shown = shown_gates(r, GATES)[:LINES]
    if not shown:
        return False
    figure = Figure(figsize=(8.5, 4.8), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    learned = [row.name for role in ("ours", "router") for row in r.of_role(role)]
    for i, one in enumerate(shown):
        groups = one.routing.counts
        own = one.name == one.weights
        axes.plot(
            [g.low for g in groups], [100 * g.share for g in groups], marker=MARKERS[i], ms=6,
            mfc="none", lw=1.5, ls="-" if own and one.name in learned else "--", color=COLOURS[i],
            label=one.name if own else f"{one.name} on {one.weights}",
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    framed(axes, "glyphs in a region (last: that many and more)", "regions at the finest scale")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    save(figure, path)
    return True


def slots_plot(r: Results, path: Path) -> bool:
    """Accuracy over mean slots."""
    return pareto(
        path, [(row, 100 * row.mean_share) for row in r.rows], "mean visual slots (% of full)"
    )


def time_plot(r: Results, path: Path) -> bool:
    """Accuracy over measured time."""
    timed = [(row, row.ms) for row in r.rows if row.ms is not None]
    return pareto(path, timed, "prefill of one question (ms)")


def pareto(path: Path, points: Sequence[tuple[Row, float]], xlabel: str) -> bool:
    """Accuracy over a cost; the best so far from the left is joined. It is named, and so are ours
    and full."""
    if not points:
        return False
    figure = Figure(figsize=(9.5, 5.2), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for trained, name, marker in ((True, "trained with", "s"), (False, "put on as it is", "o")):
        own = [(x, 100 * row.accuracy.value) for row, x in points if row.trained is trained]
        if own:
            axes.plot(*zip(*own, strict=True), marker, ms=6, mfc="none", label=name,
                      color=COLOURS[1 - trained])  # fmt: skip
    best = frontier(points)
    axes.plot(
        [x for _, x in best], [100 * row.accuracy.value for row, _ in best], lw=1, color="#888888"
    )
    ours = [p for p in points if p[0].trained and p[0].role in ("full", "ours") and p not in best]
    named(axes, [*best, *ours])
    framed(axes, xlabel, "accuracy (%)")
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)
    return True


def named(axes: Axes, points: Sequence[tuple[Row, float]]) -> None:
    """Names in a column on the right, a line to each point: on the plot they would overlap."""
    spots = sorted(points, key=lambda p: (-p[0].accuracy.value, p[1]))
    for place, (row, x) in enumerate(spots):
        accuracy = row.accuracy.value
        axes.annotate(
            f"{row.name} ({accuracy:.1%})", (x, 100 * accuracy),
            xytext=(1.03, 0.96 - 0.05 * place), textcoords="axes fraction", fontsize=8,
            va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#888888"},
        )  # fmt: skip


def frontier(points: Sequence[tuple[Row, float]]) -> list[tuple[Row, float]]:
    """Those that nothing cheaper, or as cheap, is better than; cheapest first."""
    out: list[tuple[Row, float]] = []
    for row, x in sorted(points, key=lambda p: (p[1], -p[0].accuracy.value)):
        if not out or row.accuracy.value > out[-1][0].accuracy.value:
            out.append((row, x))
    return out
