"""Charts: accuracy and speed of methods, curves, and what a calibration measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from focus_jax.report import save

_CHOSEN_COLOUR = "#D62728"
_SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class MethodPoint:
    """A method's accuracy and its interval (shares of 1) at the share of visual slots it spends."""

    name: str
    slots: float  # mean over decoder layers of visual slots, as a share of the full model's
    accuracy: float
    low: float
    high: float


def accuracy_plot(path: str | Path, points: Sequence[MethodPoint]) -> None:
    """Accuracy with its interval over the share of visual slots, one labelled point per method."""
    if not points:
        raise ValueError("points is empty; give at least one MethodPoint")
    figure = Figure(figsize=(8.5, 5.2), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for i, point in enumerate(points):
        colour = _SERIES_COLOURS[i % len(_SERIES_COLOURS)]
        reach = [[point.accuracy - point.low], [point.high - point.accuracy]]
        axes.errorbar(
            point.slots * 100,
            point.accuracy * 100,
            yerr=np.asarray(reach) * 100,
            fmt="o",
            ms=7,
            capsize=4,
            color=colour,
        )
    _open_frame(axes, "mean visual slots over layers (% of full)", "accuracy (%)")
    axes.margins(x=0.14, y=0.1)
    _label_points(figure, axes, points)
    save(figure, path)


def _label_points(figure: Figure, axes: Axes, points: Sequence[MethodPoint]) -> None:
    """Names beside their points, each moved to the first place where it covers nothing."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    spots = [axes.transData.transform((p.slots * 100, p.accuracy * 100)) for p in points]
    taken: list[Sequence[float]] = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    offsets = [(dx, dy) for dy in (7, -17, 21, -31, 35, -45, 49, -59) for dx in (9, -9)]
    frame = axes.get_window_extent()
    for i, point in enumerate(points):
        for dx, dy in offsets:
            label = axes.annotate(
                point.name,
                (point.slots * 100, point.accuracy * 100),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=9,
                color=_SERIES_COLOURS[i % len(_SERIES_COLOURS)],
            )
            box = label.get_window_extent(canvas.get_renderer()).padded(1)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1
            if inside and not any(_overlap(box.extents, other) for other in taken):
                break
            if (dx, dy) != offsets[-1]:
                label.remove()
        taken.append(box.extents)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def line_plot(
    path: str | Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """One line per name over (x, y) pairs, drawn in order of x. ValueError: nothing to draw."""
    if not any(series.values()):
        raise ValueError("series holds no points; give at least one name with (x, y) pairs")
    figure = Figure(figsize=(8.5, 5), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for i, (name, pairs) in enumerate(series.items()):
        x, y = zip(*sorted(pairs), strict=True) if pairs else ((), ())
        marker = "o" if len(pairs) <= 40 else ""
        colour = _SERIES_COLOURS[i % len(_SERIES_COLOURS)]
        style = "-" if i < len(_SERIES_COLOURS) else "--"
        axes.plot(x, y, marker=marker, ms=4, lw=1.6, ls=style, color=colour, label=name)
    _open_frame(axes, xlabel, ylabel)
    axes.set_title(title, fontsize=12, loc="left", weight="bold")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def _open_frame(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=10)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def speed_plot(path: str | Path, panels: Mapping[str, Sequence[tuple[str, float, float]]]) -> None:
    """Measured time over planned operations, both as shares of full's, a panel for each title.

    Points are (name, operations, time); on the diagonal time falls as planned.
    ValueError: nothing to draw.
    """
    if not any(panels.values()):
        raise ValueError("panels hold no points; give at least one (name, operations, time)")
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(8 * across, 6.5 * down), dpi=110, facecolor="white")
    for i, (title, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, i)
        values = [value for _, *pair in points for value in pair]
        low, high = 0.8 * min(values, default=0.1), 1.2 * max(values, default=1.0)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.plot([low, high], [low, high], color="#999999", lw=1, ls="--", zorder=1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_minor_formatter(NullFormatter())
        _open_frame(axes, "operations as planned (of full)", "time of the prefill (of full)")
        axes.set_title(title, fontsize=12, loc="left", weight="bold")
        _points_named_beside(axes, points)
    figure.subplots_adjust(
        left=0.85 / (8 * across), right=1 - 1.3 / (8 * across), wspace=0.36, hspace=0.22,
        bottom=0.6 / (6.5 * down), top=1 - 0.4 / (6.5 * down),
    )  # fmt: skip
    save(figure, path)


def _points_named_beside(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Points whose names stand in a column at the right, by height, a line from each."""
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    order = sorted(range(len(points)), key=lambda i: (points[i][2], -points[i][1]))
    heights = _apart([float(to_axes(points[i][1:])[1]) for i in order], step=0.04)
    for i, height in zip(order, heights, strict=True):
        name, x, y = points[i]
        colour = _SERIES_COLOURS[i % len(_SERIES_COLOURS)]
        line = {"arrowstyle": "-", "lw": 0.6, "color": colour, "alpha": 0.6, "relpos": (0, 0.5)}
        axes.plot(x, y, "o", ms=6, color=colour, zorder=3)
        axes.annotate(
            name, (x, y), xytext=(1.02, height), textcoords="axes fraction", va="center",
            fontsize=9, color=colour, annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def _apart(wanted: Sequence[float], step: float) -> list[float]:
    """Rising numbers near the wanted ones, at least `step` apart, none above 1."""
    raised: list[float] = []
    for value in wanted:
        raised.append(max(value, raised[-1] + step if raised else 0.0))
    out: list[float] = []
    for value in reversed(raised):
        out.append(min(value, out[-1] - step if out else 1.0))
    return out[::-1]


def divergence_plot(
    path: str | Path,
    layers: Sequence[int],
    divergence: Float[np.ndarray, "S K"],
    threshold: float,
    chosen: int | None,
) -> None:
    """Divergence (nats, log scale) of S samples over the layer that visual tokens leave before.

    The mean in colour over the samples in grey, the threshold dashed (where it is not far below),
    the chosen layer ringed.
    """
    if not divergence.size or divergence.shape[-1] != len(layers):
        raise ValueError(f"divergence is {divergence.shape} for {len(layers)} layers: give [S, K]")
    figure = Figure(figsize=(8.5, 4.6), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    mean = divergence.mean(0)
    floor = min(mean[mean > 0], default=threshold) / 100  # 0 has no place on the scale
    for sample in divergence:
        axes.plot(layers, np.maximum(sample, floor), color="#BBBBBB", lw=0.7, zorder=1)
    name = f"mean of {len(divergence)} samples"
    blue = _SERIES_COLOURS[0]
    axes.plot(layers, np.maximum(mean, floor), "o-", ms=4, lw=1.6, color=blue, label=name)
    if threshold >= floor:
        name = f"threshold {threshold:g}"
        axes.axhline(threshold, ls="--", lw=1.2, color=_CHOSEN_COLOUR, label=name)
    if chosen is not None:
        at = max(float(mean[list(layers).index(chosen)]), floor)
        axes.plot([chosen], [at], "o", ms=13, mfc="none", mew=2, color=_SERIES_COLOURS[2])
        axes.annotate(
            f"layer {chosen}", (chosen, at), xytext=(9, 9), textcoords="offset points",
            fontsize=10, weight="bold", color=_SERIES_COLOURS[2],
        )  # fmt: skip
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _open_frame(axes, "visual tokens leave before layer", "KL to the full model (nats)")
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def head_picture(
    path: str | Path, importance: Float[np.ndarray, "L H"], mask: Bool[np.ndarray, "L H"]
) -> None:
    """Layers by heads in the colour of their importance (log scale); dropped heads are crossed."""
    if importance.ndim != 2 or importance.shape != mask.shape:
        raise ValueError(f"importance is {importance.shape}, mask {mask.shape}: give both [L, H]")
    lines, columns = importance.shape
    size = (max(4.5, 2.2 + 0.24 * columns), max(2.6, 1.4 + 0.24 * lines))
    figure = Figure(figsize=size, dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    present = importance[importance > 0]
    low, high = (present.min(), present.max()) if present.size else (0.1, 1.0)
    scale = LogNorm(low, high if high > low else 2 * low)
    shown = axes.imshow(np.maximum(importance, low), cmap="viridis", norm=scale, aspect="auto")
    layer, head = np.nonzero(~mask)
    axes.scatter(head, layer, marker="x", s=22, lw=1.3, color="white")  # dropped: dark cells
    axes.set_xlabel(f"head (crossed: dropped, {mask.mean():.0%} stay)", fontsize=10)
    axes.set_ylabel("layer", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("attention to image / to text", fontsize=9)
    save(figure, path)
