"""Rules of yes/no and choice benchmarks: each trap by a hand-made case."""

import random

import pytest

from focus_jax.evaluate.scoring import letters, mmbench, mme, mmmu, pope, scienceqa

# ------------------------------------------------------------------------------------- POPE


@pytest.mark.parametrize(
    ("answer", "llava", "lmms_eval"),
    [
        ("Yes", "yes", "yes"),
        ("Yes.", "yes", "yes."),
        ("No, there is none.", "no", "no, there is none."),
        ("Yes. There is no doubt", "yes", "yes. there is no doubt"),  # the first sentence alone
        ("There is not a cat", "no", "there is not a cat"),
        ("NO", "yes", "no"),
        ("Not", "yes", "not"),
        ("No!", "yes", "no!"),
        ("no\n", "yes", "no"),
        ("it is,not", "yes", "it is,not"),  # commas vanish, "isnot"
        ("", "yes", ""),
    ],
)
def test_pope_reads_yes_or_no(answer, llava, lmms_eval):
    assert pope.parse(answer) == llava
    assert pope.parse_lmms_eval(answer) == lmms_eval


def test_pope_counts():
    """3 of 4 said yes are right, 1 no is wrong: precision 3/4, recall 3/4."""
    said = ["yes", "yes", "yes", "yes", "no", "no"]
    labels = ["yes", "yes", "yes", "no", "yes", "no"]
    figures = pope.count(said, labels).figures()
    assert figures == pytest.approx(
        {"accuracy": 4 / 6, "precision": 0.75, "recall": 0.75, "f1": 0.75, "yes_ratio": 4 / 6}
    )
    # lmms-eval: the labels' share of yes, and what is neither counts in accuracy alone.
    figures = pope.count(["yes.", "no", "yes"], ["yes", "no", "yes"], yes_of_labels=True).figures()
    assert figures == pytest.approx(
        {"accuracy": 2 / 3, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 2 / 3}
    )
    assert pope.count(["no"], ["no"]).figures()["f1"] == 0  # nothing to divide by


# -------------------------------------------------------------------------------------- MME


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Yes.", "yes"), ("Y", "yes"), ("n.", "no"), (" NO ", "no"), ("Yes, it is", "yes"),
        ("now", "no"), ("snow", "no"), ("The answer is yes", "other"), ("Ye", "other"),
        ("", "other"), ("a yes", "other"), ("x", "other"), ("n.o", "no"),
    ],
)  # fmt: skip
def test_mme_reads_the_first_four_characters(answer, parsed):
    assert mme.parse(answer) == parsed


def test_mme_counts_pairs():
    """One image with both right (200), one with one (50): 125. Cognition apart."""
    answered = [
        mme.Answered("OCR", "1", 1.0), mme.Answered("OCR", "2", 0.0), mme.Answered("OCR", "1", 1.0),
        mme.Answered("OCR", "2", 1.0), mme.Answered("code_reasoning", "1", 0.0),
        mme.Answered("code_reasoning", "1", 0.0), mme.Answered("scene", "1", 1.0),
        mme.Answered("scene", "1", 1.0),
    ]  # fmt: skip
    found = mme.by_category(answered)
    assert found == {"OCR": 125, "code_reasoning": 0, "scene": 200}
    assert mme.totals(found) == {"perception": 325, "cognition": 0}


# ---------------------------------------------------------------------------------- MMBench

CHOICES = {"A": "cat", "B": "hot dog", "C": "Dog", "D": "red"}


@pytest.mark.parametrize(
    ("answer", "first", "then"),
    [
        ("B", "B", "B"),
        ("B. hot dog", "B", "B"),
        ("(C)", "C", "C"),
        ("Answer: D", "D", "D"),
        ("it is RED", "D", "D"),
        ("It is a hot dog", None, None),  # also contains "dog"
        ("A red one is B", "D", "D"),  # "A" may be an article: the text decides
        ("A or C", None, "A"),
        ("The answer is B, not D", "D", "D"),  # a bare letter before one with a comma
        ("b", None, None),
        ("", None, None),
    ],
)
def test_mmbench_reads_an_option(answer, first, then):
    assert mmbench.infer(answer, CHOICES) == first
    assert mmbench.read_letter(answer, CHOICES) == then


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C or A", "C"),  # the start tells most
        ("not C but (B), or else D", "D"),  # then the end
        ("maybe (B) or C: yes", "B"),
        ("xAy", "A"),  # anywhere, when nowhere else
        ("Answers D: and C: hm", "C"),  # of equals the last
        ("?", None),
    ],
)
def test_mmbench_looks_closer(answer, letter):
    assert mmbench.likeliest(answer, "ABCD") == letter


