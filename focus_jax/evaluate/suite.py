"""Benchmarks on a checkpoint with a method: answered in batches, rated, and told in one table.

What was answered is on disk after each batch; a run that was killed goes on behind it. Of several
processes each answers the rows of a batch that its devices hold, and process 0 writes.
"""

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from focus_jax.data.images import Tiles
from focus_jax.evaluate import answers as files
from focus_jax.evaluate.answers import answers_file
from focus_jax.evaluate.batching import (
    ANSWERED,
    ASK,
    NOTES,
    STATE,
    TOO_LONG,
    UNREADABLE,
    Batch,
    Failed,
    Known,
    Shape,
    ahead,
    arrays_of,
    measure,
    plan_batches,
    tiles_of,
)
from focus_jax.evaluate.benchmark import PROTOCOLS, Benchmark, Figures, Protocol, Rating, Sample
from focus_jax.evaluate.costs import seconds_per_sample, visual_tokens
from focus_jax.evaluate.intervals import Interval, headline
from focus_jax.evaluate.places import Places, compiled
from focus_jax.evaluate.results import BenchmarkResult, Difference, compare, table
from focus_jax.evaluate.runner import check_batch, everyones
from focus_jax.generate import Generator, texts
from focus_jax.methods import method_to_json
from focus_jax.pipeline import Pipeline
from focus_jax.sampling import Sampling
from focus_jax.sharding import Layout

__all__ = [
    "BenchmarkResult", "Difference", "answers_file", "compare", "find_folder", "run_benchmark",
    "table",
]  # fmt: skip
Progress = Callable[[int, int], None]
Row = dict[str, Any]
WRONG = Rating(0.0)
# Answers after which a run without a single readable image is stopped: the folder is wrong.
ENOUGH = 16


def run_benchmark(
    pipeline: Pipeline,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    *,
    protocol: Protocol = "llava",
    layout: Layout | None = None,
    batch: int = 16,
    answers: Path,
    progress: Progress | None = None,
    name: str = "",
) -> BenchmarkResult:
    """Answer all samples greedily, rate them, and write the answers in their order.

    `layout`: the one that the pipeline was loaded with, which is taken where it is None. `batch`:
    questions at a time over all devices; answers do not depend on it. `answers`: the file of
    answers (see `answers_file`), which is gone on with where it holds some; its settings lie
    beside it, and one job at a time may write it (`lock.alone`). `progress(done, total)` counts
    samples. `name`: how the method is called in the result. All processes call this.
    Raises ValueError for a batch that does not divide, samples that cannot be asked, an answer
    file of other settings, and images of which none can be read.
    """
    check(benchmark, samples, protocol)
    layout = layout or pipeline.vlm.layout
    if layout != pipeline.vlm.layout:
        raise ValueError("the pipeline was loaded with another layout: load it with this one")
    if batch < 1:
        raise ValueError(f"batch={batch}: give at least 1 question")
    if layout is not None:
        check_batch(batch, layout)
    job = Job(pipeline, benchmark, samples, protocol, layout, batch, answers)
    rows, known = job.begin()
    seconds = job.answer(rows, known, progress)
    took = seconds_per_sample(known, seconds)
    if took is None:  # all was answered before
        took = files.outcome_of(answers).get("seconds_per_sample")
    ratings = job.finish(rows, took) if job.writes else []
    return job.result(ratings, known, took, name or pipeline.vlm.method.name)


def find_folder(data: Path, benchmark: Benchmark) -> Path:
    """A benchmark's folder below `data`. FileNotFoundError names those that were looked for."""
    names = (benchmark.name, *benchmark.folders)
    for name in names:
        if (data / name).is_dir():
            return data / name
    raise FileNotFoundError(
        f"{benchmark.title}: {data} has no folder {' or '.join(names)}: put its files there"
    )


