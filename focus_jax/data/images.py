"""Encoded images to arrays and back, and the arrays of an image cut into tiles."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from PIL import ExifTags, Image, ImageOps

Photo = Image.Image | np.ndarray | bytes | str | Path
Transparency = Literal["drop", "white", "keyed"]

# PIL reports broken files by all of these, according to format and place of the damage.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    RuntimeError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


# PIL's fixed point for bicubic weights of 8-bit pixels.
_PRECISION = 22


class CorruptImage(ValueError):
    """An encoded image that cannot be decoded."""


class Tiles(NamedTuple):
    """An image cut into M tiles of S x S pixels, each N patches in R rows, row-major.

    With more than one tile the first is the thumbnail, always wholly valid. `origin` is the
    (row, col) of a tile's first patch in the stitched grid; `patch_valid` is False where a patch
    shows padding only; `row_valid` is False where a row of patches lies outside the unpadded grid
    (a narrow image can have valid rows without a valid patch: each still ends in a newline).
    `grid`: rows and columns of tiles, the thumbnail apart; (1, 1) for one view.
    """

    pixels: UInt8[np.ndarray, "M S S 3"]
    patch_valid: Bool[np.ndarray, "M N"]
    origin: Int32[np.ndarray, "M 2"]
    row_valid: Bool[np.ndarray, "M R"]
    grid: tuple[int, int]


def decode(
    encoded: bytes, *, exif: bool = False, transparency: Transparency = "drop"
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image file (PNG, JPEG, ...) to RGB; animations by their first frame.

    Raises CorruptImage when the bytes are not a whole, readable image. See `to_rgb`.
    """
    return np.asarray(to_rgb(encoded, exif=exif, transparency=transparency))


def to_rgb(photo: Photo, *, exif: bool, transparency: Transparency) -> Image.Image:
    """Any photo as an upright RGB image: open image, uint8 [H W 3], file's bytes, or path.

    `exif` turns the image as its orientation tag says. `transparency="drop"` is PIL's
    `convert("RGB")`; "white" lays what is transparent on white; "keyed" drops alpha channels and
    lays on white the one colour that a file may declare transparent. Raises CorruptImage for what
    cannot be decoded, has no pixels, or more than `Image.MAX_IMAGE_PIXELS` (where PIL only warns).
    """
    if isinstance(photo, np.ndarray):
        _check_array(photo)
        return Image.fromarray(photo)
    if isinstance(photo, Image.Image):
        with _naming(f"open image {getattr(photo, 'filename', '') or photo.size}"):
            return _convert(photo, exif, transparency)
    if isinstance(photo, str | Path):
        if not Path(photo).is_file():
            raise FileNotFoundError(f"no image file at {photo}: check the path")
        name, encoded = f"image file {photo}", Path(photo).read_bytes()
    elif isinstance(photo, bytes):
        name, encoded = f"image of {len(photo)} bytes", photo
    else:
        raise ValueError(
            f"a photo of type {type(photo).__name__}: give a PIL image, uint8 [H, W, 3], the bytes"
            " of an image file, or its path"
        )
    with _naming(name), Image.open(io.BytesIO(encoded)) as image:
        return _convert(image, exif, transparency)


def size_of(photo: bytes | str | Path, *, exif: bool) -> tuple[int, int]:
    """(width, height) of the image that `to_rgb` would make, from the file's head alone.

    Raises CorruptImage where there is no image, FileNotFoundError for a wrong path.
    """
    if not isinstance(photo, bytes) and not Path(photo).is_file():
        raise FileNotFoundError(f"no image file at {photo}: check the path")
    source = io.BytesIO(photo) if isinstance(photo, bytes) else photo
    name = f"image of {len(photo)} bytes" if isinstance(photo, bytes) else f"image file {photo}"
    with _naming(name), Image.open(source) as image:
        _check_size(image)
        turned = exif and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if turned else image.size


def encode_png(image: UInt8[np.ndarray, "H W 3"], level: int = 1) -> bytes:
    """Encode RGB as PNG; level 1 is quick, 9 is small."""
    _check_array(image)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=level)
    return file.getvalue()


