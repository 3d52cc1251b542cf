"""Tiles against Hugging Face's PIL processors, LLaVA's own results, and PIL itself."""

import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from focus_jax.data import preprocess as module
from focus_jax.data.images import CorruptImage, encode_png
from focus_jax.data.preprocess import (
    ImageConfig,
    layout_of,
    normalisation_of,
    preprocess,
    preprocess_many,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "anyres"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
POINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
SMALL = {"size": 56, "patch": 14}
CROP = ImageConfig("crop", **SMALL)
ANYRES = ImageConfig("anyres", **SMALL, pinpoints=POINTS, grid_order="hf")
ORIGINAL = replace(ANYRES, grid_order="original")
PAD = ImageConfig("pad", **SMALL)

SIZES = [
    (1, 1), (2, 3), (3, 2), (1, 2), (5, 4), (13, 14), (14, 13), (55, 56), (56, 56), (57, 55),
    (56, 112), (112, 56), (112, 112), (168, 56), (56, 168), (113, 57), (75, 50), (61, 97),
    (211, 60), (300, 200), (200, 300), (331, 337), (337, 331), (640, 480), (480, 640), (500, 375),
    (3000, 200), (200, 3000), (1000, 100), (100, 1000), (1000, 1), (1, 1000), (2000, 3), (7, 999),
    (999, 1000), (101, 103),
]  # fmt: skip


@cache
def picture(width, height):
    """Noise over ramps: every resize and every shift of it shows."""
    noise = np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, width)[None, :, None] + np.linspace(0, 255, height)[:, None, None]
    return ((noise + ramp) / 3).astype(np.uint8)


@cache
def hf_processor(anyres, size=56, pinpoints=POINTS):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if not anyres:
        return LlavaImageProcessorPil(**sizes)
    return LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=[list(p) for p in pinpoints])


