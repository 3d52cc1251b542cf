"""What `data check` found, as Markdown and as histograms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from focus_jax.data.survey import Survey
from focus_jax.report import markdown_table, save

_BAR, _MARK = "#0072B2", "#D55E00"
_QUANTILES = ("min", "p5", "p50", "p95", "p99", "max")
_NAMES = {
    "turns": "turns", "characters": "characters", "tokens": "tokens",
    "learnt_tokens": "tokens learnt", "width": "image's width", "height": "image's height",
    "visual_tokens": "visual tokens of an image",
}  # fmt: skip


def as_markdown(told: Mapping[str, Any]) -> str:
    """The figures of `check` as tables; those that were not made are left out."""
    by_images = ", ".join(f"{count} with {n}" for n, count in told["rows_by_images"].items())
    parts = [
        "# What is in the data\n",
        f"{told['rows']} of {told['examples']} rows were looked at, with template "
        f"{told['template']}; by images: {by_images or 'none'}.\n",
        _quantiles(told),
    ]
    if "learnt_share" in told:
        parts.append(
            f"Of the tokens {told['learnt_share']:.1%} are learnt, {told['asked_share']:.1%} are "
            f"the users' words; {told['rows_without_learnt_tokens']} rows have none to learn.\n"
        )
        parts += ["## Cut at a length\n", _cuts(told["cuts"])]
    else:
        parts.append("Tokens were not counted: give --tokenizer DIR.\n")
    if "rows_by_tiles" in told:
        tiles = [{"tiles": n, "rows": count} for n, count in told["rows_by_tiles"].items()]
        columns = (("tiles", "tiles of the largest image", ""), ("rows", "rows", ",d"))
        parts += ["## Tiles\n", markdown_table(tiles, columns)]
    if told["odd"]:
        odd = [{"what": name, "rows": count} for name, count in told["odd"].items()]
        columns = (("what", "rows that have", ""), ("rows", "rows", ",d"))
        parts += ["## Odd, perhaps right\n", markdown_table(odd, columns)]
    return "\n".join([*parts, "## Bad rows\n", _bad(told)])


def _quantiles(told: Mapping[str, Any]) -> str:
    rows = [{"what": name, **told[key]} for key, name in _NAMES.items() if told.get(key)]
    columns = [("what", "of a row", ""), *((q, q, ",d") for q in _QUANTILES)]
    return markdown_table(rows, [*columns, ("mean", "mean", ",.1f"), ("sum", "sum", ",d")])


def _cuts(cuts: Sequence[Mapping[str, Any]]) -> str:
    columns = (
        ("length", "tokens", ""), ("rows", "rows cut", ",d"), ("share_of_rows", "share", ".2%"),
        ("share_of_learnt_tokens_lost", "learnt tokens lost", ".2%"),
        ("images_lost", "images lost", ",d"),
        ("rows_left_without_learnt_tokens", "rows left with nothing to learn", ",d"),
    )  # fmt: skip
    return markdown_table(cuts, columns)


def _bad(told: Mapping[str, Any]) -> str:
    if not told["bad_rows"]:
        return "None.\n"
    kinds = ", ".join(f"{count} {kind}" for kind, count in told["bad_rows_by_kind"].items())
    columns = (
        ("file", "file", ""), ("line", "line", ""), ("row", "row", ""), ("id", "id", ""),
        ("kind", "kind", ""), ("reason", "reason", ""),
    )  # fmt: skip
    first = told["first_bad_rows"]
    named = f"{told['bad_rows']} rows are bad ({kinds}). The first {len(first)}:\n"
    return f"{named}\n{markdown_table(first, columns)}"


def draw_histograms(path: str | Path, found: Survey, lengths: Sequence[int]) -> None:
    """Rows over what they have, a panel for each; `lengths` are marked over the tokens."""
    counts: dict[str, Sequence[int] | np.ndarray] = {
        "turns": found.turns, "characters": found.characters, "images": found.images,
        "tokens": found.tokens, "tokens learnt": found.learnt,
        "width of the largest image": found.sizes[:, 0],
        "height of the largest image": found.sizes[:, 1],
        "tiles of the largest image": found.tiles,
    }  # fmt: skip
    panels = {name: np.asarray(values) for name, values in counts.items() if len(values)}
    across = 3
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5 * across, 3.4 * down), dpi=110, layout="constrained")
    for number, (name, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, number)
        _histogram(axes, values)
        axes.set_xlabel(name, fontsize=10)
        axes.set_ylabel("rows", fontsize=10)
        for length in lengths if name == "tokens" else ():
            if length <= values.max():
                axes.axvline(length, color=_MARK, ls="--", lw=1)
                axes.annotate(
                    str(length), (length, 1), xycoords=("data", "axes fraction"), fontsize=8,
                    color=_MARK, ha="right", va="top", rotation=90,
                )  # fmt: skip
    save(figure, path)


def _histogram(axes: Axes, values: np.ndarray) -> None:
    """A bar for each of few whole numbers, else 40 bars; large counts on a log scale."""
    low, high = int(values.min()), int(values.max())
    step = max(1, -(-(high - low + 1) // 40))
    edges = np.arange(low, high + step + 1, step) - 0.5
    counts, *_ = axes.hist(values, edges.tolist(), color=_BAR, rwidth=0.9)
    if np.max(counts) > 100:  # bars of single rows are to be seen beside those of thousands
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