def single_tile(image: UInt8[np.ndarray, "H W 3"] | Image.Image, size: int, patch: int) -> Tiles:
    """The whole RGB image as one tile of `size` pixels; other sizes are resized, distorting."""
    if isinstance(image, np.ndarray) and image.shape[:2] == (size, size):
        return one_view(image, patch)
    opened = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return one_view(np.asarray(opened.resize((size, size), Image.Resampling.BICUBIC)), patch)


def one_view(pixels: UInt8[np.ndarray, "S S 3"], patch: int) -> Tiles:
    """A square image as its only tile."""
    size = len(pixels)
    if size % patch:
        raise ValueError(f"size={size} is not a multiple of patch={patch}: change one of them")
    rows = size // patch
    return Tiles(
        pixels=pixels[None],
        patch_valid=np.ones((1, rows**2), bool),
        origin=np.zeros((1, 2), np.int32),
        row_valid=np.ones((1, rows), bool),
        grid=(1, 1),
    )


def resample(
    lines: UInt8[np.ndarray, "K W 3"],
    length: int,
    size: int,
    outputs: range,
    start: int,
    fill: UInt8[np.ndarray, " 3"] | None = None,
) -> UInt8[np.ndarray, "K outputs 3"]:
    """PIL's bicubic resize along axis 1 from `length` to `size`, to the bit, for some outputs only.

    `lines` are the pixels from `start` on; the others are `fill`, or not reached by the outputs.
    """
    out = np.empty((len(lines), len(outputs), 3), np.uint8)
    for place, output in enumerate(outputs):
        first, weights = _weights(length, size, output)
        inside = slice(max(start - first, 0), max(start + lines.shape[1] - first, 0))
        seen = weights[inside]
        offset = first + inside.start - start
        total = np.einsum("kxc,x->kc", lines[:, offset : offset + len(seen)], seen)
        if fill is not None:
            total += (weights.sum() - seen.sum()) * fill.astype(np.int64)
        out[:, place] = np.clip((total + (1 << (_PRECISION - 1))) >> _PRECISION, 0, 255)
    return out


def window(length: int, size: int, output: int) -> tuple[int, int]:
    """The first pixel under an output's bicubic filter, and the one behind the last."""
    scale = length / size
    centre, support = (output + 0.5) * scale, 2 * max(scale, 1.0)
    return max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))


def reached(length: int, size: int, start: int, count: int) -> range:
    """The outputs whose filter covers any of the pixels `start .. start + count`."""
    windows = [window(length, size, output) for output in range(size)]
    hits = [i for i, (a, b) in enumerate(windows) if a < start + count and b > start]
    return range(hits[0], hits[-1] + 1)


def _weights(length: int, size: int, output: int) -> tuple[int, Int[np.ndarray, " X"]]:
    """First pixel and fixed-point bicubic weights of an output, in PIL's order of operations."""
    first, last = window(length, size, output)
    scale = length / size
    x = np.abs((np.arange(first, last) - (output + 0.5) * scale + 0.5) * (1 / max(scale, 1.0)))
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weight /= np.cumsum(weight)[-1]  # one after another, as a C loop adds
    fixed = weight * (1 << _PRECISION)
    return first, np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int64)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn PIL's many errors into a CorruptImage that says which image it was."""
    try:
        yield
    except _BROKEN as error:
        raise CorruptImage(
            f"{name} cannot be decoded ({error}); replace or remove the file"
        ) from error


def _convert(image: Image.Image, exif: bool, transparency: Transparency) -> Image.Image:
    _check_size(image)
    image.load()
    if exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if transparency == "keyed" and image.mode != "RGB":
        image = image.convert("RGB")  # keeps the transparent colour in its `info`
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparency != "drop" and has_alpha:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if not (width and height):
        raise ValueError(f"size {width}x{height}: it has no pixels")
    if limit is not None and width * height > limit:
        raise ValueError(
            f"size {width}x{height} is {width * height} pixels, over PIL's limit of {limit}:"
            " scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )


def _check_array(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}: give uint8 [H, W, 3]")
