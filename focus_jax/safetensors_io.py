"""safetensors files: read in blocks of rows straight into their place, written as a stream.

The safetensors library maps whole files, and mapped pages count as memory of the process: a load
would peak at twice the model. So headers are parsed here, and blocks are read at their offsets.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BLOCK_BYTES = 2 * 2**20
LONGEST_HEADER = 100 * 2**20  # the format's own limit
ALIGNMENT = 64  # XLA's on a CPU: an aligned buffer becomes an array without a copy

Transform = Literal["same", "linear", "conv"]


class Entry(NamedTuple):
    """Where one tensor's bytes lie."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * FLOATS[self.dtype].itemsize


# ------------------------------------------------------------------------------ headers


def directory_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of a Hugging Face directory, one file or shards with an index.

    FileNotFoundError: no weights, or an index that names a file which is not there. ValueError:
    weights in another format, a damaged file, or an index that does not match its files.
    """
    if (directory / SINGLE).exists():
        return file_entries(directory / SINGLE)
    index = directory / INDEX
    if not index.exists():
        raise no_weights(directory)
    where = weight_map(index)
    files = sorted(set(where.values()))
    lost = [f for f in files if not (directory / f).exists()]
    if lost:
        raise FileNotFoundError(
            f"{index} names {len(files)} files, of which {listed(lost)} not there: download again"
        )
    found = {f: file_entries(directory / f) for f in files}
    absent = [f"{name} in {file}" for name, file in where.items() if name not in found[file]]
    if absent:
        raise ValueError(
            f"{index} does not match its files, which lack {listed(absent)}: download again"
        )
    return {name: found[file][name] for name, file in where.items()}


def weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name, from an index."""
    try:
        where = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}): download again") from error
    outside = [f for f in where.values() if Path(f).name != f]
    if outside:
        raise ValueError(f"{index} names {listed(outside)} outside its directory")
    return where


def no_weights(directory: Path) -> Exception:
    """What to say of a directory without safetensors."""
    pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pth", ".pt"))
    pickled = [name for name in pickled if not name.startswith(("training_args", "optimizer"))]
    if not pickled:
        return FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}")
    suffix = Path(pickled[0]).suffix
    return ValueError(
        f"{directory} holds pickled weights ({listed(pickled)}), which can run code when opened "
        f"and are not read: convert them there, once, with\n{converter(suffix)}"
    )


def converter(suffix: str) -> str:
    """A command that turns the pickled weights of the current directory into safetensors."""
    return (
        'python -c "import glob, torch, safetensors.torch as s; w = {}; '
        f"[w.update(torch.load(f, map_location='cpu', weights_only=True)) "
        f"for f in sorted(glob.glob('*{suffix}')) if not f.startswith('training')]; "
        "s.save_file({k: v.contiguous().clone() for k, v in w.items()}, "
        f"'{SINGLE}', {{'format': 'pt'}})\""
    )


def file_entries(path: Path) -> dict[str, Entry]:
    """Every tensor of one file, checked against the file's size. ValueError: damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(
                f"{path} has {size} bytes and a header said to take {length}: it is cut short or "
                "no safetensors file; download it again"
            )
        try:
            header = dict(json.loads(file.read(length)).items())
            header.pop("__metadata__", None)
            return {
                name: entry(path, size, 8 + length, name, text) for name, text in header.items()
            }
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged header ({error}): download it again") from error


def entry(path: Path, size: int, data: int, name: str, text: Mapping) -> Entry:
    """One tensor of a header; `data` is where the tensors begin."""
    try:
        dtype, shape = str(text["dtype"]), tuple(int(n) for n in text["shape"])
        begin, end = (int(n) for n in text["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has a damaged header at tensor {name} ({error!r}): download it again"
        ) from error
    bytes_ = math.prod(shape) * FLOATS[dtype].itemsize if dtype in FLOATS else end - begin
    if not 0 <= begin <= end or end - begin != bytes_:
        raise ValueError(
            f"{path} gives tensor {name} {dtype}{list(shape)} the bytes {begin}..{end}, which do "
            "not fit: the file is damaged; download it again"
        )
    if data + end > size:
        raise ValueError(
            f"{path} is cut short: tensor {name} ends at byte {data + end}, the file has {size}; "
            "download it again"
        )
    return Entry(path, name, dtype, shape, data + begin)


def listed(items: Iterable[str], most: int = 8) -> str:
    """`a, b, ... (12 in all)`."""
    items = list(items)
    more = f", ... ({len(items)} in all)" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# ------------------------------------------------------------------------------ reading


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that jax takes on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def blocks(entry: Entry) -> Iterator[tuple[int, int]]:
    """(first, last) rows of a tensor, BLOCK_BYTES at a time."""
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, BLOCK_BYTES // max(entry.row_bytes, 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def read_rows(entry: Entry, first: int, last: int) -> np.ndarray:
    """Rows of a tensor as stored. ValueError where the file ends before them."""
    out = np.empty((last - first, *entry.shape[1:]), FLOATS[entry.dtype])
    view = out.reshape(-1).view(np.uint8).data
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start + first * entry.row_bytes)
        while view:
            got = file.readinto(view)
            if not got:
                raise ValueError(f"{entry.file} ends within tensor {entry.name}: download it again")
            view = view[got:]
    return out


def copy_rows(into: np.ndarray, entry: Entry, transform: Transform, first: int, last: int) -> None:
    """Rows of a tensor to their place in a parameter, turned and converted on the way."""
    block = read_rows(entry, first, last)
    if transform == "same":
        store(into[first:last], block)
    elif transform == "linear":
        store(into[:, first:last], transposed(block))
    else:
        store(into[..., first:last], block.transpose(2, 3, 1, 0))


def transposed(block: np.ndarray) -> np.ndarray:
    """`block.T` as a contiguous array.

    jax's host-to-device copy transposes with vector instructions, about five times NumPy's speed.
    """
    cpu = cpu_device()
    if cpu is None or block.dtype == np.float64:
        return block.T
    return np.asarray(jax.device_put(block.T, cpu))


def cpu_device() -> jax.Device | None:
    """jax's CPU, which a process may have switched off (JAX_PLATFORMS=cuda)."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def store(into: np.ndarray, block: np.ndarray) -> None:
    """`into[...] = block`, in float32 or bfloat16.

    bfloat16 goes as integers: NumPy copies its own dtypes faster, and without the interpreter.
    """
    brain = np.dtype(ml_dtypes.bfloat16)
    if into.dtype != brain and block.dtype == brain:
        np.left_shift(block.view(np.uint16), 16, out=into.view(np.uint32), dtype=np.uint32)
    elif into.dtype == brain:
        if block.dtype != brain:
            block = block.astype(np.float32).astype(brain)
        into.view(np.uint16)[...] = block.view(np.uint16)
    else:
        into[...] = block


# ------------------------------------------------------------------------------ writing


class Tensor(NamedTuple):
    """A tensor to be written; `make` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(directory: Path, tensors: list[Tensor], max_shard_bytes: float) -> None:
    """Write `model.safetensors`, or shards with their index where that would be too large."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return write_file(directory / SINGLE, tensors)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    index = {
        "metadata": {"total_size": sum(t.size for t in tensors)},
        "weight_map": {t.name: n for n, s in zip(names, shards, strict=True) for t in s},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: list[Tensor]) -> None:
    """Write one file, a tensor in memory at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make())
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
