"""Experiments as values: flags, JSON, config programs."""

from dataclasses import replace
from pathlib import Path

import pytest

from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.experiment import (
    Experiment,
    TextSampler,
    TrainConfig,
    TrainStage,
    from_json,
    load_program,
    override,
    to_json,
)
from focus_jax.models.vlm import dims_of
from tests.micro import get_config

FOLDER = Path(__file__).parents[1] / "configs"
# A study is several experiments: it has its own tests.
CONFIGS = sorted(path for path in FOLDER.glob("[!_]*.py") if path.stem != "study")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_programs_describe_experiments_that_hold(path):
    config = load_program(path)
    assert isinstance(config, Experiment) and config.train.stages
    config.compress.value().check(dims_of(config.model, config.model.max_tiles))
    on_glyphs = path.stem.startswith("glyphs")  # the others have no data of their own yet
    assert not on_glyphs or config.model.vision.image_size == config.data.glyphs.image_size
    assert from_json(to_json(config)) == config


def test_json_holds_every_field():
    config = get_config()
    stage = replace(config.train.stages[0], scale=(("vision.", 0.1),), clutter=0.25)
    config = replace(
        config,
        compress=replace(config.compress, text=TextSampler(layer=1, train_keep=(0.2, 1))),
        train=TrainConfig(stages=(stage, stage), init_from="a/b", weight_decay=1e-7),
    )
    assert from_json(to_json(config)) == config
    assert hash(from_json(to_json(config))) == hash(config)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"log_every": 1', '"log_every": "often"', r"run\.json does not.*\n.*train\.log_every"),
        ('"objective": "answers"', '"objective": "guess"', r"train\.stages\.0\.objective"),
        ('"steps": 2', '"steps": 0', "steps=0: give >= 1"),
        ('"name": "micro"', '"nome": "micro"', "name"),
        ('"log_every": 1', '"log_evry": 1', r"there is no field train\.log_evry"),
        ('"clutter": 0.0,', '"cluter": 0.0,', r"no field data\.glyphs\.cluter"),
        ('"warmup": 0.03', '"warm": 0.03', r"no field train\.stages\.0\.warm"),
        ("{", "", "does not describe an experiment"),
    ],
)
def test_json_that_does_not_fit_names_the_field(old, new, message):
    text = to_json(get_config())
    assert old in text
    with pytest.raises(ValueError, match=message):
        from_json(text.replace(old, new, 1), "run.json")


def test_flags_set_fields_at_any_depth():
    flags = ["--compress.text.layer", "2", "--train.seed", "7", "--train.stages.0.steps", "9"]
    flags += ["--compress.vision.enabled", "False", "--data.glyphs.colours", "red", "blue"]
    config, before = override(get_config(), flags, "train.py"), get_config()
    assert config.compress.text.layer == 2 and not config.compress.vision.enabled
    assert config.train.seed == 7 and config.data.glyphs.colours == ("red", "blue")
    assert config.train.stages == (replace(before.train.stages[0], steps=9),)
    assert config.model == before.model and config.eval == before.eval
    assert override(before, [], "train.py") == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compress.text.layr", "2"], "--compress.text.layer"),
        (["--train.stages.0.step", "2"], "--train.stages.0.steps"),
        (["--compress.text.layer", "two"], "--compress.text.layer"),
        (["--compress.vision.gate", "soft"], "straight_through"),
    ],
)
def test_wrong_flags_end_the_program_with_their_neighbours(capsys, flags, said):
    with pytest.raises(SystemExit) as end:
        override(get_config(), flags, "train.py")
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert said in shown.err and "Traceback" not in shown.err and shown.out == ""


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_switches_choose_the_method(vision, text):
    config = get_config().compress
    config = replace(
        config,
        vision=replace(config.vision, enabled=vision),
        text=replace(config.text, enabled=text),
    )
    assert config.value() == focusllava(
        VisionGuided(region=2, scales=(2, 1), budget=8, hidden=4) if vision else None,
        TextGuided(layer=1, keep=0.5) if text else None,
    )


def test_programs_may_build_on_their_neighbours(tmp_path):
    (tmp_path / "ground.py").write_text("from tests.micro import get_config\n")
    (tmp_path / "built.py").write_text(
        "from dataclasses import replace\n"
        "import ground\n"
        "def get_config(): return replace(ground.get_config(), name='built')\n"
    )
    assert load_program(tmp_path / "built.py") == replace(get_config(), name="built")


def test_programs_that_are_none_are_named(tmp_path):
    (tmp_path / "near.py").write_text("x = 1\n")
    with pytest.raises(FileNotFoundError, match=r"no config at \S*/neat\.py; .* holds near\.py"):
        load_program(tmp_path / "neat.py")
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        load_program(tmp_path / "nowhere" / "neat.py")
    with pytest.raises(ValueError, match=r"near\.py defines no get_config"):
        load_program(tmp_path / "near.py")


@pytest.mark.parametrize("name", ["steps", "batch", "questions", "accumulate"])
def test_stages_without_work_are_refused(name):
    with pytest.raises(ValueError, match=f"stage 'a': {name}=0: give >= 1"):
        TrainStage(
            **{"name": "a", "objective": "answers", "steps": 1, "learning_rate": 1.0, name: 0}
        )
