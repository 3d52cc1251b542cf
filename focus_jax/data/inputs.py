"""What `data build` and `data check` read: rows and images by the same flags."""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from focus_jax.data.image_store import ImageStore, Several, Shards, open_stores
from focus_jax.data.parquet_rows import ParquetRows
from focus_jax.data.row_files import JsonRows, RowSource, open_shard_rows


class Inputs(NamedTuple):
    """Rows, and the images that they name; None where no store was given."""

    rows: list[RowSource]
    images: Several | None


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """--json, --parquet, --webdataset and --images."""
    add = parser.add_argument
    add("--json", nargs="+", type=Path, default=[], metavar="FILE", help="JSON list or JSON lines")
    add(
        "--parquet", nargs="+", type=Path, default=[], metavar="FILE",
        help="parquet files with images inside, or their folder",
    )  # fmt: skip
    add("--webdataset", type=Path, metavar="DIR", help="shards that hold KEY.json beside KEY.jpg")
    add(
        "--images", nargs="+", default=[], metavar="STORE",
        help="folder, .zip, .tar or folder of .tar shards; NAME=STORE puts it below NAME/",
    )  # fmt: skip


def names_rows(flags: argparse.Namespace) -> bool:
    """Whether any rows are given."""
    return bool(flags.json or flags.parquet or flags.webdataset)


def open_inputs(flags: argparse.Namespace) -> Inputs:
    """The sources that flags name; each file is told on stderr, for a list takes its time.

    FileNotFoundError, ValueError naming what is missing or damaged.
    """
    rows: list[RowSource] = [JsonRows(_told(path)) for path in flags.json]
    stores: list[ImageStore] = []
    if flags.parquet:
        inside = ParquetRows(_parquet_files(flags.parquet))
        rows.append(inside)
        stores.append(inside)
    if flags.webdataset:
        rows.append(open_shard_rows(_told(flags.webdataset)))
        stores.append(Shards(sorted(flags.webdataset.glob("*.tar"))))
    stores += open_stores(flags.images).stores
    return Inputs(rows, Several(stores) if stores else None)


def _parquet_files(paths: list[Path]) -> list[Path]:
    out: list[Path] = []
    for path in map(_told, paths):
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"no parquet files in {path}")
        out += found
    return out


def _told(path: Path) -> Path:
    print(f"reading {path}", file=sys.stderr, flush=True)
    return path