def check(benchmark: Benchmark, samples: Sequence[Sample], protocol: Protocol) -> None:
    """ValueError for what cannot be run."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    if not samples:
        raise ValueError(f"{benchmark.title} has no sample to answer")
    [(name, times)] = Counter(sample.id for sample in samples).most_common(1)
    if times > 1:
        raise ValueError(f"{benchmark.title}: two samples are called {name!r}")


@dataclass(frozen=True, eq=False)
class Job:
    """One benchmark with one method; its parts in the order in which they are called."""

    pipeline: Pipeline
    benchmark: Benchmark
    samples: Sequence[Sample]
    protocol: Protocol
    layout: Layout | None
    batch: int
    path: Path

    @property
    def writes(self) -> bool:
        """Whether this process has the rows and their file."""
        return jax.process_index() == 0

    @property
    def sampling(self) -> Sampling:
        return self.pipeline.sampling({"max_new_tokens": self.benchmark.max_new_tokens})

    def settings(self) -> dict[str, Any]:
        """All that answers depend on, as JSON values."""
        cfg = self.pipeline.vlm.cfg
        return {
            "checkpoint": self.pipeline.name,
            "weights": self.pipeline.weights,
            "benchmark": self.benchmark.name,
            "protocol": self.protocol,
            "method": method_to_json(self.pipeline.vlm.method),
            "sampling": asdict(self.sampling),
            "template": self.pipeline.template.name,
            "images": asdict(self.pipeline.images),
            "param_dtype": cfg.param_dtype,
            "compute_dtype": cfg.compute_dtype,
            "version": version("focus_jax"),
        }

    # ------------------------------------------------------------------ running

    def begin(self) -> tuple[dict[str, Row], Known]:
        """The rows that are there, and what is to be asked; the same on all processes."""
        rows: dict[str, Row] = {}
        known = np.zeros((len(self.samples), 4), np.int32)
        error: Exception | None = None
        if self.writes:
            try:
                rows = files.resume(self.path, self.settings(), self.samples)
                known = measure(self.pipeline, self.samples)
            except (ValueError, OSError) as found:
                error = found
        # The others stop as well where the first cannot go on.
        if multihost_utils.broadcast_one_to_all(np.int32(error is not None)):
            raise error or ValueError(f"{self.path} cannot be begun (process 0 tells why)")
        there = np.array([s.id in rows for s in self.samples])
        known[there & (known[:, STATE] == ASK), STATE] = ANSWERED
        return rows, np.array(multihost_utils.broadcast_one_to_all(known))

    def answer(
        self, rows: dict[str, Row], known: Known, progress: Progress | None
    ) -> dict[Shape, float]:
        """Answer what is left, batch by batch; seconds of a sample by shape."""
        unasked = np.flatnonzero(np.isin(known[:, STATE], list(NOTES)))
        self.write(rows, [(int(i), "", int(known[i, STATE])) for i in unasked])
        done = int((known[:, STATE] != ASK).sum())
        told = progress or (lambda done, total: None)
        told(done, len(known))
        self.check_readable(known, done)
        every = plan_batches(known, self.batch)
        todo = [batch for batch in every if (known[list(batch.members), STATE] == ASK).any()]
        times: dict[Shape, list[float]] = defaultdict(list)
        for batch, said, seconds in self.batches(todo):
            times[batch.shape].append(seconds)
            asked = [row for row in said if known[row[0], STATE] == ASK]
            self.write(rows, asked)
            for place, _, state in asked:
                known[place, STATE] = state
            done += len(asked)
            told(done, len(known))
            self.check_readable(known, done)
        return {shape: float(np.median(values)) for shape, values in times.items()}

    def batches(
        self, todo: Sequence[Batch]
    ) -> Iterator[tuple[Batch, list[tuple[int, str, int]], float]]:
        """Each batch with (place, text, state) of its members and the seconds of one of them."""
        generate = Generator(self.pipeline.vlm, self.sampling)
        seen: set[Shape] = set()
        for batch, images in ahead(todo, self.rows, self.load):
            rows = self.rows(batch)
            arrays = arrays_of(self.pipeline, self.samples, batch.shape, rows, images)
            inputs = self.places.put(arrays)
            # Of random methods: a sample's own, whatever it runs with.
            keys = self.places.keys(self.filled(batch))
            if batch.shape not in seen:
                seen.add(batch.shape)
                compiled(generate, inputs, keys)
            jax.block_until_ready((inputs, keys))
            start = time.perf_counter()
            tokens = jax.block_until_ready(generate(inputs, keys))
            seconds = (time.perf_counter() - start) / self.batch
            yield batch, self.said(batch, tokens, images), seconds

    def load(self, place: int) -> list[Tiles] | Failed:
        return tiles_of(self.samples[place], self.pipeline.images)

    @property
    def places(self) -> Places:
        return Places(self.layout, self.batch)

    def filled(self, batch: Batch) -> list[int]:
        """The samples of all rows; the first of the batch fills it up."""
        return [*batch.members, *[batch.members[0]] * (self.batch - len(batch.members))]

    def rows(self, batch: Batch) -> list[int]:
        """The samples of the rows that this process's devices hold."""
        filled = self.filled(batch)
        return [filled[row] for row in self.places.held()]

    def said(
        self, batch: Batch, tokens: jax.Array, images: Sequence[list[Tiles] | Failed]
    ) -> list[tuple[int, str, int]]:
        """(place, text, state) of a batch's members, from all processes."""
        state = [UNREADABLE if isinstance(own, Failed) else ANSWERED for own in images]
        own = self.places.own(tokens)
        told = everyones(np.column_stack([self.places.held(), state, own]).astype(np.int32))
        told = told[: len(batch.members)]
        words = texts(self.pipeline.tokenizer, told[:, 2:])
        return [
            (place, text.strip() if row[1] == ANSWERED else "", int(row[1]))
            for place, row, text in zip(batch.members, told, words, strict=True)
        ]

    def check_readable(self, known: Known, done: int) -> None:
        """ValueError where images are asked about and none of the first ones can be read."""
        states = known[:, STATE]
        bad = int((states == UNREADABLE).sum())
        if bad and bad == done >= min(ENOUGH, len(known)):
            first = int(np.flatnonzero(states == UNREADABLE)[0])
            failed = self.load(first)
            why = failed.why if isinstance(failed, Failed) else "it can be read now"
            raise ValueError(
                f"{self.benchmark.title}: none of the first {done} questions has an image that can "
                f"be read; that of {self.samples[first].id}: {why}; put the images where the "
                "benchmark's files say, and start again"
            )

    # ------------------------------------------------------------------ rows

    def write(self, rows: dict[str, Row], said: Sequence[tuple[int, str, int]]) -> None:
        """Append what was said to the file."""
        if not self.writes or not said:
            return
        new = []
        for place, text, state in said:
            sample, note = self.samples[place], NOTES.get(state, "")
            if sample.id not in rows:
                new.append(self.row(sample, text, note, self.rate(sample, text, note)))
        files.append(self.path, new)
        rows.update({row["question_id"]: row for row in new})

    def row(self, sample: Sample, text: str, note: str, rating: Rating) -> Row:
        """An answer as LLaVA writes it, with its rating."""
        model = f"{Path(self.pipeline.name).name}:{self.pipeline.vlm.method.name}"
        score = rating.score if math.isfinite(rating.score) else None  # the server's to give
        about = {"score": score, "parsed": rating.parsed, "gold": dict(sample.gold)}
        seed = f"{self.path.stem} {model} {sample.id}".encode()
        return {
            "question_id": sample.id,
            "prompt": sample.prompt,
            "text": text,
            "answer_id": hashlib.sha256(seed).hexdigest()[:22],
            "model_id": model,
            "metadata": about | ({"note": note} if note else {}),
        }

    def rate(self, sample: Sample, text: str, note: str) -> Rating:
        """What was not answered is wrong, whatever the rule makes of no words."""
        return WRONG if note else self.benchmark.rate(sample, text, self.protocol)

    def finish(self, rows: dict[str, Row], seconds: float | None) -> list[Rating]:
        """Rate all answers by the rule as it is now, and put the file in order."""
        ratings = []
        for sample in self.samples:
            old = rows[sample.id]
            text, note = old["text"], files.note(old)
            ratings.append(self.rate(sample, text, note))
            rows[sample.id] = self.row(sample, text, note, ratings[-1])
        outcome = {"seconds_per_sample": seconds}
        files.finish(self.path, rows, [sample.id for sample in self.samples], outcome)
        return ratings

    # ------------------------------------------------------------------ figures

    def figures(self, ratings: Sequence[Rating]) -> tuple[Figures, Interval | None]:
        """All figures, and the main one with its interval; none where others have to rate."""
        if self.benchmark.judge or not ratings:
            return {}, None
        found = self.benchmark.summarise(self.samples, ratings, self.protocol)
        if self.benchmark.headline not in found:
            return found, None
        return found, headline(self.benchmark, self.samples, ratings, self.protocol)

    def result(
        self, ratings: Sequence[Rating], known: Known, seconds: float | None, name: str
    ) -> BenchmarkResult:
        """Everything that is told; figures on process 0 alone."""
        figures, main = self.figures(ratings)
        tokens, share = visual_tokens(self.pipeline.vlm, self.samples, known)
        first = self.samples[0]
        return BenchmarkResult(
            benchmark=self.benchmark.name,
            title=self.benchmark.title,
            metric=self.benchmark.metric,
            protocol=self.protocol,
            checkpoint=self.pipeline.name,
            method=name,
            headline=self.benchmark.headline,
            score=main and main.value,
            low=main and main.low,
            high=main and main.high,
            figures=figures,
            published=self.benchmark.published,
            n=len(self.samples),
            unreadable=int((known[:, STATE] == UNREADABLE).sum()),
            too_long=int((known[:, STATE] == TOO_LONG).sum()),
            visual_tokens=tokens,
            share_of_full=share,
            seconds_per_sample=seconds,
            batch=self.batch,
            device=f"{jax.devices()[0].device_kind} x {self.places.devices}",
            prompt=self.pipeline.rendered(first.prompt, len(first.images)).text,
            answers=str(self.path),
            judge=self.benchmark.judge,
            ratings=tuple(ratings),
        )
