"""Bitmaps of digits, letters and shapes, their colours, and how a grid of them is painted."""

from functools import cache

import numpy as np
from jaxtyping import UInt8

DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefgh")
SHAPES = (
    "star",
    "circle",
    "square",
    "triangle",
    "cross",
    "heart",
    "diamond",
    "arrow",
    "moon",
    "tree",
)
GLYPHS = DIGITS + LETTERS + SHAPES

COLOURS = {
    "red": (222, 36, 36),
    "green": (32, 160, 52),
    "blue": (48, 92, 238),
    "yellow": (228, 190, 20),
    "purple": (160, 52, 204),
    "cyan": (20, 184, 196),
    "orange": (240, 124, 16),
    "pink": (246, 120, 176),
}

# Grounds of the cards that hold what stands together.
CARDS = {
    "slate": (64, 76, 92),
    "olive": (92, 90, 36),
    "navy": (32, 40, 108),
    "brown": (104, 64, 36),
    "wine": (100, 28, 56),
    "moss": (36, 88, 48),
}

# The smallest cell that holds a bitmap of 7 x 7 with a pixel to spare.
MIN_CELL = 8

# Seven rows each, "/" between rows, "#" is ink.
_BITMAPS = {
    "0": " ### /#   #/#  ##/# # #/##  #/#   #/ ### ",
    "1": "  #  / ##  /  #  /  #  /  #  /  #  / ### ",
    "2": " ### /#   #/    #/   # /  #  / #   /#####",
    "3": "#### /    #/    #/ ### /    #/    #/#### ",
    "4": "   # /  ## / # # /#  # /#####/   # /   # ",
    "5": "#####/#    /#### /    #/    #/#   #/ ### ",
    "6": "  ## / #   /#    /#### /#   #/#   #/ ### ",
    "7": "#####/    #/   # /  #  / #   / #   / #   ",
    "8": " ### /#   #/#   #/ ### /#   #/#   #/ ### ",
    "9": " ### /#   #/#   #/ ####/    #/   # / ##  ",
    "a": " ### /#   #/#   #/#####/#   #/#   #/#   #",
    "b": "#### /#   #/#   #/#### /#   #/#   #/#### ",
    "c": " ####/#    /#    /#    /#    /#    / ####",
    "d": "#### /#   #/#   #/#   #/#   #/#   #/#### ",
    "e": "#####/#    /#    /#### /#    /#    /#####",
    "f": "#####/#    /#    /#### /#    /#    /#    ",
    "g": " ####/#    /#    /#  ##/#   #/#   #/ ### ",
    "h": "#   #/#   #/#   #/#####/#   #/#   #/#   #",
    "star": "   #   /   #   /#######/ ##### /  ###  / ## ## / #   # ",
    "circle": "  ###  / ##### /#######/#######/#######/ ##### /  ###  ",
    "square": "#######/#######/##   ##/##   ##/##   ##/#######/#######",
    "triangle": "   #   /  ###  /  ###  / ##### / ##### /#######/#######",
    "cross": "  ###  /  ###  /#######/#######/#######/  ###  /  ###  ",
    "heart": " ## ## /#######/#######/#######/ ##### /  ###  /   #   ",
    "diamond": "   #   /  # #  / #   # /#     #/ #   # /  # #  /   #   ",
    "arrow": "   #   /   ##  /###### /#######/###### /   ##  /   #   ",
    "moon": "  #### / ###   /###    /###    /###    / ###   /  #### ",
    "tree": "   #   /  ###  / ##### /  ###  / ##### /#######/   #   ",
}


@cache
def bitmap(glyph: str, cell: int) -> np.ndarray:
    """The ink of one glyph, bool [h, w], enlarged by the whole factor that fits a cell."""
    rows = _BITMAPS[glyph].split("/")
    ink = np.array([[mark == "#" for mark in row] for row in rows])
    factor = cell // MIN_CELL
    return ink.repeat(factor, axis=0).repeat(factor, axis=1)


def background(
    rng: np.random.Generator, size: int, light: float = 0.5
) -> UInt8[np.ndarray, "S S 3"]:
    """A nearly plain ground, light with chance `light`: one colour, a slow gradient, noise."""
    low, high = (204, 232) if rng.random() < light else (18, 50)
    colour = rng.integers(low, high, size=3)
    slope = rng.uniform(-10, 10, size=2)
    ramp = np.linspace(-0.5, 0.5, size)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    # One faint speck in eight pixels: texture enough, and PNG files stay small.
    noise = rng.integers(0, 256, size=(size, size), dtype=np.uint8)
    specks = (noise < 16).astype(np.int16) - (noise >= 240)
    grey = shade.astype(np.int16) + 3 * specks
    return (grey[:, :, None] + colour.astype(np.int16)).astype(np.uint8)


def paint(
    rng: np.random.Generator,
    glyph: UInt8[np.ndarray, "G G"],
    colour: UInt8[np.ndarray, "G G"],
    colours: tuple[str, ...],
    cell: int,
    jitter: int = 1,
    light: float = 0.5,
    card: UInt8[np.ndarray, "G G"] | None = None,
) -> UInt8[np.ndarray, "S S 3"]:
    """Draw a grid of labels (0 = empty, else 1 + index) as an RGB image; `card`: grounds of cells.

    Each glyph stays inside its own cell, up to `jitter` bitmap pixels off the centre; the ground is
    light with chance `light`.
    """
    image = background(rng, glyph.shape[0] * cell, light)
    if card is not None:
        tints = np.array([(0, 0, 0), *CARDS.values()], np.uint8)[card]
        whole = lambda a: a.repeat(cell, axis=0).repeat(cell, axis=1)  # noqa: E731
        image = np.where(whole(card > 0)[..., None], whole(tints), image)
    filled = np.argwhere(glyph)
    offsets = rng.integers(-jitter, jitter + 1, size=(len(filled), 2)).tolist()
    step = cell // MIN_CELL
    for (row, col), (down, right) in zip(filled.tolist(), offsets, strict=True):
        ink = bitmap(GLYPHS[glyph[row, col] - 1], cell)
        height, width = ink.shape
        top = min(max((cell - height) // 2 + down * step, 0), cell - height)
        left = min(max((cell - width) // 2 + right * step, 0), cell - width)
        y, x = row * cell + top, col * cell + left
        image[y : y + height, x : x + width][ink] = COLOURS[colours[colour[row, col] - 1]]
    return image
