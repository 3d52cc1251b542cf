"""Rows in LLaVA's form and encoded images, good and broken, for tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def talk(*texts):
    """Conversations: the texts of user and model in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def row(name, image=None, *texts):
    """A row; without texts, a question about its image and an answer that names it."""
    marker = "" if image is None else "<image>\n"
    talked = talk(*texts) if texts else talk(f"{marker}what is it?", f"this is {name}")
    out = {"id": name, "conversations": talked}
    return out if image is None else {**out, "image": image}


def photo(width=24, height=16, seed=0, form="JPEG"):
    """An encoded image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def lying_png(width, height):
    """A small PNG whose header declares that size."""
    made = photo(form="PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + made[24:29]
    return made[:12] + header + struct.pack(">I", zlib.crc32(header)) + made[33:]


def lying_jpeg(width, height):
    """A small JPEG whose frame header declares that size."""
    made = photo()
    start = made.index(b"\xff\xc0") + 5
    return made[:start] + struct.pack(">HH", height, width) + made[start + 4 :]
