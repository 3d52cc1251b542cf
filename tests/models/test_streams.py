"""Packing and cutting the streams, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.method import Kept, Merged
from focus_jax.compress.select import Selection
from focus_jax.models.streams import (
    VISUAL,
    Streams,
    fold,
    last_of_prompt,
    pack,
    renumber,
    row_at,
    select_visual,
    spread,
    unpack,
)

B, P, V, Q, T, D = 2, 3, 4, 2, 3, 5


@pytest.fixture
def streams() -> Streams:
    rng = np.random.default_rng(0)
    token_valid = np.array([[[1, 1, 1], [1, 0, 0]], [[0, 1, 1], [0, 0, 0]]], bool)
    bare = Streams(
        prefix=jnp.asarray(rng.standard_normal((B, P, D))),
        prefix_valid=jnp.asarray([[True, True, False], [False, True, False]]),
        prefix_position=jnp.zeros((B, P), jnp.int32),
        visual=jnp.asarray(rng.standard_normal((B, V, D))),
        visual_valid=jnp.asarray([[True, False, True, True], [False, True, False, True]]),
        visual_position=jnp.zeros((B, V), jnp.int32),
        slot=jnp.broadcast_to(jnp.arange(V), (B, V)),
        after=jnp.zeros((B, V), jnp.int32),
        centre=jnp.asarray(rng.standard_normal((B, V, 2))),
        view=jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 2]]),
        newline=jnp.asarray([[False, False, False, True], [False, True, False, True]]),
        token=jnp.asarray(rng.standard_normal((B, Q, T, D))),
        token_valid=jnp.asarray(token_valid),
        token_position=jnp.zeros((B, Q, T), jnp.int32),
        instruction=jnp.asarray(token_valid),
        prompt=jnp.asarray(token_valid),
        starts=jnp.asarray(token_valid),
        raters=jnp.asarray(token_valid),
        last=last_of_prompt(jnp.asarray(token_valid), jnp.zeros((B, Q, T), bool)),
        entered=jnp.asarray([3, 2]),
    )
    return renumber(bare)


def where(valid, position):
    """Positions of the valid entries."""
    return np.asarray(position)[np.asarray(valid)].tolist()


def test_positions_are_contiguous(streams):
    assert where(streams.prefix_valid[0], streams.prefix_position[0]) == [0, 1]
    assert where(streams.visual_valid[0], streams.visual_position[0]) == [2, 3, 4]
    for question, places in ((0, [5, 6, 7]), (1, [5])):
        valid, position = streams.token_valid[0, question], streams.token_position[0, question]
        assert where(valid, position) == places
    assert where(streams.prefix_valid[1], streams.prefix_position[1]) == [0]
    assert where(streams.visual_valid[1], streams.visual_position[1]) == [1, 2]
    assert where(streams.token_valid[1, 0], streams.token_position[1, 0]) == [3, 4]


def test_places_may_leave_gaps(streams):
    s = spread(streams, jnp.asarray([[0, 1, 5, 9], [0, 3, 4, 7]]))
    assert where(s.visual_valid[0], s.visual_position[0]) == [2, 7, 11]
    assert where(s.token_valid[0, 0], s.token_position[0, 0]) == [12, 13, 14]
    assert where(s.visual_valid[1], s.visual_position[1]) == [4, 8]
    assert where(s.token_valid[1, 0], s.token_position[1, 0]) == [9, 10]


def test_packed_rows_stand_in_reading_order(streams):
    packed = pack(streams)
    for b in range(B):
        rows = []
        for valid, hidden, segment in (
            (streams.prefix_valid[b], streams.prefix[b], 0),
            (streams.visual_valid[b], streams.visual[b], 0),
            *((streams.token_valid[b, q], streams.token[b, q], q + 1) for q in range(Q)),
        ):
            rows += [(h, segment) for h, ok in zip(hidden, valid, strict=True) if ok]
        assert packed.rows.length[b] == len(rows)
        for i, (hidden, segment) in enumerate(rows):
            np.testing.assert_array_equal(packed.hidden[b, i], hidden)
            assert packed.rows.segment[b, i] == segment
    shared = int(streams.prefix_valid[0].sum() + streams.visual_valid[0].sum())
    assert packed.position[0, : shared + 4].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5]


def test_one_question_needs_no_segments(streams):
    assert pack(fold(streams)).rows.segment is None


def test_unpack_undoes_pack(streams):
    packed = pack(streams)
    again = unpack(streams, packed, packed.hidden)
    for name, array in streams._asdict().items():
        np.testing.assert_array_equal(getattr(again, name), array, err_msg=name)


def test_fold_repeats_what_is_shared(streams):
    s = fold(streams)
    for i, (b, q) in enumerate(np.ndindex(B, Q)):
        for name, array in streams._asdict().items():
            own = array.shape[:3] == (B, Q, T)
            want = array[b, q][None] if own else array[b]
            np.testing.assert_array_equal(getattr(s, name)[i], want, err_msg=name)


def test_shared_selection_keeps_positions(streams):
    index = jnp.asarray([[[0, 3]], [[3, 0]]])
    valid = jnp.asarray([[[True, True]], [[True, False]]])
    kept = select_visual(streams, Kept(Selection(index, valid)))
    np.testing.assert_array_equal(kept.visual[0], streams.visual[0, [0, 3]])
    assert kept.visual_position[0].tolist() == streams.visual_position[0, [0, 3]].tolist()
    assert kept.slot.tolist() == [[0, 3], [3, 0]]
    assert kept.visual_valid.tolist() == [[True, True], [True, False]]
    np.testing.assert_array_equal(kept.centre[0], streams.centre[0, [0, 3]])
    assert kept.view.tolist() == [[0, 1], [2, 0]]
    assert kept.newline.tolist() == [[False, True], [True, False]]
    assert kept.token is streams.token
    assert kept.entered.tolist() == [3, 2]


def test_a_withdrawal_leaves_text_where_it_was(streams):
    nothing = jnp.zeros((B, 1, 0), jnp.int32)
    left = select_visual(streams, Kept(Selection(nothing, nothing > 0)))
    for name in VISUAL:
        assert getattr(left, name).shape[:2] == (B, 0), name
    np.testing.assert_array_equal(left.token_position, streams.token_position)
    packed = pack(left)
    assert packed.rows.length.tolist() == [2 + 4, 1 + 2]
    assert renumber(left).token_position[0, 0].tolist() == [2, 3, 4]


def test_merged_tokens_stand_behind_the_kept_ones(streams):
    index, valid = jnp.asarray([[[0]], [[3]]]), jnp.ones((B, 1, 1), bool)
    new = jnp.asarray(np.arange(B * 2 * D).reshape(B, 1, 2, D), float)
    new_valid = jnp.asarray([[[True, True]], [[True, False]]])
    s = renumber(select_visual(streams, Kept(Selection(index, valid), Merged(new, new_valid))))
    assert s.visual.shape == (B, 3, D)
    np.testing.assert_array_equal(s.visual[:, 1:], new[:, 0])
    assert s.visual_valid.tolist() == [[True, True, True], [True, True, False]]
    assert where(s.visual_valid[0], s.visual_position[0]) == [2, 3, 4]
    assert where(s.visual_valid[1], s.visual_position[1]) == [1, 2]
    assert where(s.token_valid[0, 0], s.token_position[0, 0]) == [5, 6, 7]
    np.testing.assert_allclose(s.centre[0, 1:], jnp.stack([streams.centre[0, 0]] * 2), atol=1e-6)
    assert not s.newline[:, 1:].any()


def test_selection_of_each_question_folds(streams):
    index = jnp.asarray([[[0, 2], [2, 3]], [[1, 3], [3, 0]]])
    valid = jnp.asarray([[[True, True], [True, True]], [[True, True], [True, False]]])
    kept = select_visual(streams, Kept(Selection(index, valid)))
    assert kept.token.shape == (B * Q, 1, T, D)
    for i, (b, q) in enumerate(np.ndindex(B, Q)):
        want = np.where(valid[b, q][:, None], streams.visual[b, index[b, q]], 0)
        np.testing.assert_array_equal(kept.visual[i], want)


@pytest.mark.parametrize(
    ("valid", "label", "at"),
    [
        ("111110", "000000", 4),  # a prompt: its last valid token
        ("111111", "000110", 2),  # training: before the answer
        ("111111", "011010", 3),  # several turns: before the last answer
        ("011100", "000000", 3),
        ("111100", "110000", 3),  # an answer without a prompt before it
        ("000000", "000000", None),
    ],
)
def test_last_of_prompt(valid, label, at):
    bits = lambda s: jnp.asarray([[[c == "1" for c in s]]])  # noqa: E731
    mark = last_of_prompt(bits(valid), bits(label))[0, 0]
    assert np.flatnonzero(mark).tolist() == ([] if at is None else [at])


def test_row_at():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    mark = jnp.asarray([[False, True, False, False], [False, False, False, True]])
    np.testing.assert_array_equal(row_at(x, mark), jnp.stack([x[0, 1], x[1, 3]]))
