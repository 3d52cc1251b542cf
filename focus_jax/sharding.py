"""What lies where: logical axes of arrays, mesh axes of devices, and one value that joins them.

A model names its axes (`batch`, `embed`, `heads`, ...); `ShardingRules` says over which mesh axes
each is split; a `Layout` is the rules on a mesh. Parameters are stored split over `fsdp` and
gathered where they are used; activations are split over the batch, and inside a block over heads
and feed-forward neurons.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axes over which each logical axis is split; () keeps it whole.

    `batch`: samples. `text`, `vision`: rows of the two streams between decoder stages. `embed`: the
    model's width, of parameters alone. `heads`, `kv_heads`, `mlp`, `vocab`: of parameters and of
    activations inside a block. `layers`: the stack of a stage.
    """

    batch: MeshAxes = ("data", "fsdp")
    text: MeshAxes = ()
    vision: MeshAxes = ()
    embed: MeshAxes = ("fsdp",)
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    vocab: MeshAxes = ("tensor",)
    layers: MeshAxes = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            for axis in getattr(self, field.name):
                if axis not in AXES:
                    raise ValueError(
                        f"rules.{field.name} names {axis!r}, and a mesh has the axes "
                        f"{', '.join(AXES)}"
                    )


# Logical axes of every parameter by its canonical name; None: an axis that is never split.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"decoder\.embed\.embedding", ("vocab", "embed")),
    (r"decoder\.head\.kernel", ("embed", "vocab")),
    (r"decoder\.norm\.scale", (None,)),
    (r"(decoder|vision)\.layers\.norm_\d\.(scale|bias)", ("layers", None)),
    (r"decoder\.layers\.[kv]\.kernel", ("layers", "embed", "kv_heads")),
    (r"(decoder|vision)\.layers\.[qkv]\.kernel", ("layers", "embed", "heads")),
    (r"(decoder|vision)\.layers\.out\.kernel", ("layers", "heads", "embed")),
    (r"(decoder|vision)\.layers\.(gate|up)\.kernel", ("layers", "embed", "mlp")),
    (r"(decoder|vision)\.layers\.down\.kernel", ("layers", "mlp", "embed")),
    # A low-rank update: a's rows are the kernel's inputs, b's columns its outputs.
    (r"decoder\.layers\.lora\.(q|k|v|gate|up)\.a", ("layers", "embed", None)),
    (r"decoder\.layers\.lora\.out\.a", ("layers", "heads", None)),
    (r"decoder\.layers\.lora\.down\.a", ("layers", "mlp", None)),
    (r"decoder\.layers\.lora\.q\.b", ("layers", None, "heads")),
    (r"decoder\.layers\.lora\.[kv]\.b", ("layers", None, "kv_heads")),
    (r"decoder\.layers\.lora\.(gate|up)\.b", ("layers", None, "mlp")),
    (r"decoder\.layers\.lora\.(out|down)\.b", ("layers", None, "embed")),
    (r"vision\.layers\.[qkv]\.bias", ("layers", "heads")),
    (r"vision\.layers\.up\.bias", ("layers", "mlp")),
    (r"vision\.layers\.(out|down)\.bias", ("layers", None)),
    # Small, and split further they would send whole activations about.
    (r"projector\.linear_\d\.kernel", ("embed", None)),
    (r"projector\.linear_\d\.bias", (None,)),
    (r"vision\.(?!layers).*", ()),
    (r"image_newline|samplers\..*", ()),
)


def logical_axes(name: str) -> tuple[str | None, ...]:
    """The logical axes of a parameter, by its canonical name; () where none is split."""
    for pattern, axes in PARAMETERS:
        if re.fullmatch(pattern, name):
            return axes
    raise ValueError(f"no logical axes are known for parameter {name!r}: add it to PARAMETERS")


