"""Our code beside recorded outputs of other implementations, array by array."""

import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from focus_jax.golden import anyres, cuts, metrics, vision, yopo
from focus_jax.golden.case import CASE, Recorded, read
from focus_jax.golden.tolerance import Difference, compare, parse, tolerance_of
from focus_jax.hf_config import read_json


class Kind(NamedTuple):
    """How cases of a method are run: our arrays by their names. `given`: a regex of input names."""

    run: Callable[[Recorded], Mapping[str, np.ndarray]]
    given: str


METHODS: Mapping[str, Kind] = {
    "anyres": Kind(anyres.replay, anyres.GIVEN),
    "fastv": Kind(cuts.replay, cuts.GIVEN),
    "metrics": Kind(metrics.replay, metrics.GIVEN),
    "prumerge": Kind(vision.replay_prumerge, vision.GIVEN),
    "pyramiddrop": Kind(cuts.replay, cuts.GIVEN),
    "sparsevlm": Kind(cuts.replay, cuts.GIVEN),
    "visionzip": Kind(vision.replay_visionzip, vision.GIVEN),
    "vtw": Kind(cuts.replay, cuts.GIVEN),
    "yopo": Kind(yopo.replay, yopo.GIVEN),
}
Status = Literal["passed", "failed", "skipped"]


class Verdict(NamedTuple):
    """What came of a case.

    `arrays`: every array that was compared. `inputs`: those that were given. `faults`: what is
    wrong beside differences, such as an array that could not be compared.
    """

    method: str
    status: Status
    arrays: Mapping[str, Difference]
    inputs: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    seconds: float = 0.0

    def line(self, name: str) -> str:
        """One line for people: the largest error of every array."""
        parts = [f"{array}={found}" for array, found in self.arrays.items()]
        text = f"{self.status:<7} {name}: {', '.join([*self.faults, *parts])}"
        return f"{text} (inputs: {', '.join(self.inputs)})" if self.inputs else text

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method, "status": self.status, "seconds": round(self.seconds, 2),
            "arrays": {name: found.to_json() for name, found in self.arrays.items()},
            "inputs": list(self.inputs), "faults": list(self.faults),
        }  # fmt: skip


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Each program runs once: on a CPU most optimisation costs more than it saves."""
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    jax.config.update(option, before or jax.default_backend() == "cpu")
    try:
        yield
    finally:
        jax.config.update(option, before)


def check(directory: Path, only: Iterable[str] = ()) -> Verdict:
    """Run one case and compare all that was recorded. `only`: methods, the others are skipped.

    Whatever goes wrong is the case's verdict; FOCUS_JAX_TRACEBACK=1 shows it whole.
    """
    method, began = "", time.perf_counter()
    try:
        said = read_json(directory / CASE)
        method = str(said.get("method", ""))
        if only and method and method not in only:
            return Verdict(method, "skipped", {}, faults=("not among those asked for",))
        case = read(directory)
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not supported: known are {', '.join(METHODS)}")
        verdict = compared(case, run(case))
    # A case is data from elsewhere: it must not end the others, and may be wrong in any way.
    except Exception as error:
        if os.environ.get("FOCUS_JAX_TRACEBACK"):
            traceback.print_exc()
        verdict = Verdict(method, "failed", {}, faults=(reason(error),))
    return verdict._replace(seconds=time.perf_counter() - began)


def reason(error: Exception) -> str:
    """An error in one line; errors that do not say what they are about name their kind."""
    text = " ".join(str(error).split())[:500]
    plain = isinstance(error, ValueError | OSError)
    return text if plain and text else f"{type(error).__name__}: {text}"


def run(case: Recorded) -> Mapping[str, np.ndarray]:
    """Our arrays of a case, with full-precision products."""
    with quick_compilation(), jax.default_matmul_precision("highest"):
        return METHODS[case.method].run(case)


def compared(case: Recorded, ours: Mapping[str, np.ndarray]) -> Verdict:
    """Every array but the inputs, beside ours. One that is missing on either side is a fault."""
    stated = parse(case.info.get("tolerances", {}))
    given = METHODS[case.method].given
    inputs = tuple(name for name in case.expected if re.fullmatch(given, name))
    arrays, faults = {}, []
    for name in case.expected:
        if name not in case.arrays:
            faults.append(f"{name} is listed but was not recorded")
        elif said := case.misshapen(name):
            faults.append(f"{name} is {said}")
        elif name in inputs:
            continue
        elif name not in ours:
            faults.append(f"{name} not compared: nothing here computes it")
        else:
            recorded = case.arrays[name]
            allowed = tolerance_of(name, recorded, stated)
            arrays[name] = compare(ours[name], recorded, allowed)
    if not arrays and not faults:
        faults.append("no array was compared")
    failed = faults or any(found.fault for found in arrays.values())
    return Verdict(case.method, "failed" if failed else "passed", arrays, inputs, tuple(faults))


def summary(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """Counts, and every verdict, as plain values."""
    count = [verdict.status for verdict in verdicts.values()].count
    return {
        "cases": len(verdicts), "passed": count("passed"), "failed": count("failed"),
        "skipped": count("skipped"),
        "by_case": {name: verdict.to_json() for name, verdict in verdicts.items()},
    }  # fmt: skip
