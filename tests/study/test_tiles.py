"""Images of several tiles in the study: evidence, regions, a miniature from training to rows."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.cli.study import PROGRAM
from focus_jax.compress.method import Context
from focus_jax.data.sources import FreshSource
from focus_jax.evaluate.runner import Trained
from focus_jax.models import params as names
from focus_jax.models.vlm import VLM
from focus_jax.objectives import WORD_SLOTS, inputs_of
from focus_jax.sharding import make_layout
from focus_jax.step import abstract_step
from focus_jax.study.answers import answer, device_part, image_keys, read_batches
from focus_jax.study.asked import method_rows
from focus_jax.study.config import Arm, Study, arm_of, check, costs, load_study, method_of
from focus_jax.study.placement import Ranking, chosen, evidence_at, place
from focus_jax.study.routing import route
from focus_jax.study.run import run_study
from focus_jax.workdir import glyph_tokenizer, make_train_loader
from tests.micro import get_tiled
from tests.quick import compiled

IMAGES, KEY = 3, jax.random.key(5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that nothing was trained in."""
    config = get_tiled()
    tokenizer = glyph_tokenizer(config.data)
    decoder = replace(config.model.decoder, vocab_size=len(tokenizer))
    glyphs = replace(config.data.glyphs, test=IMAGES)
    config = replace(
        config,
        model=replace(config.model, decoder=decoder),
        data=replace(config.data, glyphs=glyphs, directory=str(tmp_path_factory.mktemp("data"))),
    )
    model = compiled(lambda: names.initialise(config.model, config.compress.value(), 0))()
    tree = names.canonical(names.named_leaves(model))
    return Trained(Path(), config, tokenizer, tree, 0)


@pytest.fixture(scope="module")
def batch(run):
    [found] = read_batches(run, "test", batch=IMAGES)
    return found


@pytest.fixture(scope="module")
def noisy(batch):
    """The same with noise for pixels, so that no two patches give the same token."""
    pixels = np.random.default_rng(0).integers(0, 256, batch["pixels"].shape, np.uint8)
    return {**batch, "pixels": jnp.asarray(pixels)}


def place_of(cell):
    """(view, patch) of the tile that shows a cell of 8 x 8, by 2 x 2 tiles of 4 x 4."""
    row, col = divmod(cell, 8)
    return 1 + row // 4 * 2 + col // 4, row % 4 * 4 + col % 4


def test_the_oracle_keeps_the_evidence_in_tiles_and_nothing_else(run, noisy):
    model = run.model(run.method("full"))

    @compiled
    def streams(vlm: VLM, arrays, keys):
        inputs = inputs_of(arrays)
        flat = inputs.pixels.reshape(-1, *inputs.pixels.shape[2:])
        rows = vlm.projector(vlm.vision(flat)["features"])
        return vlm.begin(inputs, vlm.see(inputs, Context(keys))[0]), rows

    s, rows = streams(model, device_part(noisy), image_keys(KEY, noisy))
    rows = np.asarray(rows).reshape(IMAGES, 5, 16, -1)
    evidence = np.asarray(noisy["evidence"])
    assert evidence.shape == (IMAGES, 4, 64) and evidence.any(-1).all()
    found = np.asarray(evidence_at(s, noisy["evidence"], 16))
    visual = np.asarray(s.visual)
    for b in range(IMAGES):
        wanted = [[rows[b][place_of(c)] for c in np.flatnonzero(own)] for own in evidence[b]]
        for q, tokens in enumerate(wanted):
            at = np.flatnonzero(found[b, q])
            assert len(at) == len(tokens)  # none of the thumbnail, no newline
            for token in tokens:  # in another order
                assert min(np.abs(visual[b, at] - token).max(-1)) < 1e-5
    # What stays with as many slots as the question has cells is these.
    noise = np.random.default_rng(1).random(found.shape)
    most = int(evidence.sum(-1).max())
    for count in (1, most):
        kept = chosen(s, jnp.asarray(found + noise), most, jnp.full(IMAGES, count))
        hit = np.take_along_axis(found.reshape(-1, found.shape[-1]), np.asarray(kept.slot), 1)
        hit = (hit * np.asarray(kept.visual_valid)).sum(-1).reshape(IMAGES, 4)
        np.testing.assert_array_equal(hit, np.minimum(evidence.sum(-1), count))


def test_with_all_tokens_kept_a_cut_answers_as_none(run, noisy):
    model = run.model(run.method("full"))
    [curve] = place(model, [noisy], (1,), (1.0,), KEY, (Ranking("oracle"),))
    np.testing.assert_array_equal(curve.correct, answer(model, [noisy]).correct)


def test_an_oracle_for_other_cells_is_refused(run, batch):
    other = {**batch, "evidence": batch["evidence"][..., :16]}
    with pytest.raises(ValueError, match=r"knows the 16 cells of an image, and 5 views of 16"):
        place(run.model(run.method("full")), [other], (1,), (0.5,))


