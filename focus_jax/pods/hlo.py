"""What one device does in a compiled program: operations, memory traffic, kernels, collectives.

Read from the text of the compiled module, because the compiler's own cost analysis counts the body
of a loop once. Loops count as often as they run, and all they hold with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from focus_jax.pods.hlo_flops import flops
from focus_jax.pods.hlo_groups import along
from focus_jax.pods.hlo_loops import Scalars, Value, lasting, trips
from focus_jax.pods.hlo_text import Computation, Instruction, Module, parse
from focus_jax.pods.hlo_traffic import COLLECTIVES, NAMING, Traffic


class Collective(NamedTuple):
    """One collective of the program.

    `kind`: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute. `shapes`: the
    payload as it stands in one device's program, such as "bf16[2,4096]": what all-gather results
    in, what the others are given. `payload`: its bytes. `size`: devices in a group. `axes`: mesh
    axes that the groups run along; ("?",) where they follow none. `times`: runs in the whole
    program. `name`: where the program asked for it.
    """

    kind: str
    shapes: tuple[str, ...]
    payload: int
    size: int
    axes: tuple[str, ...]
    times: int
    name: str

    @property
    def total(self) -> int:
        """Bytes of payload of all runs."""
        return self.payload * self.times

    @property
    def wire(self) -> float:
        """Bytes that a device sends for all runs, by the ring algorithms of Chan et al. 2007."""
        if self.kind == "collective-permute":
            return float(self.total)
        share = self.total * (self.size - 1) / self.size
        return 2 * share if self.kind == "all-reduce" else share


class Kernel(NamedTuple):
    """A custom call: code that the text does not show, such as attention kernels."""

    target: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    times: int
    name: str


class Program(NamedTuple):
    """What one device does.

    `flops`: of dots and convolutions. `hbm_bytes`: read from and written to main memory, an
    estimate (see `hlo_traffic`). `kernels`: custom calls; their operations are not in `flops`.
    `unknown_loops`: loops whose number of runs can't be read; all they hold is counted ONCE, so
    whoever shows the other figures must show these. `assumed`: what was taken to be so where the
    program's data decide: the largest branch, no early end of a loop.
    """

    flops: int
    hbm_bytes: int
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass
class Tally:
    """A program while it is read."""

    flops: int = 0
    hbm_bytes: int = 0
    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.flops += other.flops
        self.hbm_bytes += other.hbm_bytes
        self.kernels += other.kernels
        self.collectives += other.collectives
        self.unknown_loops += other.unknown_loops
        self.assumed += other.assumed


def read_program(text: str, mesh: Mapping[str, int]) -> Program:
    """What one device does in a compiled program.

    `text`: `compiled.as_text()`. `mesh`: its axes in order with their sizes.
    Raises: ValueError where the text is no HLO module, can't be read, or is for another number of
    devices than the mesh has.
    """
    module = parse(text)
    if module.devices != prod(mesh.values()):
        raise ValueError(
            f"the program is for {module.devices} devices and the mesh "
            f"{dict(mesh)} has {prod(mesh.values())}: give the mesh it was compiled for"
        )
    tally = Reader(module, mesh).read(module[module.entry], 1, [])
    return Program(
        tally.flops,
        tally.hbm_bytes,
        tuple(tally.kernels),
        tuple(tally.collectives),
        tuple(tally.unknown_loops),
        tuple(tally.assumed),
    )


class Reader:
    """Walks the computations that run, with what is known of their parameters' values."""

    def __init__(self, module: Module, mesh: Mapping[str, int]) -> None:
        self.module, self.mesh = module, mesh
        self.traffic = Traffic(module)

    def read(
        self, computation: Computation, times: int, values: list[Value], fusion: str = ""
    ) -> Tally:
        """All that `times` runs of a computation do.

        `values`: of its parameters, as far as known. `fusion`: the name of the fusion that it is
        the inside of; that has no memory traffic of its own.
        """
        tally = Tally()
        scalars = Scalars(self.module, computation, values)
        for op in computation:
            tally.flops += times * flops(computation, op)
            if not fusion:
                tally.hbm_bytes += times * self.traffic.bytes(computation, op)
            now = op.settled
            if now.opcode in COLLECTIVES:
                if not self.traffic.carried(computation, now):
                    tally.collectives.append(self.collective(computation, now, times, fusion))
            elif now.opcode == "while":
                tally.add(self.loop(now, times, scalars))
            elif now.opcode == "conditional":
                tally.add(self.branches(now, times, scalars))
            elif now.opcode in ("fusion", "call", "async-start", "custom-call"):
                if now.opcode == "custom-call" and now.target not in NAMING:
                    tally.kernels.append(kernel(computation, now, times))
                inside = (now.source or now.name) if now.opcode == "fusion" else fusion
                known = [scalars.value(name) for name in now.operands]
                for name in called(now):
                    tally.add(self.read(self.module[name], times, known, inside))
        return tally

    def loop(self, op: Instruction, times: int, scalars: Scalars) -> Tally:
        """A loop's body as often as it runs; once, and named, where that can't be read."""
        start = scalars.value(op.operands[0])
        condition, body = (self.module[op.callees[key][0]] for key in ("condition", "body"))
        runs, early = trips(self.module, op, start)
        if runs == 0:
            return Tally()
        known, times = [lasting(self.module, body, start)], times * (1 if runs is None else runs)
        tally = self.read(body, times, known)
        tally.add(self.read(condition, times, known))
        if runs is None:
            tally.unknown_loops.append(op.label)
        if early:
            tally.assumed.append(f"{op.label} runs all of its {runs} times")
        return tally

    def branches(self, op: Instruction, times: int, scalars: Scalars) -> Tally:
        """The branch with the most operations, then the most traffic."""
        names = [name for names in op.callees.values() for name in names]
        known = [[scalars.value(name)] for name in op.operands[1:]]
        pairs = zip(names, known, strict=True)
        tallies = [self.read(self.module[name], times, values) for name, values in pairs]
        largest = max(tallies, key=lambda tally: (tally.flops, tally.hbm_bytes))
        largest.assumed.append(f"{op.label} always takes the largest of its {len(names)} branches")
        return largest

    def collective(
        self, computation: Computation, op: Instruction, times: int, fusion: str
    ) -> Collective:
        size, axes = along(op, self.mesh)
        kind = op.opcode.removeprefix("ragged-")
        if kind == "all-reduce" and scatters(computation, op, size):
            kind = "reduce-scatter"
        arrays = op.shape.arrays if kind == "all-gather" else computation.arrays(op)
        payload, name = sum(array.bytes for array in arrays), op.source or fusion or op.name
        return Collective(kind, tuple(map(str, arrays)), payload, size, axes, times, name)


def scatters(computation: Computation, op: Instruction, size: int) -> bool:
    """Whether an all-reduce is a reduce-scatter: its computation keeps this device's part alone.

    A TPU writes so what it runs as one reduce-scatter; elsewhere the two are two operations.
    """
    return size > 1 and computation.name.startswith("all-reduce-scatter")


def kernel(computation: Computation, op: Instruction, times: int) -> Kernel:
    operands = tuple(map(str, computation.arrays(op)))
    return Kernel(
        op.target, operands, tuple(map(str, op.shape.arrays)), times, op.source or op.name
    )


def called(op: Instruction) -> tuple[str, ...]:
    """Computations that an instruction runs once; a custom call's reductions hold no products."""
    if op.opcode == "custom-call":
        return op.callees.get("called_computations", ())
    return op.callees.get("calls", ()) or op.callees.get("to_apply", ())
