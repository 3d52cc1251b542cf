"""A sheet of samples: images beside their text, each token in the colour of what it is for."""

import io
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from matplotlib import font_manager, ft2font
from PIL import Image, ImageDraw, ImageFont

from focus_jax.data.samples import Panel, Piece, State
from focus_jax.data.shard import write_whole

# Tints of Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS: dict[State, str] = {
    "learnt": "#B5E3D3", "asked": "#C3E2F7", "neither": "#ECECEC", "image": "#F7DFA5",
    "dropped": "#FFFFFF",
}  # fmt: skip
LEGEND: dict[State, str] = {
    "learnt": "learnt (answers and their ends)",
    "asked": "asking (the users' words)",
    "neither": "neither",
    "image": "an image",
}
_WIDTH, _COLUMN, _MARGIN, _LINE, _SIZE = 1500, 300, 16, 23, 15
_MOST_LINES, _MOST_IMAGES = 26, 4
# Fonts that hold what the one that comes with matplotlib does not, where they are installed.
_MORE_FONTS = (
    "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Arial Unicode MS", "DejaVu Sans",
    "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Arabic", "Noto Emoji", "Symbola",
)  # fmt: skip
_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "←", "\u00a0": "␣"}
_ABSENT = "□"


def draw_sheet(path: str | Path, heading: str, panels: Sequence[Panel]) -> None:
    """Write a PNG of the panels, one below another. ValueError: nothing to draw."""
    if not panels:
        raise ValueError("panels is empty: give at least one sample")
    lines = [wrapped(panel.pieces, _WIDTH - _COLUMN - 3 * _MARGIN) for panel in panels]
    heights = [_height(panel, found) for panel, found in zip(panels, lines, strict=True)]
    head = 3 * _LINE + _MARGIN
    sheet = Image.new("RGB", (_WIDTH, head + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, _MARGIN, _MARGIN, heading)
    x = float(_MARGIN)
    for state, meaning in LEGEND.items():
        x = _box(draw, x, _MARGIN + _LINE + 4, meaning, state) + _MARGIN
    top = head
    for panel, found, height in zip(panels, lines, heights, strict=True):
        _draw_panel(sheet, draw, panel, found, top)
        top += height
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_whole(Path(path), file.getvalue())


def wrapped(pieces: Sequence[Piece], width: float) -> list[list[Piece]]:
    """Pieces in lines of at most `width` pixels, broken at tokens, and behind line breaks."""
    lines: list[list[Piece]] = [[]]
    left = width
    for piece in _split(pieces, width):
        needed = _length(visible(piece.text)) + 1
        if needed > left and lines[-1]:
            lines.append([])
            left = width
        lines[-1].append(piece)
        left -= needed
        if piece.text.endswith("\n"):
            lines.append([])
            left = width
    return lines if lines[-1] else lines[:-1]


def visible(text: str) -> str:
    """Text as it is drawn: signs for white space, a box for what no font here has."""
    return "".join(map(_drawn, text))


def _split(pieces: Sequence[Piece], width: float) -> Iterator[Piece]:
    """Pieces that end at line breaks, and are no longer than a line."""
    for text, state in pieces:
        part = ""
        for character in text:
            if part and _length(visible(part + character)) + 1 > width:
                yield Piece(part, state)
                part = ""
            part += character
            if character == "\n":
                yield Piece(part, state)
                part = ""
        if part:
            yield Piece(part, state)


@lru_cache(4096)
def _drawn(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if _font_of(character) is not None:
        return character
    # Marks that join or vary what stands before have no place of their own.
    return "" if unicodedata.category(character) in ("Mn", "Me", "Cf") else _ABSENT


@lru_cache(1)
def _fonts() -> tuple[tuple[ImageFont.FreeTypeFont, frozenset[int]], ...]:
    """Fonts in the order in which they are asked, and the characters that each has."""
    files = [str(font_manager.findfont("DejaVu Sans Mono"))]
    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    files += [str(installed[name]) for name in _MORE_FONTS if name in installed]
    return tuple(
        (ImageFont.truetype(file, _SIZE), frozenset(ft2font.FT2Font(file).get_charmap()))
        for file in files
    )


@lru_cache(4096)
def _font_of(character: str) -> ImageFont.FreeTypeFont | None:
    """The first font that has a character."""
    return next((font for font, known in _fonts() if ord(character) in known), None)


def _runs(text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Drawn text in stretches of one font."""
    run, used = "", _fonts()[0][0]
    for character in text:
        font = _font_of(character) or used
        if run and font is not used:
            yield run, used
            run = ""
        run, used = run + character, font
    if run:
        yield run, used


def _length(text: str) -> float:
    return sum(font.getlength(run) for run, font in _runs(text))


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, fill: str = "#111111") -> None:
    for run, font in _runs(visible(text)):
        draw.text((x, y), run, fill, font)
        x += font.getlength(run)


def _box(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, state: State) -> float:
    """A token in its colour; returns where the next one begins."""
    end = x + _length(visible(text))
    draw.rectangle((x, y - 1, end - 1, y + _LINE - 5), COLOURS[state])
    if state == "learnt":  # told apart without colours too
        draw.line((x, y + _LINE - 5, end - 1, y + _LINE - 5), "#007A59", 2)
    _write(draw, x, y, text)
    return end + 1


def _height(panel: Panel, lines: list[list[Piece]]) -> int:
    images = sum(_thumbnail(image).height + 6 for image in panel.images[:_MOST_IMAGES])
    return 2 * _LINE + _MARGIN + max(_LINE * (min(len(lines), _MOST_LINES) + 1), images)


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((_COLUMN, _COLUMN))
    return small


def _draw_panel(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, lines: list[list[Piece]], top: int
) -> None:
    draw.line((_MARGIN, top, _WIDTH - _MARGIN, top), "#999999")
    _write(draw, _MARGIN, top + 8, panel.title, "#444444")
    y = top + 8 + _LINE
    for image in panel.images[:_MOST_IMAGES]:
        small = _thumbnail(image)
        sheet.paste(small, (_MARGIN, y))
        y += small.height + 6
    y = top + 8 + _LINE
    for line in lines[:_MOST_LINES]:
        x: float = _COLUMN + 2 * _MARGIN
        for piece in line:
            x = _box(draw, x, y, piece.text, piece.state)
        y += _LINE
    if len(lines) > _MOST_LINES:
        more = f"… {len(lines) - _MOST_LINES} more lines"
        _write(draw, _COLUMN + 2 * _MARGIN, y, more, "#777777")
