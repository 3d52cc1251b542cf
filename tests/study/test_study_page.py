"""The page's verdicts follow the data: made-up answers for which each rule's outcome is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from focus_jax.study.claims import (
    adaptive,
    claims,
    ingredients,
    lossless,
    router,
    timely,
)
from focus_jax.study.comparisons import at_equal_slots, compared, loss_of, shown_gates
from focus_jax.study.cuts import bar_words, guided, middle, source, vacuous, vacuous_words
from focus_jax.study.page import page
from focus_jax.study.pictures import draw, frontier, trained_points
from focus_jax.study.placement import Curve
from focus_jax.study.results import Results, Routed, Row, pack, unpack
from focus_jax.study.routing import Regions, summarise
from focus_jax.study.statistics import Estimate
from focus_jax.study.tables import deciles_table, placement_table, routing_table
from focus_jax.study.verdicts import (
    Check,
    finer,
    follows,
    in_every_seed,
    in_time,
    judge,
    rule_text,
    together,
)

IMAGES, QUESTIONS, LAYERS = 300, 4, 4
# One order of difficulty for all: who is right on more questions is right on all of the others'.
ORDER = np.random.default_rng(0).permutation(IMAGES * QUESTIONS).reshape(IMAGES, QUESTIONS)


def right(share):
    return share * ORDER.size > ORDER


def row(name, accuracy, role="other", spends=0.25, **more):
    plain = {
        "weights": name, "trained": True, "asked": name, "share": 0.0, "mean_slots": 256 * spends,
        "flops": 1e9 * spends, "kv_bytes": 1000, "rounds": (10 * spends, 11 * spends, 12 * spends),
    }  # fmt: skip
    correct = more.pop("correct_", right(accuracy))
    fields = {**plain, **more}
    return Row(name=name, role=role, mean_share=spends, correct=correct, **fields)


def curves(top, random, least, oracle=0.9, keep=0.1):
    """Accuracy by layer of each ranking; `instruction` is 10 points worse than `last`."""
    out = []
    for layer in range(LAYERS):
        out += [
            Curve(layer, keep, "top", "last", right(top[layer])),
            Curve(layer, keep, "top", "instruction", right(top[layer] - 0.1)),
            Curve(layer, keep, "least", "last", right(least[layer])),
            Curve(layer, keep, "least", "instruction", right(least[layer])),
            Curve(layer, keep, "random", "", right(random[layer])),
            Curve(layer, keep, "oracle", "", right(oracle)),
        ]
    return tuple(out)


def routed(name, content, tokens, weights="", asked=""):
    regions = Regions(np.array(content), np.array(tokens), 16)
    summary = summarise(regions)
    return Routed(name, weights or name, asked or name, (summary.correlation,) * 2, summary)


@pytest.fixture
def found():
    rows = (
        row("full", 0.80, "full", 1.0),
        row("focusllava", 0.80, "ours"),
        row("focusllava_39", 0.80, "budget", 0.39),
        row("uniform", 0.60, "plain"),
        row("pool", 0.70, "plain", 0.15),
        row("gate_random", 0.50, "gate", asked="focusllava:vision.gate=random"),
        row("switch", 0.75, "router"),
        row("switch_no_balance", 0.65, "part"),
        row("random", 0.4, weights="focusllava", trained=False, asked="f:vision.gate=random"),
        row("uniform", 0.5, weights="full", trained=False, share=0.25),
        row("focusllava", 0.7, weights="full", trained=False, share=0.25, rounds=()),
        # Ours at a share that it was not trained at: no control gate, whatever it answers.
        row("focusllava", 0.95, weights="focusllava", trained=False, share=0.25, rounds=()),
    )
    placed = curves([0.3, 0.6, 0.8, 0.8], [0.3, 0.4, 0.5, 0.8], [0.2, 0.3, 0.4, 0.8])
    return Results(
        size="made up", seeds=(0, 1), images=IMAGES, layers=LAYERS, patches=256, cut_layer=2,
        cut_keep=0.1, cut_queries="last", device="none", seconds=60.0, rows=rows,
        kind=np.arange(ORDER.size).reshape(ORDER.shape) % 3, curves=placed,
        routed=(routed("focusllava", [0, 0, 0, 2, 4, 5], [1, 1, 1, 4, 16, 16]),),
        chosen={"queries": "last", "layer": 3, "at": 2},
        parts=(("switch_no_balance", "switch"),),
    )  # fmt: skip


def with_row(found, name, **changes):
    """The results with one trained row's fields changed."""
    changed = (replace(r, **changes) if r.name == name and r.trained else r for r in found.rows)
    return replace(found, rows=tuple(changed))


