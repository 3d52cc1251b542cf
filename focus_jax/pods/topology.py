"""Slices of pods by name, their devices without having them, where a mesh lies on them."""

import os
import re
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from focus_jax.pods.chips import CHIPS, Chip
from focus_jax.sharding import AXES, make_mesh, parse_mesh

# Read by libtpu when it starts. Without them it asks a metadata server that is not there, tells of
# a missing accelerator at length, and refuses a second process on the machine.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """So many chips of a kind, in a box of `shape`."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        """Chips; each is one device (a v4 or v5p chip counts two cores in product names)."""
        return prod(self.shape)

    @property
    def compiles(self) -> bool:
        """Whether programs for it can be compiled without it: TPUs alone."""
        return self.chip.torus > 0

    @property
    def closed(self) -> tuple[bool, ...]:
        """The dimensions whose ends are joined.

        Two-dimensional pods join a side of 16; in three dimensions the optical switches join all
        sides of a box of 4 x 4 x 4 cubes.
        """
        if self.chip.torus == 2:
            return tuple(side == 16 for side in self.shape)
        cubes = self.chip.torus == 3 and all(side % 4 == 0 for side in self.shape)
        return (cubes,) * len(self.shape)


def parse_topology(name: str) -> Topology:
    """`v5e:16x16`, `v5p:4x4x8`, `h100:8`. ValueError naming those that exist."""
    kind, _, sides = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(
            f"topology {name!r}: {kind!r} is no known chip: write one of {', '.join(CHIPS)} and a "
            "shape, as in v5e:16x16, v5p:4x4x8 or h100:8"
        )
    chip = CHIPS[kind]
    found = tuple(map(int, sides.split("x"))) if re.fullmatch(r"\d+(x\d+)*", sides) else ()
    cubes = len(found) == chip.torus == 3 and all(side and side % 4 == 0 for side in found)
    if found in chip.shapes or (cubes and prod(found) <= chip.most):
        return Topology(chip, found)
    known = ", ".join(f"{kind}:{'x'.join(map(str, shape))}" for shape in chip.shapes)
    more = f" and boxes of multiples of 4 up to {chip.most} chips" if chip.torus == 3 else ""
    raise ValueError(f"topology {name!r} does not exist: choose {known}{more}")


def mesh_on(topology: Topology, text: str) -> Mesh | AbstractMesh:
    """The mesh that a run there would make of its chips; one of names alone for GPUs.

    ValueError for a mesh that does not fit, or without the package that knows TPUs.
    """
    if not topology.compiles:
        sizes = parse_mesh(text, topology.size)
        return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    parse_mesh(text, topology.size)
    try:
        return make_mesh(text, chosen=devices_of(topology))
    except NotImplementedError as error:
        raise ValueError(
            f"mesh {text!r} cannot be laid on {topology.name}: choose sizes that are products of "
            "its sides"
        ) from error


def devices_of(topology: Topology) -> list[Any]:
    """Devices that programs can be compiled for, and nothing more."""
    check_libtpu()
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    flat = topology.shape + (1,) * (3 - len(topology.shape))
    closed = topology.closed + (False,) * (3 - len(topology.shape))
    options: dict[str, Any] = {"wrap": closed}
    if topology.size == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as in a run
    words = f"{topology.chip.name}:{'x'.join(map(str, flat))}"
    return list(topologies.get_topology_desc(words, platform="tpu", **options).devices)


def check_libtpu() -> None:
    """ValueError saying how to get the compiler."""
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "TPU programs are compiled by the package libtpu, which is not installed: pip install "
            "-r requirements-tpu.txt, or `make test-tpu` and PYTHONPATH=.venv/tpu; topologies of "
            "GPUs (h100:8) do without"
        ) from error


# ---------------------------------------------------------------------------------- spans


class Span(NamedTuple):
    """A dimension of the network along which a group of chips lies.

    `places` of the group in it; `links`: how many of a chip's links in it the group has for itself.
    A closed ring has both, an open line one (its ends are the bottleneck), and of k groups that
    interleave on the same ring or line each has a k-th. `switched`: every place reaches every
    other with all of them.
    """

    places: int
    links: float
    switched: bool = False


def spans(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], topology: Topology) -> tuple[Span, ...]:
    """The dimensions that the devices along mesh `axes` occupy; () for a group of one."""
    size = prod(mesh.shape[axis] for axis in axes)
    if size == 1:
        return ()
    if isinstance(mesh, AbstractMesh):  # chips behind a switch: all of their links, always
        return (Span(size, float(topology.chip.links), switched=True),)
    group = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    at = np.array([device.coords for device in mesh.devices[group].flat])
    out = []
    for side, closed, places in zip(topology.shape, topology.closed, at.T, strict=False):
        found = np.unique(places)
        if len(found) > 1:
            stride = float(found[-1] - found[0]) / (len(found) - 1)
            ring = closed and len(found) * stride == side
            out.append(Span(len(found), (2 if ring else 1) / stride))
    return tuple(out)
