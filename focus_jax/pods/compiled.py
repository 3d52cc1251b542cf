"""Compile a program for a pod and read what it takes."""

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from focus_jax.distributed import first_line
from focus_jax.pods.chips import GIB
from focus_jax.workdir import write_text

# Of all that a program keeps in memory, or of its temporary arrays alone.
USED = re.compile(r"Used ([\d.]+)([KMGT]) of")
TEMPORARY = re.compile(r"temporaries \(([\d.]+)([KMGT])\)")
# Of Pallas kernels: printed over several lines, where an instruction otherwise has one.
KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n.*\n\}")
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of a device's memory. `aliased`: output that takes the place of donated arguments."""

    argument: int
    output: int
    aliased: int
    temporary: int
    code: int = 0

    @property
    def total(self) -> int:
        """What must fit."""
        return self.argument + self.output - self.aliased + self.temporary + self.code


class Compiled(NamedTuple):
    """A program's text and memory; `refused` is the compiler's word where it does not fit."""

    text: str
    memory: Memory
    seconds: float
    refused: str = ""


def compile_program(program: Any, arguments: tuple[Any, ...], dump: Path | None = None) -> Compiled:
    """Compile for the devices that the arguments' shardings name.

    A program that the compiler refuses for want of memory comes back with what it would take, and
    no text. `dump`: where to write the text.
    """
    start = time.perf_counter()
    try:
        done = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        return Compiled("", needed(str(error), arguments), seconds, first_line(error))
    seconds = time.perf_counter() - start
    text = KERNEL_METADATA.sub("kernel_metadata={}", done.as_text())
    if dump is not None:
        write_text(dump, text)
    found = done.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    return Compiled(text, memory, seconds)


def needed(message: str, arguments: tuple[Any, ...]) -> Memory:
    """Memory from the compiler's complaint, beside the arguments, whose bytes are known."""
    argument = argument_bytes(arguments)
    if found := TEMPORARY.search(message):
        return Memory(argument, 0, 0, amount(found))
    found = USED.search(message)
    return Memory(argument, 0, 0, max(amount(found) - argument, 0) if found else 0)


def amount(found: re.Match[str]) -> int:
    """Bytes of `25.27G`."""
    return round(float(found[1]) * UNITS[found[2]])


def argument_bytes(arguments: Any) -> int:
    """Bytes of a device's part of arguments, from their shardings."""
    total = 0
    for leaf in jax.tree.leaves(arguments):
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for side in shape:
            size *= side
        total += size
    return total
