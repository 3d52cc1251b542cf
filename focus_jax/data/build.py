"""LLaVA's rows and images become a TFDS data set of ArrayRecord shards, once.

A shard is the unit of work: written whole or not at all, so that a build that was killed goes on
where it stopped and leaves the same bytes. Neither TensorFlow nor the network is needed.
"""

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from focus_jax.data.image_store import ImageStore
from focus_jax.data.row_files import AllRows, RowSource
from focus_jax.data.shard import (
    SPLITS,
    WORK,
    Job,
    Part,
    checksum,
    features,
    packed_arrays,
    write_shard,
    write_whole,
)

FORMAT = 1
FACTS, INDEX, BAD_ROWS, PLAN = "build.json", "index.npz", "bad_rows.jsonl", "plan.json"
_METADATA = ("dataset_info.json", "features.json")
_ROWS_PER_SHARD = 2500
_MAX_SHARDS = 2048
_PIXELS = 89_478_485  # PIL's own limit


@dataclass(frozen=True)
class BuildConfig:
    """How a data set is written.

    `shards`: 0 makes one for every 2,500 rows. `workers`: processes; 1 is this one alone.
    `max_bad_share`: with more bad rows there is no data set. `max_pixels`: larger images are bad.
    `verify_images`: decode all of each image, not only its header. `name`: the data set's in TFDS.
    Only `workers` and `max_bad_share` may change when a build goes on.
    """

    shards: int = 0
    workers: int = 1
    max_bad_share: float = 0.01
    max_pixels: int = _PIXELS
    verify_images: bool = True
    name: str = "llava"

    def __post_init__(self) -> None:
        if not 0 <= self.shards <= _MAX_SHARDS:
            raise ValueError(f"shards={self.shards}: give 1 to {_MAX_SHARDS}, or 0 to have it set")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}: give at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share}: give a share from 0 to 1")
        if not 1 <= self.max_pixels <= _PIXELS:
            raise ValueError(f"max_pixels={self.max_pixels}: give 1 to {_PIXELS}")
        if not re.fullmatch("[a-z][a-z0-9_]*", self.name):
            raise ValueError(
                f"name={self.name!r}: give small letters, digits and _, a letter first"
            )


class Progress(NamedTuple):
    """Rows that are dealt with, of all, and how many of these were bad."""

    done: int
    total: int
    bad: int


@dataclass(frozen=True)
class Report:
    """What was built. `kinds`: bad rows by what was wrong with them."""

    out: str
    rows: int
    kept: int
    bad: int
    kinds: dict[str, int]
    images: int
    shards: int
    bytes: int
    bad_rows: str


Tell = Callable[[Progress], None]


