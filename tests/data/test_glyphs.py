"""The embedded data set: deterministic, unambiguous, and mute without its image."""

import dataclasses
import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from focus_jax.data.glyph_art import COLOURS, DIGITS, GLYPHS, MIN_CELL, SHAPES, bitmap, paint
from focus_jax.data.glyphs import (
    HOPS,
    GlyphsConfig,
    cell_words,
    make_example,
    split_seed,
    vocabulary,
)

EVERYTHING = GlyphsConfig(digits=2, letters=True, dense=0.5, max_hops=3, questions=12)
CONFIGS = (GlyphsConfig(), GlyphsConfig(digits=3, dense=1.0), EVERYTHING)


def describe(config, example):
    """The scene read back from its labels alone: what each colour owns, and where."""
    words = cell_words(config)
    glyph = example["glyph"].reshape(config.grid, config.grid)
    colour = example["colour"].reshape(config.grid, config.grid)
    owned = defaultdict(lambda: {"number": "", "number_at": None, "shape": "", "shape_at": None})
    for row, col in np.argwhere(glyph).tolist():
        entry = owned[words.colour[colour[row, col]]]
        name = words.glyph[glyph[row, col]]
        if name.isdigit():
            entry["number"] += name
            entry["number_at"] = entry["number_at"] or (row, col)
        elif name in SHAPES:
            assert not entry["shape"]
            entry["shape"], entry["shape_at"] = name, (row, col)
        else:
            entry["letter"] = name
    return dict(owned)


def solve(config, example, question):
    """All answers that the scene permits to a question, parsed from its words."""
    scene = describe(config, example)
    words = question.split()
    subject = words[-1]

    def where(cell):
        half = config.grid // 2
        return f"{('north', 'south')[cell[0] // half]}{('west', 'east')[cell[1] // half]}"

    if "above" in words:
        (row, col) = next(g["shape_at"] for g in scene.values() if g["shape"] == subject)
        groups = [g for g in scene.values() if g["shape_at"] == (row - 1, col)]
    elif subject in COLOURS:
        groups = [scene[subject]]
    else:
        holds = ("number", "shape", "letter")
        groups = [g for g in scene.values() if subject in [g.get(name) for name in holds]]
    if question.startswith("what colour"):
        return [colour for colour, g in scene.items() if g in groups]
    if question.startswith("where is the number"):
        return [where(g["number_at"]) for g in groups]
    if question.startswith("where"):
        return [where(g["shape_at"]) for g in groups]
    return [g[words[1]] for g in groups]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_question_has_the_one_answer_that_the_labels_give(config):
    for index in range(40):
        example = make_example(config, 3, index)
        for asked in example["questions"]:
            assert solve(config, example, asked["question"]) == [asked["answer"]]


@pytest.mark.parametrize("config", CONFIGS)
def test_questions_are_short_distinct_and_evenly_spread(config):
    known = set(vocabulary(config)) | set("0123456789")
    counts = Counter()
    for index in range(200):
        questions = make_example(config, 0, index)["questions"]
        texts = [q["question"] for q in questions]
        assert len(set(texts)) == len(texts) == config.questions
        for q in questions:
            assert len(q["question"].split()) <= 10
            assert q["question"] == q["question"].lower() and "?" not in q["question"]
            assert q["hops"] == HOPS[q["kind"]] <= config.max_hops
            pieces = [w for w in (q["question"] + " " + q["answer"]).split() if not w.isdigit()]
            assert set(pieces) <= known
        counts.update(q["kind"] for q in questions)
    assert set(counts) == set(config.permitted_kinds)
    assert min(counts.values()) > 0.8 * max(counts.values())


def test_an_example_is_a_function_of_seed_and_index():
    first, again = make_example(EVERYTHING, 5, 7), make_example(EVERYTHING, 5, 7)
    assert first["questions"] == again["questions"]
    for name in ("image", "glyph", "colour"):
        np.testing.assert_array_equal(first[name], again[name])
    for other in (make_example(EVERYTHING, 6, 7), make_example(EVERYTHING, 5, 8)):
        assert (first["image"] != other["image"]).any()


def test_version_pins_the_content():
    # A change here needs a new VERSION: users' files on disk would no longer match the code.
    example = make_example(GlyphsConfig(), 0, 0)
    content = repr(example["questions"]).encode() + example["image"].tobytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    assert digest == "94c7f8f06d638bbc"


def test_splits_share_no_example():
    config = GlyphsConfig()
    seen = set()
    for seed in (0, 1):
        for split in ("train", "validation", "test", "fresh"):
            stream = split_seed(seed, split)
            seen.update(make_example(config, stream, i)["image"].tobytes() for i in range(50))
    assert len(seen) == 2 * 4 * 50


@pytest.mark.parametrize("cell", [8, 17])
def test_a_glyph_lies_in_exactly_one_cell(cell):
    config = dataclasses.replace(EVERYTHING, cell=cell, dense=1.0)
    for index in range(10):
        example = make_example(config, 1, index)
        ink = np.zeros((config.image_size, config.image_size), bool)
        for rgb in COLOURS.values():
            ink |= (example["image"] == np.array(rgb, np.uint8)).all(axis=-1)
        cells = ink.reshape(config.grid, cell, config.grid, cell).sum(axis=(1, 3)).reshape(-1)
        words = cell_words(config).glyph
        for count, label in zip(cells.tolist(), example["glyph"].tolist(), strict=True):
            assert count == (bitmap(words[label], cell).sum() if label else 0)


def test_bitmaps_fit_and_differ():
    inks = {name: bitmap(name, MIN_CELL) for name in GLYPHS}
    assert all(max(ink.shape) < MIN_CELL and ink.shape[0] == 7 for ink in inks.values())
    assert len({(ink.shape, ink.tobytes()) for ink in inks.values()}) == len(GLYPHS)


