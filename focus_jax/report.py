"""Pictures and tables: what samplers kept and cost, how answers fared, what calibration saw."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

# Tokens per region -> colour (Okabe-Ito, told apart by colour-blind readers), coarse to fine.
_SCALE_COLOURS = ("#56B4E9", "#F0E442", "#D55E00", "#CC79A7", "#009E73")
_KEPT_COLOUR = "#FFD400"
_CUT_COLOUR = "#D62728"
_SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMALLEST_PICTURE = 336  # pixels: smaller images are enlarged, in whole steps


@dataclass(frozen=True, eq=False)
class SamplerView:
    """What the samplers did for one question on one image; coordinates in patches, row first."""

    question: str
    answer: str
    prediction: str
    grid: tuple[int, int]  # rows, cols of patches
    region: tuple[int, int]  # rows, cols of patches in a region
    scale_map: Int[np.ndarray, "Rr Rc"]  # tokens of each region, 0 for none
    kept: Float[np.ndarray, "K 2"]  # centres of the tokens that the text-guided sampler kept
    kept_size: Float[np.ndarray, " K"]  # side of the square of patches behind each of them
    importance: Float[np.ndarray, "L rows cols"]  # NaN where a layer no longer has the token
    cut_layers: tuple[int, ...]  # layers at whose entry tokens left

    def __post_init__(self) -> None:
        rows, cols = self.grid
        regions = (rows // self.region[0], cols // self.region[1])
        expected = {
            "scale_map": (self.scale_map.shape, regions),
            "kept": (self.kept.shape, (len(self.kept_size), 2)),
            "importance": (self.importance.shape, (len(self.importance), rows, cols)),
        }
        for name, (found, wanted) in expected.items():
            if tuple(found) != wanted:
                raise ValueError(
                    f"{name} has shape {tuple(found)}; a grid of {rows} x {cols} patches in "
                    f"regions of {self.region[0]} x {self.region[1]} needs {wanted}"
                )


@dataclass(frozen=True)
class MethodPoint:
    """A method's accuracy and its interval (shares of 1) at the share of visual slots it spends."""

    name: str
    slots: float  # mean over decoder layers of visual slots, as a share of the full model's
    accuracy: float
    low: float
    high: float


# ------------------------------------------------------------------------ what was looked at


