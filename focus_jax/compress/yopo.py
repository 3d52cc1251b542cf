"""YOPO: visual tokens stay, and get less of each layer."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from focus_jax.compress.baselines import Full
from focus_jax.compress.method import Cut, Method
from focus_jax.compress.visual_compute import HeadMask, VisualCompute
from focus_jax.compress.vtw import Withdraw

WANTED = "give a file of one bool for each head of each layer, as save_head_mask writes it"


def yopo(
    window: int | None = 5,
    layers: int | None = 16,
    ffn: float = 2.0,
    heads: str | float | None = 0.5,
    whole: int = 2,
    mode: Literal["masked", "efficient"] = "efficient",
    mass: Literal["official", "renormalise"] = "renormalise",
) -> Method:
    """YOPO (Zhang et al. 2024, arXiv 2410.06169): four ways to spend less on visual tokens.

    window: a visual token attends to visual tokens at most (window - 1) / 2 rows and columns away,
    in both directions; None for causal attention. The official code has no such thing: there visual
    tokens see each other in both directions even with the window off, which is a window as wide as
    the image (47 for 24 x 24).
    layers: from this layer on nobody looks at visual tokens; None for no such layer.
    ffn: visual tokens use the first 1/ffn of the feed-forward neurons; 1 for all.
    heads: the heads that see and show visual tokens: a file with a measured mask (.npy, .npz or
    .json, [layers][heads]), or a share such as 0.5. A share measures nothing: it is the LOWEST
    heads of each layer behind the first `whole`, which keep all (officially 0 and 1 do). It is for
    speed studies; accuracy needs a measured mask. None for all heads.
    mode: `masked` computes everything and clears it, `efficient` leaves out what can be left out.
    mass: `official` as released checkpoints have it: attention to what was cleared is lost, weights
    do not sum to 1, and text still needs the visual keys of every head in every layer.
    `renormalise`: such keys are not there, and visual tokens leave before `layers` (None rather
    than the number of all layers), the newlines of a stitched image with them. Only this holds the
    published figures in time and memory; but it is another model. On a random network of 6 layers,
    all knobs on, the text rows' outputs, of rms 1.0, differ by 0.65 (rms): accuracy of the one
    tells nothing of the other.
    Layers that are stacked in one scan (training) all compute as many heads as the fullest of them:
    with `whole` layers among them, heads save nothing there.

    By the published count on LLaVA-1.5-7B, 7.63 T in full: 1.91 T is layers=16, heads=0.5, ffn=2,
    whole=0, window=None; 0.92 T, whose setting is not published, about layers=8 with window=5
    (0.93 T). ValueError: a file that holds no mask, or a share outside (0, 1].
    """
    mask = read_heads(heads)
    renormalise = mass == "renormalise"
    cuts: tuple[Cut, ...] = ()
    if renormalise and layers is not None:
        cuts = (Withdraw(layer=layers),)
    compute = VisualCompute(
        window=window, heads=mask, layers=None if renormalise else layers, ffn=ffn, mode=mode,
        mass=mass, whole=whole,
    )  # fmt: skip
    return Method("yopo", Full(), cuts, compute)


def read_heads(heads: str | float | None) -> HeadMask | float | None:
    """A share, or the mask in a file of that name."""
    if not isinstance(heads, str):
        return heads
    try:
        return float(heads)
    except ValueError:
        return load_head_mask(heads)


def load_head_mask(path: str | Path) -> HeadMask:
    """A mask of heads, bool [layers][heads], from .npy, .npz (its only array) or .json.

    Whether it fits a model is checked with the method. FileNotFoundError; ValueError for what is no
    table of bools (or of 0 and 1).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"head mask {path}: there is no such file; {WANTED}")
    found = read_table(path)
    try:
        mask = np.asarray(found)
    except ValueError as error:
        raise ValueError(f"head mask {path}: its rows differ in length; {WANTED}") from error
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"head mask {path} has the shape {mask.shape}; {WANTED}")
    if mask.dtype != bool and not (mask.dtype.kind in "iu" and set(np.unique(mask)) <= {0, 1}):
        raise ValueError(f"head mask {path} holds {mask.dtype} values, no bools; {WANTED}")
    return tuple(tuple(bool(kept) for kept in row) for row in mask)


def read_table(path: Path) -> Any:
    """What a file holds, whatever it is."""
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"head mask {path} is no JSON ({error}); {WANTED}") from error
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            if len(file.files) != 1:
                raise ValueError(f"head mask {path} holds the arrays {file.files}; {WANTED}")
            return file[file.files[0]]
    raise ValueError(f"head mask {path} is no .npy, .npz or .json; {WANTED}")


def save_head_mask(path: str | Path, mask: Any) -> None:
    """Write a mask [layers][heads] to .npy, .npz or .json. ValueError for what is no such mask."""
    path, mask = Path(path), np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(
            f"head mask for {path}: {mask.dtype} {mask.shape} is no bool [layers][heads]"
        )
    temporary = path.with_name(path.name + ".tmp" + path.suffix)
    if path.suffix == ".json":
        temporary.write_text(json.dumps(mask.tolist()), encoding="utf-8")
    elif path.suffix == ".npy":
        np.save(temporary, mask)
    elif path.suffix == ".npz":
        np.savez(temporary, mask=mask)
    else:
        raise ValueError(f"head mask {path}: name it .npy, .npz or .json")
    os.replace(temporary, path)


METHODS = (yopo,)
