"""A paper's table run again, cell by cell: published figures beside measured ones.

What was answered before is not asked again (see `suite`); what cannot be run says why, and the
other cells go on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax

from focus_jax.evaluate.benchmark import Benchmark, Protocol, Sample
from focus_jax.evaluate.benchmarks import BENCHMARKS
from focus_jax.evaluate.benchmarks.server import write_submission
from focus_jax.evaluate.published import NOTES, Row, Table
from focus_jax.evaluate.results import BenchmarkResult, span
from focus_jax.evaluate.suite import Progress, answers_file, find_folder, run_benchmark
from focus_jax.experiment import CompressConfig
from focus_jax.methods import method_to_json, parse_method
from focus_jax.pipeline import Pipeline, load
from focus_jax.report import markdown_table
from focus_jax.sharding import Layout


@dataclass(frozen=True)
class Setup:
    """What a table is run with.

    `checkpoints`: directories by the names of weights. `methods`: by the names of rows, in place
    of the table's. `benchmarks`: some of the table's columns; none for all. `limit`: the first
    samples alone, 0 for all.
    """

    checkpoints: Mapping[str, Path]
    data: Path
    out: Path
    benchmarks: tuple[str, ...] = ()
    methods: Mapping[str, str] | None = None
    protocol: Protocol = "llava"
    limit: int = 0
    batch: int = 16
    layout: Layout | None = None


class Questions(NamedTuple):
    """A benchmark's folder and samples."""

    folder: Path
    samples: list[Sample]


class Source(NamedTuple):
    """What a row runs on: weights by name, a method ("": the checkpoint's), tuned with it or not.

    `why`: why it cannot run, "" where it can.
    """

    weights: str
    method: str
    tuned: bool
    why: str = ""


class Cell(NamedTuple):
    """A row on a benchmark. `published` is None where the paper has no figure, `result` where
    nothing could be measured: `why` tells."""

    row: Row
    source: Source
    benchmark: str
    published: float | None
    result: BenchmarkResult | None
    why: str = ""

    @property
    def gap(self) -> float | None:
        """Measured less published."""
        measured = self.result.score if self.result else None
        return None if None in (measured, self.published) else measured - self.published  # type: ignore[operator]


def silent(name: str) -> AbstractContextManager[None]:
    """No progress."""
    return nullcontext()


def reproduce(
    table: Table,
    setup: Setup,
    progress: Callable[[str], AbstractContextManager[Progress | None]] = silent,
) -> Iterator[Cell]:
    """The table's cells, row by row; `progress(name)` makes a cell's meter.

    ValueError, before anything runs: names that the table does not have, a method that does not
    read, and a setup that lacks all checkpoints or all data.
    """
    check(table, setup)
    sources = {row.name: source_of(row, setup) for row in table.rows}
    reader = cache(lambda name: questions_of(BENCHMARKS[name], setup))
    names = setup.benchmarks or table.benchmarks
    if all(source.why for source in sources.values()):
        raise ValueError(next(iter(sources.values())).why)
    if not any(isinstance(reader(name), Questions) for name in names):
        raise ValueError(str(reader(names[0])))
    # Rows of the same weights stand together, so that a checkpoint is read once.
    for weights, rows in groupby(table.rows, key=lambda row: sources[row.name].weights):
        base: Pipeline | None = None
        for row in rows:
            source, pipeline = sources[row.name], None
            if not source.why and any(isinstance(reader(name), Questions) for name in names):
                base = base or load(setup.checkpoints[weights], layout=setup.layout)
                pipeline, source = with_method(base, source)
            for name in names:
                found, published = reader(name), row.figures.get(name)
                if pipeline is None or not isinstance(found, Questions):
                    yield Cell(row, source, name, published, None, source.why or str(found))
                    continue
                with progress(f"{row.name}, {name}") as meter:
                    result = measure(pipeline, source, BENCHMARKS[name], found, setup, meter)
                yield Cell(row, source, name, published, result)


def measure(
    pipeline: Pipeline,
    source: Source,
    benchmark: Benchmark,
    asked: Questions,
    setup: Setup,
    progress: Progress | None,
) -> BenchmarkResult:
    """One cell's answers, under `out/answers/WEIGHTS/`, and what they score.

    Where others rate them, the file for those lies beside.
    """
    folder = setup.out / "answers" / source.weights
    method = method_to_json(pipeline.vlm.method)
    result = run_benchmark(
        pipeline, benchmark, asked.samples, protocol=setup.protocol, layout=setup.layout,
        batch=setup.batch, answers=answers_file(folder, benchmark.name, setup.protocol, method),
        progress=progress, name=source.method or pipeline.vlm.method.name,
    )  # fmt: skip
    if result.score is None and jax.process_index() == 0:
        write_submission(benchmark, asked.folder, asked.samples, Path(result.answers))
    return result


def check(table: Table, setup: Setup) -> None:
    """ValueError for names that the table does not have."""
    weights = dict.fromkeys(w for row in table.rows for w in (row.weights, row.untuned) if w)
    for what, given, known in (
        ("benchmark", setup.benchmarks, table.benchmarks),
        ("row", setup.methods or (), [row.name for row in table.rows]),
        ("checkpoint", setup.checkpoints, weights),
    ):
        for name in given:
            if name not in known:
                raise ValueError(
                    f"the table of {table.title} has no {what} {name!r}: choose from "
                    f"{', '.join(known)}"
                )


