"""`python -m focus_jax reproduce`: a paper's table again, published beside measured."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from focus_jax.cli.arguments import Parser, argv_or, not_negative, positive
from focus_jax.cli.common import add_process_flags, friendly, joined
from focus_jax.cli.evaluate_benchmarks import BATCH
from focus_jax.cli.progress import SampleMeter
from focus_jax.evaluate.benchmark import PROTOCOLS
from focus_jax.evaluate.lock import alone
from focus_jax.evaluate.published import TABLES, Table
from focus_jax.evaluate.reproduce import Cell, Setup, listing, page, reproduce, silent, to_json
from focus_jax.evaluate.study import write_json
from focus_jax.sharding import make_layout
from focus_jax.workdir import write_text


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the table, or list it. Exit 0 where a cell could be measured."""
    out = parser()
    flags = out.parse_args(argv_or(argv))
    table = TABLES[flags.table]
    if flags.list:
        print(listing(table), end="")
        return 0
    for name in ("checkpoint", "data", "out"):
        if not getattr(flags, name):
            out.error(f"--{name} is missing (--list shows the table without running it)")
    with joined(flags, preemptible=False), alone(flags.out):
        run(table, flags)
    return 0


def run(table: Table, flags: argparse.Namespace) -> None:
    """All cells; process 0 writes the table behind each, so that a long run can be looked at."""
    layout = make_layout(flags.mesh)
    setup = Setup(
        checkpoints=dict(named(text, table) for text in flags.checkpoint),
        data=flags.data,
        out=flags.out,
        benchmarks=flags.benchmark,
        methods=dict(flags.method),
        protocol=flags.protocol,
        limit=flags.limit,
        batch=flags.batch or BATCH * layout.ways("batch"),
        layout=layout if layout.mesh.size > 1 else None,
    )
    tells = jax.process_index() == 0
    cells: list[Cell] = []
    text = ""
    for cell in reproduce(table, setup, SampleMeter if tells else silent):
        cells.append(cell)
        text = page(table, cells, setup.protocol, setup.limit)
        if tells:
            write_text(flags.out / f"{flags.table}.md", text)
            write_json(flags.out / f"{flags.table}.json", [to_json(cell) for cell in cells])
    if tells:
        print(text, end="")
    if not any(cell.result for cell in cells):
        raise ValueError("no cell could be measured: the table says why")


def parser() -> Parser:
    """The flags of this command."""
    out = Parser(
        "python -m focus_jax reproduce",
        description="Run a paper's table: its rows as methods here, its benchmarks as columns. "
        "What is answered is not asked again; what cannot be run says why.",
    )
    out.add_argument("table", choices=TABLES, help="a paper's table")
    out.add_argument("--list", action="store_true", help="show the table, run nothing")
    out.add_argument(
        "--checkpoint", action="append", default=[], metavar="[WEIGHTS=]DIR",
        help="of which weights; once for each (--list names them)",
    )  # fmt: skip
    out.add_argument("--data", type=Path, metavar="DIR", help="a folder for each benchmark")
    out.add_argument("--out", type=Path, metavar="DIR", help="the table, and all answers")
    out.add_argument(
        "--benchmark", type=names, default=(), metavar="B[,B]", help="some columns; default: all"
    )
    out.add_argument(
        "--method", type=replaced, action="append", default=[], metavar="ROW=METHOD",
        help="another method for a row, such as YOPO's with a measured mask",
    )  # fmt: skip
    out.add_argument("--protocol", choices=PROTOCOLS, default="llava")
    out.add_argument("--limit", type=not_negative, default=0, metavar="N", help="samples, 0: all")
    out.add_argument("--batch", type=positive, default=0, metavar="N", help="questions at a time")
    out.add_argument(
        "--mesh", default="data", metavar="M",
        help="how devices stand, such as fsdp,tensor=2; default: data, each with the whole model",
    )  # fmt: skip
    add_process_flags(out)
    return out


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def replaced(text: str) -> tuple[str, str]:
    """`ROW=METHOD` in two."""
    row, equals, method = text.partition("=")
    if not (row and equals and method):
        raise argparse.ArgumentTypeError(f"{text!r}: give ROW=METHOD")
    return row.strip(), method.strip()


def named(text: str, table: Table) -> tuple[str, Path]:
    """`WEIGHTS=DIR` in two; a directory alone is of the table's own weights."""
    weights = {name for row in table.rows for name in (row.weights, row.untuned) if name}
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and name in weights else (table.own, Path(text))


if __name__ == "__main__":
    sys.exit(main())