def build(
    rows: Sequence[RowSource],
    stores: ImageStore,
    out: str | Path,
    cfg: BuildConfig | None = None,
    progress: Tell | None = None,
) -> Report:
    """Write the rows with their images into the folder `out`; goes on where one was stopped.

    Rows keep their order; bad ones are left out and listed in bad_rows.jsonl (file, line, row, id,
    kind, reason). `tfds.builder_from_directory(out).as_data_source("train")` reads the result;
    its split "texts" holds the same rows without images. Beside it lie index.npz (see `Part`) and
    build.json (sources, counts, checksums), which is written last.

    With several workers, programs that call this need the usual `if __name__ == "__main__":`.
    Raises ValueError when more rows are bad than may be, when `out` belongs to another build,
    naming the first difference, or when another process is building there.
    """
    cfg = cfg or BuildConfig()
    out, everything = Path(out), AllRows(rows)
    total = len(everything)
    if not total:
        raise ValueError("there are no rows to build from: the sources are empty")
    shards = min(cfg.shards or -(-total // _ROWS_PER_SHARD), total, _MAX_SHARDS)
    job = Job(everything, stores, out, cfg.name, shards, cfg.verify_images, cfg.max_pixels)
    plan = _plan(job)
    if (out / FACTS).is_file():
        facts = json.loads((out / FACTS).read_text(encoding="utf-8"))
        _check_same(facts["plan"], plan, out)
        shutil.rmtree(out / WORK, ignore_errors=True)  # where it was killed at the very end
        report = _report(out, facts)
        _check_share(report.bad, total, cfg.max_bad_share, out / BAD_ROWS)
        return report
    with _claimed(out):
        _start(out, plan)
        parts = _write(job, cfg, progress or (lambda _: None))
        return _report(out, _finish(job, plan, parts, cfg.max_bad_share))


def difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(place, old, new) of the first place where two JSON values differ."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None if old == new else (name, old, new)
    for key in old | new:
        place = f"{name}.{key}" if name else str(key)
        found = difference(old.get(key), new.get(key), place)
        if found:
            return found
    return None


def _plan(job: Job) -> dict[str, Any]:
    """All that the files' bytes follow from, as JSON."""
    plan = {
        "format": FORMAT,
        "name": job.name,
        "shards": job.shards,
        "verify_images": job.verify_images,
        "max_pixels": job.max_pixels,
        "sources": job.rows.about(),
        "images": job.images.about(),
    }
    return json.loads(json.dumps(plan))


def _check_same(stored: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    found = difference(stored, asked)
    if found:
        name, old, new = found
        raise ValueError(
            f"{out} belongs to another build: {name} was {old!r}, is {new!r}; give another folder,"
            " or the same sources and settings, or remove it"
        )


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone."""
    work = out / WORK
    if out.is_dir() and not work.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds files that no build made: give an empty or a new folder")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is building in {out}: wait for it, or give another folder"
            ) from error
        yield


def _start(out: Path, plan: dict[str, Any]) -> None:
    path = out / WORK / PLAN
    if path.is_file():
        _check_same(json.loads(path.read_text(encoding="utf-8")), plan, out)
    write_whole(path, json.dumps(plan, indent=1).encode(), out / WORK)


def _write(job: Job, cfg: BuildConfig, progress: Tell) -> list[Part]:
    """Write all shards. Stops with ValueError as soon as too many rows are bad."""
    total = len(job.rows)

    def seen(done: int, bad: int) -> None:
        progress(Progress(done, total, bad))

    if cfg.workers == 1:
        parts, counts = [], [0, 0]

        def tell(good: bool) -> None:
            counts[0] += 1
            counts[1] += not good
            seen(counts[0], counts[1])

        for shard in range(job.shards):
            parts.append(write_shard(job, shard, tell))
            _stop_early(job, parts, cfg)
        return parts
    return _write_in_parallel(job, cfg, seen)


def _write_in_parallel(job: Job, cfg: BuildConfig, seen: Callable[[int, int], None]) -> list[Part]:
    # Not forked: threads of this process (JAX has some) would be lost half-way.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)
    parts: dict[int, Part] = {}
    running: dict[Future[Part], int] = {}
    left = iter(range(job.shards))
    workers = min(cfg.workers, job.shards)
    with ProcessPoolExecutor(workers, context, _enter, (job, counts)) as pool:
        try:
            while len(parts) < job.shards:
                while len(running) < 2 * workers and (shard := next(left, None)) is not None:
                    running[pool.submit(_shard, shard)] = shard
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    parts[running.pop(future)] = future.result()
                seen(counts[0], counts[1])
                _stop_early(job, [parts[shard] for shard in sorted(parts)], cfg)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker was killed (often for memory): run the same command again to go on,"
                f" perhaps with fewer than {cfg.workers} workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [parts[shard] for shard in range(job.shards)]


_WORKER: dict[str, Any] = {}


def _enter(job: Job, counts: Any) -> None:
    """What a worker keeps between shards; it ends with its parent, however that ends."""
    _WORKER.update(job=job, counts=counts)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _shard(number: int) -> Part:
    counts = _WORKER["counts"]

    def tell(good: bool) -> None:
        with counts.get_lock():
            counts[0] += 1
            counts[1] += not good

    return write_shard(_WORKER["job"], number, tell)


def _stop_early(job: Job, parts: Sequence[Part], cfg: BuildConfig) -> None:
    bad = [line for part in parts for line in part.bad]
    total = len(job.rows)
    if len(bad) > cfg.max_bad_share * total and len(parts) < job.shards:
        seen = sum(len(part.rows) + len(part.bad) for part in parts)
        _write_bad(job.out, bad)
        _check_share(len(bad), total, cfg.max_bad_share, job.out / BAD_ROWS, seen)


def _check_share(bad: int, total: int, most: float, listed: Path, seen: int | None = None) -> None:
    if bad > most * total:
        after = "" if seen is None else f" after {seen} of them"
        raise ValueError(
            f"{bad} of {total} rows are bad{after}, more than the share of {most:g} that may be:"
            f" {listed} says which and why (the first: {_first_reason(listed)}); mend them, or"
            " allow more with max_bad_share (--max-bad-share): what was built is kept"
        )


def _first_reason(listed: Path) -> str:
    with listed.open(encoding="utf-8") as file:
        return str(json.loads(file.readline())["reason"])


def _write_bad(out: Path, bad: Sequence[str]) -> None:
    write_whole(out / BAD_ROWS, "".join(f"{line}\n" for line in bad).encode(), out / WORK)


def _finish(job: Job, plan: dict[str, Any], parts: list[Part], most: float) -> dict[str, Any]:
    """Write what stands beside the shards; build.json last, for it says that all is there."""
    out, total = job.out, len(job.rows)
    bad = [line for part in parts for line in part.bad]
    _write_bad(out, bad)
    _check_share(len(bad), total, most, out / BAD_ROWS)
    sizes, characters, rows = (
        np.concatenate(found) for found in list(zip(*parts, strict=True))[:3]
    )
    if not len(rows):
        raise ValueError(f"none of {total} rows is good: {out / BAD_ROWS} says why")
    index = packed_arrays(sizes=sizes, characters=characters, rows=rows)
    write_whole(out / INDEX, index, out / WORK)
    files = {name: found for part in parts for name, found in part.files.items()}
    _write_metadata(job, parts, files)
    files[INDEX] = checksum(out / INDEX)
    # The list of bad rows names paths: the same data set elsewhere has another.
    fingerprint = sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    files |= {name: checksum(out / name) for name in (BAD_ROWS, *_METADATA)}
    facts = {
        "plan": plan,
        "rows": total,
        "kept": len(rows),
        "bad": len(bad),
        "kinds": dict(sorted(Counter(json.loads(line)["kind"] for line in bad).items())),
        "images": int(sizes[:, 0].sum()),
        "fingerprint": fingerprint,
        "files": {name: {"bytes": n, "sha256": digest} for name, (n, digest) in files.items()},
    }
    write_whole(out / FACTS, json.dumps(facts, indent=1).encode(), out / WORK)
    shutil.rmtree(out / WORK)
    return facts


def _write_metadata(job: Job, parts: list[Part], files: dict[str, tuple[int, str]]) -> None:
    """dataset_info.json and features.json, by which TFDS knows the folder."""
    infos = []
    for split in SPLITS:
        template = tfds.core.ShardedFileTemplate(
            data_dir=job.out, dataset_name=job.name, split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part.rows) for part in parts],
                num_bytes=sum(files[job.file(split, n)][0] for n in range(job.shards)),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=job.out,
        features=features(),
        split_infos=infos,
        version="1.0.0",
        check_data=False,
        description="Conversations about images.",
        disable_shuffling=True,
    )


def _report(out: Path, facts: dict[str, Any]) -> Report:
    return Report(
        out=str(out),
        rows=facts["rows"],
        kept=facts["kept"],
        bad=facts["bad"],
        kinds=facts["kinds"],
        images=facts["images"],
        shards=facts["plan"]["shards"],
        bytes=sum(file["bytes"] for file in facts["files"].values()),
        bad_rows=str(out / BAD_ROWS),
    )
