"""`python -m focus_jax data build | check`: data sets of dialogues, made once and looked at."""

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from focus_jax.cli.arguments import Parser, argv_or, not_negative, positive
from focus_jax.cli.common import friendly
from focus_jax.cli.progress import SampleMeter
from focus_jax.data.image_store import Several
from focus_jax.data.inputs import add_input_flags, names_rows, open_inputs

if TYPE_CHECKING:
    from focus_jax.data.build import Report

COMMANDS = {
    "build": "LLaVA's rows and images become a TFDS data set; goes on where it was stopped",
    "check": "rows, lengths and bad rows of a data set, and a sheet of samples with their masks",
}


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Build or check a data set. Exit 0 when that is done."""
    given = argv_or(argv)
    command = parser().parse_args(given[:1]).command
    if command == "check":
        check = import_module("focus_jax.data.check")
        out = Parser("python -m focus_jax data check", description=f"Shows {COMMANDS[command]}.")
        check.add_flags(out)
        return int(check.run(out.parse_args(given[1:])))
    return build(build_parser().parse_args(given[1:]))


def build(flags: argparse.Namespace) -> int:
    """Build, with a bar, and print what was built."""
    # TFDS takes a second to import: not for a --help.
    from focus_jax.data.build import BuildConfig
    from focus_jax.data.build import build as build_set

    if not names_rows(flags):
        raise ValueError("no rows: give --json FILE, --parquet FILE or --webdataset DIR")
    cfg = BuildConfig(
        flags.shards, flags.workers, flags.max_bad_share, name=flags.name,
        verify_images=not flags.headers_only,
    )  # fmt: skip
    rows, images = open_inputs(flags)
    images = images or Several(())
    with SampleMeter("build") as meter:
        report = build_set(rows, images, flags.out, cfg, lambda now: meter(now.done, now.total))
    print(summary(report), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line up to the sub-command's name."""
    out = Parser(
        "python -m focus_jax data",
        usage="python -m focus_jax data COMMAND [flags]",
        description="Data sets of dialogues: LLaVA-Pretrain, mix665k and what has their form.",
        epilog="commands:\n" + "\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("command", choices=tuple(COMMANDS), help="one of those below")
    return out


def build_parser() -> Parser:
    """The flags of `data build`."""
    out = Parser(
        "python -m focus_jax data build",
        description=(
            "Write conversations and their images as a TFDS data set in ArrayRecord shards. Missing"
            " and corrupt images and rows are left out and listed in DIR/bad_rows.jsonl. The same"
            " command again goes on where a build was stopped."
        ),
        epilog=(
            "Archives need no unpacking: --images coco=train2017.zip gqa=images.zip images/ reads "
            "coco/train2017/1.jpg from the first."
        ),
    )
    add_input_flags(out)
    out.add_argument("--out", required=True, type=Path, metavar="DIR", help="the data set's folder")
    out.add_argument(
        "--shards", type=not_negative, default=0, metavar="N", help="default: one for 2,500 rows"
    )
    out.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N",
        help="processes; default: one for each core",
    )  # fmt: skip
    out.add_argument(
        "--max-bad-share", type=float, default=0.01, metavar="X",
        help="fail when more of the rows are bad; default: 0.01",
    )  # fmt: skip
    out.add_argument("--name", default="llava", help="the data set's name; default: llava")
    out.add_argument(
        "--headers-only", action="store_true", help="quicker: images are not decoded to check them"
    )
    return out


def summary(report: "Report") -> str:
    """What was built, as a Markdown table."""
    from focus_jax.report import markdown_table

    lines = [
        ("rows", f"{report.rows:,}"),
        ("kept", f"{report.kept:,}"),
        ("left out", f"{report.bad:,}"),
        *((f"- {kind}", f"{count:,}") for kind, count in report.kinds.items()),
        ("images", f"{report.images:,}"),
        ("shards", f"{report.shards:,}"),
        ("size", size(report.bytes)),
        ("data set", report.out),
        ("bad rows", report.bad_rows if report.bad else "none"),
    ]
    rows = [{"what": what, "found": found} for what, found in lines]
    return markdown_table(rows, [("what", "", ""), ("found", "", "")])


def size(count: int) -> str:
    """Bytes for reading: 1.5 GB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
