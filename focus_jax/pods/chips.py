"""Accelerators by their published peaks."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip, as its maker describes it.

    `flops`: dense bf16 operations a second. `memory`: bytes. `bandwidth`: of that memory, bytes a
    second. `links` to other chips with `link` bytes a second each, one way. `torus`: dimensions of
    the network, 0 where a switch joins all chips of a node. `shapes`: slices of it that exist;
    those of three dimensions may also be any boxes of 4 x 4 x 4 cubes, up to `most` chips.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    links: int
    link: float
    torus: int
    shapes: tuple[tuple[int, ...], ...]
    most: int

    @property
    def network(self) -> float:
        """Bytes a second that a chip can send over all of its links."""
        return self.links * self.link


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
BOXES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
NODE = ((1,), (2,), (4,), (8,))

# TPUs: the "System architecture" pages of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Those pages
# give the network of a chip as the sum over its links, now both ways in GB/s (v5e 400, v6e 800,
# v5p 1,200), earlier one way in Gbit/s (v4 2,400, v5e 1,600, v5p 4,800): the same figures.
# GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM, bf16 without sparsity; NVLink's 900 GB/s
# count both ways.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1228e9, 6, 50e9, 3, BOXES, 4096),
        Chip("v5e", 197e12, 16 * GIB, 819e9, 4, 50e9, 2, FLAT, 256),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 6, 100e9, 3, BOXES, 6144),
        Chip("v6e", 918e12, 32 * GIB, 1640e9, 4, 100e9, 2, FLAT, 256),
        Chip("h100", 989.4e12, 80 * GIB, 3350e9, 18, 25e9, 0, NODE, 8),
        Chip("h200", 989.4e12, 141 * 10**9, 4800e9, 18, 25e9, 0, NODE, 8),
    )
}

# jax's names of devices (`device_kind`). The H100's PCIe card has another name and a lower peak.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def peak_of(device_kind: str) -> float | None:
    """Dense bf16 operations a second of a device by jax's name of it; None where not known."""
    name = KINDS.get(device_kind)
    return None if name is None else CHIPS[name].flops
