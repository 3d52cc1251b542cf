"""Pictures and tables: what samplers kept and cost, how answers fared, what calibration saw."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch, Rectangle

# Tokens per region -> colour (Okabe-Ito, told apart by colour-blind readers), coarse to fine.
_SCALE_COLOURS = ("#56B4E9", "#F0E442", "#D55E00", "#CC79A7", "#009E73")
_KEPT_COLOUR = "#FFD400"
_CUT_COLOUR = "#D62728"
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
    save(figure, path)


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


def save(figure: Figure, path: str | Path) -> None:
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
