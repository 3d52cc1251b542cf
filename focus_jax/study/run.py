"""Running the study: trainings and measurements in order, each written down at once and kept."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from focus_jax.compress.text_guided import TextGuided
from focus_jax.evaluate.runner import Trained, read_run
from focus_jax.evaluate.study import train_once, write_json
from focus_jax.experiment import parent_fields
from focus_jax.study.answers import Batch, answer, read_batches
from focus_jax.study.asked import Asked, gate_rows, method_rows, routed_rows, trained_rows
from focus_jax.study.clock import Clock
from focus_jax.study.config import Study, arm_of, base_of
from focus_jax.study.placement import RANKINGS, Curve, place
from focus_jax.study.processes import at_once
from focus_jax.study.results import Results, Routed, Row, pack, unpack
from focus_jax.study.routing import Regions, route, summarise
from focus_jax.study.statistics import share_right, spearman
from focus_jax.study.times import prefill_ms, prompts_of

Part = Literal["placement", "routing", "methods"]
PARTS: tuple[Part, ...] = ("placement", "routing", "methods")
TEST, VALIDATION = "test", "validation"


# A piece of work: its kind, its name, and how it is done.
Piece = tuple[str, str, Callable[[], Any]]


class Measured(NamedTuple):
    """What a method costs (fields of `Row`), its answers and the kinds of the questions."""

    costs: dict[str, Any]
    correct: Bool[np.ndarray, "I Q"]
    kind: Int[np.ndarray, "I Q"]


# ------------------------------------------------------------------------------- one seed


class Seed:
    """One seed of the study in its folder: what is trained, what is measured, all of it resumable.

    Batches are read once, parameters when they are asked for.
    """

    def __init__(self, study: Study, workdir: Path, number: int, clock: Clock):
        self.study, self.number, self.clock = study, number, clock
        self.folder = workdir / f"seed{number}"
        self.runs: dict[str, Trained] = {}
        self.batches: dict[str, list[Batch]] = {}

    @property
    def key(self) -> jax.Array:
        """Of what is random while measuring."""
        return jax.random.key(self.number)

    def train(self) -> None:
        """The base, then every arm from it."""
        base = self.folder / "base"
        of = f"seed {self.number}"
        self.clock(
            "base", f"{of} base", partial(train_once, base_of(self.study, self.number), base)
        )
        for arm in self.in_turn(self.study.arms):
            cfg = arm_of(self.study, arm, self.number, str(base / "checkpoints"))
            where = self.folder / "arms" / arm.name
            self.clock("arm", f"{of} {arm.name}", partial(train_once, cfg, where))

    def in_turn(self, pieces: Sequence[Any]) -> list[Any]:
        """Pieces of work in this seed's order: every second seed goes from the last to the first.

        Of two seeds that run at once, what one has compiled the other finds compiled.
        """
        backwards = self.study.seeds.index(self.number) % 2
        return list(pieces[::-1] if backwards else pieces)

    def run(self, arm: str) -> Trained:
        """An arm's run, read once."""
        if arm not in self.runs:
            self.runs[arm] = read_run(self.folder / "arms" / arm)
        return self.runs[arm]

    def split(self, name: str) -> list[Batch]:
        """The batches of a split, which all arms share."""
        if name not in self.batches:
            limit = self.limit(name)
            size = self.study.base.data.glyphs.size(name)
            batch = min(self.study.batch, limit or size, size)
            full = self.run(self.study.arm("full").name)
            self.batches[name] = read_batches(full, name, limit, batch)
        return self.batches[name]

    def limit(self, split: str) -> int:
        return self.study.test if split == TEST else self.study.validation

    def stored(self, file: str, asked: dict[str, Any], make: Callable[[], Any]) -> Any:
        """What lies at `file` when it answers what is asked; otherwise made and written there."""
        path = self.folder / file
        asked = json.loads(json.dumps(asked))
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["asked"] == asked:
                return found["found"]
        value = make()
        write_json(path, {"asked": asked, "found": value})
        return value

    def about(self, run: Trained, **more: Any) -> dict[str, Any]:
        """What a measurement on a run depends on."""
        images = [self.limit(TEST), self.limit(VALIDATION)]
        return {"step": run.step, "config": repr(run.config), "images": images, **more}

    # -------------------------------------------------------------------------- placement

    def place(self, split: str) -> list[Curve]:
        """The weights trained with all tokens, cut at every layer."""
        study, run = self.study, self.run(self.study.arm("full").name)
        cut = TextGuided(**parent_fields(study.base.compress.text, TextGuided))
        # Validation chooses among sources of the score: the controls wait for the test split.
        rankings = RANKINGS if split == TEST else tuple(r for r in RANKINGS if r.rank == "top")
        asked = self.about(
            run, layers=study.layers, keeps=study.keeps, cut=repr(cut), placed=study.placed
        )

        def measured() -> list[dict[str, Any]]:
            model = run.model(run.method("full"))
            batches = self.split(split)[: -(-study.placed // study.batch)]
            curves = place(model, batches, study.layers, study.keeps, self.key, rankings, cut)
            return [{**asdict_without(curve), "correct": pack(curve.correct)} for curve in curves]

        found = self.stored(f"placement_{split}.json", asked, measured)
        return [Curve(**{**curve, "correct": unpack(curve["correct"])}) for curve in found]

    # ---------------------------------------------------------------------------- routing

    def route(self, asked: Asked) -> Regions:
        """What a gate spends on every region of the test split."""
        run = self.run(asked.weights)

        def measured() -> dict[str, Any]:
            regions = route(run.model(run.method(asked.text)), self.split(TEST), self.key)
            return {
                "content": " ".join(map(str, regions.content.tolist())),
                "tokens": " ".join(map(str, regions.tokens.tolist())),
                "finest": int(regions.finest),
            }

        file = f"routing/{asked.weights}/{asked.name}.json"
        found = self.stored(file, self.about(run, method=asked.text), measured)
        numbers = [np.array(found[name].split(), int) for name in ("content", "tokens")]
        return Regions(numbers[0], numbers[1], found["finest"])

    # ---------------------------------------------------------------------------- answers

    def answer(self, asked: Asked) -> "Measured":
        """A method's answers on the test split, and what it costs."""
        run = self.run(asked.weights)

        def measured() -> dict[str, Any]:
            method = run.method(asked.text)
            cost, model = run.plan(method), run.model(method)
            answers = answer(model, self.split(TEST), self.key)
            return {
                "mean_slots": cost.mean_slots,
                "mean_share": cost.mean_share,
                "flops": cost.flops.total,
                "kv_bytes": sum(cost.kv_bytes),
                "correct": pack(answers.correct),
                "kind": " ".join(map(str, answers.kind.ravel().tolist())),
            }

        found = self.stored(asked.file, self.about(run, method=asked.text), measured)
        correct, kind = found.pop("correct"), found.pop("kind")
        return Measured(
            found, unpack(correct), np.array(kind.split(), int).reshape(correct["shape"])
        )

    def answers(self, rows: Sequence[Asked]) -> None:
        """Several methods' answers, each written down before the next one."""
        for one in rows:
            self.answer(one)

    def times(self, rows: Sequence[Asked]) -> dict[str, list[float]]:
        """Milliseconds of one question's prefill of each row, by its file, round by round.

        All rows are timed together: anew if one of them is not among those that lie there.
        """
        study, path = self.study, self.folder / "times.json"
        runs = {one.file: self.run(one.weights) for one in rows}
        about = {one.file: self.about(runs[one.file], method=one.text) for one in rows}
        asked = json.loads(
            json.dumps({"timed": study.timed, "rounds": study.rounds, "rows": about})
        )
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            known = stored["asked"].pop("rows")
            if stored["asked"].items() <= asked.items() and asked["rows"].items() <= known.items():
                return {file: stored["found"][file] for file in about}
        models = {one.file: runs[one.file].model(runs[one.file].method(one.text)) for one in rows}
        inputs = prompts_of(self.split(TEST)[0], study.timed)
        found = prefill_ms(models, inputs, study.rounds)
        write_json(path, {"asked": asked, "found": found})
        return found


def asdict_without(curve: Curve) -> dict[str, Any]:
    """A curve's fields but for its answers."""
    return {name: value for name, value in asdict(curve).items() if name != "correct"}


# ------------------------------------------------------------------------------ the whole


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
