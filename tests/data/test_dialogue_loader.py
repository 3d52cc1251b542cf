"""Batches of dialogues: what they hold, shares of processes, exact resume, damaged images."""

import json
from dataclasses import replace

import numpy as np
import pytest

from focus_jax.data import dialogue_lengths
from focus_jax.data.conversation import PLAIN, VICUNA_V1, encode_dialogue
from focus_jax.data.dialogue_lengths import token_lengths
from focus_jax.data.dialogue_loader import make_dialogue_loader
from focus_jax.data.images import decode
from focus_jax.data.loader_config import DialogueConfig
from focus_jax.data.preprocess import ImageConfig, preprocess
from focus_jax.data.tokenizer import build_tokenizer
from tests.data.dialogue_source import Listed, dialogue, photo

POINTS = ((8, 16), (16, 8), (16, 16), (24, 8), (8, 24))
ANYRES = ImageConfig("anyres", size=8, patch=4, pinpoints=POINTS)
CONFIG = DialogueConfig(batch=3, accumulate=2, lengths=(64, 96, 128), epochs=1, threads=0)
# Sizes of images of 3, 4 and 5 views.
SIZES = {3: (8, 16), 4: (30, 10), 5: (24, 24)}
VIEWS = [3, 3, 4, 5, 5, 5, 3, 5] * 2


@pytest.fixture(scope="module")
def tokenizer():
    words = [VICUNA_V1.system, "what is here red " + " ".join(map(str, range(10)))]
    return build_tokenizer([*words, "? ."], (), ("USER:", "ASSISTANT:"))


@pytest.fixture(scope="module")
def examples():
    one = [
        dialogue(f"one{i}", [photo(*SIZES[n], seed=i)], turns=1 + i % 3, words=1 + 5 * (i % 4))
        for i, n in enumerate(VIEWS)
    ]
    alone = [dialogue(f"alone{i}", turns=1 + i % 4) for i in range(9)]
    two = [dialogue(f"two{i}", [photo(24, 24, i), photo(8, 16, i + 3)]) for i in range(3)]
    return [*one, *alone, *two]


@pytest.fixture
def load(examples, tokenizer):
    def make(source=None, template=VICUNA_V1, images=ANYRES, folder=None, **changes):
        source = Listed(examples) if source is None else source
        config = replace(CONFIG, **changes)
        return make_dialogue_loader(source, tokenizer, template, config, images, folder)

    return make


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def shape_of(batch):
    return batch["image_at"].shape[1], batch["pixels"].shape[1], batch["tokens"].shape[2]


def test_batches_hold_their_dialogues(load, examples, tokenizer):
    loader = load()
    batches = list(loader)
    assert len(batches) == loader.steps_per_epoch == 2 * 5
    for batch in batches:
        images, views, text = shape_of(batch)
        assert batch["pixels"].shape == (3, views, 8, 8, 3)
        assert batch["tile_rows"].shape == (3, views, 2) and batch["prefix"].shape == (3, 0)
        for b, index in enumerate(batch["index"].tolist()):
            if index < 0:
                assert not batch["row_valid"][b] and not batch["label_mask"][b].any()
                assert batch["token_valid"][b].any() and not batch["patch_valid"][b].any()
                continue
            own = examples[index]
            want = encode_dialogue(tokenizer, VICUNA_V1, own.turns, len(own.images))
            count = len(want.ids)
            assert count <= text and batch["token_valid"][b, 0].sum() == count
            for name, array in (("tokens", want.ids), ("label_mask", want.label_mask)):
                np.testing.assert_array_equal(batch[name][b, 0, :count], array)
                assert not batch[name][b, 0, count:].any()
            np.testing.assert_array_equal(batch["query_mask"][b, 0, :count], want.query_mask)
            at = [*want.image_at, *[count] * (images - len(want.image_at))]
            assert batch["image_at"][b].tolist() == at
            for number in range(images):
                part = slice(number * views // images, (number + 1) * views // images)
                shown = batch["patch_valid"][b, part]
                if number >= len(own.images):
                    assert not shown.any() and not batch["tile_rows"][b, part].any()
                    continue
                tiles = preprocess(own.images[number], ANYRES)
                first = slice(part.start, part.start + len(tiles.pixels))
                np.testing.assert_array_equal(batch["pixels"][b, first], tiles.pixels)
                np.testing.assert_array_equal(batch["patch_valid"][b, first], tiles.patch_valid)
                np.testing.assert_array_equal(batch["tile_rows"][b, first], tiles.row_valid)
                np.testing.assert_array_equal(batch["tile_origin"][b, first], tiles.origin)
                assert shown.sum() == tiles.patch_valid.sum()
    numbers = np.concatenate([batch["index"] for batch in batches])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(len(examples)))


