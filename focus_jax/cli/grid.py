"""`python -m focus_jax grid`: train and score every combination of configs, settings, methods."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from focus_jax.charts import MethodPoint, accuracy_plot
from focus_jax.cli.arguments import Meter, Parser, argv_or, not_negative
from focus_jax.cli.common import friendly, split_flags
from focus_jax.data.glyph_config import SPLITS
from focus_jax.evaluate.runner import Result, read_run
from focus_jax.evaluate.study import evaluate_once, train_once, write_json
from focus_jax.experiment import Experiment, load_program, override
from focus_jax.methods import parse_method, split_methods
from focus_jax.models.params import abstract, is_sampler, named_leaves
from focus_jax.models.vlm import dims_of
from focus_jax.report import markdown_table
from focus_jax.workdir import write_text

Setting = tuple[str, str]


@dataclass(frozen=True)
class Cell:
    """One training: a config program with settings over it."""

    program: str
    settings: tuple[Setting, ...]
    config: Experiment

    @property
    def slug(self) -> str:
        """The name of its folder."""
        parts = [self.program, *(f"{key}={value}" for key, value in self.settings)]
        return as_name("__".join(parts))


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained, score what is not scored. Exit 0 with the table on stdout."""
    flags, shared = split_flags(parser(), argv_or(argv))
    workdir: Path = flags.workdir
    methods = split_methods(flags.methods) if flags.methods else [None]
    cells = make_cells(flags.config, flags.vary, shared)
    for cell in cells:
        check(cell, [name for name in methods if name])
    workdir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(cells, start=1):
        print(f"cell {number}/{len(cells)}: {cell.slug}", file=sys.stderr)
        folder = workdir / cell.slug
        seconds = train_once(cell.config, folder, flags.quiet)
        run = read_run(folder)
        for name in methods:
            path = folder / "evaluations" / f"{as_name(name or 'own')}_{flags.split}.json"
            meter = None if flags.quiet else Meter(name or "evaluate")
            result = evaluate_once(path, run, name, flags.split, flags.limit, progress=meter)
            rows.append(row_of(cell, result, seconds))
        write(workdir, rows)  # after each cell, so that a long grid can be looked at
    print(table(rows), end="")
    return 0


def parser() -> Parser:
    """The grid's own flags; all others set fields of every experiment."""
    out = Parser(
        "python -m focus_jax grid",
        description="Train and score every combination. What is finished is not repeated.",
        epilog="Other flags set fields of every experiment, as in train.py.",
    )
    out.add_argument("--workdir", type=Path, required=True, help="a folder for each training")
    out.add_argument("--config", type=Path, nargs="+", required=True, metavar="FILE")
    out.add_argument(
        "--vary", type=varied, action="append", default=[], metavar="FIELD=A,B",
        help="e.g. compress.text.layer=1,2,3; may be given more than once",
    )  # fmt: skip
    out.add_argument("--methods", metavar="M,M", help="of every training; default: its own")
    out.add_argument("--split", choices=SPLITS, default="validation")
    out.add_argument("--limit", type=not_negative, default=0, metavar="N", help="images, 0: all")
    out.add_argument("--quiet", action="store_true", help="no progress")
    return out


def varied(text: str) -> tuple[Setting, ...]:
    """The settings that `field=a,b` stands for."""
    field, equals, values = text.partition("=")
    settings = tuple((field.strip("- "), v.strip()) for v in values.split(",") if v.strip())
    if not (equals and field and settings):
        raise argparse.ArgumentTypeError(f"{text!r}: give FIELD=VALUE,VALUE")
    return settings


def as_name(text: str) -> str:
    """Text as a file's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text)


# ------------------------------------------------------------------------------- cells


def make_cells(
    programs: Sequence[Path], vary: Sequence[tuple[Setting, ...]], shared: Sequence[str]
) -> list[Cell]:
    """All combinations, in order. ValueError for two that would share a folder."""
    cells = []
    for program, settings in product(programs, product(*vary)):
        flags = [text for key, value in settings for text in (f"--{key}", value)]
        config = override(load_program(program), [*shared, *flags], "focus_jax grid")
        cells.append(Cell(program.stem, settings, config))
    slugs = [cell.slug for cell in cells]
    if twice := next((slug for slug in slugs if slugs.count(slug) > 1), None):
        raise ValueError(f"two trainings would be called {twice}: give each combination once")
    return cells


def check(cell: Cell, methods: Sequence[str]) -> None:
    """ValueError, before anything is trained, for a method that this cell cannot run."""
    model, own = cell.config.model, cell.config.compress.value()
    dims = dims_of(model, model.max_tiles)
    trained = samplers(cell.config, own.check(dims))
    for text in methods:
        method = parse_method(text, cell.config.compress).check(dims)
        lacking = samplers(cell.config, method) - trained
        if lacking:
            raise ValueError(
                f"{cell.slug} trains {own.name!r} and so has no {sorted(lacking)[0]} for the "
                f"method {text!r}: leave the method out, or train this config with it"
            )


def samplers(cfg: Experiment, method: Any) -> set[str]:
    """Names of a method's learned parameters."""
    return {name for name in named_leaves(abstract(cfg.model, method)) if is_sampler(name)}


# ------------------------------------------------------------------------------ report


def row_of(cell: Cell, result: Result, seconds: float | None) -> dict[str, Any]:
    """One line of the results."""
    return {
        "cell": cell.slug,
        "program": cell.program,
        "settings": dict(cell.settings),
        "train_step_seconds": seconds,
        **result.to_json(),
    }


def write(workdir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """results.json, results.md and accuracy.png of what is finished."""
    write_json(workdir / "results.json", list(rows))
    accuracy_plot(workdir / "accuracy.png", [point(row) for row in rows])
    cost = "Slots are lengths of arrays, GFLOPs those of one question's prefill by the plan."
    text = f"# Results\n\n{cost}\n\n{table(rows)}\n![accuracy over slots](accuracy.png)\n"
    write_text(workdir / "results.md", text)


def point(row: dict[str, Any]) -> MethodPoint:
    """A row in the chart, named by what tells it from others."""
    settings = (f"{key.rsplit('.', 1)[-1]}={value}" for key, value in row["settings"].items())
    name = " ".join([row["program"], *settings, row["method"]])
    return MethodPoint(name, row["share_of_full"], row["accuracy"], row["low"], row["high"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each training and method; a column for each varied field."""
    varied_fields = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    lines = [
        {
            **row, **{key: row["settings"].get(key) for key in varied_fields},
            "interval": f"{row['low']:.1%} to {row['high']:.1%}",
        }
        for row in rows
    ]  # fmt: skip
    return markdown_table(
        lines,
        [
            ("program", "config", ""),
            *((key, key, "") for key in varied_fields),
            ("method", "method", ""),
            ("accuracy", "accuracy", ".1%"),
            ("interval", "95 % interval", ""),
            ("visual_slots_entering", "slots entering", "d"),
            ("visual_slots_mean", "mean slots", ".1f"),
            ("share_of_full", "of full", ".1%"),
            ("flops", "GFLOPs", lambda n: f"{n / 1e9:.3f}"),
            ("seconds_per_sample", "ms", lambda s: f"{s * 1e3:.2f}"),
            ("train_step_seconds", "s a training step", ".3f"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
