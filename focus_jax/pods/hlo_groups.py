"""Which mesh axes a collective runs along, from the devices that its text groups.

Devices are numbered by their position in the mesh, row by row: the partitions of the program.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np

from focus_jax.pods.hlo_text import Instruction

UNKNOWN = ("?",)
IOTA = re.compile(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?$")
Groups = tuple[tuple[int, ...], ...]


def along(op: Instruction, mesh: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Devices in a group of a collective, and the mesh axes that the groups run along.

    The axes are () for groups of one device, and ("?",) where no set of axes makes these groups.
    A permutation counts the devices of the axes along which its pairs lie.
    """
    sizes = tuple(mesh.items())
    pairs = op.find(r"\bsource_target_pairs=(\{[{},\d]*\})")
    if pairs:
        return permuted(pairs, sizes)
    text = op.find(r"\breplica_groups=(mesh\[.*?\{[^{}]*\}|\{[{},\d]*\}|\[[\d,]*\]<=\[[^ ]*)")
    return grouped(text.rstrip(","), sizes)


@lru_cache(maxsize=4096)
def grouped(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[int, tuple[str, ...]]:
    """Group size and mesh axes of a text such as `{{0,1},{2,3}}`, an iota or a mesh."""
    count = int(np.prod([size for _, size in sizes]))
    groups = read_groups(text, count)
    found = frozenset(map(frozenset, groups))
    wide = [name for name, size in sizes if size > 1]
    for number in range(len(wide) + 1):
        for axes in combinations(wide, number):
            if found == frozenset(map(frozenset, of_axes(sizes, axes))):
                return len(groups[0]), axes
    return max(map(len, groups)), UNKNOWN


@lru_cache(maxsize=4096)
def permuted(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[int, tuple[str, ...]]:
    """Devices and axes that pairs `{{0,1},{1,0}}` of a permutation lie along."""
    pairs = np.array(re.findall(r"(\d+),(\d+)", text), int).reshape(-1, 2)
    shape = [size for _, size in sizes]
    if pairs.size and pairs.max() >= np.prod(shape):
        return len(np.unique(pairs)), UNKNOWN
    ends = np.stack([np.unravel_index(pairs[:, end], shape) for end in (0, 1)])
    moved = (ends[0] != ends[1]).any(1)
    axes = tuple(name for (name, _), moves in zip(sizes, moved, strict=True) if moves)
    return int(np.prod([size for name, size in sizes if name in axes])), axes


def of_axes(sizes: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> Groups:
    """The groups of a mesh in which only these axes vary."""
    names = [name for name, _ in sizes]
    shape = [size for _, size in sizes]
    return gathered(np.arange(np.prod(shape)), shape, names, axes)


def gathered(ids: np.ndarray, shape: list[int], names: Sequence, axes: Sequence) -> Groups:
    """Rows of devices: the named dimensions of the array of devices moved last and flattened."""
    last = [names.index(axis) for axis in axes]
    first = [at for at in range(len(names)) if at not in last]
    width = int(np.prod([shape[at] for at in last]))
    rows = ids.reshape(shape).transpose(first + last).reshape(-1, width)
    return tuple(map(tuple, rows.tolist()))


def read_groups(text: str, count: int) -> Groups:
    """The groups of any of the three text forms; none written means all devices in one.

    Raises: ValueError where the text is in no known form.
    """
    if text in ("", "{}"):
        return (tuple(range(count)),)
    if text.startswith("{"):
        groups = re.findall(r"\{([\d,]+)\}", text)
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    if text.startswith("mesh["):
        return mesh_groups(text)
    found = IOTA.match(text)
    if not found or not found[1]:
        raise ValueError(f"the devices of a collective are in an unknown form: {text[:120]!r}")
    ids = iota(found[2], found[3])
    return tuple(map(tuple, ids.reshape(numbers(found[1])).tolist()))


def mesh_groups(text: str) -> Groups:
    """Groups of `mesh['a'=4,'b'=2], device_ids=(..) {'a','b':(1)2}`, parts of axes included."""
    found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?[^)]*)\))? \{([^{}]*)\}$", text)
    if not found:
        raise ValueError(f"the devices of a collective are in an unknown form: {text[:120]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", found[1])}
    parts = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"('[^']*'|[^',:]+)(?::\((\d+)\)(\d+))?", found[3])
    ]
    names, shape = [], []
    for axis, size in sizes.items():
        bounds = {bound for name, low, n in parts if name == axis for bound in (low, low * n)}
        for low, high in pairwise(sorted({1, size} | bounds)):
            names.append((axis, low))
            shape.append(high // low)
    ids = device_ids(found[2]) if found[2] else np.arange(np.prod(shape))
    axes = [each for name, low, n in parts for each in names if inside(each, name, low, low * n)]
    return gathered(ids, shape, names, axes)


def inside(piece: tuple[str, int], name: str, low: int, high: int) -> bool:
    return piece[0] == name and low <= piece[1] < high


def device_ids(text: str) -> np.ndarray:
    """A list of devices, or an iota such as `[2,4]T(1,0)`, flat."""
    found = IOTA.match(text)
    return iota(found[2], found[3]) if found else np.array(numbers(text))


def iota(dims: str, order: str | None) -> np.ndarray:
    """Counting numbers in these dimensions, transposed, flat."""
    ids = np.arange(np.prod(numbers(dims))).reshape(numbers(dims))
    return ids.transpose(numbers(order)).ravel() if order else ids.ravel()


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
