"""Least times of a program on a chip: compute, memory and network, each alone."""

from collections.abc import Iterable
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from focus_jax.pods.chips import Chip
from focus_jax.pods.hlo import Collective
from focus_jax.pods.network import link_load
from focus_jax.pods.topology import Span, Topology, spans


class Traffic(NamedTuple):
    """Collectives of one kind along the same mesh axes, summed over their runs.

    `payload`: bytes of a device. `wire`: bytes that it sends. `all_links`, `own_links`: seconds,
    with all links of the chip, and with those that the axes occupy.
    """

    kind: str
    axes: tuple[str, ...]
    payload: int
    wire: float
    runs: int
    all_links: float
    own_links: float


class Times(NamedTuple):
    """Seconds of one run of a program, if nothing else cost time."""

    compute: float
    memory: float
    network_all_links: float
    network_own_links: float

    @property
    def least(self) -> float:
        """The longest: the others overlap with it perfectly. Network on its own links."""
        return max(self.compute, self.memory, self.network_own_links)

    @property
    def bound(self) -> str:
        """Which that is."""
        named = {
            "compute": self.compute,
            "memory": self.memory,
            "network": self.network_own_links,
        }
        return max(named, key=named.__getitem__)


def summed(
    collectives: Iterable[Collective], mesh: Mesh | AbstractMesh, topology: Topology
) -> tuple[Traffic, ...]:
    """Collectives by kind and axes, most bytes first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for one in collectives:
        groups.setdefault((one.kind, one.axes), []).append(one)
    out = [traffic(*key, group, mesh, topology) for key, group in groups.items()]
    return tuple(sorted(out, key=lambda group: -group.wire))


def traffic(
    kind: str,
    axes: tuple[str, ...],
    group: list[Collective],
    mesh: Mesh | AbstractMesh,
    topology: Topology,
) -> Traffic:
    """One sum. Groups that follow no mesh axes are taken to span all of them."""
    chip = topology.chip
    known = axes if set(axes) <= set(mesh.axis_names) else tuple(mesh.axis_names)
    along: tuple[Span, ...] = spans(mesh, known, topology)
    wire = sum(one.wire for one in group)
    return Traffic(
        kind,
        axes,
        sum(one.total for one in group),
        wire,
        sum(one.times for one in group),
        wire / chip.network,
        sum(link_load(one, along) for one in group) / chip.link,
    )


def times(flops: float, hbm_bytes: float, traffics: Iterable[Traffic], chip: Chip) -> Times:
    """Seconds from a device's operations and bytes."""
    listed = tuple(traffics)
    return Times(
        flops / chip.flops,
        hbm_bytes / chip.bandwidth,
        sum(one.all_links for one in listed),
        sum(one.own_links for one in listed),
    )
