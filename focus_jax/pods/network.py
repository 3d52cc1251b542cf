"""How long collectives take on the links of a pod, at least."""

from collections.abc import Sequence
from itertools import permutations
from math import prod

from focus_jax.pods.hlo import Collective
from focus_jax.pods.topology import Span


def gather_load(payload: float, spans: Sequence[Span]) -> float:
    """Bytes that one link carries while `payload` is gathered (or reduced and scattered).

    The group works dimension by dimension, what it holds growing on the way: in the best order, or
    in as many equal parts as there are dimensions, each in another order, so that all are busy.
    """
    if not spans:
        return 0.0
    orders = [sum(in_turn(payload, order)) for order in permutations(spans)]
    rotated = [payload_in_parts(payload, order) for order in permutations(spans)]
    return min(orders + rotated)


def in_turn(payload: float, order: Sequence[Span]) -> list[float]:
    """Bytes over a link in each dimension, one after another."""
    held, out = payload / prod(span.places for span in order), []
    for span in order:
        out.append(held * (span.places - 1) / span.links)
        held *= span.places
    return out


def payload_in_parts(payload: float, order: Sequence[Span]) -> float:
    """The same with the payload in parts that begin in different dimensions, step by step."""
    parts = len(order)
    turned = [in_turn(payload / parts, [*order[i:], *order[:i]]) for i in range(parts)]
    return sum(max(step) for step in zip(*turned, strict=True))


def crossing(span: Span) -> float:
    """Share of each place's data, in an exchange of all with all, that its busiest link carries.

    In a line, half of one half's data crosses the middle; on a ring there are two ways.
    """
    return (span.places - 1) / span.places if span.switched else span.places / 4


def link_load(collective: Collective, spans: Sequence[Span]) -> float:
    """Bytes that one link carries for all runs of a collective whose group lies along `spans`."""
    payload = float(collective.payload)
    if collective.kind == "all-reduce":
        once = 2 * gather_load(payload, spans)
    elif collective.kind in ("all-gather", "reduce-scatter"):
        once = gather_load(payload, spans)
    elif collective.kind == "all-to-all":
        once = sum(payload * crossing(span) / span.links for span in spans)
    else:
        # Permutes of ring algorithms come in pairs, one each way.
        once = max((payload / span.links for span in spans), default=0.0)
    return once * collective.times
