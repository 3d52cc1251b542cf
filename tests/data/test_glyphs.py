"""The embedded data set: deterministic, unambiguous, and mute without its image."""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from focus_jax.data import glyphs
from focus_jax.data.glyph_art import (
    CARDS,
    COLOURS,
    DIGITS,
    GLYPHS,
    MIN_CELL,
    SHAPES,
    bitmap,
    paint,
)
from focus_jax.data.glyphs import (
    HOPS,
    GlyphsConfig,
    cell_words,
    make_example,
    split_seed,
    vocabulary,
)
from focus_jax.experiment import load_program

CONFIGS_FOLDER = Path(__file__).parents[2] / "configs"
EVERYTHING = GlyphsConfig(digits=2, letters=True, dense=0.5, max_hops=3, questions=12)
PAIRED = GlyphsConfig(
    digits=2, groups=6, beside=True, cards=True, tally=3, dense=0.5, max_hops=3, questions=16
)
EMBEDDED = load_program(CONFIGS_FOLDER / "glyphs_base.py").data.glyphs
CONFIGS = (GlyphsConfig(), GlyphsConfig(digits=3, dense=1.0), EVERYTHING, PAIRED, EMBEDDED)


# (relation, what stands there) and how far, in rows and columns, from it to the shape.
RELATIONS = {("above", "shape"): (1, 0), ("left", "number"): (0, 1)}


def describe(config, example):
    """The scene read back from its labels alone: what each colour owns, and in which cells."""
    words = cell_words(config)
    glyph = example["glyph"].reshape(config.grid, config.grid)
    colour = example["colour"].reshape(config.grid, config.grid)
    owned = defaultdict(lambda: {"number": "", "shape": "", "letter": "", "at": defaultdict(list)})
    for row, col in np.argwhere(glyph).tolist():
        entry = owned[words.colour[colour[row, col]]]
        name = words.glyph[glyph[row, col]]
        thing = "number" if name.isdigit() else "shape" if name in SHAPES else "letter"
        assert not (thing == "shape" and entry["shape"])
        entry[thing] = entry[thing] + name if thing == "number" else name
        entry["at"][thing].append((row, col))
    return dict(owned)


def follow(scene, question):
    """(the group that a question ends at, the cells that it is about), parsed from its words."""
    words = question.split()
    subject = words[-1]
    if subject in COLOURS:
        thing, group = "", scene[subject]
    else:
        [(thing, group)] = [
            (thing, group)
            for group in scene.values()
            for thing in ("number", "shape", "letter")
            if group[thing] == subject
        ]
    cells = set(group["at"][thing])
    for (relation, beyond), step in RELATIONS.items():
        if relation in words:
            [(row, col)] = group["at"]["shape"]
            before = (row - step[0], col - step[1])
            [group] = [g for g in scene.values() if before in g["at"][beyond]]
            cells |= set(group["at"][beyond])
    # "how many letters", "where is the number", "what shape", ...; else it ends where it began.
    asked = {"how": "letter", "where": words[3]}.get(words[0], words[1])
    return group, cells | set(group["at"].get(asked, ()))


def solve(config, example, question):
    """The answer that the scene gives to a question."""
    scene = describe(config, example)
    group, _ = follow(scene, question)
    if question.startswith("how many letters"):
        return str(len(group["at"]["letter"]))
    if question.startswith("what colour"):
        return next(colour for colour, g in scene.items() if g is group)
    if question.startswith("where"):
        half = config.grid // 2
        row, col = group["at"]["number" if "number" in question else "shape"][0]
        return f"{('north', 'south')[row // half]}{('west', 'east')[col // half]}"
    return group[question.split()[1]]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_question_has_the_one_answer_that_the_labels_give(config):
    for index in range(40):
        example = make_example(config, 3, index)
        for asked in example["questions"]:
            assert solve(config, example, asked["question"]) == asked["answer"]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_cells_of_a_question_are_those_of_all_its_hops(config):
    for index in range(40):
        example = make_example(config, 4, index)
        scene = describe(config, example)
        for asked in example["questions"]:
            cells = [divmod(cell, config.grid) for cell in asked["cells"]]
            assert len(cells) <= config.most_cells
            assert set(cells) == follow(scene, asked["question"])[1], asked["question"]


