"""train.py: stages by name, one run after another, sizes from a checkpoint."""

import json

import numpy as np
import pytest

from focus_jax.checkpoint import load_params
from focus_jax.cli.train import main
from focus_jax.models.params import canonical, initialise, named_leaves
from focus_jax.workdir import read_workdir

TWO_STAGES = """
from dataclasses import replace

from focus_jax.experiment import TrainConfig
from tests.micro import get_config as micro


def get_config():
    cfg = micro()
    [stage] = cfg.train.stages
    align = replace(stage, name="align", train=("projector.", "samplers."))
    instruct = replace(
        stage, name="instruct", train=("",), learning_rate=1e-2, scale=(("vision.", 0.2),)
    )
    vision = replace(cfg.model.vision, feature_layer=-1)
    return replace(
        cfg, model=replace(cfg.model, vision=vision), train=TrainConfig((align, instruct))
    )
"""


@pytest.fixture
def program(micro, tmp_path):
    """Runs the experiment of two stages in a workdir of that name; its exit code."""
    (tmp_path / "two.py").write_text(TWO_STAGES)

    def run(workdir, *flags):
        path = tmp_path / "two.py"
        own = ["--config", str(path), "--workdir", str(tmp_path / workdir), "--quiet"]
        return main([*own, *micro.flags, *flags])

    return run


def test_flags_that_do_not_fit(program, tmp_path, capsys):
    assert program("a", "--stages", "align,tune") == 1
    assert "has no stage 'tune': choose from align, instruct" in capsys.readouterr().err
    assert program("a", "--model-from-checkpoint") == 1
    assert "init_from='' tells no model's sizes" in capsys.readouterr().err
    assert program("a", "--train.init-from", str(tmp_path / "none")) == 1
    assert "decoder=DIR,vision=DIR" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_one_stage_after_another(micro, program, tmp_path, capsys):
    """The tower is frozen in the first, and learns at a fifth of the rate in the second."""
    assert program("one", "--stages", "align") == 0
    start = ["--train.init-from", str(tmp_path / "one"), "--stages", "instruct"]
    wider = ["--model.decoder.mlp-width", "24"]
    assert program("two", *start, *wider) == 1
    assert "model.decoder.mlp_width 16, the config 24" in capsys.readouterr().err
    assert program("two", *start, *wider, "--model-from-checkpoint") == 0
    stored = json.loads((tmp_path / "two" / "config.json").read_text())
    assert [stage["name"] for stage in stored["train"]["stages"]] == ["instruct"]
    assert stored["model"]["decoder"]["mlp_width"] == 16
    one, two = (load_params(tmp_path / run / "checkpoints")[0] for run in ("one", "two"))
    assert one.keys() == two.keys()
    cfg, _ = read_workdir(tmp_path / "one")
    fresh = canonical(named_leaves(initialise(cfg.model, cfg.compress.value(), 0)))
    for name, leaf in one.items():
        learns = name.startswith(("projector.", "samplers."))
        assert (np.asarray(leaf) != fresh[name]).any() == learns, name

    def largest(part: str) -> float:
        return max(abs(two[n] - one[n]).max() for n in one if n.startswith(part))

    # Of two steps of Adam the first has rate 0, the second takes about the rate where gradients go
    # one way.
    np.testing.assert_allclose(largest("decoder."), 1e-2, rtol=0.3)
    np.testing.assert_allclose(largest("vision.layers."), 0.2e-2, rtol=0.3)
