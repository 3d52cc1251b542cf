"""What the study found, as arrays: a row for each method on some weights, all seeds stacked."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from focus_jax.data.glyphs import KINDS
from focus_jax.study.config import Role
from focus_jax.study.placement import Curve
from focus_jax.study.routing import Routing
from focus_jax.study.statistics import Estimate, difference, median, share_right


@dataclass(frozen=True, eq=False)
class Row:
    """A method on some weights: what it spends by the plan, and every answer on the test split.

    name: the arm's, or the method's for one that is put on weights as they come. weights: the arm
    whose training gave them; `trained`: they learned with this method in place. asked: as on a
    command line. share: of full's slots that was asked for (0: the method's own budget).
    `mean_share`: of full's slots that are spent, in the mean over layers. flops and kv_bytes are of
    one question's prefill; `rounds` its milliseconds in each round that all timed rows met together
    (none: not timed). correct: seeds stacked.
    """

    name: str
    role: Role
    weights: str
    trained: bool
    asked: str
    share: float
    mean_slots: float
    mean_share: float
    flops: float
    kv_bytes: int
    correct: Bool[np.ndarray, "I Q"]
    rounds: tuple[float, ...] = ()

    @property
    def ms(self) -> float | None:
        """The median time of one question's prefill; None where it was not measured."""
        return statistics.median(self.rounds) if self.rounds else None

    def time_saved(self, other: "Row") -> Estimate | None:
        """The share of another row's time that this one saves; None where one was not measured."""
        if not self.rounds or not other.rounds:
            return None
        pairs = zip(self.rounds, other.rounds, strict=True)
        return median([1 - own / theirs for own, theirs in pairs])

    @property
    def accuracy(self) -> Estimate:
        """The share of right answers with its 95 % interval."""
        return share_right(self.correct)

    def minus(self, other: "Row") -> Estimate:
        """The difference to another row on the same questions, with its 95 % interval."""
        return difference(self.correct, other.correct)


@dataclass(frozen=True, eq=False)
class Routed:
    """What a gate did on some weights: all seeds' regions together, and each seed's correlation."""

    name: str
    weights: str
    asked: str
    correlations: tuple[float | None, ...]
    routing: Routing


@dataclass(frozen=True, eq=False)
class Results:
    """All that the page and the pictures are made of.

    `cut_layer`, `cut_keep`, `cut_queries`: of the text-guided sampler as the base has it. `kind`:
    of each question, as an index of `KINDS`, seeds stacked. `chosen`: decided on validation:
    `queries` and `layer` of the cut. `parts`: (arm without a part, arm with it) as in the study.
    """

    size: str
    seeds: tuple[int, ...]
    images: int
    layers: int
    patches: int
    cut_layer: int
    cut_keep: float
    cut_queries: str
    device: str
    seconds: float
    rows: tuple[Row, ...]
    kind: Int[np.ndarray, "I Q"]
    curves: tuple[Curve, ...] = ()
    routed: tuple[Routed, ...] = ()
    chosen: dict[str, Any] = field(default_factory=dict)
    parts: tuple[tuple[str, str], ...] = ()

    def row(self, name: str, weights: str | None = None, share: float = 0.0) -> Row | None:
        """The row of that name: an arm on its own weights, or a method on the given ones."""
        for row in self.rows:
            own = row.trained if weights is None else row.weights == weights and not row.trained
            if row.name == name and own and abs(row.share - share) < 1e-9:
                return row
        return None

    def of_role(self, role: Role) -> list[Row]:
        """The arms of a role, on their own weights."""
        return [row for row in self.rows if row.trained and row.role == role]

    @property
    def full(self) -> Row:
        """All tokens, trained with all tokens. ValueError where it was not measured."""
        [*found] = self.of_role("full")
        if not found:
            raise ValueError("no row has all tokens: measure the arm of role 'full' first")
        return found[0]

    def by_kind(self, row: Row) -> dict[str, float]:
        """Accuracy on each kind of question that was asked, in the order of `KINDS`."""
        asked = [number for number in range(len(KINDS)) if (self.kind == number).any()]
        return {KINDS[n]: float(row.correct[self.kind == n].mean()) for n in asked}


def pack(correct: Bool[np.ndarray, "I Q"]) -> dict[str, Any]:
    """Answers as JSON: their shape and the bits as hexadecimal digits."""
    return {"shape": list(correct.shape), "bits": np.packbits(correct).tobytes().hex()}


def unpack(stored: dict[str, Any]) -> Bool[np.ndarray, "I Q"]:
    """What `pack` made."""
    shape = tuple(stored["shape"])
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(stored["bits"]), np.uint8))
    return bits[: int(np.prod(shape))].reshape(shape).astype(bool)
