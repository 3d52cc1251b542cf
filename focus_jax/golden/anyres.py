"""Recorded any-resolution images: where photos come to lie, tiles, and how tokens are packed."""

import re
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from focus_jax.compress.baselines import Full
from focus_jax.compress.method import Context, Dims, Views, VisualTokens
from focus_jax.compress.stitch import stitch
from focus_jax.data.images import Tiles
from focus_jax.data.preprocess import ImageConfig, LayoutName, layout_of, preprocess
from focus_jax.golden.case import Recorded

GIVEN = r"image_newline|image\d+|features.*"


def replay(case: Recorded) -> dict[str, np.ndarray]:
    """Whatever of a table, tiles and packed tokens a case holds."""
    found: dict[str, np.ndarray] = {}
    if "table" in case.expected:
        found["table"] = table(case)
    for name in case.expected:
        if match := re.fullmatch(r"(tiles|pad)(\d+)", name):
            layout: LayoutName = "anyres" if match[1] == "tiles" else "pad"
            found[name] = pixels(case, layout, match[2])
    return found | dict(packed(case))


def config(case: Recorded, layout: LayoutName = "anyres") -> ImageConfig:
    """The case's grid, in LLaVA's order of sides."""
    knobs = case.knobs
    cfg = {"size": knobs["tile"], "patch": knobs["patch"]}
    if layout == "anyres":
        points = tuple((width, height) for width, height in knobs["grid_pinpoints"])
        return ImageConfig(layout, **cfg, pinpoints=points)
    red, green, blue = (int(mean * 255) for mean in knobs["image_mean"])
    return ImageConfig(layout, **cfg, background=(red, green, blue))


def table(case: Recorded) -> Int[np.ndarray, "S C"]:
    """The layout of every size in a table, by its columns. ValueError: an unknown column."""
    cfg, columns = config(case), case.info["columns"]
    given = case.array("table")[:, [columns.index("orig_w"), columns.index("orig_h")]]
    rows = []
    for width, height in given.tolist():
        found = layout_of((width, height), cfg)
        row = {
            "orig_w": width, "orig_h": height, "grid_w": found.canvas[0],
            "grid_h": found.canvas[1], "resized_w": found.resized[0],
            "resized_h": found.resized[1], "paste_x": found.offset[0], "paste_y": found.offset[1],
            "tiles": found.grid[0] * found.grid[1], "grid_cols": found.grid[1],
            "grid_rows": found.grid[0], "unpadded_rows": found.unpadded.rows,
            "unpadded_cols": found.unpadded.cols, "tokens": found.tokens,
        }  # fmt: skip
        if unknown := [name for name in columns if name not in row]:
            raise ValueError(f"{case.directory} has table columns {unknown}: known are {[*row]}")
        rows.append([row[name] for name in columns])
    return np.array(rows, np.int64)


def pixels(case: Recorded, layout: LayoutName, number: str) -> Float[np.ndarray, "..."]:
    """Normalised tiles of an image, channels first; of one view without their axis."""
    tiles = preprocess(case.array(f"image{number}"), config(case, layout)).pixels
    mean, std = (np.asarray(case.knobs[f"image_{name}"]) for name in ("mean", "std"))
    out = ((tiles / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    return out if layout == "anyres" else out[0]


def packed(case: Recorded) -> Iterator[tuple[str, np.ndarray]]:
    """Tokens of each image with newlines, in the order of the decoder."""
    for name in case.expected:
        match = re.fullmatch(r"packed(\d+)", name)
        if match is None and name != "packed_single_tile":
            continue
        features = case.array(name.replace("packed", "features"))
        tiles = single(case) if match is None else tiled(case, int(match[1]))
        yield name, stitched(case, features, tiles)


def tiled(case: Recorded, number: int) -> Tiles:
    """How an image of the case's size is cut, whatever it shows."""
    width, height = case.info["images"][number]["size"]
    return preprocess(np.zeros((height, width, 3), np.uint8), config(case))


def single(case: Recorded) -> Tiles:
    """An image that is one tile only."""
    side = case.knobs["tile"]
    cfg = ImageConfig("squash", size=side, patch=case.knobs["patch"])
    return preprocess(np.zeros((side, side, 3), np.uint8), cfg)


def stitched(
    case: Recorded, features: Float[np.ndarray, "M N C"], tiles: Tiles
) -> Float[np.ndarray, "V C"]:
    """Projected features of all tiles, packed as the model packs them when every patch stays."""
    cfg, width = config(case), features.shape[-1]
    side = cfg.size // cfg.patch
    dims = Dims(
        rows=side, cols=side, tiles=len(features),
        grids=tuple((high // cfg.size, wide // cfg.size) for wide, high in cfg.pinpoints),
        vision_width=width, width=width, layers=1, newline=True,
    )  # fmt: skip
    patches, rows, origin, given = (
        jnp.asarray(a)[None] for a in (tiles.patch_valid, tiles.row_valid, tiles.origin, features)
    )
    tokens = stream(Views(given, patches, rows, origin, {}), dims)
    there = np.asarray(tokens.valid[0])
    newline = np.asarray(tokens.newline[0, :, None])
    return np.where(newline, case.array("image_newline"), tokens.features[0])[there]


@partial(jax.jit, static_argnames="dims")
def stream(views: Views, dims: Dims) -> VisualTokens:
    """Every patch as a token, and newlines."""
    stage = Full()
    groups, _ = stage.apply(views, dims, None, None, Context(jax.random.key(0)))
    return stitch(groups, views, dims, stage.band(dims))