@pytest.mark.parametrize("config", [PAIRED, EMBEDDED])
def test_cards_lie_under_the_pairs_that_stand_together(config):
    words = cell_words(config)
    alone = config.groups // 2
    for index in range(30):
        example = make_example(config, 0, index)
        square = (config.grid, config.grid)
        card, glyph, colour = (example[k].reshape(square) for k in ("card", "glyph", "colour"))
        seen = Counter()
        for tint in set(card[card > 0].tolist()):
            (row, col), *more = np.argwhere(card == tint).tolist()
            cells = [(row, col), *map(tuple, more)]
            names = [words.glyph[glyph[cell]] for cell in cells]
            assert names[-1] in SHAPES
            owners = [int(colour[cell]) for cell in cells]
            assert len(set(owners)) == 2 and owners[-1] not in owners[:-1]
            if names[0] in SHAPES:
                assert cells == [(row, col), (row + 1, col)]
                seen["above"] += 1
            else:
                assert cells == [(row, col + i) for i in range(config.digits + 1)]
                assert all(name.isdigit() for name in names[:-1])
                seen["left"] += 1
        assert seen == {"above": alone // 2, "left": config.groups - alone}
        assert words.card[card.max()] in CARDS


def test_only_pairs_on_a_card_are_asked_about():
    kinds = ("colour_left_of_shape", "shape_matching_left", "colour_above_shape")
    config = dataclasses.replace(EMBEDDED, dense=0.8, kinds=kinds, questions=2 + 2 + 1)
    chance = 0
    for index in range(60):
        example = make_example(config, 0, index)
        scene = describe(config, example)
        card = example["card"].reshape(config.grid, config.grid)
        on_card, beside_it = Counter(), Counter()  # neighbours, by relation and subject
        for (relation, beyond), (row, col) in RELATIONS.items():
            for right in scene.values():
                [(r, c)] = right["at"]["shape"]
                for left in scene.values():
                    if (r - row, c - col) in left["at"][beyond]:
                        same = card[r, c] == card[r - row, c - col] > 0
                        (on_card if same else beside_it)[relation, right["shape"]] += 1
        asked = Counter()
        for q in example["questions"]:
            words = q["question"].split()
            asked["above" if "above" in words else "left", words[-1], q["kind"]] += 1
        expected = {
            (relation, shape, kind)
            for relation, shape in on_card
            for kind in kinds
            if ("above" in kind) == (relation == "above")
        }
        assert set(asked) == expected and max(asked.values()) == 1
        chance += beside_it.total()
    assert chance > 10  # Neighbours by chance, which nothing asks about.


def test_a_card_is_painted_on_its_cells_alone():
    config = dataclasses.replace(EMBEDDED, jitter=1, light=0.5)
    tints = [None, *CARDS.values()]
    for index in range(10):
        example = make_example(config, 0, index)
        cells = example["image"].reshape(config.grid, config.cell, config.grid, config.cell, 3)
        cells = cells.transpose(0, 2, 1, 3, 4).reshape(config.grid**2, -1, 3)
        for cell, card, glyph in zip(cells, example["card"], example["glyph"], strict=True):
            like = {n for n, rgb in enumerate(tints) if n and (cell == rgb).all(-1).sum() > 8}
            assert like == ({int(card)} if card else set())
            if card:
                name = cell_words(config).glyph[glyph]
                ground = (cell == tints[card]).all(-1).sum()
                assert ground == config.cell**2 - bitmap(name, config.cell).sum()


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
    assert set(counts) == set(config.asked_kinds)
    assert min(counts.values()) > 0.8 * max(counts.values())


def test_an_example_is_a_function_of_seed_and_index():
    first, again = make_example(EVERYTHING, 5, 7), make_example(EVERYTHING, 5, 7)
    assert first["questions"] == again["questions"]
    for name in ("image", "glyph", "colour", "card"):
        np.testing.assert_array_equal(first[name], again[name])
    for other in (make_example(EVERYTHING, 6, 7), make_example(EVERYTHING, 5, 8)):
        assert (first["image"] != other["image"]).any()


def test_version_pins_the_content():
    # A change here needs a new VERSION: users' files on disk would no longer match the code.
    example = make_example(GlyphsConfig(), 0, 0)
    questions = [{k: v for k, v in q.items() if k != "cells"} for q in example["questions"]]
    content = repr(questions).encode() + example["image"].tobytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    assert digest == "94c7f8f06d638bbc"


def test_the_embedded_jobs_data_are_pinned():
    # A change here needs a new VERSION, and the stored language model has learnt other scenes.
    example = make_example(EMBEDDED, split_seed(0, "train"), 0)
    assert {q["kind"] for q in example["questions"]} == set(EMBEDDED.asked_kinds)
    content = [repr(q).encode() for q in example["questions"]]
    content += [example[name].tobytes() for name in ("image", "glyph", "colour", "card")]
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:16]
    assert digest == "cc343925362b7ff5"


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


@pytest.mark.parametrize(
    ("letters", "tally", "names"),
    [
        (False, 0, (*DIGITS, *SHAPES)),
        (True, 0, GLYPHS),
        (False, 2, GLYPHS),  # Letters to be counted are letters as well.
    ],
)
def test_clutter_has_the_glyphs_of_its_scenes(letters, tally, names):
    plain = GlyphsConfig(letters=letters, tally=tally)
    words, counts = cell_words(plain).glyph, Counter()
    for index in range(10):
        before = make_example(plain, 0, index)["glyph"]
        after = make_example(dataclasses.replace(plain, clutter=0.5), 0, index)["glyph"]
        counts.update(words[glyph] for glyph in after[(before == 0) & (after > 0)])
    assert set(counts) == set(names)
    mean = counts.total() / len(names)
    assert all(abs(count - mean) < 4.5 * mean**0.5 for count in counts.values())


