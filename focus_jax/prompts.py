"""Prompts and images to a batch for the model: static shapes, in a few sizes."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from focus_jax.compress.method import Method
from focus_jax.config import ModelConfig
from focus_jax.data.conversation import Prompt
from focus_jax.data.images import Tiles
from focus_jax.models.vlm import Inputs, dims_of

SHORTEST = 16
Arrays = dict[str, np.ndarray]


def bucket(length: int) -> int:
    """The next size that text is padded to: 16, 24, 32, 48, 64, 96, ..."""
    size = SHORTEST
    while size < length:
        if size + size // 2 >= length:
            return size + size // 2
        size *= 2
    return size


def make_inputs(
    cfg: ModelConfig, prompts: Sequence[Prompt], images: Sequence[Sequence[Tiles]]
) -> Inputs:
    """One batch of prompts with their images.

    Text is padded to a bucket, images to the most tiles and the most images that one has.
    ValueError where a prompt places another number of images than it has.
    """
    for number, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        if len(prompt.image_at) != len(own):
            raise ValueError(
                f"prompt {number} places {len(prompt.image_at)} images and has {len(own)}"
            )
    most = max((len(own) for own in images), default=0) or 1
    tiles = max((len(tile.pixels) for own in images for tile in own), default=1)
    text = bucket(max(len(p.ids) for p in prompts))
    arrays = make_arrays(cfg, prompts, images, text, most, tiles)
    return Inputs(**{name: jnp.asarray(array) for name, array in arrays.items()})


def make_arrays(
    cfg: ModelConfig,
    prompts: Sequence[Prompt],
    images: Sequence[Sequence[Tiles]],
    text: int,
    most: int,
    tiles: int,
) -> Arrays:
    """The arrays of `Inputs`: text padded to `text` tokens, `most` images of `tiles` tiles."""
    arrays = empty(cfg, len(prompts), text, most, tiles)
    for row, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        write_text(arrays, row, prompt)
        for number, tile in enumerate(own):
            write_tiles(arrays, row, number, tile)
    for name in ("pixels", "patch_valid", "origin", "row_valid"):
        shape = arrays[name].shape
        arrays[name] = arrays[name].reshape(shape[0], most * tiles, *shape[3:])
    return arrays


def empty(cfg: ModelConfig, b: int, text: int, images: int, tiles: int) -> Arrays:
    """A batch without text and images; images and their tiles are axes apart."""
    size, lead = cfg.vision.image_size, (b, images, tiles)
    asked = (b, 1, text)
    return {
        "pixels": np.zeros((*lead, size, size, 3), np.uint8),
        "patch_valid": np.zeros((*lead, cfg.vision.patches), bool),
        "row_valid": np.zeros((*lead, cfg.vision.grid), bool),
        "origin": np.zeros((*lead, 2), np.int32),
        "image_at": np.zeros((b, images), np.int32),
        "prefix": np.zeros((b, 0), np.int32),
        "prefix_valid": np.zeros((b, 0), bool),
        "tokens": np.zeros(asked, np.int32),
        **{name: np.zeros(asked, bool) for name in ("token_valid", "instruction", "label")},
    }


def write_text(arrays: Arrays, row: int, prompt: Prompt) -> None:
    """One prompt's tokens; images that it does not have stand at its end."""
    n = len(prompt.ids)
    arrays["tokens"][row, 0, :n] = prompt.ids
    arrays["token_valid"][row, 0, :n] = True
    arrays["instruction"][row, 0, :n] = prompt.asks
    arrays["image_at"][row] = n
    arrays["image_at"][row, : len(prompt.image_at)] = prompt.image_at


def write_tiles(arrays: Arrays, row: int, number: int, tiles: Tiles) -> None:
    """One image of a prompt. ValueError for tiles of another size than the model's."""
    size = arrays["pixels"].shape[3:]
    if tiles.pixels.shape[1:] != size:
        raise ValueError(
            f"tiles are {tiles.pixels.shape[1:]}, the model takes {size}: preprocess with the "
            "model's image size"
        )
    at = (row, number, slice(0, len(tiles.pixels)))
    for name in ("pixels", "patch_valid", "row_valid", "origin"):
        arrays[name][at] = getattr(tiles, name)


def check_context(
    cfg: ModelConfig,
    method: Method,
    prompts: Sequence[Prompt],
    images: Sequence[Sequence[Tiles]],
    new_tokens: int,
) -> None:
    """ValueError for a prompt that, with its images and answer, exceeds the model's context."""
    limit = cfg.decoder.max_position
    for number, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        if not len(prompt.ids):
            raise ValueError(f"prompt {number} is empty: ask something")
        visual = sum(visual_tokens(cfg, method, tiles) for tiles in own)
        length = len(prompt.ids) + visual
        if length + new_tokens > limit:
            raise ValueError(
                f"prompt {number} has {length} tokens ({visual} of them visual) and up to "
                f"{new_tokens} new ones; the model's context is {limit}: shorten the text, lower "
                "max_new_tokens, or use a method that lets fewer visual tokens in"
            )


def visual_tokens(cfg: ModelConfig, method: Method, tiles: Tiles) -> int:
    """The most visual tokens with which an image enters the decoder."""
    lines = np.unique((tiles.origin[:, :1] + np.arange(cfg.vision.grid))[1:][tiles.row_valid[1:]])
    present = int(tiles.patch_valid.sum()) + (lines.size if cfg.image_newline else 0)
    return min(present, method.stage_slots(dims_of(cfg, len(tiles.pixels)))[0])