@cache
def hf_whole(size=56, pinpoints=POINTS):
    """LLaVA-NeXT's processor with a tokenizer of three words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<image>": 1, "x": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=["<image>"], unk_token="<unk>"
    )
    return LlavaNextProcessor(
        hf_processor(True, size, pinpoints), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def hf_pixels(anyres, image):
    pixels = hf_processor(anyres)(image, return_tensors="np")["pixel_values"]
    return pixels[0] if anyres else pixels


def normalised(tiles):
    return ((tiles.pixels / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)


def pack(features, newline, tiles):
    """Thumbnail, then each valid row of the stitched grid with a newline behind it."""
    side = tiles.row_valid.shape[1]
    out = list(features[0])
    for row in range(tiles.grid[0] * side):
        lies = np.flatnonzero(tiles.origin[1:, 0] // side == row // side) + 1
        lies = lies[np.argsort(tiles.origin[lies, 1])]
        if not tiles.row_valid[lies, row % side].all():
            assert not tiles.row_valid[lies, row % side].any()
            continue
        for tile in lies:
            here = slice(row % side * side, (row % side + 1) * side)
            out += list(features[tile, here][tiles.patch_valid[tile, here]])
        out.append(newline)
    return np.array(out)


# -- Hugging Face --


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_hf(size):
    image = picture(*size)
    for cfg in (CROP, ANYRES):
        theirs = hf_pixels(cfg is ANYRES, Image.fromarray(image))
        np.testing.assert_allclose(normalised(preprocess(image, cfg)), theirs, rtol=0, atol=1e-5)


def test_padding_equals_hf_do_pad():
    for size in SIZES[::5]:
        theirs = hf_processor(False)(Image.fromarray(picture(*size)), do_pad=True)
        ours = normalised(preprocess(picture(*size), PAD))
        np.testing.assert_allclose(ours[0], theirs["pixel_values"][0], rtol=0, atol=1e-5)


def encoded(kind):
    """Bytes of an image file of this kind, 75 x 50."""
    rng = np.random.default_rng(1)
    image, file = Image.fromarray(picture(75, 50)), io.BytesIO()
    alpha = Image.fromarray(rng.integers(0, 256, (50, 75), dtype=np.uint8))
    if kind.startswith("exif"):
        exif = Image.Exif()
        exif[0x0112] = int(kind[-1])
        image.save(file, "PNG" if "png" in kind else "JPEG", exif=exif)
    elif kind == "I;16":
        wide = rng.integers(0, 65536, (50, 75), dtype=np.uint16)
        Image.fromarray(wide).save(file, "PNG")
    elif kind == "RGBA":
        image.putalpha(alpha)
        image.save(file, "PNG")
    elif kind == "LA":
        Image.merge("LA", (image.convert("L"), alpha)).save(file, "PNG")
    elif kind == "P with transparency":
        image.quantize(16).save(file, "PNG", transparency=bytes(range(0, 256, 16)))
    elif kind.endswith("key"):
        image = image.quantize(16) if kind[0] == "P" else image.convert(kind.split()[0])
        image.save(file, "PNG", transparency=image.getpixel((3, 4)))
    elif kind == "GIF":
        image.quantize(16).save(file, "GIF", transparency=3)
    elif kind == "animated":
        image.save(file, "GIF", save_all=True, append_images=[image.rotate(180)])
    elif kind == "CMYK":
        image.convert("CMYK").save(file, "JPEG")
    else:
        image.convert(kind).save(file, "PNG")
    return file.getvalue()


KINDS = [
    "1", "L", "LA", "P", "P with transparency", "P with key", "L with key", "RGB with key",
    "GIF", "RGBA", "CMYK", "I;16",
    "animated", "exif 1", "exif 2", "exif 3", "exif 6", "exif 8", "exif png 5",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images_equal_hf(kind, tmp_path):
    data = encoded(kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    for cfg in (CROP, ANYRES):
        # A path goes through `load_image`, an open image only through the processor's conversion.
        loaded = replace(cfg, exif=True, transparency="keyed")
        as_opened = replace(cfg, transparency="white")
        theirs = hf_pixels(cfg is ANYRES, str(path))
        for given in (data, path, str(path)):
            ours = normalised(preprocess(given, loaded))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        with Image.open(path) as image:
            theirs = hf_pixels(cfg is ANYRES, image)
        with Image.open(path) as image:
            ours = normalised(preprocess(image, as_opened))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_original_is_a_plain_conversion_unturned(kind):
    data = encoded(kind)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    ours, expected = preprocess(data, PAD), preprocess(plain, PAD)
    np.testing.assert_array_equal(ours.pixels, expected.pixels)


def test_processor_puts_as_many_tokens_into_the_prompt():
    for size in SIZES[::4]:
        prompt = hf_whole()(images=Image.fromarray(picture(*size)), text="x <image> x")
        count = sum(token == 1 for token in prompt["input_ids"][0])
        assert count == layout_of(size, ANYRES).tokens, size


def test_token_counts_equal_hf_for_many_sizes():
    big = ImageConfig("anyres", pinpoints=tuple((6 * a, 6 * b) for a, b in POINTS), grid_order="hf")
    rng = np.random.default_rng(2)
    drawn = np.exp(rng.uniform(0, np.log(4000), (1500, 2))).astype(int).tolist()
    for cfg, side in ((ANYRES, 56), (big, 336)):
        count = hf_whole(side, cfg.pinpoints)._get_number_of_features
        for size in [*SIZES, (10000, 1), (1, 10000), *map(tuple, drawn)]:
            # HF's number includes the class token, which the model drops.
            assert layout_of(size, cfg).tokens == count(size[1], size[0], side, side) - 1, size


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_validity_and_order_equal_hf_packing(size):
    import torch
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    tiles = preprocess(picture(*size), ANYRES)
    numbers = np.arange(tiles.patch_valid.size, dtype=np.float32)
    features = numbers.reshape(*tiles.patch_valid.shape, 1)
    vision = SimpleNamespace(image_size=56, patch_size=14)
    config = SimpleNamespace(
        vision_config=vision, image_grid_pinpoints=[list(p) for p in POINTS]
    )  # fmt: skip
    theirs, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [torch.from_numpy(features)], [(size[1], size[0])],
        "default", torch.full((1,), -1.0),
    )  # fmt: skip
    ours = pack(features, np.full(1, -1.0), tiles)
    np.testing.assert_array_equal(ours, theirs[0].numpy())
    assert len(ours) == layout_of(size, ANYRES).tokens


# -- LLaVA --


def test_table_of_the_original():
    case = json.loads((GOLDEN / "table_336" / "case.json").read_text())
    table = np.load(GOLDEN / "table_336" / "arrays.npz")["table"]
    points = tuple(map(tuple, case["knobs"]["grid_pinpoints"]))
    cfg = ImageConfig("anyres", pinpoints=points)
    assert len(table) == 46
    for row in table.tolist():
        wanted = dict(zip(case["columns"], row, strict=True))
        found = layout_of((wanted["orig_w"], wanted["orig_h"]), cfg)
        assert found.canvas == (wanted["grid_w"], wanted["grid_h"])
        assert found.resized == (wanted["resized_w"], wanted["resized_h"])
        assert found.offset == (wanted["paste_x"], wanted["paste_y"])
        assert found.grid == (wanted["grid_rows"], wanted["grid_cols"])
        area = found.unpadded
        # Without rows the columns are not written down, and the other way round.
        assert area.rows * area.cols == wanted["unpadded_rows"] * wanted["unpadded_cols"]
        assert (area.rows, area.cols) == (wanted["unpadded_rows"], wanted["unpadded_cols"])
        assert found.tokens == wanted["tokens"]


@pytest.mark.parametrize("number", range(3))
def test_tiles_of_the_original(number):
    arrays = np.load(GOLDEN / "tiles_56" / "arrays.npz")
    image = arrays[f"image{number}"]
    tiles = normalised(preprocess(image, ORIGINAL))
    np.testing.assert_allclose(tiles, arrays[f"tiles{number}"], rtol=0, atol=4e-3)
    padded = normalised(preprocess(image, PAD))[0]
    np.testing.assert_allclose(padded, arrays[f"pad{number}"], rtol=0, atol=4e-3)


def test_packing_of_the_original():
    case = json.loads((GOLDEN / "packing" / "case.json").read_text())
    arrays = np.load(GOLDEN / "packing" / "arrays.npz")
    for number, image in enumerate(case["images"]):
        tiles = preprocess(picture(*image["size"]), ORIGINAL)
        packed = pack(arrays[f"features{number}"], arrays["image_newline"], tiles)
        np.testing.assert_array_equal(packed, arrays[f"packed{number}"])
        assert layout_of(tuple(image["size"]), ORIGINAL).tokens == image["tokens"]


def test_ties_between_grids_turn_with_the_order():
    points = tuple((6 * a, 6 * b) for a, b in POINTS)
    original = ImageConfig("anyres", pinpoints=points)
    assert layout_of((640, 480), original).tokens == 2340
    assert layout_of((300, 200), original).tokens == 976
    assert layout_of((300, 200), replace(original, grid_order="hf")).tokens == 1464


# -- layouts --


def test_one_view_is_valid_throughout():
    for layout in ("squash", "pad", "crop"):
        cfg = ImageConfig(layout, **SMALL)
        tiles = preprocess(picture(75, 50), cfg)
        assert tiles.pixels.shape == (1, 56, 56, 3) and tiles.pixels.dtype == np.uint8
        assert tiles.patch_valid.shape == (1, 16) and tiles.patch_valid.all()
        assert tiles.row_valid.shape == (1, 4) and tiles.row_valid.all()
        assert tiles.origin.tolist() == [[0, 0]] and tiles.grid == (1, 1)
        assert layout_of((75, 50), cfg).tokens == 16


def test_tiles_stitch_to_the_picture_on_black():
    tiles, layout = preprocess(picture(211, 60), ANYRES), layout_of((211, 60), ANYRES)
    canvas = np.zeros((*layout.canvas[::-1], 3), np.uint8)
    for pixels, (row, col) in zip(tiles.pixels[1:], tiles.origin[1:] * 14, strict=True):
        canvas[row : row + 56, col : col + 56] = pixels
    (x, y), (width, height) = layout.offset, layout.resized
    resized = Image.fromarray(picture(211, 60)).resize(layout.resized, Image.Resampling.BICUBIC)
    expected = np.zeros_like(canvas)
    expected[y : y + height, x : x + width] = np.asarray(resized)
    np.testing.assert_array_equal(canvas, expected)
    assert tiles.patch_valid[0].all() and tiles.row_valid[0].all()
    assert tiles.pixels.dtype == np.uint8 and tiles.origin.dtype == np.int32


def test_thin_photos_take_an_equal_but_smaller_road(monkeypatch):
    thin = [(97, 11), (13, 200), (1, 50), (50, 1), (301, 7), (7, 302), (5, 57), (640, 100)]
    whole = {(size, cfg): preprocess(picture(*size), cfg) for size in thin for cfg in (PAD, CROP)}
    monkeypatch.setattr(module, "_LARGE", 0)
    made = record_sizes(monkeypatch)
    for (size, cfg), tiles in whole.items():
        again = preprocess(picture(*size), cfg)
        np.testing.assert_array_equal(again.pixels, tiles.pixels, err_msg=f"{size} {cfg.layout}")
    assert set(made) <= set(thin)


def record_sizes(monkeypatch):
    """Pixels of every image that PIL makes from now on by resizing or anew."""
    made, resize, new = [], Image.Image.resize, Image.new
    monkeypatch.setattr(
        Image.Image, "resize", lambda im, size, *a: made.append(size) or resize(im, size, *a)
    )
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *a: made.append(size) or new(mode, size, *a)
    )
    return made


@pytest.mark.parametrize("size", [(10000, 1), (1, 10000), (30000, 2)], ids=str)
def test_extreme_photos_make_no_enormous_images(size, monkeypatch):
    image = picture(*size)
    made = record_sizes(monkeypatch)
    squash = ImageConfig("squash", **SMALL)
    for cfg in (squash, ANYRES, *(ImageConfig(layout) for layout in ("pad", "crop"))):
        tiles = preprocess(image, cfg)
        assert tiles.pixels.shape[1:] == (cfg.size, cfg.size, 3)
        assert tiles.patch_valid.sum() <= layout_of(size, cfg).tokens
    assert all(width * height <= 4 * 10**6 for width, height in made)


# -- many --


def test_many_keep_their_order():
    images = [picture(*size) for size in SIZES[10:22]]
    alone = [preprocess(image, ANYRES) for image in images]
    for workers in (0, 3):
        for ours, expected in zip(
            preprocess_many(images, ANYRES, workers=workers), alone, strict=True
        ):
            np.testing.assert_array_equal(ours.pixels, expected.pixels)
            assert ours.grid == expected.grid


def test_many_name_the_corrupt_image():
    good = encode_png(picture(5, 4))
    for workers in (0, 2):
        with pytest.raises(CorruptImage, match=r"images\[2\]: image of 3 bytes"):
            preprocess_many([good, good, b"bad", good], PAD, workers=workers)
    with pytest.raises(ValueError, match="workers=-1"):
        preprocess_many([], PAD, workers=-1)
    assert preprocess_many([], PAD, workers=2) == []


# -- configuration --

LEGACY = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
    "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "resample": 3,
    "image_mean": MEAN.tolist(), "image_std": STD.tolist(), "rescale_factor": 1 / 255,
}  # fmt: skip


def write(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_from_hf_reads_what_transformers_writes(tmp_path):
    hf_whole().save_pretrained(tmp_path / "next")
    assert ImageConfig.from_hf(tmp_path / "next") == replace(
        ANYRES, exif=True, transparency="keyed"
    )
    assert ImageConfig.from_hf(tmp_path / "next", mode="original") == ORIGINAL
    write(tmp_path, config={"vision_config": {"patch_size": 14}})
    hf_processor(False).save_pretrained(tmp_path)
    as_hf = {"exif": True, "transparency": "keyed", "grid_order": "hf"}
    assert ImageConfig.from_hf(tmp_path) == replace(CROP, **as_hf)
    assert ImageConfig.from_hf(tmp_path, mode="original") == PAD
    mean, std = normalisation_of(tmp_path)
    np.testing.assert_array_equal([mean, std], [MEAN, STD])


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({}, "crop"),
        ({"size": 56, "crop_size": 56}, "crop"),
        ({"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}, "crop"),
        ({"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}, "pad"),
        ({"do_pad": True}, "crop"),
        ({"size": {"height": 56, "width": 56}}, "squash"),
        ({"size": {"height": 56, "width": 56}, "do_center_crop": False, "crop_size": 9}, "squash"),
        (
            {
                "image_processor_type": "LlavaNextImageProcessor",
                "image_grid_pinpoints": [[56, 112], [112, 56]],
            },
            "anyres",
        ),
    ],
)
def test_from_hf_reads_older_files(changes, layout, tmp_path):
    write(tmp_path, preprocessor_config=LEGACY | changes, processor_config={"patch_size": 14})
    cfg = ImageConfig.from_hf(tmp_path)
    assert (cfg.layout, cfg.size, cfg.patch, cfg.grid_order) == (layout, 56, 14, "hf")
    assert cfg.background == (122, 116, 104)
    assert len(cfg.pinpoints) == (2 if layout == "anyres" else 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "resample is 2"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"image_mean": 0.5}, "image_mean is 0.5"),
        ({"crop_size": 48}, "square tiles"),
        ({"size": {"height": 56, "width": 60}}, "square tiles"),
        ({"size": {"shortest_edge": 56, "longest_edge": 90}}, "square tiles"),
        ({"do_center_crop": False}, "square tiles"),
        ({"size": None}, "square tiles"),
        ({"crop_size": None}, "square tiles"),
        ({"image_processor_type": "LlavaOnevisionImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "image_grid_pinpoints is None"),
        ({"image_grid_pinpoints": [[56, 56]]}, "image_grid_pinpoints"),
        ({"image_processor_type": "", "image_grid_pinpoints": [[56, 60]]}, "pinpoint"),
    ],
)
def test_from_hf_refuses_what_is_not_followed(changes, message, tmp_path):
    write(tmp_path, preprocessor_config=LEGACY | changes, processor_config={"patch_size": 14})
    with pytest.raises(ValueError, match=message):
        ImageConfig.from_hf(tmp_path)


def test_from_hf_names_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        ImageConfig.from_hf(tmp_path)
    write(tmp_path, preprocessor_config=LEGACY)
    with pytest.raises(ValueError, match="patch_size is None"):
        ImageConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        ImageConfig.from_hf(tmp_path)
    with pytest.raises(ValueError, match="mode='torch'"):
        ImageConfig.from_hf(tmp_path, mode="torch")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "stretch"}, "layout='stretch': choose one of squash, pad, crop, anyres"),
        ({"grid_order": "w"}, "grid_order='w'"),
        ({"transparency": "black"}, "transparency='black'"),
        ({"size": 50}, "patch=14"),
        ({"size": 0}, "size=0"),
        ({"layout": "anyres"}, "needs pinpoints"),
        ({"layout": "anyres", "pinpoints": ((336, 500),)}, r"pinpoint \(336, 500\)"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageConfig(**fields)


def test_wrong_photos_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        preprocess(tmp_path / "gone.png", PAD)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(CorruptImage, match=r"text\.png cannot be decoded"):
        preprocess(str(tmp_path / "text.png"), PAD)
    with pytest.raises(ValueError, match="float64"):
        preprocess(np.zeros((4, 4, 3)), PAD)
    with pytest.raises(ValueError, match=r"\(0, 4, 3\)"):
        preprocess(np.zeros((0, 4, 3), np.uint8), PAD)
    with pytest.raises(ValueError, match="type list"):
        preprocess([1], PAD)
    with pytest.raises(ValueError, match="0x5"):
        layout_of((0, 5), PAD)
