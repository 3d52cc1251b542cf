"""The mesh and what lies where: batches over `data`, parameters on every device."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: int = 0) -> Mesh:
    """A mesh of one axis, `data`, over `devices` devices (0: all).

    Raises ValueError when more are asked for than there are.
    """
    found = jax.devices()
    if not 0 <= devices <= len(found):
        raise ValueError(
            f"{devices} devices asked for, {len(found)} found ({found[0].platform}): give a number "
            "up to that, or 0 for all"
        )
    chosen = found[: devices or len(found)]
    return jax.make_mesh((len(chosen),), ("data",), (AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A process's part of a batch as global arrays.

    Raises ValueError when the batch does not divide over the devices.
    """
    local = mesh.local_mesh.devices.size
    rows = len(next(iter(batch.values())))
    if rows % local:
        raise ValueError(
            f"a batch of {rows} rows does not divide over {local} devices: choose a multiple, or "
            "fewer devices (train.devices)"
        )
    sharding = over_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Every array of a tree on all devices."""
    return jax.device_put(tree, replicated(mesh))
