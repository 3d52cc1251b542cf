"""One seed of the study: its trainings and measurements, each written down at once and kept."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from focus_jax.compress.text_guided import TextGuided
from focus_jax.evaluate.runner import Trained, read_run
from focus_jax.evaluate.study import train_once, write_json
from focus_jax.experiment import parent_fields
from focus_jax.study.answers import Batch, answer, read_batches
from focus_jax.study.asked import Asked
from focus_jax.study.clock import Clock
from focus_jax.study.config import Study, arm_of, base_of
from focus_jax.study.placement import RANKINGS, Curve, place
from focus_jax.study.results import pack, unpack
from focus_jax.study.routing import Regions, route
from focus_jax.study.times import prefill_ms, prompts_of

TEST, VALIDATION = "test", "validation"


class Measured(NamedTuple):
    """What a method costs (fields of `Row`), its answers and the kinds of the questions."""

    costs: dict[str, Any]
    correct: Bool[np.ndarray, "I Q"]
    kind: Int[np.ndarray, "I Q"]


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