def test_clutter_lies_on_cards_and_beside_them():
    config = dataclasses.replace(EMBEDDED, clutter=0.5)
    tints = Counter()
    for index in range(20):
        before, after = make_example(EMBEDDED, 0, index), make_example(config, 0, index)
        scene = before["glyph"] > 0
        assert after["questions"] == before["questions"]
        np.testing.assert_array_equal(after["card"][scene], before["card"][scene])
        assert not after["card"][after["glyph"] == 0].any()
        tints.update(after["card"][~scene & (after["glyph"] > 0)].tolist())
    assert set(tints) == set(range(len(CARDS) + 1))
    total, bare = tints.total(), tints.pop(0)
    assert abs(bare / total - 1 / 2) < 0.04  # four standard deviations, below as well
    for count in tints.values():
        assert abs(count / (total - bare) - 1 / len(CARDS)) < 0.045


@pytest.mark.parametrize(
    ("config", "images"),
    [
        pytest.param(
            GlyphsConfig(max_hops=3, letters=True, questions=12, dense=0.3),
            3000,
            marks=pytest.mark.slow,
        ),
        (GlyphsConfig(), 3000),
        pytest.param(GlyphsConfig(digits=2), 3000, marks=pytest.mark.slow),
        (EMBEDDED, 1000),
        pytest.param(EMBEDDED, 6000, marks=pytest.mark.slow),
    ],
    ids=["everything", "default", "two digits", "embedded", "embedded, more"],
)
def test_answers_cannot_be_guessed_from_the_question(config, images, monkeypatch):
    monkeypatch.setattr(glyphs, "paint", lambda *_: None)  # It draws after the questions.
    # Chance: numbers, 10 shapes, 6 colours, 8 letters, 4 quadrants.
    number = 1 / (10 if config.digits == 1 else 90)
    chance = {"number": number, "digit": number, "shape": 1 / 10, "colour": 1 / 6}
    chance |= {"letter": 1 / 8, "quadrant": 1 / 4, "count": 1 / (config.tally + 1)}
    # A question that names a shape and asks for one: it is another.
    chance |= {kind: 1 / 9 for kind in ("shape_above_shape", "shape_matching_left")}
    learned = defaultdict(Counter)
    for index in range(images):
        for q in make_example(config, split_seed(0, "train"), index)["questions"]:
            learned[q["kind"], q["question"]][q["answer"]] += 1
    hits = defaultdict(list)
    for index in range(images // 3):
        for q in make_example(config, split_seed(0, "test"), index)["questions"]:
            known = learned[q["kind"], q["question"]]
            guess = known.most_common(1)[0][0] if known else None
            hits[q["kind"]].append(guess == q["answer"])
    assert set(hits) == set(config.asked_kinds)
    for kind, right in hits.items():
        expected = chance.get(kind, chance[kind.split("_")[0]])
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
        ({"kinds": ("number_left_of_shape",)}, "beside"),
        ({"kinds": ("count_of_colour",)}, "tally"),
        ({"tally": -1}, "tally=-1"),
        ({"tally": 1, "letters": True}, "one of those counted"),
        ({"tally": 13}, "quarter of the cells"),
        ({"beside": True, "groups": 1, "questions": 4}, "groups=1: beside"),
        ({"beside": True, "grid": 8, "groups": 2, "digits": 4}, "digits=4: with beside"),
        ({"beside": True, "max_hops": 3, "groups": 3}, "groups=3.* 4 or more with beside"),
        ({"beside": True, "kinds": ("colour_left_of_shape",)}, "questions=8.* 1 to 3"),
        ({"beside": True, "max_hops": 3, "kinds": ("shape_above_shape",)}, "questions=8.* 1 to 1"),
        ({"max_hops": 3, "groups": 1, "questions": 4}, "groups=1.* 2 or more"),
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


def test_every_image_has_as_many_questions_as_a_kind_permits():
    kinds = ("colour_left_of_shape", "shape_above_shape", "count_of_colour")
    config = dataclasses.replace(PAIRED, kinds=kinds, dense=0.0, questions=3 + 1 + 6)
    for index in range(20):
        found = Counter(q["kind"] for q in make_example(config, 0, index)["questions"])
        assert found == dict(zip(kinds, (3, 1, 6), strict=True))
    # Without cards, pairs that came about by chance may be asked about as well.
    config, most = dataclasses.replace(config, cards=False, dense=1.0), Counter()
    for index in range(20):
        found = Counter(q["kind"] for q in make_example(config, 0, index)["questions"])
        assert found.total() == config.questions and found[kinds[0]] >= 3 and found[kinds[1]] >= 1
        most |= found
    assert most[kinds[0]] + most[kinds[1]] > 3 + 1
