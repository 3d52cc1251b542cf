"""Decoding, and the layout of one tile."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from focus_jax.data.images import (
    CorruptImage,
    decode,
    encode_png,
    single_tile,
    size_of,
    to_rgb,
)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_round_trip_is_exact():
    image = noise(17, 31)
    np.testing.assert_array_equal(decode(encode_png(image)), image)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_decoding_is_pils_conversion(kind):
    encoded = saved(Image.fromarray(noise(17, 31)), kind)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(decode(encoded), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_when_asked_for(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(Image.fromarray(noise(6, 9)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(encoded), noise(6, 9))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decode(encoded, exif=True), np.asarray(upright))
    assert size_of(encoded, exif=True) == upright.size
    assert size_of(encoded, exif=False) == (9, 6)


def test_a_size_needs_the_head_alone(tmp_path):
    encoded = saved(Image.fromarray(noise(40, 70)), "JPEG")
    path = tmp_path / "half.jpg"
    path.write_bytes(encoded[: len(encoded) // 2])
    assert size_of(path, exif=False) == (70, 40)
    with pytest.raises(CorruptImage, match="half"):
        to_rgb(path, exif=False, transparency="drop")
    with pytest.raises(CorruptImage, match="image of 7 bytes"):
        size_of(b"nothing", exif=False)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        size_of(tmp_path / "none.jpg", exif=False)


def test_transparent_pixels_are_dropped_or_laid_on_white():
    colours = noise(1, 3)
    alpha = np.array([[[255], [0], [0]]], np.uint8)
    encoded = saved(Image.fromarray(np.concatenate([colours, alpha], axis=2)), "PNG")
    np.testing.assert_array_equal(decode(encoded), colours)
    white = decode(encoded, transparency="white")
    np.testing.assert_array_equal(white, np.where(alpha > 0, colours, 255))


@pytest.mark.parametrize("share", [1.5, 3])
def test_too_large_images_are_corrupt(share, monkeypatch):
    encoded = encode_png(noise(30, 40))
    limit = int(1200 / share)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    filters = list(warnings.filters)
    with pytest.raises(CorruptImage, match=r"1200 pixels.* limit") as raised:
        decode(encoded)
    # Past twice its limit PIL itself raises, and names the double.
    assert str(limit if share < 2 else 2 * limit) in str(raised.value)
    assert limit == Image.MAX_IMAGE_PIXELS and warnings.filters == filters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CorruptImage, match="1200 pixels"):
            decode(encoded)


def test_an_open_image_stays_usable():
    image = Image.open(io.BytesIO(encode_png(noise(5, 7))))
    first = to_rgb(image, exif=True, transparency="white")
    np.testing.assert_array_equal(np.asarray(first), noise(5, 7))
    np.testing.assert_array_equal(np.asarray(image), noise(5, 7))


def test_images_without_pixels_are_corrupt():
    with pytest.raises(CorruptImage, match="0x5"):
        to_rgb(Image.new("RGB", (0, 5)), exif=False, transparency="drop")


def test_truncated_open_images_are_corrupt():
    whole = saved(Image.fromarray(noise(40, 40)), "JPEG")
    with pytest.raises(CorruptImage, match="truncated"):
        to_rgb(Image.open(io.BytesIO(whole[:-500])), exif=False, transparency="drop")


@pytest.mark.parametrize("damage", [b"", b"not an image", "cut", "flip"])
def test_damaged_files_are_corrupt_images(damage):
    whole = encode_png(noise(40, 40))
    if damage == "cut":
        damage = whole[: len(whole) // 2]
    elif damage == "flip":
        damage = whole[:20] + bytes(20) + whole[40:]
    with pytest.raises(CorruptImage, match=f"of {len(damage)} bytes cannot be decoded"):
        decode(damage)


def test_encoding_refuses_other_arrays():
    with pytest.raises(ValueError, match="float"):
        encode_png(noise(4, 4).astype(np.float32))


def test_single_tile_keeps_an_image_of_its_size():
    image = noise(32, 32)
    tiles = single_tile(image, 32, 8)
    np.testing.assert_array_equal(tiles.pixels[0], image)
    assert tiles.patch_valid.shape == (1, 16) and tiles.patch_valid.all()
    assert tiles.row_valid.shape == (1, 4) and tiles.row_valid.all()
    assert tiles.origin.tolist() == [[0, 0]] and tiles.grid == (1, 1)


def test_single_tile_resizes_and_checks_the_patch():
    assert single_tile(noise(20, 50), 32, 8).pixels.shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="patch=7"):
        single_tile(noise(32, 32), 32, 7)