def test_backgrounds_carry_little_information():
    empty = np.zeros((16, 16), np.uint8)
    for seed in range(20):
        image = paint(np.random.default_rng(seed), empty, empty, ("red",), 8).astype(int)
        assert np.ptp(image.reshape(-1, 3), axis=0).max() <= 30


def test_grounds_are_as_light_as_asked_and_glyphs_as_steady():
    empty = np.zeros((16, 16), np.uint8)
    for light in (0.0, 1.0):
        grounds = [
            paint(np.random.default_rng(seed), empty, empty, ("red",), 8, light=light).mean()
            for seed in range(10)
        ]
        assert all((ground > 150) == (light == 1.0) for ground in grounds)
    config = GlyphsConfig(jitter=0, light=0.0)
    centred = np.zeros((8, 8), bool)
    centred[:7, :7] = True  # A bitmap of 7 x 7 leaves one row and one column of its cell free.
    for index in range(10):
        example = make_example(config, 0, index)
        ink = (example["image"].max(axis=-1) > 100).reshape(16, 8, 16, 8).any(axis=(0, 2))
        assert ink.any() and not (ink & ~centred).any()


def test_clutter_fills_its_share_of_the_cells_and_leaves_the_questions():
    plain = GlyphsConfig(letters=True, jitter=0, light=0.0)
    config = dataclasses.replace(plain, clutter=0.5)
    filled = []
    for index in range(30):
        before, after = make_example(plain, 0, index), make_example(config, 0, index)
        assert after["questions"] == before["questions"]
        scene = before["glyph"] > 0
        for name in ("glyph", "colour"):
            np.testing.assert_array_equal(after[name][scene], before[name][scene])
        np.testing.assert_array_equal(after["glyph"] > 0, after["colour"] > 0)
        assert after["glyph"].max() <= len(GLYPHS)
        assert after["colour"].max() <= len(plain.colours)
        filled.append((after["glyph"] > 0)[~scene])
        ink = after["image"].max(axis=-1).reshape(16, 8, 16, 8).max(axis=(1, 3)) > 100
        np.testing.assert_array_equal(ink.reshape(-1), after["glyph"] > 0)
    assert abs(np.concatenate(filled).mean() - 0.5) < 0.02
    without = dataclasses.replace(config, letters=False, questions=8)
    seen = {
        cell_words(without).glyph[g] for i in range(5) for g in make_example(without, 0, i)["glyph"]
    }
    assert seen == {"empty", *DIGITS, *SHAPES}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            GlyphsConfig(max_hops=3, letters=True, questions=12, dense=0.3),
            marks=pytest.mark.slow,
        ),
        GlyphsConfig(),
        pytest.param(GlyphsConfig(digits=2), marks=pytest.mark.slow),
    ],
    ids=["everything", "default", "two digits"],
)
def test_answers_cannot_be_guessed_from_the_question(config):
    # Chance: numbers, 10 shapes, 6 colours, 8 letters, 4 quadrants.
    number = 1 / (10 if config.digits == 1 else 90)
    chance = {"number": number, "digit": number, "shape": 1 / 10, "colour": 1 / 6}
    chance |= {"letter": 1 / 8, "quadrant": 1 / 4}
    learned = defaultdict(Counter)
    for index in range(3000):
        for q in make_example(config, split_seed(0, "train"), index)["questions"]:
            learned[q["kind"], q["question"]][q["answer"]] += 1
    hits = defaultdict(list)
    for index in range(1000):
        for q in make_example(config, split_seed(0, "test"), index)["questions"]:
            known = learned[q["kind"], q["question"]]
            guess = known.most_common(1)[0][0] if known else None
            hits[q["kind"]].append(guess == q["answer"])
    assert set(hits) == set(config.permitted_kinds)
    for kind, right in hits.items():
        expected = chance[kind.split("_")[0]]
        noise = 4 * (expected * (1 - expected) / len(right)) ** 0.5
        assert np.mean(right) < expected + noise, kind


def test_dense_scenes_cluster():
    def neighbours(dense):
        total = 0
        for index in range(60):
            config = GlyphsConfig(dense=dense)
            filled = make_example(config, 0, index)["glyph"].reshape(16, 16) > 0
            total += (filled[:, 1:] & filled[:, :-1]).sum() + (filled[1:] & filled[:-1]).sum()
        return total

    assert neighbours(1.0) > 4 * neighbours(0.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": 15}, "even grid"),
        ({"cell": 6}, "8 pixels"),
        ({"colours": ("red", "mauve"), "groups": 1}, "mauve"),
        ({"colours": ("red", "red"), "groups": 1}, "once"),
        ({"groups": 7}, "groups=7"),
        ({"groups": 0}, "groups=0"),
        ({"digits": 0}, "digits=0"),
        ({"grid": 4}, "quarter of the cells"),
        ({"dense": 1.5}, "dense=1.5"),
        ({"clutter": -0.1}, "clutter=-0.1"),
        ({"jitter": 2}, "jitter=2"),
        ({"light": 2.0}, "light=2.0"),
        ({"max_hops": 4}, "max_hops=4"),
        ({"kinds": ("number_above_shape",)}, "not permitted"),
        ({"kinds": ("letter_of_colour",)}, "letters"),
        ({"questions": 41}, "1 to 40"),
        ({"train": 0}, "train=0"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        GlyphsConfig(**wrong)


def test_one_kind_alone():
    config = GlyphsConfig(max_hops=3, kinds=("number_above_shape",), questions=2)
    for index in range(20):
        questions = make_example(config, 0, index)["questions"]
        assert [q["kind"] for q in questions] == ["number_above_shape"] * 2