def test_mmbench_wants_every_rotation():
    rows = [
        mmbench.Rotation(1_000_007, True, "x", "l"), mmbench.Rotation(7, True, "x", "l"),
        mmbench.Rotation(3, True, "y", "l"), mmbench.Rotation(2_000_003, False, "y", "l"),
        mmbench.Rotation(1_000_009, True, "z", "l"),  # its first rotation is not there
    ]  # fmt: skip
    assert mmbench.circular(rows) == {3: False, 7: True}
    assert mmbench.hit_rates(rows) == {
        "overall": {"": 0.5}, "category": {"x": 1, "y": 0}, "l2_category": {"l": 0.5},
    }  # fmt: skip
    with pytest.raises(ValueError, match="first rotation"):
        mmbench.hit_rates(rows[4:])


# -------------------------------------------------------------------------------- ScienceQA


@pytest.mark.parametrize(
    ("answer", "parsed", "lmms_eval"),
    [
        ("B", "B", True),
        ("b", "FAILED", True),
        ("B ", "FAILED", True),  # nothing is stripped
        ("B.", "FAILED", True),
        ("B. leaf", "B", True),
        ("B.leaf", "FAILED", True),
        ("The answer is B.", "B", False),
        ("The answer is B", "FAILED", False),  # "." is any character, but one is needed
        ("The answer is B!", "B", False),
        ("The answer is A. The answer is B.", "FAILED", False),  # twice
        ("F", "FAILED", False),
        ("", "FAILED", False),
        ("AB", "FAILED", False),
    ],
)
def test_scienceqa_reads_a_letter(answer, parsed, lmms_eval):
    assert scienceqa.parse(answer) == parsed
    assert scienceqa.right_by_lmms_eval(answer, "B") == lmms_eval


def test_scienceqa_letters_beyond_the_choices():
    assert scienceqa.parse("The answer is Z.") == "Z"
    places = [scienceqa.index_of(letter, 3) for letter in ("A", "C", "D", "Z", "FAILED", "")]
    assert places == [0, 2, -1, -1, -1, -1]


# ---------------------------------------------------------------------------- SEED and AI2D


def test_letters_alone():
    assert letters.same_letter("B", "B")
    assert not any(letters.same_letter(answer, "B") for answer in ("b", "B.", "B. two", " B"))
    assert all(letters.first_letter(answer, "B") for answer in ("b", "B.", " B. two", "Bats"))
    assert not letters.first_letter("", "B")
    said = {" B. leaf": "b", "(B)": "b", "b": "b", "B leaf": "b leaf", "": ""}
    assert {answer: letters.ai2d_letter(answer) for answer in said} == said


# ------------------------------------------------------------------------------------- MMMU

OPTIONS = {"A": "Monet", "B": "a water lily", "C": "Goya"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) because (C)", "C"),  # the last of those in brackets
        ("A is wrong, so C is right", "C"),
        ("in brackets (A) beats C", "A"),
        ("I think it is surely by goya here", "C"),  # more than five words: texts count
    ],
)
def test_mmmu_reads_an_option(answer, letter):
    class Never:
        def choice(self, _):
            raise AssertionError("drawn")

    assert mmmu.parse_option(answer, OPTIONS, Never()) == letter


def test_mmmu_draws_what_it_cannot_read():
    drawn = [mmmu.parse_option("Goya", OPTIONS, random.Random(seed)) for seed in range(40)]
    assert drawn == [random.Random(seed).choice("ABC") for seed in range(40)]
    # lmms-eval also takes a letter in front of a period or at the end of a word.
    assert mmmu.parse_option("xC y", OPTIONS, random.Random(0), lmms_eval=True) == "C"
    assert mmmu.parse_option("is B.ut", OPTIONS, random.Random(0), lmms_eval=True) == "B"


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("24.32", "24.32", True),
        ("The area is 24.321 cm", "24.32", True),  # rounded to two places
        ("x = 1,234", "1234", True),
        ("1.2e3 of them", "1200", True),
        ("So the mineral is MgS.", ["$MgS$", "MgS"], True),
        ("Iron", "iron", True),
        ("bar", "A", False),  # single characters need a space beside them
        ("it is A or b", "A", True),
        ("12", "120", False),
        ("", "5", False),
    ],
)
def test_mmmu_open_answers(answer, gold, right):
    assert mmmu.open_right(mmmu.parse_open(answer), gold) == right
