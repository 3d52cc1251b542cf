"""YOPO's layers row by row in NumPy (float64), as its paper's text and the golden cases have it."""

from typing import NamedTuple

import numpy as np


class Knobs(NamedTuple):
    """`alive` [layers heads]; `layers`: cut (official) or withdrawal (renormalised) there; `half`
    None: causal; `cell`: patches from a token to the next."""

    alive: np.ndarray
    half: int | None = None
    layers: int = 10**6
    ffn: float = 1.0
    renormalise: bool = False
    cell: float = 1.0


class RowsOf(NamedTuple):
    """One sample's valid rows in the decoder's order. `leaves`: all that is of an image."""

    x: np.ndarray
    position: np.ndarray
    visual: np.ndarray
    leaves: np.ndarray
    centre: np.ndarray
    view: np.ndarray


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, position, base):
    """Half-split rotary positions of [S H K]."""
    half = x.shape[-1] // 2
    angle = position[:, None] / base ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def neighbours(rows: RowsOf, knobs: Knobs) -> np.ndarray:
    """Who sees whom [S S]: causal, but visual rows their neighbours in both directions."""
    size = len(rows.x)
    seen = np.tril(np.ones((size, size), bool))
    if knobs.half is None:
        return seen
    gap = np.abs(rows.centre[:, None] - rows.centre).max(-1)
    near = (gap <= knobs.half * knobs.cell + 1e-6) & (rows.view[:, None] == rows.view)
    return np.where(rows.visual[:, None] & rows.visual, near, seen)


def run(tree: dict, cfg, rows: RowsOf, knobs: Knobs) -> np.ndarray:
    """Rows behind the last layer, before the final norm; those that left are NaN."""
    d = cfg.decoder
    layers = {k[15:]: np.asarray(v, float) for k, v in tree.items() if "decoder.layers" in k}
    out = np.full(rows.x.shape, np.nan)
    at, x = np.arange(len(rows.x)), np.asarray(rows.x, float)
    for layer in range(d.layers):
        w = {name: a[layer] for name, a in layers.items()}
        if knobs.renormalise and layer == knobs.layers:
            stay = ~rows.leaves
            at, x, rows = at[stay], x[stay], RowsOf(*(np.asarray(a)[stay] for a in rows))
        x = one_layer(x, w, d, rows, neighbours(rows, knobs), knobs, layer)
    out[at] = x
    return out


def one_layer(x, w, d, rows, seen, knobs, layer):
    y = norm(x, w["norm_1.scale"], d.norm_eps)
    q, k, v = (
        (y @ w[f"{name}.kernel"]).reshape(len(x), -1, d.head_dim) for name in ("q", "k", "v")
    )
    q, k = (rotate(a, rows.position, d.rope_theta) for a in (q, k))
    mixed = np.zeros((len(x), d.heads, d.head_dim))
    for head in range(d.heads):
        group = head // (d.heads // d.kv_heads)
        alive = knobs.alive[layer, head]
        logits = q[:, head] @ k[:, group].T / np.sqrt(d.head_dim)
        may = seen & ~(rows.visual & ~alive & knobs.renormalise)
        logits = np.where(may, logits, -np.inf)
        top = np.where(may.any(-1), logits.max(-1), 0)
        weight = np.exp(logits - top[:, None])
        weight = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)
        if not knobs.renormalise and (not alive or layer >= knobs.layers):
            weight[:, rows.visual] = 0
        mixed[:, head] = weight @ v[:, group]
        if not alive:
            mixed[rows.visual, head] = 0
    x = x + mixed.reshape(len(x), -1) @ w["out.kernel"]
    y = norm(x, w["norm_2.scale"], d.norm_eps)
    gate, up = y @ w["gate.kernel"], y @ w["up.kernel"]
    inner = gate / (1 + np.exp(-gate)) * up
    inner[rows.visual, int(d.mlp_width / knobs.ffn) :] = 0
    return x + inner @ w["down.kernel"]


def scores(tree: dict, cfg, x: np.ndarray) -> np.ndarray:
    """Vocabulary scores of rows."""
    scale = np.asarray(tree["decoder.norm.scale"], float)
    return norm(x, scale, cfg.decoder.norm_eps) @ np.asarray(tree["decoder.head.kernel"], float)


def rows_of(s, sample: int) -> RowsOf:
    """The rows of one sample with one question, from streams at the decoder's entry."""
    get = lambda name: np.asarray(getattr(s, name))[sample]  # noqa: E731
    valid = [get("prefix_valid"), get("visual_valid"), get("token_valid")[0]]
    x = [get("prefix"), get("visual"), get("token")[0]]
    position = [get("prefix_position"), get("visual_position"), get("token_position")[0]]
    counts = [len(a) for a in x]
    image = np.repeat([False, True, False], counts)
    newline, centre, view = (np.zeros((sum(counts), *get(n).shape[1:]), get(n).dtype)
                             for n in ("newline", "centre", "view"))  # fmt: skip
    for whole, name in ((newline, "newline"), (centre, "centre"), (view, "view")):
        whole[image] = get(name)
    valid, x, position = (np.concatenate(part) for part in (valid, x, position))
    order = np.flatnonzero(valid)
    order = order[np.argsort(position[order], kind="stable")]
    # The thumbnail is tile 0 of an image; the numbers of tiles begin anew every 1024.
    group = view // 1024 * 2 + (view % 1024 > 0)
    parts = x, position, image & ~newline, image, centre, group
    return RowsOf(*(part[order] for part in parts))