# --------------------------------------------------------------------------------- meshes


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Sizes of all mesh axes from words such as `fsdp=64,tensor=4`.

    One axis may stand without a number and takes the rest: `data` (plain data parallelism), `fsdp`,
    `fsdp,tensor=2`. Axes that are not named have size 1.
    Raises ValueError for unknown axes, sizes that are none, and a product other than `devices`.
    """
    sizes: dict[str, int] = {}
    rest = ""
    for word in text.split(","):
        axis, _, number = word.strip().partition("=")
        if axis not in AXES or axis in sizes or axis == rest:
            raise ValueError(
                f"mesh {text!r}: {axis!r} is no axis, or named twice; write some of "
                f"{', '.join(AXES)}, as in 'fsdp=4,tensor=2' or 'fsdp'"
            )
        if number:
            if not number.isdigit() or int(number) < 1:
                raise ValueError(f"mesh {text!r}: {axis}={number}: give a size of at least 1")
            sizes[axis] = int(number)
        elif rest:
            raise ValueError(f"mesh {text!r}: both {rest} and {axis} lack a size; give one of them")
        else:
            rest = axis
    known = prod(sizes.values())
    if rest:
        sizes[rest] = max(devices // known, 1)
    if prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh {text!r} has {' x '.join(map(str, sizes.values()))} = {prod(sizes.values())} "
            f"places, there are {devices} devices: choose sizes whose product is {devices}"
        )
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(text: str = "data", devices: int = 0, chosen: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all `AXES` over the first `devices` devices (0: all), or over `chosen` ones.

    Raises ValueError when more are asked for than there are, or for what `parse_mesh` refuses.
    """
    found = list(jax.devices() if chosen is None else chosen)
    if not 0 <= devices <= len(found):
        raise ValueError(
            f"{devices} devices asked for, {len(found)} found ({found[0].platform}): give a number "
            "up to that, or 0 for all"
        )
    found = found[: devices or len(found)]
    sizes = parse_mesh(text, len(found))
    shape, kinds = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    blocks = in_blocks(found, sizes["tensor"])
    if blocks is not None:
        return Mesh(blocks.reshape(shape), AXES, axis_types=kinds)
    try:
        return jax.make_mesh(shape, AXES, kinds, devices=found)
    except NotImplementedError:  # where a side of a torus would have to be split
        placed = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=kinds)