@pytest.mark.parametrize(
    ("rule", "low", "high", "verdict"),
    [
        ("better", 0.01, 0.05, "held"),
        ("better", -0.05, -0.01, "did NOT hold"),
        ("better", -0.01, 0.05, "not told apart"),
        ("better", 0.0, 0.0, "not told apart"),
        ("no loss", -0.009, 0.01, "held"),
        ("no loss", 0.0, 0.0, "held"),
        ("no loss", -0.009, -0.001, "held"),  # surely there, and too small to matter
        ("no loss", -0.015, -0.001, "did NOT hold"),
        ("no loss", -0.03, 0.01, "not told apart"),
        ("matters", -0.2, -0.1, "held"),
        ("matters", -0.009, -0.001, "did NOT hold"),
        ("matters", -0.015, -0.001, "held"),
        ("matters", -0.03, 0.01, "not told apart"),
    ],
)
def test_rules(rule, low, high, verdict):
    assert judge(rule, Estimate((low + high) / 2, low, high)) == verdict


def test_no_interval_makes_two_rules_contradict_each_other():
    opposite = {"held": "did NOT hold", "did NOT hold": "held", "not told apart": "not told apart"}
    ends = np.linspace(-0.05, 0.05, 21)
    for low in ends:
        for d in (Estimate(0, low, high) for high in ends[ends >= low]):
            assert judge("matters", d) == opposite[judge("no loss", d)]
    wide = Estimate(-0.01, -0.019, -0.001)
    assert (judge("no loss", wide), judge("no loss", wide, 0.02)) == ("did NOT hold", "held")
    assert "-1 points" in rule_text("no loss") and "-2 points" in rule_text("matters", 0.02)


def test_one_refutation_refutes_and_what_was_not_measured_decides_nothing():
    held, open_, against, lacking = (
        Check("", "", v) for v in ("held", "not told apart", "did NOT hold", "not measured")
    )
    assert together([held, lacking]) == "held"
    assert together([held, open_]) == "not told apart"
    assert together([held, open_, against]) == "did NOT hold"
    assert together([held, replace(against, decides=False)]) == "held"
    assert together([lacking]) == together([]) == "not measured"
    assert follows([0.6, 0.5]) == "held" and follows([0.9, None]) == "did NOT hold"
    assert follows([0.9, 0.3]) == "not told apart" and follows([]) == "not measured"
    assert [finer(a, 0.2) for a in (0.5, 0.3, 0.2, None)] == [
        "held", "not told apart", "did NOT hold", "not measured",
    ]  # fmt: skip
    times = [Estimate(0.4, low, high) for low, high in ((0.4, 0.5), (0.39, 0.41), (0.3, 0.39))]
    assert [in_time(0.5, time) for time in times] == ["held", "not told apart", "did NOT hold"]
    assert in_every_seed("held", [0.1, 0.2]) == "held"
    assert in_every_seed("did NOT hold", [-0.1, 0.0]) == "not told apart"


