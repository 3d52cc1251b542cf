"""A photo becomes tiles: LLaVA-1.5's padded or cropped square, LLaVA-NeXT's any-resolution grid.

Sizes of images are (width, height), sizes of grids (rows, cols). All pixel work is PIL's bicubic
resize in uint8, as the official processors do it; the vision tower normalises.
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from focus_jax.data.images import (
    CorruptImage,
    Photo,
    Tiles,
    Transparency,
    one_view,
    reached,
    resample,
    single_tile,
    to_rgb,
    window,
)

Size = tuple[int, int]
LayoutName = Literal["squash", "pad", "crop", "anyres"]

# Of more pixels (256 MB in PIL) than this, an intermediate image of a thin photo is not made whole.
_LARGE = 1 << 26


@dataclass(frozen=True)
class ImageConfig:
    """How a photo becomes tiles.

    `layout`: "squash" resizes to the tile, distorting; "pad" centres on a square of colour
    `background`, then resizes (LLaVA-1.5); "crop" resizes the shortest edge and crops the centre
    (Hugging Face's LLaVA-1.5); "anyres" is a thumbnail and a grid of tiles (LLaVA-NeXT).
    `size`, `patch`: pixels of a tile's and a patch's side. `pinpoints`: the sizes in pixels that a
    grid of tiles may have, as the checkpoint writes them. `grid_order`: a pinpoint is (w, h) in the
    original and (h, w) in Hugging Face's code, which also rounds where the original truncates when
    it unpads. `exif`, `transparency` (see `to_rgb`): LLaVA's scripts leave the orientation tag be
    and drop transparency. Hugging Face's processors turn photos given by path and treat them as
    "keyed"; open images they do not turn and lay on white.
    """

    layout: LayoutName = "pad"
    size: int = 336
    patch: int = 14
    pinpoints: tuple[Size, ...] = ()
    grid_order: Literal["original", "hf"] = "original"
    background: tuple[int, int, int] = (122, 116, 104)
    exif: bool = False
    transparency: Transparency = "drop"

    def __post_init__(self) -> None:
        _among("layout", self.layout, ("squash", "pad", "crop", "anyres"))
        _among("grid_order", self.grid_order, ("original", "hf"))
        _among("transparency", self.transparency, ("drop", "white", "keyed"))
        if self.patch < 1 or self.size < 1 or self.size % self.patch:
            raise ValueError(
                f"size={self.size} is not a multiple of patch={self.patch}: change one"
            )
        if self.layout == "anyres" and not self.pinpoints:
            raise ValueError("layout 'anyres' needs pinpoints, such as ((336, 672), (672, 336))")
        for point in self.pinpoints:
            if len(point) != 2 or any(side < 1 or side % self.size for side in point):
                raise ValueError(
                    f"pinpoint {point} is not two multiples of size={self.size}: change one of them"
                )

    @classmethod
    def from_hf(
        cls, directory: str | Path, *, mode: Literal["hf", "original"] = "hf"
    ) -> "ImageConfig":
        """What a Hugging Face LLaVA directory asks for; `mode="original"` what LLaVA's code does.

        "hf" is the PIL processor given a path (for its treatment of open images replace `exif` and
        `transparency`). Raises ValueError for settings that `preprocess` does not follow.
        """
        _among("mode", mode, ("hf", "original"))
        settings, patch = _read_settings(Path(directory))
        size, layout = _size_and_layout(settings)
        red, green, blue = (int(mean * 255) for mean in settings["image_mean"])
        return cls(
            layout="pad" if mode == "original" and layout != "anyres" else layout,
            size=size,
            patch=patch,
            pinpoints=tuple((a, b) for a, b in settings.get("image_grid_pinpoints") or ()),
            grid_order=mode,
            background=(red, green, blue),
            exif=mode == "hf",
            transparency="keyed" if mode == "hf" else "drop",
        )


class Region(NamedTuple):
    """A rectangle of the stitched grid, in patches."""

    rows: int
    cols: int
    top: int
    left: int


class Layout(NamedTuple):
    """Where a photo of some size comes to lie, from its size alone.

    The photo is brought to `resized` and put with its corner at `offset` (x, y) on the `canvas`,
    which is cut into `grid` tiles; a negative offset crops. Under "pad" this happens at the photo's
    own scale and the canvas is resized to the tile. `unpadded`: what is left of the stitched grid.
    `tokens`: N for one view; under "anyres" N, and rows * (cols + 1) of `unpadded` with newlines.
    """

    grid: Size
    resized: Size
    canvas: Size
    offset: Size
    unpadded: Region
    tokens: int


def layout_of(size: Size, cfg: ImageConfig) -> Layout:
    """The layout of a photo of `size` (width, height) pixels."""
    if min(size) < 1:
        raise ValueError(f"size {size[0]}x{size[1]}: a photo needs at least one pixel")
    if cfg.layout == "anyres":
        return _anyres_layout(size, cfg)
    tile, rows = (cfg.size, cfg.size), cfg.size // cfg.patch
    resized = canvas = tile
    if cfg.layout == "pad":
        resized, canvas = size, (max(size), max(size))
    elif cfg.layout == "crop":
        resized = (
            max(cfg.size, int(cfg.size * size[0] / size[1])),
            max(cfg.size, int(cfg.size * size[1] / size[0])),
        )
    return Layout(
        grid=(1, 1),
        resized=resized,
        canvas=canvas,
        offset=(_centre(canvas[0], resized[0]), _centre(canvas[1], resized[1])),
        unpadded=Region(rows, rows, 0, 0),
        tokens=rows**2,
    )


def preprocess(image: Photo, cfg: ImageConfig) -> Tiles:
    """A photo (open image, uint8 [H W 3], file's bytes, or path) as tiles.

    Raises CorruptImage for what cannot be decoded, FileNotFoundError for a wrong path.
    """
    photo = to_rgb(image, exif=cfg.exif, transparency=cfg.transparency)
    if cfg.layout == "squash":
        return single_tile(photo, cfg.size, cfg.patch)
    layout = layout_of(photo.size, cfg)
    if cfg.layout == "anyres":
        return _anyres(photo, layout, cfg)
    view = _pad if cfg.layout == "pad" else _crop
    return one_view(view(photo, layout, cfg), cfg.patch)


def preprocess_many(images: Sequence[Photo], cfg: ImageConfig, workers: int = 0) -> list[Tiles]:
    """`preprocess` of each image, in order, in `workers` threads (0: in this one).

    An open PIL image may stand in the list once only: PIL loads it lazily, in no thread-safe way.
    Raises CorruptImage with the number of the image.
    """
    if workers < 0:
        raise ValueError(f"workers={workers}: give 0 (no threads) or more")
    one = partial(_numbered, cfg=cfg)
    if workers == 0:
        return list(map(one, enumerate(images)))
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(one, enumerate(images)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def normalisation_of(directory: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which a Hugging Face directory normalises pixels in [0, 1]."""
    settings, _ = _read_settings(Path(directory))
    return tuple(settings["image_mean"]), tuple(settings["image_std"])


def _numbered(item: tuple[int, Photo], cfg: ImageConfig) -> Tiles:
    number, image = item
    try:
        return preprocess(image, cfg)
    except CorruptImage as error:
        raise CorruptImage(f"images[{number}]: {error}") from error


def _anyres_layout(size: Size, cfg: ImageConfig) -> Layout:
    points = [p if cfg.grid_order == "original" else (p[1], p[0]) for p in cfg.pinpoints]
    canvas = _best_canvas(size, points)
    wide, high = canvas[0] / size[0], canvas[1] / size[1]
    if wide < high:
        resized = (canvas[0], min(math.ceil(size[1] * wide), canvas[1]))
    else:
        resized = (min(math.ceil(size[0] * high), canvas[0]), canvas[1])
    unpadded = _unpad(size, (canvas[1] // cfg.patch, canvas[0] // cfg.patch), cfg.grid_order)
    return Layout(
        grid=(canvas[1] // cfg.size, canvas[0] // cfg.size),
        resized=resized,
        canvas=canvas,
        offset=((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2),
        unpadded=unpadded,
        tokens=(cfg.size // cfg.patch) ** 2 + unpadded.rows * (unpadded.cols + 1),
    )


def _centre(canvas: int, length: int) -> int:
    """Where a length starts in the middle of a canvas; odd rests go behind, in a crop too."""
    return (canvas - length) // 2 if canvas > length else -((length - canvas) // 2)


def _best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """Most of the photo's pixels kept, then least waste; the first wins a tie."""

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def _unpad(size: Size, grid: Size, order: str) -> Region:
    """The part of a grid of (rows, cols) patches that shows the photo, by the official rule.

    Equal cuts at both ends: an odd rest leaves one padded row; a thin photo may leave none.
    """
    rows, cols = grid
    across = size[0] / size[1] > cols / rows
    free, side, scale = (
        (rows, size[1], cols / size[0]) if across else (cols, size[0], rows / size[1])
    )
    shown = int(side * scale if order == "original" else round(side * scale, 7))
    cut = (free - shown) // 2
    if across:
        return Region(rows - 2 * cut, cols, cut, 0)
    return Region(rows, cols - 2 * cut, 0, cut)


def _anyres(photo: Image.Image, layout: Layout, cfg: ImageConfig) -> Tiles:
    (rows, cols), (left, top), side = layout.grid, layout.offset, cfg.size // cfg.patch
    canvas = np.zeros((*layout.canvas[::-1], 3), np.uint8)
    width, height = layout.resized
    canvas[top : top + height, left : left + width] = _resize(photo, layout.resized)
    pixels = np.empty((1 + rows * cols, cfg.size, cfg.size, 3), np.uint8)
    pixels[0] = _resize(photo, (cfg.size, cfg.size))
    cut = canvas.reshape(rows, cfg.size, cols, cfg.size, 3).swapaxes(1, 2)
    pixels[1:].reshape(cut.shape)[:] = cut

    area = layout.unpadded
    corners = np.indices((rows, cols)).reshape(2, -1).T * side
    row = corners[:, :1] + np.arange(side)
    col = corners[:, 1:] + np.arange(side)
    row_valid = (row >= area.top) & (row < area.top + area.rows)
    col_valid = (col >= area.left) & (col < area.left + area.cols)
    patch_valid = (row_valid[:, :, None] & col_valid[:, None]).reshape(rows * cols, -1)
    return Tiles(
        pixels=pixels,
        patch_valid=np.concatenate([np.ones((1, side**2), bool), patch_valid]),
        origin=np.concatenate([np.zeros((1, 2), np.int32), corners.astype(np.int32)]),
        row_valid=np.concatenate([np.ones((1, side), bool), row_valid]),
        grid=layout.grid,
    )


def _resize(photo: Image.Image, size: Size) -> UInt8[np.ndarray, "H W 3"]:
    return np.asarray(photo.resize(size, Image.Resampling.BICUBIC))


def _crop(photo: Image.Image, layout: Layout, cfg: ImageConfig) -> UInt8[np.ndarray, "S S 3"]:
    x, y = -layout.offset[0], -layout.offset[1]
    if layout.resized[0] * layout.resized[1] <= _LARGE:
        return _resize(photo, layout.resized)[y : y + cfg.size, x : x + cfg.size]
    (width, height), (wide, high) = photo.size, layout.resized
    rows, cols = range(y, y + cfg.size), range(x, x + cfg.size)
    left, right = window(width, wide, cols[0])[0], window(width, wide, cols[-1])[1]
    top, bottom = window(height, high, rows[0])[0], window(height, high, rows[-1])[1]
    pixels = np.asarray(photo.crop((left, top, right, bottom)))
    across = resample(pixels, width, wide, cols, start=left)
    return resample(across.swapaxes(0, 1), height, high, rows, start=top).swapaxes(0, 1)


def _pad(photo: Image.Image, layout: Layout, cfg: ImageConfig) -> UInt8[np.ndarray, "S S 3"]:
    (side, _), (x, y), (width, height) = layout.canvas, layout.offset, photo.size
    if width == height:
        return _resize(photo, (cfg.size, cfg.size))
    if side**2 <= max(_LARGE, 4 * width * height):
        canvas = Image.new("RGB", layout.canvas, cfg.background)
        canvas.paste(photo, layout.offset)
        return _resize(canvas, (cfg.size, cfg.size))
    rows, cols = reached(side, cfg.size, y, height), reached(side, cfg.size, x, width)
    fill = np.array(cfg.background, np.uint8)
    across = resample(np.asarray(photo), side, cfg.size, cols, x, fill)
    shown = resample(across.swapaxes(0, 1), side, cfg.size, rows, y, fill).swapaxes(0, 1)
    out = np.tile(fill, (cfg.size, cfg.size, 1))
    out[rows.start : rows.stop, cols.start : cols.stop] = shown
    return out


def _read_settings(directory: Path) -> tuple[dict[str, Any], int]:
    """The image processor's settings, checked but for sizes, and the patch size."""
    processor = _read_json(directory / "processor_config.json")
    settings = processor.get("image_processor") or _read_json(
        directory / "preprocessor_config.json"
    )
    if not settings:
        raise FileNotFoundError(
            f"{directory} has no preprocessor_config.json, nor image_processor settings in a"
            " processor_config.json: give the directory of a Hugging Face LLaVA checkpoint"
        )
    problem = _unsupported(settings)
    vision = _read_json(directory / "config.json").get("vision_config") or {}
    patch = processor.get("patch_size") or vision.get("patch_size")
    if not isinstance(patch, int):
        problem = ("patch_size", patch, "a whole number, here or in config.json")
    elif problem is None:
        return settings, patch
    key, found, wanted = problem
    raise ValueError(f"{directory}: {key} is {found!r}, but only {wanted} is supported")


def _unsupported(settings: dict[str, Any]) -> tuple[str, object, str] | None:
    """The first setting that `preprocess` does not follow: its key, value, and what would do."""
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if settings.get(key) is False:
            return key, False, "true"
    if settings.get("resample", 3) != Image.Resampling.BICUBIC:
        return "resample", settings["resample"], "3 (bicubic)"
    if not math.isclose(settings.get("rescale_factor") or 1 / 255, 1 / 255, rel_tol=1e-6):
        return "rescale_factor", settings["rescale_factor"], "1/255"
    for key in ("image_mean", "image_std"):
        if not isinstance(settings.get(key), list) or len(settings[key]) != 3:
            return key, settings.get(key), "a list of three numbers"
    kind, pinpoints = _kind(settings), settings.get("image_grid_pinpoints")
    if kind not in ("", "CLIP", "Llava", "LlavaNext"):
        return "image_processor_type", kind, "LLaVA's, LLaVA-NeXT's or CLIP's"
    if kind and (kind == "LlavaNext") != bool(pinpoints):
        return "image_grid_pinpoints", pinpoints, "a list for LLaVA-NeXT, none for another type"
    return None


def _kind(settings: dict[str, Any]) -> str:
    """The family of the image processor; "" in files that do not tell."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    return name


def _size_and_layout(settings: dict[str, Any]) -> tuple[int, LayoutName]:
    """Tile size and layout of a processor; ValueError unless its tiles are square."""
    size, crop = settings.get("size"), settings.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {}
    layout: LayoutName = "crop" if "shortest_edge" in size else "squash"
    if settings.get("image_grid_pinpoints"):
        layout = "anyres"
    elif settings.get("do_pad") and _kind(settings) == "Llava":
        layout = "pad"
    cropped = settings.get("do_center_crop") is not False
    sides = {side for key, side in size.items() if side is not None}
    if cropped or layout == "anyres":
        sides |= {crop.get("height"), crop.get("width")}
    if not size or len(sides) != 1 or None in sides or (layout == "crop" and not cropped):
        raise ValueError(
            f"size={size}, crop_size={crop}, do_center_crop={cropped} do not give square tiles of"
            " one size: make shortest_edge (or height and width) and crop_size equal"
        )
    return sides.pop(), layout


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch it again") from error


def _among(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
