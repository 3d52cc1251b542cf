"""Batches in order, read ahead by threads, from a position that is restorable."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from focus_jax.data.loader_config import ReadingConfig

Batch = dict[str, np.ndarray]


def read_ahead(
    make: Callable[[int], Batch], total: int, config: ReadingConfig, fingerprint: dict[str, Any]
) -> "LoaderIterator":
    """An iterator over `make(0)` .. `make(total - 1)`; `make` runs in several threads at once."""
    threads = config.threads
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=config.prefetch if threads else 0
    )
    batches = grain.MapDataset.source(range(total)).map(make)
    return LoaderIterator(iter(batches.to_iter_dataset(options)), fingerprint)


class LoaderIterator(Iterator[Batch]):
    """Batches in order, from a position that can be stored.

    `fingerprint`: what decides their order and contents.
    """

    def __init__(self, batches: grain.DatasetIterator, fingerprint: dict[str, Any]):
        self._batches = batches
        self._fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: equal on all processes, exact whatever has been prefetched.

        It serves any number of processes.
        """
        return {"order": dict(self._fingerprint), "grain": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called. Raises ValueError for another order of data."""
        order = state.get("order", {})
        changed = [
            f"{name} was {order.get(name)!r}, is {self._fingerprint.get(name)!r}"
            for name in self._fingerprint | order
            if order.get(name) != self._fingerprint.get(name)
        ]
        if changed:
            raise ValueError(
                f"loader: this state belongs to another order of data ({'; '.join(changed)}):"
                " restore with the same settings, or start a new pass"
            )
        self._batches.set_state(state["grain"])

    def close(self) -> None:
        """Stop the threads that read ahead."""
        self._batches.close()
