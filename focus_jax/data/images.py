"""Encoded images to arrays and back, and the layout of an image as tiles."""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image


class CorruptImage(ValueError):
    """An encoded image that cannot be decoded."""


class Tiles(NamedTuple):
    """An image cut into tiles of S x S pixels with N patches each, row-major.

    `origin` is the (row, col) of a tile's first patch in the stitched grid; `patch_valid` is
    False where a patch shows padding only.
    """

    pixels: UInt8[np.ndarray, "tiles S S 3"]
    patch_valid: Bool[np.ndarray, "tiles N"]
    origin: Int32[np.ndarray, "tiles 2"]


def decode(encoded: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image file (PNG, JPEG, ...) to RGB.

    Raises CorruptImage when the bytes are not a whole, readable image.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))
    # PIL reports broken files by all of these, according to format and place of the damage.
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        raise CorruptImage(
            f"image of {len(encoded)} bytes cannot be decoded ({error}); replace or remove the file"
        ) from error


def encode_png(image: UInt8[np.ndarray, "H W 3"], level: int = 1) -> bytes:
    """Encode RGB as PNG; level 1 is quick, 9 is small."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}: give uint8 [H, W, 3]")
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=level)
    return file.getvalue()


def single_tile(image: UInt8[np.ndarray, "H W 3"], size: int, patch: int) -> Tiles:
    """The whole image as one tile of `size` pixels; other sizes are resized, distorting."""
    if size % patch:
        raise ValueError(f"size={size} is not a multiple of patch={patch}: change one of them")
    if image.shape[:2] != (size, size):
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    return Tiles(
        pixels=image[None],
        patch_valid=np.ones((1, (size // patch) ** 2), bool),
        origin=np.zeros((1, 2), np.int32),
    )
