"""Where arrays lie, on four simulated devices; the slow tests train on them."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.config import LORA_TARGETS, PRESETS, LoraConfig
from focus_jax.models.params import abstract, canonical_name, named_leaves
from focus_jax.sharding import (
    AXES,
    Layout,
    ShardingRules,
    in_blocks,
    logical_axes,
    make_layout,
    make_mesh,
    parse_mesh,
    put_batch,
    put_replicated,
    replicated,
)
from tests.sharded import TOWER, VOCAB, WIDTH

ROOT = Path(__file__).parents[1]


def python(code, *arguments, devices=4):
    """Run a program in a process of its own that sees `devices` CPU devices."""
    flags = [os.environ["XLA_FLAGS"], f"--xla_force_host_platform_device_count={devices}"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_device():
    layout = make_layout()
    assert dict(layout.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert layout.spec("batch", None, "heads") == PartitionSpec(None, None, None)
    batch = {"a": np.arange(6).reshape(3, 2), "b": np.ones(3, bool)}
    placed = put_batch(batch, layout)
    assert placed.keys() == batch.keys()
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].dtype == jax.dtypes.canonicalize_dtype(array.dtype)
    tree = put_replicated({"w": [np.ones(2)]}, layout.mesh)
    assert tree["w"][0].sharding == replicated(layout.mesh)


@pytest.mark.parametrize("devices", [2, -1])
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(ValueError, match=f"{devices} devices asked for, 1 found .cpu.: give"):
        make_mesh("data", devices)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data", (8, 1, 1)),
        ("fsdp", (1, 8, 1)),
        ("fsdp,tensor=2", (1, 4, 2)),
        ("tensor=2, data", (4, 1, 2)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2)),
    ],
)
def test_words_for_meshes(text, sizes):
    assert tuple(parse_mesh(text, 8).values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=8", "'model' is no axis, or named twice; write some of data, fsdp, tensor"),
        ("data=2,data=4", "'data' is no axis, or named twice"),
        ("data,data", "'data' is no axis, or named twice"),
        ("data,fsdp", "both data and fsdp lack a size"),
        ("tensor=0", "tensor=0: give a size of at least 1"),
        ("fsdp=2.5", "fsdp=2.5: give a size"),
        ("fsdp=3", "3 = 3 places, there are 8 devices: choose sizes whose product is 8"),
        ("fsdp,tensor=3", "= 6 places, there are 8 devices"),
        ("fsdp,tensor=16", "= 16 places, there are 8 devices"),
        ("", "'' is no axis"),
    ],
)
def test_words_for_no_mesh(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_mesh(text, 8)


def test_rules_name_axes_of_a_mesh():
    with pytest.raises(ValueError, match=re.escape("rules.mlp names 'model', and a mesh has")):
        ShardingRules(mlp=("model",))


MESH = AbstractMesh((2, 4, 2), AXES)


def test_parameters_are_kept_split_and_used_gathered():
    layout = Layout(MESH)
    name, shape = "decoder.layers.gate.kernel", (3, 16, 24)
    assert layout.stored(name, shape).spec == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert layout.used(name, shape).spec == PartitionSpec(None, None, ("tensor",))
    # One layer of a scan has no axis of layers.
    assert layout.stored(name, shape[1:]).spec == PartitionSpec(("fsdp",), ("tensor",))
    # 37 words do not divide over two devices.
    embedding = layout.stored("decoder.embed.embedding", (37, 16))
    assert embedding.spec == PartitionSpec(None, ("fsdp",))
    assert layout.stored("samplers.vision.gate.kernel", (8, 4)).spec == PartitionSpec()
    other = Layout(MESH, ShardingRules(embed=(), mlp=("fsdp", "tensor")))
    assert other.stored(name, shape).spec == PartitionSpec(None, None, ("fsdp", "tensor"))
    with pytest.raises(ValueError, match="no logical axes are known for parameter"):
        layout.stored("decoder.new", (2,))


def test_low_rank_updates_lie_as_their_kernels():
    layout = Layout(MESH)
    sizes = {"embed": 16, "heads": 32, "kv_heads": 8, "mlp": 24, "layers": 3}
    for target in LORA_TARGETS:
        _, *axes = logical_axes(f"decoder.layers.{target}.kernel")
        name = f"decoder.layers.lora.{target}"
        kernel = layout.stored(f"decoder.layers.{target}.kernel", (3, *(sizes[a] for a in axes)))
        a = layout.stored(f"{name}.a", (3, sizes[axes[0]], 4)).spec
        b = layout.stored(f"{name}.b", (3, 4, sizes[axes[1]])).spec
        assert PartitionSpec(None, a[1], b[2]) == kernel.spec and a[2] is b[1] is None


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_parameter_has_logical_axes(preset):
    cfg = replace(PRESETS[preset](), lora=LoraConfig(rank=4))
    model = abstract(cfg, focusllava(vision=VisionGuided(), text=None))
    for name, leaf in named_leaves(model).items():
        axes = logical_axes(canonical_name(name))
        assert len(axes) in (0, len(leaf.shape)), name


class Chip(NamedTuple):
    coords: tuple[int, int, int]


def test_tensor_axes_are_blocks_of_a_flat_torus():
    chips = [Chip((x, y, 0)) for y in range(8) for x in range(4)]
    found = in_blocks(chips, 4)
    assert found.size == 32 and len({chip.coords for chip in found.flat}) == 32
    for block in found.reshape(8, 4):
        corner = min(chip.coords for chip in block)
        square = {(corner[0] + i, corner[1] + j, 0) for i in range(2) for j in range(2)}
        assert {chip.coords for chip in block} == square
    # Not for pairs, boxes, parts of a slice, and devices without a place.
    assert in_blocks(chips, 2) is None
    assert (
        in_blocks([Chip((x, y, z)) for x in range(2) for y in range(2) for z in (0, 1)], 4) is None
    )
    assert in_blocks(chips[:-1], 4) is None
    assert in_blocks(jax.devices(), 1) is None


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="a batch of 12 rows does not divide over 8 devices"):
        Layout(MESH).check_batch(12)


def test_four_devices_share_a_batch():
    out = python(
        """
        import json, sys
        import numpy as np
        from focus_jax.sharding import make_layout, make_mesh, put_batch, put_replicated
        layout = make_layout("data=2,tensor=2")
        rows = put_batch({"a": np.arange(8)}, layout)["a"].addressable_shards
        later = put_batch({"a": np.arange(8)[None]}, layout, axis=1)["a"].addressable_shards
        whole = put_replicated(np.arange(3), layout.mesh).addressable_shards
        try:
            put_batch({"a": np.arange(7)}, layout)
            said = ""
        except ValueError as error:
            said = str(error)
        json.dump({
            "sizes": [make_mesh("data", n).size for n in (0, 1, 3, 4)],
            "rows": {s.device.id: s.data.tolist() for s in rows},
            "later": {s.device.id: s.data[0].tolist() for s in later},
            "whole": [s.data.tolist() for s in whole],
            "said": said,
            "held": [layout.rows(8), make_layout("data").rows(8)],
        }, sys.stdout)
        """
    )
    found = json.loads(out)
    assert found["sizes"] == [4, 1, 3, 4]
    first, second = [0, 1, 2, 3], [4, 5, 6, 7]
    assert found["rows"] == {"0": first, "1": first, "2": second, "3": second} == found["later"]
    assert found["whole"] == [[0, 1, 2]] * 4
    assert found["held"] == [list(range(8))] * 2
    assert "a batch of 7 rows does not divide over 2 devices" in found["said"]


# ------------------------------------------------------------------ training on 8 devices


@pytest.fixture(scope="module")
def sharded():
    """What `tests/sharded.py` measured, by method and mesh."""
    program = "import runpy; runpy.run_module('tests.sharded', run_name='__main__')"
    return json.loads(python(program, devices=8))


METHODS = ("full", "focusllava")
ON_EIGHT = ("data", "fsdp", "fsdp + tensor")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", ON_EIGHT)
def test_losses_are_those_of_one_device(sharded, method, mesh):
    one, many = (sharded[method][name]["losses"] for name in ("one device", mesh))
    assert len(one) == 20
    assert len(set(one)) == 20
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


# What dims of parameters and of scores may be; all others count samples or rows.
WIDTHS = {WIDTH, TOWER, 16, 32, 56, 160, 320, VOCAB}


def sent(found) -> dict[tuple, int]:
    """Bytes by (kind, mesh axes, widths of the array); how many samples and rows left open."""
    out = Counter()
    for one in found:
        if one["size"] == 1:
            continue
        for shape in one["shapes"]:
            dims = [int(n) for n in re.findall(r"\d+", shape.partition("[")[2])]
            widths = tuple(n for n in dims if n in WIDTHS)
            key = one["kind"], tuple(one["axes"]), shape.partition("[")[0], widths
            out[key] += one["times"] * 4 * math.prod(dims)
    return out


def is_hidden(key) -> bool:
    """Whether an array could be rows of the model's or the tower's width."""
    *_, widths = key
    return len(widths) == 1 and widths[0] in (WIDTH, TOWER)


@pytest.mark.parametrize("mesh", ON_EIGHT)
def test_samplers_send_no_hidden_states(sharded, mesh):
    """No activation of a model's width travels that does not travel with all tokens too."""
    full, focus = (sent(sharded[method][mesh]["collectives"]) for method in METHODS)
    more = {k: (n, full[k]) for k, n in focus.items() if is_hidden(k) and n > full[k]}
    assert not more
    if "tensor" in mesh:  # the test sees them where they are
        assert any(is_hidden(key) for key in full)