def sampler_figure(
    path: str | Path, image: UInt8[np.ndarray, "S S 3"], rows: Sequence[SamplerView]
) -> None:
    """One PNG, for each question: scales over the image, kept tokens, importance by layer.

    The importance maps of a question share one colour scale; a layer framed in red is the first
    without the tokens that left at a cut. ValueError: no rows, or an image that is not uint8 RGB.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; give uint8 [S, S, 3]")
    if not rows:
        raise ValueError("rows is empty; give at least one SamplerView")
    picture = _enlarged(image)
    heights = [1.05 + max(2.9, 1.45 * _map_grid(len(view.importance))[0]) for view in rows]
    figure = Figure(figsize=(16.5, sum(heights)), dpi=110, facecolor="white")
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, view, height in zip(parts, rows, heights, strict=True):
        _view_row(part, picture, view, height)
    _save(figure, path)


def _view_row(part: SubFigure, picture: np.ndarray, view: SamplerView, height: float) -> None:
    said, wanted = (text.strip().lower().rstrip(".") for text in (view.prediction, view.answer))
    right = said == wanted
    verdict = f"answer: {view.answer}     model: {view.prediction}"
    top = 1 - 0.12 / height
    part.text(0.012, top, view.question, fontsize=13, weight="bold", va="top")
    part.text(
        0.012,
        top - 0.27 / height,
        f"{verdict}  {'(right)' if right else '(wrong)'}",
        fontsize=11,
        color="#1A7F37" if right else _CUT_COLOUR,
        va="top",
    )
    cells = part.add_gridspec(
        1,
        3,
        width_ratios=(1, 1, 3.1),
        left=0.012,
        right=0.955,
        top=1 - 0.88 / height,
        bottom=0.36 / height,
        wspace=0.06,
    )
    _scale_panel(part.add_subplot(cells[0]), picture, view)
    _kept_panel(part.add_subplot(cells[1]), picture, view)
    _importance_panel(part, cells[2], view)


def _scale_panel(axes: Axes, picture: np.ndarray, view: SamplerView) -> None:
    """The image with each region tinted by its number of tokens, and the grid of regions."""
    levels = sorted({int(tokens) for tokens in np.unique(view.scale_map)} - {0})
    colours = {tokens: _scale_colour(tokens, view.region) for tokens in levels}
    # Mostly grey, so that a region's colour says its scale and not what the image shows there.
    grey = (0.75 * picture.mean(-1, keepdims=True) + 0.25 * picture).astype(np.uint8)
    axes.imshow(grey, extent=_extent(view), interpolation="nearest")
    for (r, c), tokens in np.ndenumerate(view.scale_map):
        corner = (c * view.region[1], r * view.region[0])
        face = (*to_rgb(colours[int(tokens)]), 0.42) if tokens else (0, 0, 0, 0.6)
        axes.add_patch(
            Rectangle(corner, view.region[1], view.region[0], fc=face, ec="white", lw=0.8)
        )
    handles = [Patch(color=colours[t], label=f"{t}") for t in levels]
    if (view.scale_map == 0).any():
        handles.insert(0, Patch(color="#444444", label="none"))
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=max(len(handles), 1),
        fontsize=8,
        frameon=False,
        handlelength=1,
        columnspacing=1,
    )
    _bare(axes, view, f"tokens per region: {int(view.scale_map.sum())} in all")


def _kept_panel(axes: Axes, picture: np.ndarray, view: SamplerView) -> None:
    """The image dimmed to grey except behind the tokens that were kept."""
    grey = picture.mean(-1, keepdims=True)
    dimmed = (0.3 * np.broadcast_to(grey, picture.shape)).astype(np.uint8)
    lit = np.array(dimmed)
    high, wide = (s / g for s, g in zip(picture.shape[:2], view.grid, strict=True))
    for (row, col), size in zip(view.kept, view.kept_size, strict=True):
        r = slice(round(max(row - size / 2, 0) * high), round((row + size / 2) * high))
        c = slice(round(max(col - size / 2, 0) * wide), round((col + size / 2) * wide))
        lit[r, c] = picture[r, c]
        box = Rectangle((col - size / 2, row - size / 2), size, size, fill=False)
        box.set(edgecolor=_KEPT_COLOUR, linewidth=0.9)
        axes.add_patch(box)
    axes.imshow(lit, extent=_extent(view), interpolation="nearest")
    _bare(axes, view, f"kept for this question: {len(view.kept)} tokens")


def _importance_panel(part: SubFigure, cell: SubplotSpec, view: SamplerView) -> None:
    """One small map per layer on a shared colour scale, framed where tokens left."""
    lines, columns = _map_grid(len(view.importance))
    grid = cell.subgridspec(lines, columns, wspace=0.08, hspace=0.28)
    present = view.importance[np.isfinite(view.importance)]
    high = float(present.max()) if present.size else 1.0
    shown, small = None, []
    for layer, values in enumerate(view.importance):
        axes = part.add_subplot(grid[layer // columns, layer % columns])
        axes.set_facecolor("#D9D9D9")
        shown = axes.imshow(
            np.ma.masked_invalid(values),
            extent=_extent(view),
            cmap="magma",
            vmin=0,
            vmax=high or 1.0,
            interpolation="nearest",
        )
        cut = layer in view.cut_layers
        _bare(axes, view, f"layer {layer}" + (" (cut)" if cut else ""), cut)
        small.append(axes)
    if shown is not None:
        bar = part.colorbar(shown, ax=small, fraction=0.02, pad=0.015, aspect=30)
        bar.set_label("importance (grey: token gone)", fontsize=8)
        bar.ax.tick_params(labelsize=7)


def _map_grid(layers: int) -> tuple[int, int]:
    """Lines and columns of the small maps: a deep model gets more of them on a line."""
    columns = 6 if layers <= 12 else 8
    return max(-(-layers // columns), 1), max(min(columns, layers), 1)


def _bare(axes: Axes, view: SamplerView, title: str, marked: bool = False) -> None:
    axes.set(xticks=[], yticks=[], xlim=(0, view.grid[1]), ylim=(view.grid[0], 0))
    axes.set_anchor("N")
    axes.set_title(title, fontsize=9, pad=3, color=_CUT_COLOUR if marked else "black")
    for spine in axes.spines.values():
        spine.set(edgecolor=_CUT_COLOUR if marked else "#888888", linewidth=2.2 if marked else 0.6)


def _extent(view: SamplerView) -> tuple[float, float, float, float]:
    return (
        0.0,
        float(view.grid[1]),
        float(view.grid[0]),
        0.0,
    )  # left, right, bottom, top, in patches


def _scale_colour(tokens: int, region: tuple[int, int]) -> str:
    """A colour by how far the region is from one token, so that it means the same in each row."""
    side = region[0] * region[1] / max(tokens, 1)
    halvings = max(0, round(np.log2(region[0] * region[1]) / 2 - np.log2(side) / 2))
    return _SCALE_COLOURS[min(halvings, len(_SCALE_COLOURS) - 1)]


def _enlarged(image: np.ndarray) -> np.ndarray:
    factor = max(1, -(-_SMALLEST_PICTURE // min(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


# -------------------------------------------------------------------------------- charts


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
    _save(figure, path)


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
    _save(figure, path)


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
    _save(figure, path)


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


# ---------------------------------------------------------------------------- calibration


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
        axes.axhline(threshold, ls="--", lw=1.2, color=_CUT_COLOUR, label=name)
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
    _save(figure, path)


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
    _save(figure, path)


# -------------------------------------------------------------------------------- tables


def markdown_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[tuple[str, str, str | Callable[[Any], str]]],
) -> str:
    """A Markdown table, padded so that it reads well as plain text too.

    Columns are (key, header, format): a format specification such as ".1%", or a function. Numbers
    stand to the right. A value that is None is shown as a dash. ValueError: a row without the key.
    """
    for row in rows:
        missing = [key for key, _, _ in columns if key not in row]
        if missing:
            raise ValueError(
                f"row {dict(row)} lacks {missing}; give every column's key in each row"
            )
    texts = [[header for _, header, _ in columns]]
    texts += [[_cell(row[key], form) for key, _, form in columns] for row in rows]
    widths = [max(3, *(len(text) for text in column)) for column in zip(*texts, strict=True)]
    right = [any(_is_number(row[key]) for row in rows) for key, _, _ in columns]
    lines = [
        " | ".join(
            f"{t:{'>' if r else '<'}{w}}" for t, w, r in zip(line, widths, right, strict=True)
        )
        for line in texts
    ]
    rule = " | ".join("-" * (w - r) + ":" * r for w, r in zip(widths, right, strict=True))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:])) + "\n"


def _cell(value: Any, form: str | Callable[[Any], str]) -> str:
    if value is None:
        return "-"
    text = form(value) if callable(form) else format(value, form)
    return text.replace("|", "\\|").replace("\n", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


# -------------------------------------------------------------------------------- writing


def _save(figure: Figure, path: str | Path) -> None:
    with _replacing(Path(path)) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only when all was written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent} is not a folder; make it before writing {path.name}"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
