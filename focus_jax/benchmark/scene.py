"""One size of the input with the methods that meet it: programs compiled, then timed."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from focus_jax.benchmark.job import Job
from focus_jax.benchmark.ours import context, copies, finished, our_inputs, prefill_once
from focus_jax.benchmark.parts import (
    Rows,
    Weights,
    cache_bytes,
    decode_rate,
    projected,
    sampled,
    shrunk,
    timed,
    tower_rows,
)
from focus_jax.compress.baselines import full
from focus_jax.compress.method import Method, VisualTokens
from focus_jax.generate import Caches, Prefilled
from focus_jax.models.streams import Streams
from focus_jax.models.vlm import VLM, Inputs


def cut_once(vlm: VLM, s: Streams, before: Streams, key: Any, stage: int, entering: int) -> Streams:
    """The cut at the entry of a stage; `before` is what the stage before it ran on."""
    return vlm.cut(s, stage, entering, context(key), before)[0]


def layers_once(
    vlm: VLM, s: Streams, key: Any, stage: int, entering: int, room: int
) -> tuple[Any, Caches]:
    """The layers of a stage of a model without cuts; behind the last ones the scores."""
    ctx = context(key)
    if stage < len(vlm.decoder.stages) - 1:
        out = vlm.decode(s, range(stage, stage + 1), entering, ctx, room)
        return out.streams, out.caches
    hidden, caches = vlm.last_row(s, range(stage, stage + 1), entering, ctx, room)
    return vlm.decoder.logits(hidden), caches


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a prefill as a program of its own; `cuts`: it belongs to the samplers."""

    name: str
    vlm: VLM
    function: Callable[..., Any]
    args: tuple[Any, ...]
    static: dict[str, Any]
    cuts: bool = False

    @cached_property
    def call(self) -> Callable[[], Any]:
        """Compiled."""
        return finished(self.function, self.vlm, *self.args, **self.static)


@dataclass(frozen=True, eq=False)
class Scene:
    """One image and its prompt, `batch` times. The tower runs once for all methods.

    `layers`: of the tower, whose rows the methods ask for.
    """

    weights: Weights
    job: Job
    tiles: int
    batch: int
    layers: tuple[int, ...]

    @cached_property
    def inputs(self) -> Inputs:
        """All samples' inputs."""
        return copies(our_inputs(self.job, self.weights.cfg, self.tiles), self.batch)

    @cached_property
    def rows(self) -> Rows:
        """The tower's rows for methods without a grid of their own."""
        return self.tower(self.weights.model(full()), lambda pixels: pixels, self.layers)

    def tower(self, vlm: VLM, view: Callable[[Any], Any], layers: tuple[int, ...]) -> Rows:
        """Its rows for one sample's images, repeated."""
        one = view(self.inputs.pixels[:1])
        return copies(finished(tower_rows, vlm, one, layers=layers)(), self.batch)

    def stage_call(self, vlm: VLM) -> Callable[[], VisualTokens]:
        """The compiled vision stage. Where it has the tower see other images, those are its too."""
        key = jax.random.key(0)
        if not vlm.method.vision.grid:
            return finished(sampled, vlm, self.inputs, self.rows, key)
        rows = self.tower(vlm, lambda pixels: shrunk(vlm, pixels), ())
        resize = finished(shrunk, vlm, self.inputs.pixels)
        rest = finished(sampled, vlm, self.inputs, rows, key)
        return lambda: (resize(), rest())[1]

    def steps(self, vlm: VLM, visual: VisualTokens, layers: VLM | None = None) -> Iterator["Step"]:
        """What a prefill does, step by step: cuts and, with `layers`, the stages between them.

        `layers` is the model without its cuts. Whether the layers run or not, a step gets what the
        cut before it left: its time does not depend on what is in the rows.
        """
        embed = Step("embedding", vlm, VLM.begin, (self.inputs, visual), {})
        yield embed
        s, key, entering = embed.call(), jax.random.key(0), visual.features.shape[1]
        before, edges = s, (0, *vlm.method.bounds, vlm.cfg.decoder.layers)
        if vlm.method.rater is not None:
            yield Step("raters", vlm, VLM.rated, (s,), {}, cuts=True)
        for stage in range(len(vlm.decoder.stages)):
            where = {"stage": stage, "entering": entering}
            if (cut := vlm.method.cut_before(stage)) is not None:
                name = f"cut before layer {cut.layer}"
                step = Step(name, vlm, cut_once, (s, before, key), where, cuts=True)
                yield step
                s = step.call()
            if layers is not None:
                rows = s.prefix.shape[1] + s.visual.shape[1] + s.token.shape[2]
                name = f"layers {edges[stage]}..{edges[stage + 1] - 1}, {rows} rows"
                room = where | {"room": self.job.new_tokens}
                yield Step(name, layers, layers_once, (s, key), room)
            before = s

    def prefill_call(self, vlm: VLM, visual: VisualTokens) -> Callable[[], Prefilled]:
        """The compiled program that `generate` uses behind the tower."""
        key, room = jax.random.key(0), self.job.new_tokens
        return finished(prefill_once, vlm, self.inputs, visual, key, room=room)

    def prepare(self, method: Method) -> "Prepared":
        """The programs of a method, compiled."""
        vlm = self.weights.model(method)
        stage = self.stage_call(vlm)
        visual = finished(projected, vlm, stage())()
        return Prepared(self, vlm, visual, stage, self.prefill_call(vlm, visual))


@dataclass(frozen=True, eq=False)
class Prepared:
    """One method's model in a scene, its visual tokens, and the programs to time."""

    scene: Scene
    vlm: VLM
    visual: VisualTokens
    stage: Callable[[], VisualTokens]
    prefill: Callable[[], Prefilled]

    def timed_prefill(self) -> tuple[dict[str, float], Prefilled]:
        """Seconds of the decoder's prefill and when that was, and what decoding needs."""
        start = time.time()
        seconds, prompt = timed(self.prefill)
        return {"at": (start + time.time()) / 2, "prefill": seconds}, prompt

    def measure(self) -> dict[str, Any]:
        """Seconds of the vision stage, of each cut and of the prefill; tokens/s; cache bytes."""
        steps = self.scene.steps(self.vlm, self.visual)
        cuts = {step.name: timed(step.call).seconds for step in steps if step.cuts}
        stage = timed(self.stage).seconds
        out, prompt = self.timed_prefill()
        size = self.scene.job.new_tokens
        held = cache_bytes(prompt.caches, size)
        return out | {
            "stage": stage, "cuts": cuts, "cache_bytes": held,
            "decode": decode_rate(self.vlm, prompt, size),
        }  # fmt: skip
