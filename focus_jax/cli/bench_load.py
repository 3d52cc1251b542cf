"""How fast a checkpoint loads, and in how much memory: `python -m focus_jax.cli.bench_load`.

Writes a random checkpoint in LLaVA-1.5's layout, loads it in a fresh process, and prints one line
of JSON. Rates are bytes of the files a second, beside those of merely reading the files.
"""

import argparse
import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from focus_jax import hf, hf_names
from focus_jax import safetensors_io as io
from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
from focus_jax.hf_write import DTYPES, config_json, shapes

STATUS = Path("/proc/self/status")


def main(argv: Sequence[str] | None = None) -> int:
    """Make a checkpoint, load it in a process of its own, print what that measured."""
    flags = parser().parse_args(argv)
    if flags.measure:
        print(json.dumps(measure(Path(flags.measure), flags)))
        return 0
    given = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(dir=flags.directory) as folder:
        make_checkpoint(Path(folder), flags.gigabytes, flags.stored)
        command = [sys.executable, "-m", "focus_jax.cli.bench_load", *given, "--measure", folder]
        return subprocess.run(command, check=False).returncode


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser("bench_load", description=__doc__.splitlines()[0])
    out.add_argument("--gigabytes", type=float, default=2.0, help="size of the files")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="loaded")
    out.add_argument("--stored", choices=tuple(DTYPES), default="float16", help="in the files")
    out.add_argument("--workers", type=int, default=4)
    out.add_argument("--cold", action="store_true", help="put the files out of the page cache")
    out.add_argument("--directory", default=None, help="where the temporary files are made")
    out.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    return out


def make_checkpoint(folder: Path, gigabytes: float, stored: str) -> None:
    """A random checkpoint of about that size: full width where two layers of it fit."""
    item = DTYPES[stored].itemsize
    fitting = (w for w in (4096, 2048, 1024, 512, 256) if size(w, 2) * item <= gigabytes * 1e9)
    width = next(fitting, 128)
    layers = 1
    while size(width, layers + 1) * item <= gigabytes * 1e9:
        layers += 1
    cfg = config(width, layers)
    pool = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32)
    pool = pool.astype(DTYPES[stored])
    tensors = []
    for name, leaf in shapes(cfg).items():
        layered, turn = hf_names.has_layers(name), hf_names.transform_of(name)
        shape = hf_names.shape_there(leaf.shape[1:] if layered else leaf.shape, turn)
        for i in range(leaf.shape[0]) if layered else [None]:
            there = hf_names.name_there(name, i)
            make = lambda shape=shape: np.resize(pool, shape)  # noqa: E731
            tensors.append(io.Tensor(there, shape, DTYPES[stored], make))
    io.write_directory(folder, tensors, max_shard_bytes=1e9)
    text = config_json(cfg, stored, 0, {})
    (folder / "config.json").write_text(json.dumps(text))


def config(width: int, layers: int) -> ModelConfig:
    """LLaVA-1.5 with fewer layers, and narrower where asked."""
    heads = max(1, width // 128)
    decoder = DecoderConfig(
        vocab_size=width * 32064 // 4096, width=width, layers=layers, heads=heads, kv_heads=heads,
        head_dim=width // heads, mlp_width=width * 11008 // 4096,
    )  # fmt: skip
    vision = replace(VisionConfig(), layers=2, width=width // 4, mlp_width=width, heads=heads)
    return ModelConfig(vision=vision, decoder=decoder)


def size(width: int, layers: int) -> int:
    """Parameters of `config(width, layers)`."""
    return sum(math.prod(leaf.shape) for leaf in shapes(config(width, layers)).values())


def measure(folder: Path, flags: argparse.Namespace) -> dict[str, float | int | str]:
    """Read the files plainly, then load them; this process has done nothing else."""
    jax.devices()
    files = sorted(folder.glob("*.safetensors"))
    stored = sum(f.stat().st_size for f in files)
    item = DTYPES[flags.dtype].itemsize
    entries = io.directory_entries(folder).values()
    needed = item * sum(math.prod(e.shape) for e in entries)
    fresh = seconds_to_touch(needed)
    if flags.cold:
        forget(files)
    plain = seconds_to_read(files)
    if flags.cold:
        forget(files)
    gc.collect()
    before = reset_peak()
    start = time.perf_counter()
    _, tree = hf.read(folder, param_dtype=flags.dtype, workers=flags.workers)
    jax.block_until_ready(tree)
    seconds = time.perf_counter() - start
    above = peak() - before
    loaded = sum(leaf.nbytes for leaf in tree.values())
    largest = item * max(math.prod(e.shape) for e in entries)
    return {
        "platform": jax.devices()[0].platform,
        "stored": flags.stored,
        "dtype": flags.dtype,
        "file_bytes": stored,
        "parameter_bytes": loaded,
        "largest_tensor_bytes": largest,
        "peak_rss_above_bytes": above,
        "beyond_parameters_in_largest_tensors": round((above - loaded) / largest, 3),
        "seconds": round(seconds, 3),
        "mb_per_s": round(stored / seconds / 1e6),
        "plain_read_mb_per_s": round(stored / plain / 1e6),
        "fresh_memory_mb_per_s": round(needed / fresh / 1e6),
        "page_cache": "cold" if flags.cold else "warm",
    }


def seconds_to_touch(size: int) -> float:
    """Ask for memory, use it, give it back.

    A virtual machine may back memory that was never used far more slowly than any disk reads; that
    is no property of the loader, so it is paid here, and reported apart.
    """
    start = time.perf_counter()
    np.empty(size, np.uint8)[::4096] = 0
    return time.perf_counter() - start


def seconds_to_read(files: list[Path]) -> float:
    """As `dd bs=2M of=/dev/null` reads."""
    room = bytearray(io.BLOCK_BYTES)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return time.perf_counter() - start


def forget(files: list[Path]) -> None:
    """Put files out of the page cache (written pages only, so they are synced first)."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reset_peak() -> int:
    """Bytes resident now; the high-water mark, which imports may have raised, begins anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {key}: this measurement needs Linux")
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
