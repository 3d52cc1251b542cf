"""Decoding, and the layout of one tile."""

import numpy as np
import pytest

from focus_jax.data.images import CorruptImage, decode, encode_png, single_tile


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_round_trip_is_exact():
    image = noise(17, 31)
    np.testing.assert_array_equal(decode(encode_png(image)), image)


@pytest.mark.parametrize("damage", [b"", b"not an image", "cut", "flip"])
def test_damaged_files_are_corrupt_images(damage):
    whole = encode_png(noise(40, 40))
    if damage == "cut":
        damage = whole[: len(whole) // 2]
    elif damage == "flip":
        damage = whole[:20] + bytes(20) + whole[40:]
    with pytest.raises(CorruptImage, match="cannot be decoded"):
        decode(damage)


def test_encoding_refuses_other_arrays():
    with pytest.raises(ValueError, match="float"):
        encode_png(noise(4, 4).astype(np.float32))


def test_single_tile_keeps_an_image_of_its_size():
    image = noise(32, 32)
    tiles = single_tile(image, 32, 8)
    np.testing.assert_array_equal(tiles.pixels[0], image)
    assert tiles.patch_valid.shape == (1, 16) and tiles.patch_valid.all()
    assert tiles.origin.tolist() == [[0, 0]]


def test_single_tile_resizes_and_checks_the_patch():
    assert single_tile(noise(20, 50), 32, 8).pixels.shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="patch=7"):
        single_tile(noise(32, 32), 32, 7)
