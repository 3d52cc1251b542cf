"""Batches: static shapes, order, shards, exact resume, damaged images."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from focus_jax.data.conversation import BRIEF, VICUNA_V1
from focus_jax.data.glyphs import KINDS, GlyphsConfig, cell_words, vocabulary
from focus_jax.data.images import decode
from focus_jax.data.loader import LoaderConfig, make_loader
from focus_jax.data.sources import FreshSource
from focus_jax.data.tokenizer import build_tokenizer

GLYPHS = GlyphsConfig(grid=4, groups=2, questions=5)
CONFIG = LoaderConfig(batch=4, questions=3, image_size=32, text_length=20, epochs=1)
SIZE = 22


class Records:
    """Records held in a list."""

    def __init__(self, records):
        self._records = records

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]


@pytest.fixture(scope="module")
def records():
    fresh = FreshSource(GLYPHS, 0, SIZE)
    return [fresh[i] for i in range(SIZE)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([], vocabulary(GLYPHS), ("USER:", "ASSISTANT:"))


@pytest.fixture
def load(records, tokenizer):
    def make(train=True, config=CONFIG, source=None, template=BRIEF, **changes):
        rows = Records(records) if source is None else source
        config = replace(config, **changes)
        return make_loader(rows, tokenizer, template, config, train, GLYPHS)

    return make


def damaged(records, *places):
    return Records([{**r, "image": b"broken"} if i in places else r for i, r in enumerate(records)])


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def read(tokenizer, ids, mask):
    return " ".join(tokenizer.convert_ids_to_tokens(ids[mask].tolist()))


def spaced(text):
    """Digits stand alone in tokens."""
    return " ".join(text) if text.isdigit() else text


def test_training_batches_hold_their_records(load, records, tokenizer):
    loader = load()
    batches = list(loader)
    assert len(batches) == loader.steps_per_epoch == SIZE // 4
    for batch in batches:
        assert batch["row_valid"].all() and batch["patch_valid"].all()
        gold = loader.gold(batch)
        for b, index in enumerate(batch["index"].tolist()):
            record = records[index]
            np.testing.assert_array_equal(batch["pixels"][b, 0], decode(record["image"]))
            np.testing.assert_array_equal(batch["glyph"][b], record["glyph"])
            assert read(tokenizer, batch["prefix"][b], batch["prefix_valid"][b]) == "<s> USER:"
            assert len(set(batch["question"][b].tolist())) == 3
            for q, number in enumerate(batch["question"][b].tolist()):
                tokens = batch["tokens"][b, q]
                question, answer = record["question"][number], record["answer"][number]
                text = f"{question} ASSISTANT: {answer} </s>".split()
                text = " ".join(spaced(word) for word in text)
                assert read(tokenizer, tokens, batch["token_valid"][b, q]) == text
                assert read(tokenizer, tokens, batch["label_mask"][b, q]) == (
                    f"{spaced(answer)} </s>"
                )
                asked = " ".join(spaced(word) for word in question.split())
                assert read(tokenizer, tokens, batch["query_mask"][b, q]) == asked
                count = batch["token_valid"][b, q].sum()
                assert batch["token_valid"][b, q, :count].all()
                assert KINDS[batch["kind"][b, q]] == gold[b][q].kind
                assert gold[b][q][:2] == (question, answer)


def test_shapes_and_types_are_static(load):
    for train, flat, questions in ((True, False, 3), (False, False, 5), (False, True, 1)):
        for batch in load(train, flat=flat):
            shapes = {name: (value.dtype.name, *value.shape) for name, value in batch.items()}
            b, q = 4, questions
            assert shapes == {
                "pixels": ("uint8", b, 1, 32, 32, 3),
                "patch_valid": ("bool", b, 1, 16),
                "tile_origin": ("int32", b, 1, 2),
                "prefix": ("int32", b, 4),
                "prefix_valid": ("bool", b, 4),
                "tokens": ("int32", b, q, 20),
                "token_valid": ("bool", b, q, 20),
                "label_mask": ("bool", b, q, 20),
                "query_mask": ("bool", b, q, 20),
                "row_valid": ("bool", b, q),
                "index": ("int64", b),
                "question": ("int32", b, q),
                "kind": ("int32", b, q),
                "cell_words": ("int32", b, 16, 3),
                "cell_filled": ("bool", b, 16),
                "glyph": ("int32", b, 16),
                "colour": ("int32", b, 16),
            }


def test_cells_are_described_in_words(load, records, tokenizer):
    batch = next(iter(load(train=False)))
    words = cell_words(GLYPHS)
    for b in range(4):
        for cell in range(16):
            glyph, colour = records[b]["glyph"][cell], records[b]["colour"][cell]
            quarter = ("north" if cell < 8 else "south") + ("west" if cell % 4 < 2 else "east")
            expected = [words.colour[colour], words.glyph[glyph], quarter]
            found = tokenizer.convert_ids_to_tokens(batch["cell_words"][b, cell].tolist())
            assert found == expected
            assert batch["cell_filled"][b, cell] == (glyph > 0) == (found[1] != "empty")


def test_evaluation_asks_everything_once_in_order(load, records, tokenizer):
    loader = load(train=False)
    batches = list(loader)
    assert len(batches) == loader.steps_per_epoch == 6
    index = np.concatenate([batch["index"] for batch in batches])
    assert index.tolist() == [*range(SIZE), -1, -1]
    last = batches[-1]
    assert last["row_valid"].tolist() == [[True] * 5] * 2 + [[False] * 5] * 2
    # Padding repeats a real example: nothing downstream meets an empty sequence.
    assert last["token_valid"].any(axis=-1).all() and last["prefix_valid"].any(axis=-1).all()
    assert loader.gold(last)[2] == [None] * 5
    for batch in batches:
        assert not batch["label_mask"].any()
        for b, q in np.argwhere(batch["row_valid"]).tolist():
            assert batch["question"][b, q] == q
            text = read(tokenizer, batch["tokens"][b, q], batch["token_valid"][b, q])
            question = records[batch["index"][b]]["question"][q]
            assert text == f"{question} ASSISTANT:"


def test_flat_evaluation_has_a_question_per_row(load):
    rows = []
    for batch in load(train=False, flat=True):
        for b in np.flatnonzero(batch["row_valid"][:, 0]).tolist():
            rows.append((batch["index"][b], batch["question"][b, 0]))
    assert rows == [(image, question) for image in range(SIZE) for question in range(5)]


def test_order_follows_the_seed_and_changes_with_the_epoch(load):
    def order(**changes):
        return np.concatenate([batch["index"] for batch in load(**changes)]).tolist()

    two = order(epochs=2)
    assert two == order(epochs=2) and two[:20] == order()
    assert two[:20] != two[20:]
    assert order(seed=1) != order()
    assert order(shuffle=False) == list(range(20))


def test_questions_differ_between_epochs_and_cover_all(load):
    seen = Counter()
    for batch in load(epochs=20):
        for index, chosen in zip(batch["index"], batch["question"].tolist(), strict=True):
            seen.update((int(index), number) for number in chosen)
    assert len(seen) == SIZE * 5


@pytest.mark.parametrize("threads", [0, 2])
def test_threads_do_not_change_the_batches(load, threads):
    pairs = zip(load(epochs=2), load(epochs=2, threads=threads), strict=True)
    for one, other in pairs:
        assert_equal(one, other)


@pytest.mark.parametrize(("train", "flat"), [(True, False), (False, False), (False, True)])
def test_shards_cover_the_data_without_overlap(load, train, flat):
    places, lengths = [], []
    for process in range(3):
        batches = list(load(train, flat=flat, process_index=process, process_count=3))
        lengths.append(len(batches))
        for batch in batches:
            valid = batch["row_valid"]
            index = np.broadcast_to(batch["index"][:, None], valid.shape)
            places += zip(index[valid].tolist(), batch["question"][valid].tolist(), strict=True)
    assert len(set(lengths)) == 1
    assert len(set(places)) == len(places)
    if train:
        # 22 images over 3 processes: 7 each, of which one batch of 4 is full.
        assert len(places) == 3 * 4 * 3
    else:
        assert len(places) == SIZE * 5


@pytest.mark.parametrize("stop", [0, 3, 5, 7])
def test_resume_is_exact(load, stop):
    whole = list(load(epochs=2))
    first = iter(load(epochs=2))
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    # Reading on must not change a state already taken.
    next(first)
    first.close()
    resumed = iter(load(epochs=2))
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - stop
    for one, other in zip(rest, whole[stop:], strict=True):
        assert_equal(one, other)


def test_endless_training_goes_on(load):
    batches = iter(load(epochs=None))
    assert len([next(batches) for _ in range(13)]) == 13
    batches.close()


def test_state_of_another_order_is_refused(load):
    state = iter(load()).get_state()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        iter(load(seed=1)).set_state(state)
    # The same state serves every process of a run.
    shards = [load(process_index=i, process_count=2) for i in range(2)]
    iter(shards[1]).set_state(iter(shards[0]).get_state())


def test_training_replaces_corrupt_images(load, records):
    loader = load(source=damaged(records, 2, 9), max_bad_share=0.1, epochs=4)
    batches = list(loader)
    assert len(batches) == 4 * 5
    index = np.concatenate([batch["index"] for batch in batches])
    assert not {2, 9} & set(index.tolist())
    assert all(batch["row_valid"].all() for batch in batches)
    assert loader.bad_images.indices == (2, 9)
    again = load(source=damaged(records, 2, 9), max_bad_share=0.1, epochs=4)
    for one, other in zip(batches, again, strict=True):
        assert_equal(one, other)


def test_evaluation_marks_corrupt_images(load, records):
    loader = load(train=False, source=damaged(records, 5), max_bad_share=0.1)
    batches = list(loader)
    valid = np.concatenate([batch["row_valid"] for batch in batches])[:SIZE]
    assert np.flatnonzero(~valid.any(axis=1)).tolist() == [5]
    assert loader.bad_images.indices == (5,)


@pytest.mark.parametrize("train", [True, False])
def test_too_many_corrupt_images_are_an_error(load, records, train):
    loader = load(train, source=damaged(records, *range(4, 9)), max_bad_share=0.1, epochs=3)
    with pytest.raises(ValueError, match=r"3 of 22 images are corrupt.*max_bad_share=0.1"):
        list(loader)


def test_nothing_but_corrupt_images_ends(load, records):
    loader = load(source=damaged(records, *range(SIZE)), max_bad_share=1.0)
    with pytest.raises(ValueError, match="all corrupt"):
        list(loader)


def test_fewer_questions_than_slots_leave_invalid_rows(load):
    batch = next(iter(load(questions=7)))
    assert batch["row_valid"].tolist() == [[True] * 5 + [False] * 2] * 4
    assert not batch["label_mask"][:, 5:].any() and batch["token_valid"].any(axis=-1).all()


def test_cut_answers_teach_nothing(load):
    short = list(load(text_length=6))
    for batch in short:
        np.testing.assert_array_equal(batch["row_valid"], batch["label_mask"].any(axis=-1))
    assert not all(batch["row_valid"].all() for batch in short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 23}, "batch=23 is larger than the 22"),
        ({"batch": 8, "process_count": 3}, "larger than the 7"),
        ({"source": Records([])}, "no examples"),
        ({"image_size": 64}, "do not match glyphs"),
        ({"batch": 0}, "batch=0"),
        ({"process_index": 1}, "process_index=1"),
        ({"epochs": 0}, "epochs=0"),
        ({"max_bad_share": 2.0}, "max_bad_share=2.0"),
        ({"patch": 7}, "patch=7"),
    ],
)
def test_bad_settings_are_named(load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(**changes)


def test_lengths_that_do_not_suffice_are_named(load):
    with pytest.raises(ValueError, match="prefix_length=1: template 'brief' puts 2 tokens"):
        list(load(prefix_length=1))
    with pytest.raises(ValueError, match="text_length=4: the prompt"):
        list(load(train=False, text_length=4))
    with pytest.raises(ValueError, match="vicuna_v1"):
        list(load(template=VICUNA_V1))
    assert next(iter(load(template=VICUNA_V1, prefix_length=40)))["prefix_valid"].sum(1).min() > 20


def test_uneven_question_counts_are_refused_in_evaluation(load, records):
    uneven = [*records[:-1], {**records[-1], "question": records[-1]["question"][:3]}]
    with pytest.raises(ValueError, match="example 21 has 3 questions"):
        list(load(train=False, source=Records(uneven)))


def test_a_tokenizer_without_the_words_of_cells_is_refused(records):
    poor = build_tokenizer(["what is red ?"])
    with pytest.raises(ValueError, match="no token for"):
        make_loader(Records(records), poor, BRIEF, CONFIG, True, GLYPHS)