def test_two_trainings_differ_only_if_they_do_in_every_seed(found):
    half = IMAGES // 2
    mixed = right(0.8)
    mixed[:half], mixed[half:] = right(0.3)[:half], right(0.85)[half:]
    ours, control = found.row("focusllava"), row("other", 0.8, correct_=mixed)
    check = compared(found, "", ours, control, "better")
    assert check.estimate is not None and check.estimate.low > 0.1
    assert check.verdict == "not told apart"
    first, second = (100 * (right(0.8) * 1.0 - mixed)[at].mean() for at in (
        slice(half), slice(half, None)))  # fmt: skip
    assert f"; by seed {first:+.1f}, {second:+.1f}" in check.figure
    # On the same weights seeds do not differ by training.
    same = compared(found, "", ours, replace(control, weights="focusllava"), "better")
    assert same.verdict == "held" and "by seed" not in same.figure


def test_what_the_data_show_holds(found):
    assert [claim.verdict for claim in claims(found)] == ["held"] * 8


def test_a_loss_refutes_the_headline(found):
    worse = with_row(found, "focusllava_39", correct=right(0.7))
    assert lossless(worse).verdict == "did NOT hold"
    # Another budget than the paper's does not decide.
    assert lossless(with_row(found, "focusllava", correct=right(0.5))).verdict == "held"


def test_a_control_counts_at_equal_slots_or_where_its_share_makes_the_case_stronger(found):
    assert adaptive(with_row(found, "uniform", correct=right(0.85))).verdict == "did NOT hold"
    ours = row("focusllava", 0.8, spends=0.25)
    cases = [
        (0.7, 0.26, True), (0.7, 0.24, True), (0.7, 0.15, False), (0.7, 0.4, True),
        (0.9, 0.24, True), (0.9, 0.4, False), (0.9, 0.15, True), (0.8, 0.4, False),
    ]  # fmt: skip
    for accuracy, spends, counts in cases:
        check = at_equal_slots(found, "", ours, row("pool", accuracy, spends=spends))
        assert check.decides is counts, (accuracy, spends)
    [check] = [c for c in adaptive(found).checks if "pool" in c.what]
    assert not check.decides and check.figure.endswith("15.0%, not 25.0%: does not count")


def test_guidance_no_better_than_chance(found):
    chance = curves([0.5] * 4, [0.5] * 4, [0.2] * 4)
    assert guided(replace(found, curves=chance)).verdict == "not told apart"
    worse = curves([0.5] * 4, [0.6] * 4, [0.2] * 4)
    assert guided(replace(found, curves=worse)).verdict == "did NOT hold"
    [check] = [c for c in guided(found).checks if c.what.endswith("highest minus full")]
    assert (check.figure[:4], check.verdict, check.decides) == ("+0.0", "held", False)


def test_the_bar_for_a_good_choice(found):
    assert "it is met with 10% of the tokens kept; no other layer." in bar_words(found, 2)
    assert "with no share of the tokens kept; other layers that meet it: layer 2 at 10%" in (
        bar_words(found, 1)
    )
    # Ten points over chance by the mean alone, or two under full: not met.
    for top, chance in ((0.8, 0.7), (0.78, 0.4)):
        placed = curves([0.3, 0.3, top, 0.3], [chance] * 4, [0.1] * 4)
        assert "met with no share" in bar_words(replace(found, curves=placed), 2)


