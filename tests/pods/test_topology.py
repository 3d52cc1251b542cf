"""Names of slices, and the links that the axes of a mesh occupy on them."""

from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from focus_jax.pods.chips import CHIPS, peak_of
from focus_jax.pods.topology import Span, devices_of, mesh_on, parse_topology, spans


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_published_peaks_by_jaxs_names(kind, teraflops):
    assert peak_of(kind) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_peak_of_a_slices_devices_is_its_chips(name):
    pytest.importorskip("libtpu")
    topology = parse_topology(name)
    assert {peak_of(d.device_kind) for d in devices_of(topology)} == {topology.chip.flops}


@pytest.mark.parametrize(
    ("name", "size", "closed"),
    [
        ("v5e:16x16", 256, (True, True)),
        ("v5e:8x16", 128, (False, True)),
        ("v5e:8x8", 64, (False, False)),
        ("v6e:2x2", 4, (False, False)),
        ("v5p:4x4x8", 128, (True, True, True)),
        ("v4:2x2x4", 16, (False, False, False)),
        ("h100:8", 8, (False,)),
    ],
)
def test_slices_that_exist(name, size, closed):
    topology = parse_topology(name)
    assert (topology.name, topology.size, topology.closed) == (name, size, closed)
    assert topology.compiles == (not name.startswith("h"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "'v9' is no known chip: write one of v4, v5e"),
        ("v5e", "does not exist: choose v5e:1x1, v5e:2x2"),
        ("v5e:3x5", "does not exist"),
        ("v5e:64x64", "does not exist"),
        ("v5p:4x4", "boxes of multiples of 4 up to 6144 chips"),
        ("v5p:64x64x64", "does not exist"),
        ("v5p:4x4x0", "does not exist"),
        ("h100:16", "choose h100:1, h100:2, h100:4, h100:8"),
        ("v5e:x", "does not exist"),
    ],
)
def test_slices_that_do_not_exist(name, said):
    with pytest.raises(ValueError, match=said):
        parse_topology(name)


def test_published_figures_hang_together():
    for chip in CHIPS.values():
        assert chip.network == chip.links * chip.link
    # One way, what the makers' pages give: 1,600 and 4,800 Gbit/s, half of NVLink's 900 GB/s.
    assert CHIPS["v5e"].network == 200e9 and CHIPS["v5p"].network == 600e9
    assert CHIPS["h100"].network == 450e9


def mesh_of(places, **sizes):
    """A stand-in for a mesh: devices at `places` [*sizes, dimensions]."""
    at = np.empty(tuple(sizes.values()), object)
    for index in np.ndindex(at.shape):
        at[index] = SimpleNamespace(coords=[*map(int, places[index]), 0])
    return SimpleNamespace(axis_names=tuple(sizes), shape=sizes, devices=at)


def grid(rows, cols):
    return np.stack(np.meshgrid(range(rows), range(cols), indexing="ij"), -1)


def test_an_axis_owns_the_links_of_the_dimensions_that_it_lies_along():
    pod = parse_topology("v5e:16x16")
    # tensor: four neighbours in the first dimension; fsdp: all of the second, every fourth there.
    places = grid(16, 16).reshape(4, 4, 16, 2).transpose(0, 2, 1, 3).reshape(64, 4, 2)
    mesh = mesh_of(places, fsdp=64, tensor=4)
    assert spans(mesh, ("tensor",), pod) == (Span(4, 1.0),)
    # The ring of 16 is its own; four interleaved groups share the other one's two links.
    assert spans(mesh, ("fsdp",), pod) == (Span(4, 0.5), Span(16, 2.0))
    assert spans(mesh, ("fsdp", "tensor"), pod) == (Span(16, 2.0), Span(16, 2.0))


def test_a_square_block_has_a_link_in_both_dimensions():
    pod = parse_topology("v5e:16x16")
    blocks = grid(16, 16).reshape(8, 2, 8, 2, 2).transpose(0, 2, 1, 3, 4).reshape(64, 4, 2)
    mesh = mesh_of(blocks, fsdp=64, tensor=4)
    assert spans(mesh, ("tensor",), pod) == (Span(2, 1.0), Span(2, 1.0))
    assert spans(mesh, ("fsdp",), pod) == (Span(8, 1.0), Span(8, 1.0))


def test_open_ends_and_axes_of_one():
    small = parse_topology("v5e:8x8")
    mesh = mesh_of(grid(8, 8).reshape(1, 64, 2), data=1, fsdp=64)
    assert spans(mesh, ("fsdp",), small) == (Span(8, 1.0), Span(8, 1.0))
    assert spans(mesh, ("data",), small) == ()


def test_chips_behind_a_switch_have_all_of_their_links():
    node = parse_topology("h100:8")
    mesh = mesh_on(node, "fsdp=4,tensor=2")
    assert isinstance(mesh, AbstractMesh)
    assert spans(mesh, ("fsdp",), node) == (Span(4, 18.0, switched=True),)
    with pytest.raises(ValueError, match="has 3 = 3 places, there are 8 devices"):
        mesh_on(node, "fsdp=3")