def in_blocks(devices: Sequence[Any], tensor: int) -> np.ndarray | None:
    """Chips of a flat torus (v5e, v6e) in an order in which neighbours of `tensor` form a block.

    In a line of four chips all that is added up passes the middle link; in a block of 2 x 2 every
    chip sends over two links, which takes half the time. None where that does not apply.
    """
    corner = getattr(devices[0], "coords", None)
    if corner is None or tensor < 4:
        return None
    at = {tuple(device.coords): device for device in devices}
    sides = [max(c[i] for c in at) - min(c[i] for c in at) + 1 for i in range(3)]
    tall = max(n for n in range(1, tensor + 1) if tensor % n == 0 and n * n <= tensor)
    block = (tall, tensor // tall)
    flat = sides[2] == 1 and sides[0] * sides[1] == len(at) == len(devices)
    if not flat or sides[0] % block[0] or sides[1] % block[1]:
        return None
    first = [min(c[i] for c in at) for i in range(3)]
    grid = np.empty(sides[:2], object)
    for place, device in at.items():
        grid[place[0] - first[0], place[1] - first[1]] = device
    rows, cols = sides[0] // block[0], sides[1] // block[1]
    return grid.reshape(rows, block[0], cols, block[1]).swapaxes(1, 2)


# --------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Layout:
    """Rules on a mesh: where parameters, batches and activations lie. Hashable."""

    mesh: Mesh | AbstractMesh
    rules: ShardingRules = ShardingRules()

    def ways(self, axis: str) -> int:
        """Over how many places a logical axis is split."""
        return prod(self.mesh.shape[name] for name in getattr(self.rules, axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array with these logical axes; mesh axes of size 1 are left out."""
        return PartitionSpec(*(self.mesh_axes(axis) for axis in axes))

    def mesh_axes(self, axis: str | None) -> MeshAxes | None:
        """The mesh axes of a logical one; None where it stays whole."""
        names = () if axis is None else getattr(self.rules, axis)
        return tuple(name for name in names if self.mesh.shape[name] > 1) or None

    def joined(self, *axes: str) -> PartitionSpec:
        """The partition of an axis that several logical ones share, the first one slowest."""
        return PartitionSpec(tuple(name for a in axes for name in self.mesh_axes(a) or ()) or None)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """`spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def pin(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Fix where a traced array lies; trailing axes that are not named stay whole."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def local(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """`function` on each device's own part, without communication.

        `inputs`, `outputs`: trees of partition specs (`spec`), as `jax.shard_map` takes them.
        """
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    # ------------------------------------------------------------------ parameters

    def stored(self, name: str, shape: Sequence[int]) -> NamedSharding:
        """Where a parameter (canonical name) is kept, and the optimiser's moments of it."""
        return self._parameter(name, shape, ())

    def used(self, name: str, shape: Sequence[int]) -> NamedSharding:
        """Where it lies while it is used: gathered over the axes of `embed`."""
        return self._parameter(name, shape, self.rules.embed)

    def _parameter(self, name: str, shape: Sequence[int], without: MeshAxes) -> NamedSharding:
        """A dimension that does not divide stays whole, such as a small vocabulary."""
        axes = logical_axes(name)
        axes = axes[len(axes) - len(shape) :] if len(axes) > len(shape) else axes
        parts: list[MeshAxes | None] = []
        for axis, size in zip(axes, shape, strict=False):
            names = tuple(n for n in self.mesh_axes(axis) or () if n not in without)
            ways = prod(self.mesh.shape[n] for n in names)
            parts.append(names if names and size % ways == 0 else None)
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    # ------------------------------------------------------------------ batches

    def rows(self, batch: int) -> tuple[int, ...]:
        """The rows of a batch that this process's devices hold, in rising order.

        Raises ValueError when the batch does not divide, or the process has no device here.
        """
        self.check_batch(batch)
        held = self.sharding("batch").addressable_devices_indices_map((batch,)).values()
        rows = {row for part in held if part is not None for row in range(batch)[part[0]]}
        if not rows:
            raise ValueError(
                f"this process has no device in the mesh ({describe(self.mesh)}): use all devices "
                "(train.devices=0)"
            )
        return tuple(sorted(rows))

    def check_batch(self, batch: int) -> None:
        """ValueError unless a batch divides over the places that hold samples."""
        if batch % self.ways("batch"):
            raise ValueError(
                f"a batch of {batch} rows does not divide over {self.ways('batch')} devices "
                f"({describe(self.mesh)}): choose a multiple, fewer devices (train.devices) or "
                "another mesh (train.mesh)"
            )


def pinned(layout: Layout | None, x: jax.Array, *axes: str | None) -> jax.Array:
    """`Layout.pin` where there is a layout."""
    return x if layout is None else layout.pin(x, *axes)


def name_of(path: tuple) -> str:
    """`decoder.stages.0.q.kernel` from a pytree path."""
    parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return ".".join(part for part in parts if part != "value")


def in_use(layout: Layout | None, module: Any, prefix: str) -> Any:
    """A module whose parameters are gathered where they are used; gradients go back split.

    `prefix`: the module's place in the canonical tree, such as `decoder.layers.`. Done inside a
    scan over layers, so that one layer at a time is whole.
    """
    if layout is None:
        return module

    def place(path: tuple, leaf: jax.Array) -> jax.Array:
        name = prefix + name_of(path)
        return gather(leaf, layout.used(name, leaf.shape), layout.stored(name, leaf.shape))

    return jax.tree_util.tree_map_with_path(place, module)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    """Where a parameter lies in use. Its gradient is pinned to where it is kept: the plain
    transpose would pin it whole, and so add it up everywhere before it is split."""
    return jax.lax.with_sharding_constraint(x, used)


def _gather_forward(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> tuple:
    return gather(x, used, stored), None


def _gather_backward(used: NamedSharding, stored: NamedSharding, _: None, grad: jax.Array) -> tuple:
    return (jax.lax.with_sharding_constraint(grad, stored),)


gather.defvjp(_gather_forward, _gather_backward)


def make_layout(text: str = "data", devices: int = 0, rules: ShardingRules | None = None) -> Layout:
    """A layout over the devices that there are (see `make_mesh`)."""
    return Layout(make_mesh(text, devices), rules or ShardingRules())


def describe(mesh: Mesh | AbstractMesh) -> str:
    """`data=1, fsdp=64, tensor=4`."""
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(
    batch: Mapping[str, np.ndarray], layout: Layout, axis: int = 0
) -> dict[str, jax.Array]:
    """A process's rows of a batch (`Layout.rows`) as global arrays; samples lie along `axis`.

    Raises ValueError when the batch does not divide over the devices.
    """
    ways = layout.ways("batch")
    held = layout.sharding("batch").addressable_devices_indices_map((ways,)).values()
    places = {part[0].indices(ways) for part in held if part is not None}
    own = sum(end - first for first, end, _ in places)
    sharding = layout.sharding(*(None,) * axis, "batch")

    def put(array: np.ndarray) -> jax.Array:
        shape = list(array.shape)
        shape[axis] = shape[axis] * ways // own
        layout.check_batch(shape[axis])
        return jax.make_array_from_process_local_data(sharding, array, tuple(shape))

    return {name: put(array) for name, array in batch.items()}


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Every array of a tree on all devices."""
    return jax.device_put(tree, replicated(mesh))