def test_batches_of_a_step_have_one_shape_and_there_are_few(load, examples, tokenizer):
    loader = load(epochs=3)
    shapes = [shape_of(batch) for batch in loader]
    assert shapes[::2] == shapes[1::2] and len(set(shapes)) <= 5
    assert {0, 1} <= {shape[0] for shape in shapes}
    most: dict = {}
    for own, views in zip(examples, [*VIEWS, *[0] * 9, *[5] * 3], strict=True):
        tokens = encode_dialogue(tokenizer, VICUNA_V1, own.turns, len(own.images)).ids
        kind = len(own.images), views
        most[kind] = max(most.get(kind, 0), len(tokens))
    assert loader.longest() == [(*kind, most[kind]) for kind in sorted(most)]
    told = loader.about()
    assert "28 dialogues, 5 steps of 6 an epoch; padding: text " in told and "cut at 128" in told


def test_processes_make_their_shares(load):
    whole = list(load(epochs=2))
    parts = [list(load(epochs=2, rows=rows, threads=2)) for rows in ((0, 2), (1,))]
    for batch, one, other in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(one[name], array[[0, 2]])
            np.testing.assert_array_equal(other[name], array[[1]])


@pytest.mark.parametrize("stop", [0, 1, 7, 13])
def test_resume_is_exact_within_a_step_and_an_epoch(load, stop):
    whole = list(load(epochs=2))
    first = iter(load(epochs=2, threads=2))
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    resumed = iter(load(epochs=2, rows=(0, 1)))
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - stop
    for one, other in zip(rest, whole[stop:], strict=True):
        assert_equal(one, {name: array[:2] for name, array in other.items()})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"accumulate": 1}, "accumulate was 2, is 1"),
        ({"template": PLAIN}, "template was 'vicuna_v1', is 'plain'"),
        ({"images": replace(ANYRES, exif=True)}, "images was"),
        ({"lengths": (64, 128)}, r"lengths was \[64, 96, 128\], is \[64, 128\]"),
    ],
)
def test_a_state_of_other_batches_is_refused(load, changes, said):
    state = iter(load()).get_state()
    with pytest.raises(ValueError, match=said):
        iter(load(**changes)).set_state(state)


def test_other_data_are_refused_and_moved_ones_are_not(load, examples, tmp_path):
    state = iter(load(folder=tmp_path)).get_state()
    iter(load(source=Listed(examples))).set_state(state)
    with pytest.raises(ValueError, match=r"data was .*, is"):
        iter(load(source=Listed(examples[::-1]))).set_state(state)


def damaged(examples, *places):
    wrong = [e._replace(images=(b"broken",)) if i in places else e for i, e in enumerate(examples)]
    return Listed(wrong, Listed(examples).sizes)


def test_corrupt_images_are_replaced_by_others_of_their_shape(load, examples):
    loader = load(source=damaged(examples, 1, 4), max_bad_share=0.1)
    batches = list(loader)
    index = np.concatenate([batch["index"] for batch in batches])
    assert not {1, 4} & set(index.tolist()) and set(index.tolist()) >= set(range(5, 28))
    assert loader.bad_images.indices == (1, 4)
    for one, other in zip(batches, load(), strict=True):
        assert shape_of(one) == shape_of(other)
        for b in np.flatnonzero(one["index"] != other["index"]).tolist():
            stands, gone = one["index"][b], other["index"][b]
            assert gone in (1, 4) and loader.plan.home[stands] == loader.plan.home[gone]
    with pytest.raises(ValueError, match=r"2 of 28 images are corrupt.*max_bad_share=0.05"):
        list(load(source=damaged(examples, 1, 4), max_bad_share=0.05))
    with pytest.raises(ValueError, match="all have corrupt images: repair"):
        list(load(source=damaged(examples, *range(16)), max_bad_share=1.0))


