"""Batches: static shapes, order, shares of processes, exact resume, damaged images."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_jax.data.conversation import BRIEF, VICUNA_V1
from focus_jax.data.glyphs import KINDS, GlyphsConfig, cell_words, vocabulary
from focus_jax.data.images import decode, encode_png
from focus_jax.data.loader import LoaderConfig, make_loader
from focus_jax.data.rows import BadImages, TrainRows
from focus_jax.data.sources import FreshSource
from focus_jax.data.tokenizer import build_tokenizer

GLYPHS = GlyphsConfig(grid=4, groups=2, questions=5)
CONFIG = LoaderConfig(batch=4, questions=3, image_size=32, text_length=20, epochs=1)
SIZE = 22
# Rows of a batch of 4 that each process makes.
SHARES = {
    1: [None],
    2: [(0, 1), (2, 3)],
    3: [(0,), (1, 2), (3,)],
    4: [(i,) for i in range(4)],
}


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


def together(loaders):
    """The batches of several processes, their rows put behind one another."""
    for parts in zip(*loaders, strict=True):
        yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def ids(batches):
    """Numbers of the images, padding left out."""
    index = np.concatenate([batch["index"] for batch in batches])
    return index[index >= 0].tolist()


def read(tokenizer, ids, mask):
    return " ".join(tokenizer.convert_ids_to_tokens(ids[mask].tolist()))


def spaced(text):
    """Digits stand alone in tokens."""
    return " ".join(text) if text.isdigit() else text


def test_training_batches_hold_their_records(load, records, tokenizer):
    loader = load()
    batches = list(loader)
    assert len(batches) == loader.steps_per_epoch == 6
    for batch in batches:
        assert batch["row_valid"].any() and batch["patch_valid"].all()
        gold = loader.gold(batch)
        for b in np.flatnonzero(batch["row_valid"].all(axis=1)).tolist():
            index = int(batch["index"][b])
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
                "evidence": ("bool", b, q, 16),
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


def test_cells_on_cards_have_a_fourth_word_and_questions_their_cells(tokenizer):
    glyphs = replace(GLYPHS, beside=True, cards=True)
    tokenizer = build_tokenizer([], vocabulary(glyphs), ("USER:", "ASSISTANT:"))
    source = FreshSource(glyphs, 0, 8)
    told = set()
    for batch in make_loader(source, tokenizer, BRIEF, CONFIG, True, glyphs):
        assert batch["cell_words"].shape == (4, 16, 4)
        for b, index in enumerate(batch["index"].tolist()):
            record = source[index]
            found = tokenizer.convert_ids_to_tokens(batch["cell_words"][b, :, 3].tolist())
            assert found == [cell_words(glyphs).card[card] for card in record["card"]]
            told |= set(found)
            for q, number in enumerate(batch["question"][b].tolist()):
                about = record["evidence"][number]
                assert set(np.flatnonzero(batch["evidence"][b, q])) == set(about[about >= 0])
                # Cells that a question of this small scene is about hold something.
                assert batch["cell_filled"][b][batch["evidence"][b, q]].all()
    assert len(told) > 2


def test_evaluation_may_hold_its_answers(records, tokenizer):
    rows = Records(records)
    loader = make_loader(rows, tokenizer, BRIEF, CONFIG, False, GLYPHS, answers=True)
    for batch in loader:
        for b, asked in enumerate(loader.gold(batch)):
            for q, gold in enumerate(asked):
                if gold is not None:
                    label = read(tokenizer, batch["tokens"][b, q], batch["label_mask"][b, q])
                    assert label == f"{spaced(gold.answer)} </s>"


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
        return ids(load(**changes))

    two = order(epochs=2)
    assert two == order(epochs=2) and two[:SIZE] == order()
    assert two[:SIZE] != two[SIZE:]
    assert sorted(two[:SIZE]) == sorted(two[SIZE:]) == list(range(SIZE))
    assert order(seed=1) != order()
    assert order(shuffle=False) == list(range(SIZE))


def test_training_leaves_nothing_out_at_the_end_of_an_epoch(load):
    batches = list(load(epochs=3))
    assert len(batches) == 17  # 66 images
    # The sixth batch holds the last two images of one epoch and the first two of the next.
    assert all(batch["row_valid"].all() for batch in batches[:16])
    last = batches[16]
    assert last["index"][2:].tolist() == [-1, -1] and (last["question"][2:] == -1).all()
    assert last["row_valid"].tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    assert not last["label_mask"][2:].any() and last["token_valid"].any(axis=-1).all()
    assert Counter(ids(batches)) == dict.fromkeys(range(SIZE), 3)


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


@pytest.mark.parametrize(
    ("train", "flat", "processes"),
    [(True, False, 2), (True, False, 3), (True, False, 4), (False, False, 2), (False, True, 3)],
)
def test_processes_together_make_the_batches_of_one(load, train, flat, processes):
    whole = load(train, flat=flat)
    shares = [load(train, flat=flat, rows=rows) for rows in SHARES[processes]]
    assert {share.steps_per_epoch for share in shares} == {whole.steps_per_epoch}
    for one, other in zip(together(shares), whole, strict=True):
        assert_equal(one, other)
    for share, rows in zip(shares, SHARES[processes], strict=True):
        held = range(4) if rows is None else rows
        assert {len(array) for array in next(iter(share)).values()} == {len(held)}


def test_rows_of_a_process_need_not_be_neighbours(load):
    whole, share = next(iter(load())), next(iter(load(rows=(0, 3))))
    for name, array in share.items():
        np.testing.assert_array_equal(array, whole[name][[0, 3]])


@pytest.mark.parametrize(("before", "after", "stop"), [(2, 1, 3), (2, 4, 5), (4, 1, 6), (1, 3, 9)])
def test_a_position_serves_any_number_of_processes(load, before, after, stop):
    whole = list(load(epochs=2))
    iterators = [iter(load(epochs=2, rows=rows, threads=2)) for rows in SHARES[before]]
    seen = [next(batches) for batches in [together(iterators)] for _ in range(stop)]
    states = [json.dumps(iterator.get_state()) for iterator in iterators]
    assert len(set(states)) == 1
    resumed = [iter(load(epochs=2, rows=rows, threads=0)) for rows in SHARES[after]]
    for iterator in resumed:
        iterator.set_state(json.loads(states[0]))
    rest = list(together(resumed))
    assert len(rest) == len(whole) - stop
    for one, other in zip(rest, whole[stop:], strict=True):
        assert_equal(one, other)
    numbers = ids(seen) + ids(rest)
    assert sorted(numbers[:SIZE]) == sorted(numbers[SIZE:]) == list(range(SIZE))


PIXEL = {"image": encode_png(np.zeros((4, 4, 3), np.uint8)), "question": ("a", "b", "c")}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_batches_follow_from_their_number_alone(data):
    examples = data.draw(st.integers(1, 20))
    batch = data.draw(st.integers(1, examples))
    seed = data.draw(st.integers(0, 3))
    edges = sorted({0, batch, *data.draw(st.sets(st.integers(0, batch)))})

    def rows(part=None):
        config = LoaderConfig(batch=batch, questions=2, seed=seed, rows=part)
        return TrainRows(Records([PIXEL] * examples), config, BadImages(examples, 0.0))

    def asked(*parts):
        return [(row.index, *row.questions) for one in parts for row in one]

    whole, shares = rows(), [rows(tuple(range(*part))) for part in pairwise(edges)]
    count = 2 * -(-examples // batch)
    batches = [asked(whole(number)) for number in range(count)]
    for number in data.draw(st.permutations(range(count))):
        assert asked(*(share(number) for share in shares)) == batches[number]
    numbers = [row[0] for one in batches for row in one]
    for first in range(0, len(numbers) - examples + 1, examples):
        assert sorted(numbers[first : first + examples]) == list(range(examples))


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
    shares = [load(rows=rows) for rows in SHARES[2]]
    iter(shares[1]).set_state(iter(shares[0]).get_state())
    # A setting that is known no longer changed the order.
    state["order"]["process_count"] = 2
    with pytest.raises(ValueError, match="process_count was 2, is None"):
        iter(load()).set_state(state)


def test_training_replaces_corrupt_images(load, records):
    loader = load(source=damaged(records, 2, 9), max_bad_share=0.1, epochs=4)
    batches = list(loader)
    assert len(batches) == 4 * SIZE // 4
    index = np.concatenate([batch["index"] for batch in batches])
    assert not {2, 9} & set(index.tolist())
    assert all(batch["row_valid"].all() for batch in batches)
    assert loader.bad_images.indices == (2, 9)
    again = load(source=damaged(records, 2, 9), max_bad_share=0.1, epochs=4)
    for one, other in zip(batches, again, strict=True):
        assert_equal(one, other)


def test_processes_put_the_same_images_in_place_of_corrupt_ones(load, records):
    def make(rows=None):
        return load(source=damaged(records, 2, 9), max_bad_share=0.1, epochs=2, rows=rows)

    shares = [make(rows) for rows in SHARES[2]]
    for one, other in zip(together(shares), make(), strict=True):
        assert_equal(one, other)
    found = [set(share.bad_images.indices) for share in shares]
    assert found[0] | found[1] == {2, 9}


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
        ({"rows": (2, 2)}, r"rows=\(2, 2\) of a batch of 4: give"),
        ({"rows": (0, 5)}, r"rows=\(0, 5\) of a batch of 4: give"),
        ({"rows": (-1, 4)}, r"rows=\(-1, 4\) of a batch of 4: give"),
        ({"source": Records([])}, "no examples"),
        ({"image_size": 64}, "do not match glyphs"),
        ({"batch": 0}, "batch=0"),
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
