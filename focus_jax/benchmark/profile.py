"""Where the time of one method goes: each part as a program of its own, with its operations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from focus_jax.benchmark.ours import prefill_once
from focus_jax.benchmark.parts import (
    Weights,
    load,
    projected,
    sampled,
    shrunk,
    timed,
    tower_rows,
)
from focus_jax.benchmark.scene import Scene, Step
from focus_jax.benchmark.sweep import Sweep
from focus_jax.compress.method import Cut, Method
from focus_jax.models.vlm import VLM
from focus_jax.report import markdown_table


def profile_of(sweep: Sweep) -> str:
    """Tables of all tokens and of the sweep's methods, at its first size."""
    cell = sweep.cells()[0]
    scene = sweep.scene(load(sweep.job).cut_to(cell.layers), cell)
    tables = (
        f"## {name}: {cell.words}, {cell.layers} layers\n\n"
        + profile(scene, sweep.method(name, cell.layers))
        for name in sweep.methods
    )
    return "\n".join(tables)


class Uncut(Method):
    """A method whose stages are run without its cuts."""

    def cut_before(self, stage: int) -> Cut | None:
        return None


@dataclass(frozen=True)
class Part:
    """One part: its seconds, and its operations for the batch as the compiler counts them."""

    name: str
    seconds: float
    flops: float

    def row(self, whole: float) -> dict[str, Any]:
        """For the table; `whole`: seconds of the prefill."""
        rate = self.flops / self.seconds
        return {
            "part": self.name, "ms": 1e3 * self.seconds, "flops": self.flops / 1e9,
            "rate": rate / 1e9, "share": self.seconds / whole,
        }  # fmt: skip


def profile(scene: Scene, method: Method) -> str:
    """A Markdown table of a method's parts; shares are of the prefill behind the tower."""
    parts = list(measured(scene, method))
    whole = next(part.seconds for part in parts if part.name == WHOLE)
    columns = (
        ("part", "part", ""), ("ms", "ms", ".1f"), ("share", "of the prefill", ".1%"),
        ("flops", "GFLOP", ".4g"), ("rate", "GFLOP/s", ".3g"),
    )  # fmt: skip
    return markdown_table([part.row(whole) for part in parts], columns)


WHOLE = "prefill, one program"


def measured(scene: Scene, method: Method) -> Iterator[Part]:
    """The parts in the order in which they run, then the whole prefill."""
    prepared = scene.prepare(method)
    uncut = Uncut(method.name, method.vision, method.cuts, method.compute)
    vlm, layers = prepared.vlm, scene.weights.model(uncut)
    cfg = replace(scene.weights.cfg, attention="xla", unroll=True)
    plain = Weights(cfg, scene.weights.tree)
    countable = {method: plain.model(method), uncut: plain.model(uncut)}
    key, room = jax.random.key(0), {"room": scene.job.new_tokens}
    steps = [*front(scene, vlm), *scene.steps(vlm, prepared.visual, layers)]
    steps.append(Step(WHOLE, vlm, prefill_once, (scene.inputs, prepared.visual, key), room))
    for step in steps:
        flops = operations(countable[step.vlm.method], step)
        yield Part(step.name, timed(step.call).seconds, flops)


def front(scene: Scene, vlm: VLM) -> Iterator[Step]:
    """Tower, vision stage and projector."""
    pixels = scene.inputs.pixels
    if vlm.method.vision.grid:
        yield Step("resize", vlm, shrunk, (pixels,), {})
        pixels = shrunk(vlm, pixels)
    tower = Step("tower", vlm, tower_rows, (pixels,), {"layers": scene.layers})
    yield tower
    given = (scene.inputs, tower.call(), jax.random.key(0))
    stage = Step("vision stage", vlm, sampled, given, {})
    yield stage
    yield Step("projector", vlm, projected, (stage.call(),), {})


def operations(vlm: VLM, step: Step) -> float:
    """What the compiler counts, with a model of no loops: it counts their bodies once."""
    lowered = jax.jit(step.function, static_argnames=tuple(step.static)).lower(
        vlm, *step.args, **step.static
    )
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))
