"""Every method at every size, beside full tokens; what was measured before is not repeated."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from focus_jax.benchmark.job import BIG, Job, Measured, model_config
from focus_jax.benchmark.methods import build
from focus_jax.benchmark.ours import our_inputs
from focus_jax.benchmark.parts import (
    Weights,
    counted,
    load,
    planned,
    prefill_flops,
    requested,
    with_layers,
)
from focus_jax.benchmark.record import Line, Record, machine
from focus_jax.benchmark.report import tiles_words
from focus_jax.benchmark.scene import Prepared, Scene
from focus_jax.compress.method import Method
from focus_jax.models.vlm import dims_of

GROUP = 7  # methods between two runs with all tokens
OVERHEAD = 1.5e12  # operations that compiling and decoding amount to, about

Tell = Callable[[str], None]


class Cell(NamedTuple):
    """One size of the input, and the depth of the decoder that takes it."""

    tiles: int
    batch: int
    layers: int

    @property
    def words(self) -> str:
        return f"{tiles_words(self.tiles)}, batch {self.batch}"


@dataclass(frozen=True)
class Sweep:
    """What is measured: `methods` by name, `full` first, at the tiles and batches of `job`.

    `big_layers`: the decoder's depth where a batch has `BIG` tiles or more.
    """

    job: Job
    methods: tuple[str, ...]
    rounds: int
    big_layers: int

    @property
    def config(self) -> Any:
        return model_config(self.job)

    def settings(self) -> Line:
        """What every measurement depends on."""
        names = ("checkpoint", "preset", "dtype", "text", "new_tokens", "attention")
        values = asdict(self.job)
        layers = self.config.decoder.layers
        return {name: values[name] for name in names} | {"layers": layers, "machine": machine()}

    def cells(self) -> list[Cell]:
        """Sizes, the least work first."""
        depth, pairs = self.config.decoder.layers, product(self.job.tiles, self.job.batch)
        return [
            Cell(tiles, batch, self.big_layers if tiles * batch >= BIG else depth)
            for tiles, batch in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))
        ]

    def method(self, name: str, layers: int) -> Method:
        """The method on that depth. ValueError: it does not fit, whose name is told."""
        cfg = with_layers(self.config, layers)
        try:
            method = build(name, cfg).check(dims_of(cfg, cfg.max_tiles))
            requested(cfg, method)
        except ValueError as error:
            raise ValueError(f"{name} with {layers} layers: {error}") from error
        return method

    def scene(self, weights: Weights, cell: Cell) -> Scene:
        """The inputs of a cell and what the tower makes of them, for all methods."""
        asked = [requested(weights.cfg, self.method(n, cell.layers)) for n in self.methods]
        layers = tuple(sorted({layer for requests in asked for _, _, layer in requests}))
        return Scene(weights, self.job, cell.tiles, cell.batch, layers)


def measure(sweep: Sweep, record: Record, other: Callable[[], Measured] | None, tell: Tell) -> None:
    """All that the record lacks. `other` measures transformers, before and after the rest.

    ValueError: a method that does not fit, or whose caches are not as large as its plan says.
    """
    count_all(sweep, record, tell)
    measure_other(sweep, record, "before", other, tell)
    time_all(sweep, record, tell)
    gc.collect()  # the weights: the other side needs the room
    measure_other(sweep, record, "after", other, tell)


def measure_other(
    sweep: Sweep, record: Record, when: str, other: Callable[[], Measured] | None, tell: Tell
) -> None:
    """transformers, unless the record has it."""
    if other is None or record.find(kind="hf", when=when):
        return
    tell(f"transformers, {when} the methods ...")
    start = time.time()
    measured = other()
    line = {"kind": "hf", "when": when, "layers": sweep.config.decoder.layers}
    # It decodes behind the prompt of the first number of tiles.
    line |= {"decode_tiles": sweep.job.tiles[0], "at": (start + time.time()) / 2}
    record.add(line | {"measured": measured})


# ------------------------------------------------------------------------------ counting


def count_all(sweep: Sweep, record: Record, tell: Tell) -> None:
    """Plans and the compiler's counts, for one image of each size and depth; nothing is run."""
    sizes = sorted({(cell.tiles, cell.layers) for cell in sweep.cells()})
    left = [
        (name, tiles, layers)
        for (tiles, layers), name in product(sizes, sweep.methods)
        if not record.find(kind="count", method=name, tiles=tiles, layers=layers)
    ]
    for name, _, layers in left:  # what does not fit is told before anything takes long
        sweep.method(name, layers)
    for done, (name, tiles, layers) in enumerate(left, start=1):
        record.add(count(sweep, name, tiles, layers))
        tell(f"counted {done}/{len(left)}: {name}, {tiles_words(tiles)}, {layers} layers")


