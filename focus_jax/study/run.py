"""Running the study: all of its work in order, and what was found as one value."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from focus_jax.evaluate.study import write_json
from focus_jax.study.asked import Asked, gate_rows, method_rows, routed_rows, trained_rows
from focus_jax.study.clock import Clock
from focus_jax.study.config import Study
from focus_jax.study.placement import Curve
from focus_jax.study.processes import at_once
from focus_jax.study.results import Results, Routed, Row
from focus_jax.study.routing import Regions, summarise
from focus_jax.study.seed import TEST, VALIDATION, Seed
from focus_jax.study.statistics import share_right, spearman

Part = Literal["placement", "routing", "methods"]
PARTS: tuple[Part, ...] = ("placement", "routing", "methods")
# A piece of work: its kind, its name, and how it is done.
Piece = tuple[str, str, Callable[[], Any]]


def rows_of(study: Study, seed: Seed, parts: Sequence[Part]) -> list[Asked]:
    """Everything that is answered and timed."""
    out = trained_rows(study)
    out += gate_rows(study) if "routing" in parts else []
    for share_ in study.shares if "methods" in parts else ():
        out += method_rows(study, seed.run(study.arm("full").name), share_)
    return out


def timed_rows(study: Study, rows: Sequence[Asked]) -> list[Asked]:
    """The rows whose prefill is timed: each costs a compilation."""
    return [one for one in rows if one.share in (0.0, study.timed_share)]


def planned(study: Study, parts: Sequence[Part], seeds: int, alone: bool) -> dict[str, int]:
    """How many pieces of work there are of each kind; a seed alone times nothing."""
    out = {"base": seeds, "arm": seeds * len(study.arms)}
    out["answers"] = seeds * len(trained_rows(study))
    if "placement" in parts:
        out["placement"] = seeds * 2
    if "routing" in parts:
        out["routing"] = seeds * len(routed_rows(study))
        out["answers"] += seeds * len(gate_rows(study))
    if "methods" in parts:
        out["methods"] = seeds * len(study.shares)
    return out if alone else out | {"times": 1}


def run_study(
    study: Study,
    workdir: Path,
    size: str,
    parts: Sequence[Part] = PARTS,
    command: Sequence[str] = (),
    jobs: int = 1,
) -> Results:
    """Train and measure what is not there yet; all of it as one value.

    `parts` are those to measure beside the arms. With `jobs` above 1 seeds run at once, each in a
    process of its own: `command` and `--alone SEED`. What is timed is timed here, alone.
    Raises ValueError when the folder holds another study's runs.
    """
    start, before = time.perf_counter(), seconds_of(workdir)
    try:
        if jobs > 1:
            at_once([(*command, "--alone", str(number)) for number in study.seeds], jobs)
        clock = Clock(planned(study, parts, len(study.seeds), alone=False))
        seeds = [run_seed(study, workdir, number, parts, clock) for number in study.seeds]
        rows = rows_of(study, seeds[0], parts)
        clock("times", "times", partial(seeds[0].times, timed_rows(study, rows)))
    finally:
        spent = before + time.perf_counter() - start
        write_json(workdir / "state.json", {"seconds": spent})
    return gather(study, seeds, size, parts, spent)


def run_seed(
    study: Study, workdir: Path, number: int, parts: Sequence[Part], clock: Clock | None = None
) -> Seed:
    """One seed, trained and measured."""
    clock = clock or Clock(planned(study, parts, 1, alone=True))
    seed = Seed(study, workdir, number, clock)
    seed.train()
    measure(seed, parts)
    return seed


def seconds_of(workdir: Path) -> float:
    """Seconds spent in this folder so far."""
    path = workdir / "state.json"
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0


def measure(seed: Seed, parts: Sequence[Part]) -> None:
    """Everything that is asked of a seed, written into its folder."""
    for kind, name, work in seed.in_turn(pieces_of(seed, parts)):
        seed.clock(kind, f"seed {seed.number} {name}", work)


def pieces_of(seed: Seed, parts: Sequence[Part]) -> list[Piece]:
    """What is measured of a seed."""
    study, full = seed.study, seed.study.arm("full").name
    out: list[Piece] = []
    for one in trained_rows(study):
        out.append(("answers", one.name, partial(seed.answer, one)))
    if "placement" in parts:
        for split in (VALIDATION, TEST):
            out.append(("placement", f"placement {split}", partial(seed.place, split)))
    if "routing" in parts:
        for one in gate_rows(study):
            out.append(("answers", f"gate {one.name}", partial(seed.answer, one)))
        for one in routed_rows(study):
            out.append(("routing", f"routing {one.name}", partial(seed.route, one)))
    for share_ in study.shares if "methods" in parts else ():
        rows = list(method_rows(study, seed.run(full), share_))
        out.append(("methods", f"methods at {share_:.0%}", partial(seed.answers, rows)))
    return out


def gather(
    study: Study, seeds: Sequence[Seed], size: str, parts: Sequence[Part], spent: float
) -> Results:
    """What all seeds have measured, stacked; what is on disk is read, nothing is made anew."""
    sampler = study.base.compress.text
    roles = {arm.name: arm.role for arm in study.arms}
    asked = rows_of(study, seeds[0], parts)
    times = seeds[0].times(timed_rows(study, asked))
    rows = [stacked(one, seeds, roles.get(one.name, "other"), times) for one in asked]
    kind = np.concatenate([seed.answer(asked[0]).kind for seed in seeds])
    curves, chosen = placed(study, seeds) if "placement" in parts else ((), {})
    routed = [routed_of(one, seeds) for one in routed_rows(study)] if "routing" in parts else []
    return Results(
        size=size, seeds=study.seeds, images=len(kind), layers=study.base.model.decoder.layers,
        patches=study.base.tiles * study.base.model.vision.patches, cut_layer=sampler.layer,
        cut_keep=sampler.keep, cut_queries=sampler.queries, device=jax.devices()[0].device_kind,
        seconds=spent, rows=tuple(rows), kind=kind, curves=curves, routed=tuple(routed),
        chosen=chosen,
        parts=tuple((arm.name, arm.against) for arm in study.arms if arm.role == "part"),
    )  # fmt: skip


def stacked(
    asked: Asked, seeds: Sequence[Seed], role: Any, times: Mapping[str, list[float]]
) -> Row:
    """A row with the answers of all seeds, and the first one's costs."""
    found = [seed.answer(asked) for seed in seeds]
    own: Any = role if asked.trained else "other"
    return Row(
        name=asked.name, role=own, weights=asked.weights, trained=asked.trained, asked=asked.text,
        share=asked.share, correct=np.concatenate([one.correct for one in found]),
        rounds=tuple(times.get(asked.file, ())), **found[0].costs,
    )  # fmt: skip