@pytest.mark.parametrize("mesh", ON_EIGHT)
def test_what_samplers_add_is_at_most_a_hundredth(sharded, mesh):
    """Scores, their own gradients, scalars, and what they read of a layer's parameters."""
    full, focus = (sent(sharded[method][mesh]["collectives"]) for method in METHODS)
    added = {key: n - full[key] for key, n in focus.items() if n > full[key]}
    assert sum(added.values()) <= 0.01 * sum(full.values()), added


TRAIN = """
    import sys
    from dataclasses import replace
    import jax
    from focus_jax import training
    from focus_jax.experiment import TrainConfig, TrainStage
    from tests.micro import get_config

    workdir, data, devices, stop = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    words = TrainStage(
        "words", "words", steps=3, learning_rate=3e-3, samplers=False, batch=4, questions=2
    )
    # The tower is frozen: near-ties in max pooling would send gradients elsewhere.
    joint = TrainStage(
        "joint", "answers", steps=4, learning_rate=3e-3, batch=4, questions=2,
        train=("decoder.", "projector.", "samplers."),
    )
    config = get_config()
    config = replace(
        config,
        data=replace(config.data, directory=data),
        train=TrainConfig((words, joint), log_every=1, save_every=2, devices=devices),
    )
    steps, make_step, see = [], training.make_step, training.Watch.see

    def keeping(*arguments):
        steps.append(make_step(*arguments))
        return steps[-1]

    def stopping(watch, number, *seen):
        see(watch, number, *seen)
        if number == stop:
            watch.flush()
            sys.exit(0)

    training.make_step, training.Watch.see = keeping, stopping
    tree = training.Run(config, workdir, quiet=True).train()
    assert {leaf.sharding.num_devices for leaf in tree.values()} == {devices}
    # A second compilation means that a step hands on its state in another layout.
    assert [step._cache_size() for step in steps] == [1] * len(steps)
    """