def count(sweep: Sweep, name: str, tiles: int, layers: int) -> Line:
    """What the plan and the compiler say of one method."""
    cfg, text = with_layers(sweep.config, layers), sweep.job.text
    method, dims = sweep.method(name, layers), dims_of(cfg, tiles)
    table = planned(method, cfg, tiles, text)
    found = counted(method, cfg, our_inputs(sweep.job, cfg, tiles))
    check_cache(name, found.cache_bytes, sum(table.kv_bytes))
    return {
        "kind": "count", "method": name, "tiles": tiles, "layers": layers,
        "entering": table.entering, "mean_slots": table.mean_slots,
        "plan_flops": prefill_flops(table, method, dims),
        "plain_flops": prefill_flops(
            planned(method, plain(cfg), tiles, text), method, dims
        ),
        "compiled_flops": found.flops, "cache_bytes": sum(table.kv_bytes),
    }  # fmt: skip


def plain(cfg: Any) -> Any:
    """The model as the compiler counts it: attention of all rows to all keys, without loops."""
    return replace(cfg, attention="xla")


def check_cache(name: str, found: float, wanted: float) -> None:
    """ValueError unless caches are as large as planned."""
    if found != wanted:
        raise ValueError(
            f"{name}: its caches take {found:.0f} bytes, its plan says {wanted:.0f}: the plan or "
            "the model is wrong"
        )


# -------------------------------------------------------------------------------- timing


class Left:
    """How long the rest will take, from what has been done: operations and a share for each."""

    def __init__(self, costs: dict[tuple, float]):
        self.costs, self.done, self.start = costs, 0.0, time.monotonic()

    def words(self, key: tuple) -> str:
        """After `key` is done."""
        self.done += self.costs.pop(key)
        seconds = (time.monotonic() - self.start) * sum(self.costs.values()) / self.done
        return f"about {seconds / 60:.0f} min left for {len(self.costs)}"


def time_all(sweep: Sweep, record: Record, tell: Tell) -> None:
    """Seconds of every part that the record lacks."""
    keys = {
        (cell, i, name): cost(record, cell, name)
        for cell, i, name in product(sweep.cells(), range(sweep.rounds), sweep.methods)
        if not record.find(kind="time", method=name, round=i, **cell._asdict())
    }
    if not keys:
        return
    tell("making weights ...")
    weights, left = load(sweep.job), Left(keys)
    for cell in sweep.cells():
        if any(key[0] == cell for key in keys):
            shallow = weights.cut_to(cell.layers)
            time_cell(sweep, record, cell, shallow, left, tell)


def cost(record: Record, cell: Cell, name: str) -> float:
    """How much work a measurement is, in operations."""
    (line,) = record.find(kind="count", method=name, tiles=cell.tiles, layers=cell.layers)
    return cell.batch * line["plan_flops"] + OVERHEAD


def time_cell(
    sweep: Sweep, record: Record, cell: Cell, weights: Weights, left: Left, tell: Tell
) -> None:
    """One size: all tokens before and behind each group of methods, in every round."""
    scene = sweep.scene(weights, cell)
    full = scene.prepare(sweep.method("full", cell.layers))

    def time_one(prepared: Prepared, name: str, i: int) -> None:
        where = {"method": name, **cell._asdict(), "round": i}
        line = {"kind": "time", **where, **prepared.measure()}
        (wanted,) = record.find(kind="count", method=name, tiles=cell.tiles, layers=cell.layers)
        check_cache(name, line["cache_bytes"], cell.batch * wanted["cache_bytes"])
        record.add(line)
        tell(f"{words(line)}, {left.words((cell, i, name))}")

    def time_full(i: int) -> None:
        if (cell, i, "full") in left.costs:
            time_one(full, "full", i)
            return
        again, _ = full.timed_prefill()
        record.add({"kind": "again", **cell._asdict(), "round": i, **again})
        tell(f"{cell.words}: full again: prefill {again['prefill']:.3g} s")

    for i in range(sweep.rounds):
        todo = [name for c, j, name in left.costs if (c, j) == (cell, i) and name != "full"]
        if not todo and (cell, i, "full") not in left.costs:
            continue
        for first in range(0, len(todo), GROUP):
            time_full(i)
            for name in todo[first : first + GROUP]:
                time_one(scene.prepare(sweep.method(name, cell.layers)), name, i)
        time_full(i)


def words(line: Line) -> str:
    """One measurement on one line."""
    cell = Cell(*(line[name] for name in Cell._fields))
    seconds = [f"prefill {line['prefill']:.3g} s", f"decode {line['decode']:.3g} tokens/s"]
    seconds += [f"{name} {1e3 * value:.3g} ms" for name, value in line["cuts"].items()]
    stage = f"vision stage {1e3 * line['stage']:.3g} ms"
    return f"{cell.words}, round {line['round'] + 1}: {line['method']}: " + ", ".join(
        [stage, *seconds]
    )