def placed(study: Study, seeds: Sequence[Seed]) -> tuple[tuple[Curve, ...], dict[str, Any]]:
    """The curves of the test split; which rows ask and which layer, decided on validation."""
    both = {}
    for split in (VALIDATION, TEST):
        each = zip(*(seed.place(split) for seed in seeds), strict=True)
        both[split] = [
            replace(same[0], correct=np.concatenate([curve.correct for curve in same]))
            for same in each
        ]
    return tuple(both[TEST]), chosen_of(both[VALIDATION], study.base.compress.text.layer)


def chosen_of(curves: Sequence[Curve], layer: int) -> dict[str, Any]:
    """On validation: the rows that ask best at the cut's layer, and with them the best layer.

    Means over all shares. A cut layer outside the measured ones is taken for the nearest.
    """
    tops = [curve for curve in curves if curve.rank == "top"]
    near = min({curve.layer for curve in tops}, key=lambda at: abs(at - layer))

    def score(**wanted: Any) -> float:
        chosen = [c for c in tops if all(getattr(c, k) == v for k, v in wanted.items())]
        return statistics.fmean(share_right(c.correct).value for c in chosen)

    names = list(dict.fromkeys(curve.queries for curve in tops))
    queries = max(names, key=lambda name: score(queries=name, layer=near))
    layers = sorted({curve.layer for curve in tops})
    best = max(layers, key=lambda at: score(queries=queries, layer=at))
    return {"queries": queries, "layer": best, "at": near}


def routed_of(asked: Asked, seeds: Sequence[Seed]) -> Routed:
    """A gate's regions, those of all seeds together."""
    found = [seed.route(asked) for seed in seeds]
    whole = Regions(joined(found, "content"), joined(found, "tokens"), found[0].finest)
    each = tuple(spearman(regions.tokens, regions.content) for regions in found)
    return Routed(asked.name, asked.weights, asked.text, each, summarise(whole))


def joined(found: Sequence[Regions], name: str) -> Int[np.ndarray, " R"]:
    return np.concatenate([getattr(regions, name) for regions in found])
