"""How often a loop of an HLO program runs.

The compiler's own note (`known_trip_count`) where there is one. Otherwise the loop's counters are
run: first values, condition and step are evaluated as the program states them, integers and truth
values alone, everything else unknown. So any first value, step and comparison is read, also the
steps of two that an unrolled `windowed_dot_general` takes.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from focus_jax.pods.hlo_text import Computation, Instruction, Module, bits

# An integer or truth value, a list for a tuple, None where it is not known.
Value = Any
LIMIT = 1 << 20


class Trips(NamedTuple):
    """`runs` is None where it can't be read; `early`: a condition on data may stop it sooner."""

    runs: int | None
    early: bool = False


def trips(module: Module, loop: Instruction, start: Value) -> Trips:
    """How often the body of a `while` runs, from what is known of its first values."""
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"\}')
    if known:
        return Trips(int(known))
    condition = module[loop.callees["condition"][0]]
    body = module[loop.callees["body"][0]]
    early, values = Scalars(module, condition, [start]).root() is None, start
    for count in range(LIMIT):
        goes_on = Scalars(module, condition, [values], hopeful=True).root()
        if goes_on is None:
            return Trips(None)
        if not goes_on:
            return Trips(count, early)
        after = Scalars(module, body, [values]).root()
        if after == values:
            return Trips(None)
        values = after
    return Trips(None)


def lasting(module: Module, body: Computation, start: Value) -> Value:
    """The values of a loop that no run of its body changes; None for the others."""
    if not isinstance(start, list):
        return None
    marks = [object() for _ in start]
    after = Scalars(module, body, [marks]).root()
    after = after if isinstance(after, list) else [None] * len(start)
    return [
        old if new is mark else None for old, new, mark in zip(start, after, marks, strict=True)
    ]


class Scalars:
    """The values of scalars in one computation, as far as they follow from its parameters'.

    `hopeful`: an unknown side of an `and` is taken to hold.
    """

    def __init__(
        self,
        module: Module,
        computation: Computation,
        parameters: list[Value],
        hopeful: bool = False,
    ) -> None:
        self.module, self.computation, self.parameters = module, computation, parameters
        self.hopeful = hopeful
        self.known: dict[str, Value] = {}

    def root(self) -> Value:
        return self.value(self.computation.root.name)

    def value(self, name: str) -> Value:
        if name not in self.known:
            self.known[name] = self.evaluate(self.computation[name])
        return self.known[name]

    def evaluate(self, op: Instruction) -> Value:
        """The value of one instruction; arrays are handed on and never looked into."""
        match op.opcode:
            case "parameter":
                at = int(op.inner)
                return self.parameters[at] if at < len(self.parameters) else None
            case "tuple":
                return [self.value(name) for name in op.operands]
            case "get-tuple-element":
                whole = self.value(op.operands[0])
                return whole[int(op.find(r"\bindex=(\d+)"))] if isinstance(whole, list) else None
            case "copy" | "copy-start" | "copy-done" | "bitcast" | "reshape":
                return self.value(op.operands[0])
            case "optimization-barrier" | "opt-barrier":
                return self.value(op.operands[0])
            case "while":
                body = self.module[op.callees["body"][0]]
                return lasting(self.module, body, self.value(op.operands[0]))
        return self.scalar(op) if op.shape.parts or is_scalar(op) else None

    def scalar(self, op: Instruction) -> Value:
        """The value of an operation on scalars."""
        match op.opcode:
            case "constant":
                return literal(op.inner)
            case "convert":
                return self.value(op.operands[0])
            case "fusion" | "call":
                (name,) = op.callees.get("calls") or op.callees["to_apply"]
                operands = [self.value(operand) for operand in op.operands]
                return Scalars(self.module, self.module[name], operands, self.hopeful).root()
            case "and" | "or":
                return self.logic(op)
            case "compare":
                return self.apply(COMPARISONS[op.find(r"\bdirection=(\w+)")], op)
            case _ if op.opcode in OPERATIONS:
                return self.apply(OPERATIONS[op.opcode], op)
        return None

    def apply(self, operation: Callable[..., Value], op: Instruction) -> Value:
        values = [self.value(name) for name in op.operands]
        return operation(*values) if all(isinstance(value, int) for value in values) else None

    def logic(self, op: Instruction) -> Value:
        """`and`, `or` of values of which some may be unknown."""
        values = [self.value(name) for name in op.operands]
        known = [value for value in values if isinstance(value, int)]
        if len(known) == len(values):
            return OPERATIONS[op.opcode](*values)
        if op.opcode == "or":
            return True if True in known else None
        if False in known:
            return False
        return True if known and self.hopeful else None


def is_scalar(op: Instruction) -> bool:
    """Whether the result is one integer or truth value."""
    array = op.shape.array
    if array is None or array.dtype[0] not in "psu" or not bits(array.dtype):
        return False
    return prod(array.dims) == 1


def literal(text: str) -> Value:
    """`5`, `-1`, `true`, `{5}` as a value; None for anything else."""
    text = text.strip("{} ")
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.lstrip("-").isdigit() else None


def divided(a: int, b: int) -> int | None:
    """Integer division towards zero."""
    return None if b == 0 else int(np.sign(a) * np.sign(b)) * (abs(a) // abs(b))


def remains(a: int, b: int) -> int | None:
    quotient = divided(a, b)
    return None if quotient is None else a - b * quotient


COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
OPERATIONS: dict[str, Callable[..., Value]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": divided,
    "remainder": remains,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: not a if isinstance(a, bool) else ~a,
    "negate": lambda a: -a,
    "select": lambda which, a, b: a if which else b,
    "clamp": lambda low, a, high: min(max(low, a), high),
}