def test_the_layer_from_which_the_lowest_serves_as_well(found):
    assert vacuous(found, 0.1) == 3
    assert "from layer 3 on (of those measured) those with the LOWEST" in " ".join(
        middle(found).notes
    )
    none = replace(found, curves=curves([0.5] * 4, [0.4] * 4, [0.3] * 4))
    assert vacuous(none, 0.1) is None
    assert "none of the layers measured is late" in vacuous_words(none, 0.1)
    # A gap in the middle, and a last layer of which nothing is sure: no claim about all layers.
    noise = right(0.8) ^ (np.random.default_rng(2).random(ORDER.shape) < 0.3)
    spread = curves([0.8] * 4, [0.5] * 4, [0.2, 0.8, 0.3, 0.3])
    spread = tuple(
        replace(c, correct=noise) if (c.layer, c.rank) == (3, "least") else c for c in spread
    )
    open_ = replace(found, curves=spread, rows=(replace(found.rows[0], correct=right(0.63)),))
    words = vacuous_words(open_, 0.1)
    assert "matters at all of them" not in words
    assert "not told apart at layer 3" in words and "as well at layer 1, but not" in words
    early = replace(found, curves=curves([0.3, 0.8, 0.8, 0.8], [0.8] * 4, [0.2, 0.8, 0.8, 0.8]))
    assert vacuous(early, 0.1) == 1
    # The middle beats the first layer and equals the last, yet any tokens would do there.
    assert middle(early).verdict == "did NOT hold"
    good = replace(found, curves=curves([0.3, 0.8, 0.8, 0.8], [0.5] * 4, [0.2] * 4))
    assert middle(good).verdict == "held"


def test_another_source_that_is_better_refutes_ours(found):
    assert source(found).verdict == "held"
    assert source(replace(found, cut_queries="instruction")).verdict == "did NOT hold"


def test_a_router_that_ignores_content(found):
    blind = routed("focusllava", [0, 1, 2, 3], [4, 16, 16, 4])
    assert router(replace(found, routed=(blind,))).verdict == "did NOT hold"
    lucky = with_row(found, "gate_random", correct=right(0.8))
    assert router(lucky).verdict == "not told apart"
    gone = router(replace(found, routed=()))
    assert [c.verdict for c in gone.checks[:2]] == ["not measured"] * 2
    # Ours at another share is no control gate.
    assert not [c for c in router(found).checks if "same weights: focusllava" in c.what]