def source_of(row: Row, setup: Setup) -> Source:
    """On which weights a row runs, and with which method.

    A method in `setup.methods` runs on the row's own weights, else on those it runs on untuned.
    """
    method = (setup.methods or {}).get(row.name)
    if row.weights in setup.checkpoints:
        return checked(Source(row.weights, row.method if method is None else method, True))
    if row.untuned in setup.checkpoints:
        as_comes = row.untuned_method or row.method
        return checked(Source(row.untuned, as_comes if method is None else method, False))
    names = " or ".join(f"{name}=DIR" for name in (row.weights, row.untuned) if name)
    return Source(row.weights, row.method, True, f"no checkpoint: give --checkpoint {names}")


def checked(source: Source) -> Source:
    """The same. ValueError for a method that does not read."""
    if source.method:
        parse_method(source.method, CompressConfig())
    return source


def with_method(base: Pipeline, source: Source) -> tuple[Pipeline | None, Source]:
    """The checkpoint with a row's method; none, and the reason, where it does not fit."""
    if not source.method:
        return base, source
    try:
        return base.with_method(base.method(source.method)), source
    except ValueError as error:
        return None, source._replace(why=f"{source.method} does not fit: {error}")


def questions_of(benchmark: Benchmark, setup: Setup) -> Questions | OSError | ValueError:
    """A benchmark's samples, or the error that says why they cannot be read."""
    try:
        folder = find_folder(setup.data, benchmark)
        samples = benchmark.read(folder, setup.protocol)
    except (OSError, ValueError) as error:
        return error
    return Questions(folder, samples[: setup.limit or len(samples)])


# ------------------------------------------------------------------------------- tables


def page(table: Table, cells: Sequence[Cell], protocol: Protocol, limit: int = 0) -> str:
    """A table of all cells, which of them are missing and why, and the first prompts."""
    head = [f"# {table.title}: published and measured", "", f"Published: {table.source}."]
    head += [f"- {note}" for note in table.notes]
    part = f" The first {limit} samples of each." if limit else ""
    head += ["", f"Measured by the protocol of {protocol}; 95 % intervals.{part}", ""]
    text = "\n".join(head) + "\n" + cells_table(cells)
    names = dict.fromkeys(cell.benchmark for cell in cells)
    text += "\nWhat the published figures are of:\n\n"
    text += "".join(f"- {name}: {NOTES[name]}\n" for name in names if name in NOTES)
    if missing := [cell for cell in cells if cell.result is None]:
        text += f"\nMissing: {len(missing)} of {len(cells)} cells.\n\n"
        text += "".join(f"- {c.row.name}, {c.benchmark}: {first_line(c.why)}\n" for c in missing)
    prompts = {cell.result.title: cell.result.prompt for cell in cells if cell.result}
    for title, prompt in prompts.items():
        text += f"\nFirst prompt of {title}:\n\n```text\n{prompt}\n```\n"
    return text


def cells_table(cells: Sequence[Cell]) -> str:
    """A line for each cell."""
    return markdown_table(
        [line(cell) for cell in cells],
        [
            ("row", "row", ""),
            ("method", "method here", ""),
            ("benchmark", "benchmark", ""),
            ("published", "published", ".1f"),
            ("measured", "measured", ".1f"),
            ("interval", "95 % interval", ""),
            ("gap", "difference", "+.1f"),
            ("n", "n", "d"),
            ("note", "note", ""),
        ],
    )


def line(cell: Cell) -> dict[str, Any]:
    """A cell in a table's words."""
    result, source = cell.result, cell.source
    notes = [] if source.tuned else [f"{source.weights} as it comes; published: tuned"]
    if result is None:
        notes.append("missing")
    elif result.score is None:
        notes.append(result.judge or "rated by the benchmark's server")
    return {
        "row": cell.row.name,
        "method": f"`{source.method}`" if source.method else "the checkpoint's",
        "benchmark": cell.benchmark,
        "published": cell.published,
        "measured": result and result.score,
        "interval": result and span(result.low, result.high),
        "gap": cell.gap,
        "n": result and result.n,
        "note": "; ".join(notes) or None,
    }


def listing(table: Table) -> str:
    """The table with its published figures, and what each row is here; nothing is run."""
    columns: list[tuple[str, str, Any]] = [("row", "row", "")]
    columns += [(name, name, ".1f") for name in table.benchmarks]
    figures = [
        {"row": row.name} | {name: row.figures.get(name) for name in table.benchmarks}
        for row in table.rows
    ]
    text = f"# {table.title}\n\n{table.source}.\n" + "".join(f"- {n}\n" for n in table.notes)
    text += "\n" + markdown_table(figures, columns) + "\n"
    for row in table.rows:
        text += f"- {row.name}: {row_words(row)}\n"
    return text + f"\nA --checkpoint without a name is {table.own}.\n"


def row_words(row: Row) -> str:
    """What a row is: weights, method, and on what else it runs."""
    words = [f"--checkpoint {row.weights}=DIR", row.method or "the checkpoint's own method"]
    if row.untuned:
        method = row.untuned_method or row.method
        words.append(f"without these weights on {row.untuned} as it comes, {method}")
    return "; ".join([*words, *([row.note] if row.note else [])])


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def to_json(cell: Cell) -> dict[str, Any]:
    """A cell as plain values."""
    return {
        "row": cell.row.name, "benchmark": cell.benchmark, "published": cell.published,
        "weights": cell.source.weights, "method": cell.source.method, "tuned": cell.source.tuned,
        "difference": cell.gap, "missing": cell.why,
        "result": cell.result.to_json() if cell.result else None,
    }  # fmt: skip
