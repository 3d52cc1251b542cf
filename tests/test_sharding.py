"""Where arrays lie, on four simulated devices; the slow tests train on them."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from focus_jax.sharding import make_mesh, put_batch, put_replicated, replicated

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
    mesh = make_mesh()
    assert mesh.axis_names == ("data",) and mesh.size == len(jax.devices()) == 1
    batch = {"a": np.arange(6).reshape(3, 2), "b": np.ones(3, bool)}
    placed = put_batch(batch, mesh)
    assert placed.keys() == batch.keys()
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].dtype == jax.dtypes.canonicalize_dtype(array.dtype)
    tree = put_replicated({"w": [np.ones(2)]}, mesh)
    assert tree["w"][0].sharding == replicated(mesh)


@pytest.mark.parametrize("devices", [2, -1])
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(ValueError, match=f"{devices} devices asked for, 1 found .cpu.: give"):
        make_mesh(devices)


def test_four_devices_share_a_batch():
    out = python(
        """
        import json, sys
        import numpy as np
        from focus_jax.sharding import make_mesh, put_batch, put_replicated
        mesh = make_mesh()
        rows = put_batch({"a": np.arange(8)}, mesh)["a"].addressable_shards
        whole = put_replicated(np.arange(3), mesh).addressable_shards
        try:
            put_batch({"a": np.arange(6)}, mesh)
            said = ""
        except ValueError as error:
            said = str(error)
        json.dump({
            "sizes": [make_mesh(n).size for n in (0, 1, 3, 4)],
            "rows": {s.device.id: s.data.tolist() for s in rows},
            "whole": [s.data.tolist() for s in whole],
            "said": said,
        }, sys.stdout)
        """
    )
    found = json.loads(out)
    assert found["sizes"] == [4, 1, 3, 4]
    assert found["rows"] == {"0": [0, 1], "1": [2, 3], "2": [4, 5], "3": [6, 7]}
    assert found["whole"] == [[0, 1, 2]] * 4
    assert "a batch of 6 rows does not divide over 4 devices: choose a multiple" in found["said"]


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

    def stopping(watch, number, batches):
        see(watch, number, batches)
        if number == stop:
            watch.flush()
            sys.exit(0)

    training.make_step, training.Watch.see = keeping, stopping
    tree = training.Run(config, workdir, quiet=True).train()
    assert {leaf.sharding.num_devices for leaf in tree.values()} == {devices}
    # A second compilation means that a step hands on its state in another layout.
    assert [step._cache_size() for step in steps] == [1] * len(steps)
    """


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
