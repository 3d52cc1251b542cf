"""`focus_jax plan --topology` on a small experiment."""

import json
import sys
from pathlib import Path

import pytest

from focus_jax.cli.plan import main
from focus_jax.pods.report import MARK

CONFIG = ["--config", str(Path(__file__).parents[1] / "pods" / "pod_micro.py")]
NODE = [*CONFIG, "--topology", "h100:4"]


def test_methods_on_a_node(tmp_path, capsys):
    path = tmp_path / "plans" / "micro.json"
    flags = ["--mesh", "fsdp=2,tensor=2", "--method", "full,focusllava", "--json", str(path)]
    assert main([*NODE, *flags, "--compress.text.keep", "0.25"]) == 0
    full, focus = json.loads(path.read_text())
    assert full["fits"] and full["method"] == "full" and focus["method"] == "focusllava"
    assert focus["flops"]["model"] < full["flops"]["model"]
    assert full["stage"] == "joint" and full["batch"] == 8
    assert full["command"].startswith("python -m focus_jax plan --config")
    assert full["command"].endswith("--method full,focusllava --compress.text.keep 0.25")
    said = capsys.readouterr().out
    assert "| mesh | fsdp=2,tensor=2: 4 devices |" in said and "| bound by |" in said
    page = tmp_path / "pods.md"
    page.write_text(MARK + "\n")
    assert main(["--markdown", str(page), "--plans", str(path.parent)]) == 0
    assert "2 plans" in capsys.readouterr().out
    assert page.read_text().count("| micro, h100:4 fsdp=2,tensor=2") == 2


def test_the_mesh_of_the_config_stage_and_batch(tmp_path):
    path = tmp_path / "plan.json"
    flags = ["--stage", "align", "--batch", "4", "--train.mesh", "fsdp", "--text", "20"]
    assert main([*NODE, *flags, "--json", str(path)]) == 0
    plan = json.loads(path.read_text())
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert (plan["stage"], plan["batch"], plan["text"]) == ("align", 4, 2 + 2 * 20)


@pytest.mark.slow
def test_a_sweep_prints_the_best_first(tmp_path, capsys):
    path = tmp_path / "plans.json"
    flags = ["--sweep", "--batch", "2", "--batch", "8", "--json", str(path)]
    assert main([*NODE, *flags]) == 0
    plans = json.loads(path.read_text())
    speeds = [plan["images_per_second"] for plan in plans]
    assert speeds == sorted(speeds, reverse=True) and len(plans) == 3
    said = capsys.readouterr()
    assert said.out.count("| micro, h100:4") == 3
    assert "left out: a batch of 2 rows does not divide over 4 devices" in said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology", "v5e:3x5"], "topology 'v5e:3x5' does not exist: choose v5e:1x1"),
        (["--topology", "tpu:2x2"], "'tpu' is no known chip"),
        (["--topology", "h100:4", "--mesh", "fsdp=3"], "there are 4 devices"),
        (["--topology", "h100:4", "--mesh", "fsdp", "--batch", "6"], "does not divide over 4"),
        (["--topology", "h100:4", "--stage", "none"], "the experiment's stages are align, joint"),
        (["--topology", "h100:4", "--tiles", "3"], "--tiles 3: the model takes up to 1"),
        (["--topology", "h100:4", "--mesh", "fsdp", "--mesh", "data"], "add --sweep"),
        (["--topology", "h100:4", "--dump-hlo", "FILE"], "there is no HLO to dump"),
        (["--mesh", "fsdp"], "--mesh is for plans of a pod: say which with --topology"),
    ],
)
def test_what_does_not_fit(flags, said, capsys):
    assert main([*CONFIG, *flags]) == 1
    assert said in capsys.readouterr().err


def test_a_preset_has_no_step(capsys):
    assert main(["--preset", "tiny", "--topology", "h100:4"]) == 1
    assert "name it with --config" in capsys.readouterr().err


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert main([*CONFIG, "--topology", "v5e:2x2", "--mesh", "fsdp"]) == 1
    assert "requirements-tpu.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["focusllava_7b", "focusllava_13b", "focusllava_llama3_8b"])
def test_committed_experiments_have_meshes(name):
    from focus_jax.experiment import load_program
    from focus_jax.pods.settings import SETTINGS
    from focus_jax.pods.topology import parse_topology
    from focus_jax.sharding import parse_mesh

    config = load_program(Path(__file__).parents[2] / "configs" / f"{name}.py")
    assert config.name == name and config.model.max_tiles == 5
    assert config.data.text_length + config.data.prefix_length == 1024
    align, instruct = config.train.stages
    assert (align.batch, instruct.batch) == (256, 128)
    needed = {"v5e:8x8", "v5e:16x16", "v5p:4x4x4", "v5p:4x4x8", "h100:8"}
    assert needed <= SETTINGS[name].keys()
    for topology, used in SETTINGS[name].items():
        sizes = parse_mesh(used.mesh, parse_topology(topology).size)
        assert 128 // used.accumulate % (sizes["data"] * sizes["fsdp"]) == 0
        assert config.model.decoder.kv_heads % sizes["tensor"] == 0
