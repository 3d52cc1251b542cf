"""Bytes that the kernels of a compiled program read from and write to a device's main memory.

An estimate: each kernel reads its operands once and writes its results once, without the padding
of tiled layouts, and nothing stays in a cache between two kernels. What is only sliced counts as
the slice, what is updated in place counts as the update. On a TPU arrays in on-chip memory
(layout `S(1)`) are free, and so the copies into it carry the traffic.
"""

from focus_jax.pods.hlo_text import Array, Computation, Instruction, Module

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("while", "conditional", "call", "async-start", "async-update", "add-dependency"),
    *("partition-id", "replica-id", "optimization-barrier", "opt-barrier"),
}
# Custom calls that name or join buffers and move nothing.
NAMING = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"}
SLICES = ("slice", "dynamic-slice", "gather")
VIEWS = ("bitcast", "get-tuple-element")
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    "collective-permute",
)


class Traffic:
    """Bytes of single instructions of a module."""

    def __init__(self, module: Module) -> None:
        self.module, self.started = module, started_chains(module)

    def bytes(self, computation: Computation, op: Instruction) -> int:
        """Bytes from and to main memory that one run of an instruction moves."""
        op = op.settled
        if op.opcode in FREE or op.opcode.endswith("-done") or op.target in NAMING:
            return 0
        operands = computation.arrays(op)
        results = self.module.hbm(op.shape.arrays)
        if op.opcode in SLICES:
            return self.placed(op.shape.arrays, operands[0]) + results
        if op.opcode in ("dynamic-update-slice", "scatter"):
            update = operands[1 if op.opcode == "dynamic-update-slice" else -1]
            return self.module.hbm((update,)) + self.placed((update,), op.shape.arrays[0])
        if op.opcode == "fusion":
            return self.fusion(computation, op)
        return self.module.hbm(operands) + results

    def placed(self, arrays: tuple[Array, ...], where: Array) -> int:
        """Bytes of arrays that lie where another one lies."""
        return self.module.hbm(tuple(a._replace(space=where.space) for a in arrays))

    def fusion(self, computation: Computation, op: Instruction) -> int:
        inner = self.module[op.callees["calls"][0]]
        moved = 0
        for at, name in enumerate(op.operands):
            arrays = computation[name].shape.arrays
            if self.module.hbm(arrays):
                moved += self.read(inner, inner.parameters[at].name)
        root = inner.root
        names = root.operands if root.opcode == "tuple" else (root.name,)
        shapes = op.shape.parts if root.opcode == "tuple" else (op.shape,)
        for name, shape in zip(names, shapes, strict=True):
            if self.module.hbm(shape.arrays):
                moved += self.written(inner, name)
        return moved

    def read(self, inner: Computation, name: str) -> int:
        """Bytes that a fusion reads of one of its values, at most all of it."""
        whole = total(inner[name].shape.arrays)
        return min(whole, sum(self.use(inner, user, name) for user in inner.users[name]))

    def use(self, inner: Computation, user: Instruction, name: str) -> int:
        """Bytes of a value that one instruction of a fusion reads."""
        first = user.operands[0] == name
        if user.opcode == "tuple" or user.target in NAMING or self.carried(inner, user):
            return 0
        if user.opcode in SLICES and first:
            return total(user.shape.arrays)
        if user.opcode == "dynamic-update-slice" and first:
            return 0
        if user.opcode in VIEWS and not user.root:
            return self.read(inner, user.name)
        if user.opcode == "fusion":
            called = self.module[user.callees["calls"][0]]
            places = [at for at, operand in enumerate(user.operands) if operand == name]
            return sum(self.read(called, called.parameters[at].name) for at in places)
        return total(inner[name].shape.arrays)

    def written(self, inner: Computation, name: str) -> int:
        """Bytes that a fusion writes for one of its results."""
        op = inner[name]
        if op.opcode == "parameter" or self.carried(inner, op):
            return 0
        if op.target == "AsyncCollectiveStart":
            return total(op.shape.parts[1].arrays)
        if op.opcode == "dynamic-update-slice":
            return total(inner[op.operands[1]].shape.arrays)
        if op.opcode in VIEWS and inner[op.operands[0]].opcode == "dynamic-update-slice":
            return self.written(inner, op.operands[0])
        if op.opcode == "fusion":
            called = self.module[op.callees["calls"][0]]
            if called.root.opcode != "tuple":
                return self.written(called, called.root.name)
        return total(op.shape.arrays)

    def carried(self, inner: Computation, op: Instruction) -> bool:
        """Whether an instruction of a fusion only carries on what another one started."""
        if op.opcode == "custom-call" and op.target in NAMING:
            return op.target == "AsyncCollectiveDone"
        if op.opcode not in COLLECTIVES or chain(op) not in self.started:
            return False
        return not starts(inner)


def total(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def chain(op: Instruction) -> tuple[str, ...]:
    """What the pieces of one collective share; programs by hand use one channel for all."""
    return op.opcode, op.find(r"\bchannel_id=(\d+)"), op.find(r'\bchain_id="(\d+)"')


def starts(computation: Computation) -> bool:
    """Whether a fused computation is the first piece of a collective that several share."""
    return any(op.target == "AsyncCollectiveStart" for op in computation)


def started_chains(module: Module) -> frozenset[tuple[str, ...]]:
    """Collectives that the compiler spread over several fusions."""
    return frozenset(
        chain(op)
        for computation in module.computations.values()
        if starts(computation)
        for op in computation
        if op.opcode in COLLECTIVES
    )