LORA = """
    import json, sys
    from dataclasses import replace
    import numpy as np
    from focus_jax.config import LoraConfig
    from focus_jax.models import params as names
    from tests.sharded import CONFIG, MESHES, STAGE, train

    cfg = replace(CONFIG.model, lora=LoraConfig(rank=4))
    stage = replace(STAGE, train=("decoder.layers.lora.", "projector.", "samplers."), steps=8)
    method = CONFIG.compress.value()
    leaves = names.canonical(names.named_leaves(names.initialise(cfg, method, 0)))
    tree = {name: np.array(leaf) for name, leaf in leaves.items()}
    rng = np.random.default_rng(0)
    for name, leaf in tree.items():
        if name.endswith(".b"):
            leaf[:] = 0.05 * rng.standard_normal(leaf.shape)
    found = {n: train(method, tree, *MESHES[n], cfg, stage)["losses"] for n in sys.argv[1:]}
    json.dump(found, sys.stdout)
    """


@pytest.mark.slow
def test_low_rank_updates_train_on_every_mesh_as_on_one_device():
    found = json.loads(python(LORA, "one device", "fsdp + tensor", devices=8))
    one, many = found.values()
    assert len(set(one)) == 8
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_four_devices_train_as_one_does_and_resume(tmp_path):
    def train(name, devices, stop=0):
        python(TRAIN, tmp_path / name, tmp_path / "data", devices, stop)
        return losses(tmp_path / name)

    one, four = train("one", 1), train("four", 4)
    assert len(one) == 7
    np.testing.assert_allclose(four, one, rtol=1e-5)
    assert len(train("cut", 4, stop=6)) == 6
    shutil.copytree(tmp_path / "cut", tmp_path / "moved")
    assert train("cut", 4) == four
    # A run may go on with another number of devices.
    np.testing.assert_allclose(train("moved", 1), one, rtol=1e-5)
