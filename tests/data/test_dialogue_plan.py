"""Which dialogues share a batch: every row once an epoch, few shapes, what they pad."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_jax.data.dialogue_plan import (
    NOBODY,
    DialoguePlan,
    Shape,
    cost,
    few_shapes,
    most_tiles,
    needs_of,
    tiles_of,
)
from focus_jax.data.preprocess import ImageConfig

PAD = ImageConfig("pad", size=336)
POINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ANYRES = ImageConfig("anyres", size=336, pinpoints=POINTS)
PATCHES = 16

# Text alone, one image of 3, 4 or 5 views, two images of 5.
VISUAL = [(0, 0), (1, 3), (1, 4), (1, 5), (2, 5)]
need = st.tuples(st.sampled_from(VISUAL), st.sampled_from([8, 16, 32])).map(lambda n: (*n[0], n[1]))
plans = st.tuples(
    st.lists(need, min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3), st.integers(1, 3)
).filter(lambda drawn: drawn[1] <= len(drawn[0]))


def groups_of(plan, first, last):
    return [plan.group(number) for number in range(first, last)]


@settings(deadline=None, max_examples=100)
@given(plans)
def test_each_row_comes_once_an_epoch(drawn):
    needs, group, seed, epochs = drawn
    plan = DialoguePlan(np.array(needs), group, PATCHES, seed, epochs=epochs)
    assert plan.total == -(-epochs * len(needs) // group)
    seen: Counter = Counter()
    done = 0
    for epoch in range(1, epochs + 1):
        last = -(-epoch * len(needs) // group)
        for one in groups_of(plan, done, last):
            assert one.epoch == epoch - 1 and len(one.rows) == group
            seen.update(one.rows.tolist())
        done = last
        missing = last * group - epoch * len(needs)
        early = Counter(seen[row] - epoch for row in range(len(needs)))
        # Rows of the next epoch fill the last group; behind the last epoch there are none.
        ahead = missing if epoch < epochs else 0
        assert early == Counter({0: len(needs) - ahead, 1: ahead}) or ahead == len(needs)
    assert seen[NOBODY] == done * group - epochs * len(needs)


@settings(deadline=None, max_examples=100)
@given(plans)
def test_rows_fit_and_shapes_are_few(drawn):
    needs, group, seed, _ = drawn
    plan = DialoguePlan(np.array(needs), group, PATCHES, seed)
    mixed = 0
    for one in groups_of(plan, 0, plan.steps):
        own = [Shape(*needs[row]) for row in one.rows.tolist()]
        assert all(one.shape.covers(shape) for shape in own)
        mixed += sum(one.shape.images > shape.images == 0 for shape in own)
    kinds = Counter(needs)
    assert len(plan.shapes) <= len(kinds) + 1
    # Text alone stands by itself, but for what is too rare for a shape, what an epoch leaves, and
    # what fills its last group: each less than a group.
    assert mixed < 3 * group
    costs = [cost(shape, PATCHES) for shape in plan.shapes]
    assert costs == sorted(costs) and len(set(plan.shapes)) == len(plan.shapes)
    assert all(plan.shapes[-1].covers(shape) for shape in plan.shapes)


@settings(deadline=None, max_examples=50)
@given(plans, st.randoms(use_true_random=False))
def test_a_group_follows_from_its_number_alone(drawn, random):
    needs, group, seed, _ = drawn
    plan = DialoguePlan(np.array(needs), group, PATCHES, seed)
    want = [(one.shape, one.rows.tolist()) for one in groups_of(plan, 0, 3 * plan.steps)]
    numbers = list(range(3 * plan.steps))
    random.shuffle(numbers)
    again = DialoguePlan(np.array(needs), group, PATCHES, seed)
    for number in numbers:
        one = again.group(number)
        assert (one.shape, one.rows.tolist()) == want[number]


def test_a_rare_shape_goes_to_the_cheapest_larger_one():
    needs = [(1, 3, 8)] * 5 + [(1, 3, 16)] * 2 + [(1, 4, 16)] * 4 + [(1, 3, 32)] * 4 + [(0, 0, 8)]
    shapes, home = few_shapes(np.array(needs), 4, patches=10)
    # 3 views and 32 tokens cost 62, 4 views and 16 tokens 56.
    assert shapes == ((1, 3, 8), (1, 4, 16), (1, 3, 32), (1, 4, 32))
    assert home.tolist() == [0] * 5 + [1] * 2 + [1] * 4 + [2] * 4 + [0]


def test_the_dearest_group_comes_first_and_others_are_mixed():
    needs = np.array([(0, 0, 8)] * 40 + [(1, 3, 8)] * 40 + [(1, 5, 32)] * 10)
    plan = DialoguePlan(needs, 5, PATCHES, seed=3)
    shapes = [one.shape for one in groups_of(plan, 0, plan.steps)]
    assert shapes[0] == (1, 5, 32) and Counter(shapes) == plan.counts()
    assert sorted(shapes) != shapes and sorted(shapes, reverse=True) != shapes


def test_padding_is_counted():
    needs = np.array([(1, 3, 8)] * 2 + [(0, 0, 16)] * 2 + [(2, 3, 16)])
    lengths = np.array([8, 4, 10, 16, 99])
    plan = DialoguePlan(needs, 1, PATCHES)
    assert plan.padding(needs, lengths) == pytest.approx((1 - (8 + 4 + 10 + 16 + 16) / 64, 0.0))
    # All in one shape of two images: 5 x 6 views are made, 6 + 6 shown.
    whole = DialoguePlan(needs, 5, PATCHES)
    assert whole.shapes == ((2, 3, 16),)
    assert whole.padding(needs, lengths) == pytest.approx((1 - 54 / 80, 1 - 12 / 30))


def test_views_and_tokens_of_rows():
    assert [tiles_of(size, ANYRES) for size in ((300, 600), (640, 480), (1600, 400))] == [3, 5, 4]
    assert (tiles_of((640, 480), PAD), most_tiles(PAD), most_tiles(ANYRES)) == (1, 1, 5)
    sizes = np.array([(0, 0, 0), (1, 300, 600), (1, 1600, 400), (2, 300, 600)], np.int32)
    lengths = np.array([8, 9, 16, 40])
    want = [(0, 0, 8), (1, 3, 16), (1, 4, 16), (2, 5, 16)]
    assert needs_of(sizes, lengths, (8, 16), ANYRES).tolist() == [list(row) for row in want]
    assert needs_of(sizes, lengths, (8, 16), PAD)[:, 1].tolist() == [0, 1, 1, 1]


def test_more_rows_a_step_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"6 dialogues a step .* more than the 5"):
        DialoguePlan(np.array([(0, 0, 8)] * 5), 6, PATCHES)