def test_what_is_cut_off_teaches_nothing(load, examples):
    # The system's words and the first question fit, its answer does not.
    for batch in load(source=Listed(examples[:16]), lengths=(37,), batch=8, accumulate=1):
        assert shape_of(batch)[2] == 37 and batch["token_valid"].all()
        assert not batch["row_valid"].any() and batch["patch_valid"].any((1, 2)).all()


def test_captions_alone(load, examples, tokenizer):
    [batch] = load(source=Listed(examples[:6]), template=PLAIN, batch=6, accumulate=1)
    assert (batch["image_at"] == 1).all() and not batch["query_mask"].any()  # behind BOS
    for b, index in enumerate(batch["index"].tolist()):
        told = tokenizer.convert_ids_to_tokens(batch["tokens"][b, 0][batch["label_mask"][b, 0]])
        assert told[0] == "red" and "what" not in told and "USER:" not in told, index


def test_an_index_that_does_not_fit_its_images_is_named(load, examples):
    sizes = Listed(examples).sizes
    sizes[3] = (1, 8, 16)
    with pytest.raises(ValueError, match=r"example 3 \(id 'one3'\) has .*\(1, 5, .*build the data"):
        list(load(source=Listed(examples, sizes), batch=4, accumulate=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (64, 64)}, r"lengths=\(64, 64\)"),
        ({"lengths": ()}, r"lengths=\(\)"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"batch": 30}, "60 dialogues a step .* more than the 28"),
        ({"source": Listed([])}, "holds no dialogues"),
    ],
)
def test_bad_settings_are_named(load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(**changes)


# ---------------------------------------------------------------- counts of tokens


def test_tokens_are_counted_once_for_tokenizer_template_and_data(
    examples, tokenizer, tmp_path, monkeypatch, capsys
):
    source = Listed(examples)
    want = [
        len(encode_dialogue(tokenizer, VICUNA_V1, e.turns, len(e.images)).ids) for e in examples
    ]
    monkeypatch.setattr(dialogue_lengths, "_CHUNK", 5)
    assert token_lengths(source, tokenizer, VICUNA_V1, tmp_path).tolist() == want
    assert "counting the tokens of 28 dialogues" in capsys.readouterr().err
    [file] = tmp_path.iterdir()
    assert source.images_read == 0
    with monkeypatch.context() as patch:
        patch.setattr(dialogue_lengths, "_count", None)
        assert token_lengths(source, tokenizer, VICUNA_V1, tmp_path).tolist() == want
    other = build_tokenizer(["red"])
    for change in ((source, other, VICUNA_V1), (source, tokenizer, PLAIN)):
        token_lengths(*change, tmp_path)
    token_lengths(Listed(examples[1:]), tokenizer, VICUNA_V1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    # A damaged file is told and written again.
    capsys.readouterr()
    file.write_bytes(file.read_bytes()[:50])
    assert token_lengths(source, tokenizer, VICUNA_V1, tmp_path).tolist() == want
    assert "is damaged" in capsys.readouterr().err
    assert np.load(file).tolist() == want


def test_a_folder_that_cannot_be_written_costs_only_time(examples, tokenizer, tmp_path, capsys):
    counts = token_lengths(Listed(examples), tokenizer, VICUNA_V1, tmp_path / "none")
    assert len(counts) == 28 and "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_count_as_one_does(examples, tokenizer, monkeypatch):
    source = Listed(examples)
    alone = token_lengths(source, tokenizer, VICUNA_V1, workers=1)
    monkeypatch.setattr(dialogue_lengths, "_FEW", 1)
    monkeypatch.setattr(dialogue_lengths, "_CHUNK", 3)
    np.testing.assert_array_equal(token_lengths(source, tokenizer, VICUNA_V1, workers=2), alone)


def test_the_photos_of_the_test_are_what_they_seem(examples):
    assert decode(examples[3].images[0]).shape == (24, 24, 3)
    assert [len(preprocess(e.images[0], ANYRES).pixels) for e in examples[:16]] == VIEWS