def test_gates_side_by_side(found):
    content = [0, 0, 0, 0, 0, 0, 0, 2, 4, 5]
    gates = (
        routed("oracle", content, [1] * 8 + [16] * 2, "focusllava", "f:vision.gate=oracle"),
        routed("uniform", content, [4] * 10, "focusllava", "f:vision.gate=uniform"),
        routed("focusllava", content, [1] * 7 + [4, 16, 16]),
        routed("switch", content, [16] + [4] * 9),
        routed("gate_random", content, [16] * 5 + [1] * 5, asked="f:vision.gate=random"),
        routed("unaligned", content, [4] * 10),
    )
    many = replace(found, routed=gates)
    assert [one.name for one in shown_gates(many, ("random", "oracle"))] == [
        "focusllava", "switch", "gate_random", "oracle",
    ]  # fmt: skip
    lines = [line.split("|")[1:-1] for line in deciles_table(many).splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert rows[0][3:] == ["focusllava", "switch", "gate_random", "oracle on focusllava"]
    assert rows[2] == ["0% to 70%", "0", "7", "0%", "14%", "71%", "0%"]
    assert rows[-1] == ["90% to 100%", "5", "1", "100%", "0%", "0%", "100%"]
    assert deciles_table(replace(found, routed=())) == ""
    # 43 and 40 tokens of one image.
    one_image = replace(many, images=1)
    table = routing_table(one_image)
    assert "43.0" in table and "tokens an image" in table
    assert "no whole step to a finer scale fits into what remains: 40.0 tokens an image" in (
        " ".join(router(one_image).notes)
    )
    even = replace(one_image, routed=(gates[1], routed("focusllava", content, [4] * 10)))
    assert not router(even).notes


def test_a_part_that_harms(found):
    assert ingredients(found).verdict == "held"
    harmed = with_row(found, "switch_no_balance", correct=right(0.9))
    assert ingredients(harmed).verdict == "did NOT hold"


def test_slots_without_time(found):
    assert timely(found).verdict == "held"
    assert timely(with_row(found, "focusllava", rounds=(9.0,) * 3)).verdict == "did NOT hold"
    noisy = with_row(found, "focusllava", rounds=(0.1, 4.9, 9.0))
    assert timely(noisy).verdict == "not told apart"
    untimed = with_row(found, "focusllava", rounds=())
    assert [c.what for c in timely(untimed).checks] == ["saved by focusllava_39"]
    assert timely(with_row(found, "full", rounds=())).verdict == "not measured"


def test_cuts_stand_beside_full_on_their_own_images(found):
    """Each seed's first images are cut: full's share there, not on all."""
    few = IMAGES // 2 // 3
    own = np.r_[0:few, IMAGES // 2 : IMAGES // 2 + few]
    full = right(0.8)
    full[own] = True
    placed = tuple(replace(c, correct=right(0.5)[own]) for c in found.curves)
    changed = replace(with_row(found, "full", correct=full), curves=placed)
    d = loss_of(changed, placed[0])
    assert d.value == pytest.approx(right(0.5)[own].mean() - 1)
    assert f"({100 * d.low:+.1f} to {100 * d.high:+.1f})" in placement_table(changed)


def test_points_of_arms_match_their_share_alone():
    figure = Figure()
    arms = [
        row("a", 0.5, asked="text_only:text.keep=0.1,text.layer=2"),
        row("b", 0.6, asked="text_only:text.layer=1,text.keep=0.1"),
        row("c", 0.7, asked="text_only:text.keep=0.15"),
    ]
    axes = figure.add_subplot()
    trained_points(axes, arms, 0.1)
    [marks] = axes.containers
    assert marks.lines[0].get_xdata().tolist() == [2, 1]


def test_the_page_says_what_the_claims_say(found, tmp_path):
    worse = with_row(found, "focusllava_39", correct=right(0.7))
    pictures = draw(worse, tmp_path, "study")
    assert set(pictures) == {"placement", "routing", "slots", "time"}
    assert all(path.stat().st_size > 1000 for path in pictures.values())
    names = {name: Path(path.name) for name, path in pictures.items()}
    text = page(worse, "python -m focus_jax study --workdir W", names)
    for number, claim in enumerate(claims(worse), start=1):
        assert f"## {number}. {claim.title}\n\n**Verdict: {claim.verdict}.**" in text
    assert "The data refute it: focusllava_39 (39% of the slots) minus full, -10.0 points" in text
    assert "configs/glyphs_language.py" in text and "on validation the best one is 3" in text
    assert text.count("<details>") == 1 == text.count("</details>")
    assert "![accuracy over the layer of the cut](study_placement.png)" in text
    # Each table with figures is followed by the command that makes it.
    assert text.count("python -m focus_jax study --workdir W") == 1 + 8 + 2 + 1


def test_with_next_to_nothing_measured(found, tmp_path):
    least = replace(found, rows=found.rows[:1], curves=(), routed=(), chosen={}, parts=())
    assert {claim.verdict for claim in claims(least)} == {"not measured"}
    assert "Nothing was measured that could decide it." in page(least, "c", {})
    assert set(draw(least, tmp_path, "study")) == {"slots", "time"}
    with pytest.raises(ValueError, match="no row has all tokens"):
        claims(replace(found, rows=found.rows[1:]))


def test_rows_are_found_by_weights_and_share(found):
    assert found.row("uniform").trained and found.row("uniform").weights == "uniform"
    assert found.row("uniform", "full", 0.25).correct.mean() == 0.5
    assert found.row("uniform", "full", 0.1) is None
    kinds = found.by_kind(found.full)
    assert len(kinds) == 3 and np.mean(list(kinds.values())) == pytest.approx(0.8)


def test_the_frontier_is_what_nothing_beats():
    rows = {name: row(name, share) for name, share in {"a": 0.5, "b": 0.4, "c": 0.7}.items()}
    points = [(rows["c"], 3.0), (rows["b"], 2.0), (rows["a"], 1.0)]
    assert [r.name for r, _ in frontier(points)] == ["a", "c"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 8)])
def test_answers_survive_packing(shape):
    correct = np.random.default_rng(1).random(shape) < 0.5
    np.testing.assert_array_equal(unpack(pack(correct)), correct)
