"""Where the demo's decoder may be cut: the study's placement with its controls, in short."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from focus_jax.cli.arguments import Meter
from focus_jax.compress.text_guided import TextGuided
from focus_jax.evaluate.runner import Trained
from focus_jax.evaluate.study import fingerprint, write_json
from focus_jax.report import markdown_table
from focus_jax.study.answers import read_batches
from focus_jax.study.placement import Curve, Ranking, place
from focus_jax.study.results import pack, unpack
from focus_jax.study.statistics import Estimate, difference, share_right

IMAGES = 64  # at most
BATCH = 16  # images
KEEPS = (0.25, 0.10, 0.05)
RANKS = {"top": "highest attention", "random": "random", "least": "lowest", "oracle": "oracle"}


def place_once(path: Path, run: Trained, cut: TextGuided, split: str, limit: int) -> list[Curve]:
    """A full model's answers with a cut at every layer; read back where `path` holds these.

    Ranked by attention as `cut` asks, and by the controls. `limit`: the first images (0: all), of
    which at most `IMAGES` are asked about.
    """
    size = run.config.data.glyphs.size(split)
    images = min(limit or run.config.eval.limit or size, size, IMAGES)
    layers = range(run.config.model.decoder.layers)
    asked = {
        "step": run.step, "config": fingerprint(run.config), "cut": repr(cut), "split": split,
        "images": images, "layers": list(layers), "keeps": list(KEEPS),
    }  # fmt: skip
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["asked"] == asked:
            return [Curve(**{**c, "correct": unpack(c["correct"])}) for c in stored["found"]]
    model, curves = run.model(run.method("full")), []
    batches, meter = read_batches(run, split, images, min(BATCH, images)), Meter("placement")
    for layer in layers:
        curves += place(model, batches, [layer], KEEPS, rankings=rankings(cut), cut=cut)
        meter(layer + 1, len(layers))
    found = [{**asdict(c), "correct": pack(c.correct)} for c in curves]
    write_json(path, {"asked": asked, "found": found})
    return curves


def rankings(cut: TextGuided) -> tuple[Ranking, ...]:
    """The rows that the cut asks with, both ends of their scores, chance and the oracle."""
    asks = cut.queries
    return (
        Ranking("top", asks), Ranking("random"), Ranking("least", asks), Ranking("oracle"),
    )  # fmt: skip


def at(curves: Sequence[Curve], layer: int, keep: float) -> dict[str, Curve]:
    """The curves of one layer and share by rank."""
    return {c.rank: c for c in curves if (c.layer, c.keep) == (layer, keep)}


def figures(curves: Sequence[Curve], cut: TextGuided, full: Estimate) -> dict[str, Any]:
    """What results.json holds. `full`: the accuracy with all tokens on the same images."""
    images, questions = curves[0].correct.shape
    table = []
    for c in curves:
        accuracy = share_right(c.correct)
        table.append(
            {"layer": c.layer, "keep": c.keep, "rank": c.rank, "queries": c.queries}
            | accuracy._asdict()
        )
    return {
        "images": images, "n": images * questions, "layer": cut.layer, "queries": cut.queries,
        "nearest_keep": min(KEEPS, key=lambda keep: abs(keep - cut.keep)), "full": list(full),
        "curves": table,
    }  # fmt: skip


def section(curves: Sequence[Curve], found: dict[str, Any]) -> str:
    """The part of results.md: layer by ranking at one share, `found` as `figures` has it."""
    keep, (value, low, high) = found["nearest_keep"], found["full"]
    lines = []
    for layer in dict.fromkeys(c.layer for c in curves):
        ranked = at(curves, layer, keep)
        d = difference(ranked["top"].correct, ranked["random"].correct)
        accuracy = {rank: share_right(c.correct).value for rank, c in ranked.items()}
        lines.append({"layer": str(layer), **accuracy, "d": points(d)})
    columns = [("layer", "cut before layer", ""), *((k, v, ".1%") for k, v in RANKS.items())]
    table = markdown_table(lines, [*columns, ("d", "highest minus random [95 %]", "")])
    return f"""## Where the decoder may be cut

Weights `full` with one cut and no training for it: {keep:.0%} of the visual tokens go on.
`highest` and `lowest` attention from the rows `{found["queries"]}`; `oracle` keeps the cells that
the question is about. {found["n"]} questions about {found["images"]} images; all tokens answer
{value:.1%} of them ({low:.1%} to {high:.1%}). FocusLLaVA cuts before layer {found["layer"]}. Where
`lowest` does as well as all tokens, a good score is no sign of a good choice.

{table}
![accuracy over the cut's layer](placement.png)
"""


def points(d: Estimate) -> str:
    """A difference of two shares in percentage points, with its interval."""
    return f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
