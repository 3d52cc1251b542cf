"""The text of a compiled HLO module as values: computations, instructions, arrays.

The text is what `jax.stages.Compiled.as_text()` prints for CPU, TPU and GPU.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

# Types whose name does not end with their number of bits.
BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
HEADER = re.compile(r"(ENTRY )?%(\S+) \(")
LINE = re.compile(r"\s+(ROOT )?%(\S+) = ")
NAME = re.compile(r"%([\w.\-]+)")
CALLEES = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    r"called_computations)=(?:%([\w.\-]+)|\{([^{}]*)\})"
)


class Array(NamedTuple):
    """One array of a shape; `space` is the memory space of its layout, 0 where none is named."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of a tiled layout; types under a byte are packed."""
        return -(-self.elements * bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def bits(dtype: str) -> int:
    """Bits of an element: bf16 16, f8e4m3fn 8, s4 4, pred 8. Raises: ValueError, unknown type."""
    if dtype in BITS:
        return BITS[dtype]
    found = re.match(r"(?:bf|[fsu])(\d+)", dtype)
    if not found:
        raise ValueError(f"the HLO text holds an element type {dtype!r} of unknown size")
    return int(found[1])


@dataclass(frozen=True)
class Shape:
    """A result's type: an array, or a tuple of shapes."""

    array: Array | None = None
    parts: tuple["Shape", ...] = ()

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays, tuples flattened in order."""
        if self.array:
            return (self.array,)
        return tuple(array for part in self.parts for array in part.arrays)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; `inner` is the text in the parentheses of its operation."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    inner: str
    attributes: str
    root: bool = False

    @cached_property
    def own(self) -> str:
        """Attributes without those that hold free text: metadata and the compiler's notes."""
        return re.split(r", (?:metadata|backend_config|frontend_attributes)=", self.attributes)[0]

    @cached_property
    def callees(self) -> dict[str, tuple[str, ...]]:
        """Computations that this instruction names, by the attribute that names them."""
        return {
            key: (one,) if one else tuple(NAME.findall(many))
            for key, one, many in CALLEES.findall(self.own)
        }

    @cached_property
    def settled(self) -> "Instruction":
        """An asynchronous start as the operation that it starts; any other as it is.

        A start's tuple holds operands, result and counters; a copy's holds its result first.
        """
        if not self.opcode.endswith("-start") or self.opcode == "async-start":
            return self
        shape = self.shape
        if self.opcode != "all-reduce-start":
            shape = shape.parts[0 if self.opcode == "copy-start" else 1]
        return replace(self, opcode=self.opcode.removesuffix("-start"), shape=shape)

    @property
    def source(self) -> str:
        """`op_name` of the metadata: what the program calls it; "" where it has none."""
        return self.find(r'\bmetadata=\{[^{}]*?op_name="((?:[^"\\]|\\.)*)"')

    @property
    def label(self) -> str:
        """The instruction's name, with what the program calls it."""
        return f"%{self.name} ({self.source})" if self.source else f"%{self.name}"

    @property
    def target(self) -> str:
        return self.find(r'custom_call_target="([^"]*)"')

    def find(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; "" where it is not found."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list such as `dimensions={0,1}`; () where it is not there."""
        return tuple(map(int, re.findall(r"\d+", self.find(rf"\b{key}={{([\d,]*)}}"))))


@dataclass
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        if name not in self.instructions:
            raise ValueError(f"the HLO text names %{name} in %{self.name} and never defines it")
        return self.instructions[name]

    @cached_property
    def root(self) -> Instruction:
        roots = [instruction for instruction in self if instruction.root]
        if len(roots) != 1:
            raise ValueError(f"the HLO text marks {len(roots)} roots in %{self.name}, not one")
        return roots[0]

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(each.inner): each for each in self if each.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def arrays(self, instruction: Instruction) -> tuple[Array, ...]:
        """Arrays of all operands, tuples flattened."""
        return tuple(a for name in instruction.operands for a in self[name].shape.arrays)


@dataclass
class Module:
    """The computations of a program; `devices` is the number of partitions of the text."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    # A TPU's layouts carry tiles; there, space 1 is its on-chip memory, not HBM.
    tiled: bool

    def __getitem__(self, name: str) -> Computation:
        if name not in self.computations:
            raise ValueError(f"the HLO text calls %{name} and never defines it")
        return self.computations[name]

    def hbm(self, arrays: tuple[Array, ...]) -> int:
        """Bytes of the arrays that lie in a device's main memory."""
        spaces = (0,) if self.tiled else (0, 1)
        return sum(array.bytes for array in arrays if array.space in spaces)


def parse(text: str) -> Module:
    """The module of a text.

    Raises: ValueError where the text is no HLO module or a line of it can't be read.
    """
    if not text.startswith("HloModule"):
        raise ValueError(f"not the text of an HLO module: it starts with {text[:40]!r}")
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        if line[:1] in ("%", "E") and line.rstrip().endswith("{") and (head := HEADER.match(line)):
            current = computations.setdefault(head[2], Computation(head[2]))
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and line.strip():
            instruction = parse_line(line)
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation: give all of compiled.as_text()")
    first = text.split("\n", 1)[0]
    return Module(computations, entry, devices(first), ":T(" in text)


def devices(header: str) -> int:
    """Partitions that the module's first line names, 1 where it names none."""
    found = re.search(r"\bnum_partitions=(\d+)", header)
    return int(found[1]) if found else 1


def parse_line(line: str) -> Instruction:
    """`ROOT %name = shape opcode(operands), attributes` as an instruction."""
    head = LINE.match(line)
    if not head:
        raise ValueError(f"a line of the HLO text can't be read: {line.strip()[:120]!r}")
    rest = re.sub(r"/\*[^*]*\*/", "", line[head.end() :])
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    start = rest.index("(", end)
    stop = closing(rest, start)
    inner, opcode = rest[start + 1 : stop], rest[end:start].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(NAME.findall(inner))
    shape = parse_shape(rest[:end])
    return Instruction(
        head[2], shape, opcode, operands, inner, rest[stop + 1 :], root=bool(head[1])
    )


def closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise ValueError(f"a line of the HLO text never closes a parenthesis: {text[:120]!r}")


def parse_shape(text: str) -> Shape:
    """`bf16[2,3]{1,0:T(8,128)(2,1)S(1)}` or a tuple of such."""
    text = text.strip()
    if text.startswith("("):
        return Shape(parts=tuple(map(parse_shape, split(text[1:-1]))))
    found = ARRAY.match(text)
    if not found:
        raise ValueError(f"a shape of the HLO text can't be read: {text[:120]!r}")
    space = re.search(r"S\((\d+)\)", found[3] or "")
    bits(found[1])
    dims = tuple(map(int, re.findall(r"\d+", found[2])))
    return Shape(Array(found[1], dims, int(space[1]) if space else 0))


def split(text: str) -> list[str]:
    """The parts of a list at its outer commas."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