def glyphs_by_loops(filled):
    """Glyphs in the regions of 2 x 2 patches of each view of an image, [5, 4]."""
    views = np.zeros((5, 4, 4), int)
    for row in range(8):
        for col in range(8):
            if filled[8 * row + col]:
                views[0, row // 2, col // 2] = 1
                views[1 + row // 4 * 2 + col // 4, row % 4, col % 4] = 1
    out = np.zeros((5, 4), int)
    for row in range(4):
        for col in range(4):
            out[:, row // 2 * 2 + col // 2] += views[:, row, col]
    return out


@pytest.mark.parametrize(("thumbnail", "first"), [("same", 0), ("full", 1)])
def test_regions_of_every_view_are_set_beside_their_glyphs(run, batch, thumbnail, first):
    text = f"vision_only:vision.gate=oracle,vision.budget=7,vision.thumbnail={thumbnail}"
    found = route(run.model(run.method(text)), [batch], KEY)
    wanted = [glyphs_by_loops(filled)[first:] for filled in np.asarray(batch["cell_filled"])]
    np.testing.assert_array_equal(found.content, np.concatenate(wanted).ravel())
    # Room for one region of each view at single patches: the gate sees where glyphs are.
    content, tokens = found.content.reshape(-1, 4), found.tokens.reshape(-1, 4)
    assert set(found.tokens.tolist()) == {1, 4} and found.finest == 4
    crowded = content.max(-1)
    for view in np.flatnonzero(crowded > 0):
        assert tokens[view].tolist().count(4) == 1
        assert content[view][tokens[view] == 4] == crowded[view]


def test_patches_hold_what_their_cells_hold(batch):
    content = np.asarray(inputs_of(batch).content)
    assert content.shape == (IMAGES, 5, 16) and content.dtype == np.float32
    for b, filled in enumerate(np.asarray(batch["cell_filled"])):
        for cell in range(64):
            assert content[b][place_of(cell)] == filled[cell]
        for patch in range(16):
            row, col = divmod(patch, 4)
            under = filled.reshape(8, 8)[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert content[b, 0, patch] == under.any()


def test_every_method_of_the_larger_study_has_a_plan_in_tiles():
    asked = check(load_study(PROGRAM, "gpu"))
    base, free = asked.base, costs(asked.base)
    assert (base.across, base.tiles, base.model.vision.patches) == (2, 5, 256)
    assert base.model.vision == load_study(PROGRAM, "cpu").base.model.vision
    longest = 5 * 256 + 32 + base.data.text_length + base.data.prefix_length
    assert longest <= base.model.decoder.max_position
    spent = {}
    for arm in asked.arms:
        cost = free.plan(method_of(base, arm.method))
        assert cost.full == 5 * 256 + 32 and cost.tiles == 5
        spent[arm.name] = cost.mean_share
    assert spent["full"] == 1 and 0.15 < spent["focusllava"] < 0.25
    for name in ("random", "uniform", "pool", "downsample", "prumerge"):
        assert spent[name] == pytest.approx(spent["focusllava"], abs=0.05), name
    for share in asked.shares:
        rows = {row.name: row.text for row in method_rows(asked, free, share)}
        assert set(rows) == set(asked.methods)  # none is left out
        for name, text in rows.items():
            assert free.plan(method_of(base, text)).mean_share <= 1.005 * share, name


def test_scenes_of_the_larger_study_fit_its_batches():
    base = load_study(PROGRAM, "gpu").base
    tokenizer = glyph_tokenizer(base.data)
    for stage in base.train.stages:
        glyphs = stage.glyphs or base.data.glyphs
        assert glyphs.filled <= WORD_SLOTS and glyphs.grid == 32
        own = replace(stage, batch=4, questions=glyphs.questions)
        batches = iter(make_train_loader(base, {"": FreshSource(glyphs, 0, 4)}, tokenizer, own, 0))
        batch = next(batches)
        batches.close()
        assert batch["pixels"].shape == (4, 5, 128, 128, 3)
        assert batch["cell_words"].shape[1] == batch["evidence"].shape[-1] == 1024
        assert batch["label_mask"].any(-1).all()
        assert not (batch["tokens"] == tokenizer.unk_token_id).any()


@pytest.mark.slow
def test_a_step_of_the_larger_study_can_be_traced():
    asked = load_study(PROGRAM, "gpu")
    layout = make_layout("data", 1)
    for arm in (asked.arm("full"), asked.arm("ours")):
        cfg = arm_of(asked, arm, 0, "")
        step, arguments = abstract_step(cfg, asked.joint, layout, cfg.tiles)
        _, metrics = jax.eval_shape(step, *arguments)
        assert metrics["loss"].shape == ()


@pytest.mark.slow
def test_a_miniature_study_with_tiles(tmp_path):
    base = get_tiled()
    [joint] = base.train.stages
    describe = replace(
        joint, name="describe", objective="describe", samplers=False, questions=1,
        train=("vision.", "projector."),
    )  # fmt: skip
    fit = replace(describe, name="vision", objective="fit", clutter=0.5)
    align = replace(joint, name="align", objective="route", train=("samplers.",))
    base = replace(
        base,
        data=replace(base.data, directory=str(tmp_path / "data")),
        train=replace(base.train, stages=(fit, describe, align)),
    )
    arms = (
        Arm("full", "full", role="full"),
        Arm("focusllava", "focusllava:vision.gate=distortion", role="ours"),
        Arm("gate_oracle", "focusllava:vision.gate=oracle", role="gate"),
    )
    study = check(
        Study(
            base, joint, arms, seeds=(0,), layers=(0, 1), keeps=(0.1,), shares=(0.5,),
            gates=("uniform",), batch=2, placed=2, timed=2, timed_share=0.0,
        )
    )  # fmt: skip
    found = run_study(study, tmp_path / "study", "gpu")
    assert found.patches == 80
    assert {c.rank for c in found.curves} == {"top", "least", "random", "oracle"}
    assert {c.correct.shape for c in found.curves} == {(2, 4)}
    for one in found.routed:
        assert one.routing.regions == 3 * 5 * 4, one.name
    measured = {row.name for row in found.rows if row.share}
    assert measured == set(study.methods) - {"pyramiddrop", "sparsevlm"}  # cuts at three layers
    assert all(row.correct.shape == (3, 4) for row in found.rows)
    assert all(row.mean_share <= 0.51 for row in found.rows if row.share)
