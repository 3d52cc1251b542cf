"""Loads of links against networks on which every message is sent by hand."""

from itertools import product

import numpy as np
import pytest

from focus_jax.pods.hlo import Collective
from focus_jax.pods.network import gather_load, link_load
from focus_jax.pods.topology import Span


def sent(places, ring):
    """The busiest link's share of the payload when each of `places` shards reaches all others.

    A shard travels outwards from its place both ways, each place passing it on once; on a ring of
    an even length half of it goes each way to the place opposite.
    """
    load: dict[tuple[int, int], float] = {}
    for source in range(places):
        for way in (1, -1):
            reach = places // 2 if ring else places
            for step in range(reach):
                here, there = source + way * step, source + way * (step + 1)
                if not ring and not 0 <= there < places:
                    break
                half = 0.5 if ring and places % 2 == 0 and step == reach - 1 else 1.0
                key = (here % places, there % places)
                load[key] = load.get(key, 0.0) + half / places
    return max(load.values())


@pytest.mark.parametrize("places", [2, 3, 4, 5, 8, 16])
def test_one_dimension(places):
    assert gather_load(1.0, [Span(places, 1.0)]) == pytest.approx(sent(places, ring=False))
    if places > 2:
        assert gather_load(1.0, [Span(places, 2.0)]) == pytest.approx(sent(places, ring=True))


@pytest.mark.parametrize("stride", [2, 4])
def test_interleaved_groups_share_a_line(stride):
    """`stride` groups of 4 on one line: every link carries what all of them send across it."""
    line, load = 4 * stride, np.zeros((2, 4 * stride))
    for group in range(stride):
        members = range(group, line, stride)
        for source, link in product(members, range(line - 1)):
            if link >= source and any(m > link for m in members):
                load[0, link] += 1 / 4
            if link < source and any(m <= link for m in members):
                load[1, link] += 1 / 4
    assert gather_load(1.0, [Span(4, 1 / stride)]) == pytest.approx(load.max())


def test_several_dimensions():
    square = [Span(8, 1.0), Span(8, 1.0)]
    # No fewer bytes than all others' shards over all of a chip's links; and both are kept busy.
    assert gather_load(1.0, square) == pytest.approx(63 / 64 / 2)
    uneven = [Span(16, 2.0), Span(4, 0.5)]
    # Much better first along the slow dimension, while there is little to send.
    assert gather_load(1.0, uneven) == pytest.approx(3 / 64 / 0.5 + 15 / 16 / 2)
    assert gather_load(1.0, uneven) == gather_load(1.0, uneven[::-1])
    assert gather_load(1.0, []) == 0


def collective(kind, payload, size, times=1):
    return Collective(kind, (), payload, size, ("fsdp",), times, "")


def test_kinds():
    ring = [Span(4, 2.0)]
    gather = link_load(collective("all-gather", 800, 4), ring)
    assert gather == pytest.approx(300)
    assert link_load(collective("reduce-scatter", 800, 4), ring) == gather
    assert link_load(collective("all-reduce", 800, 4, times=3), ring) == 6 * gather
    assert link_load(collective("collective-permute", 800, 4), ring) == 400
    assert link_load(collective("all-gather", 800, 1), []) == 0


@pytest.mark.parametrize("places", [2, 4, 8])
def test_an_exchange_of_all_with_all(places):
    """Each place has a part of its data for every place; on a line all take the only way."""
    load = np.zeros(places - 1)
    for source, target in product(range(places), repeat=2):
        load[source:target] += 1 / places  # one direction; the other is its mirror image
    assert link_load(collective("all-to-all", 1, places), [Span(places, 1.0)]) == load.max()
    switched = [Span(places, 18.0, switched=True)]
    sent_out = (places - 1) / places / 18
    assert link_load(collective("all-to-all", 1, places), switched) == pytest.approx(sent_out)
