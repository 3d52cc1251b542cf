import contextlib
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from focus_jax.checkpoint import (
    CheckpointDamaged,
    CheckpointMismatch,
    CheckpointNotWritten,
    Checkpoints,
    load_meta,
    load_params,
    save_params,
)


def make_params(width=64):
    # Random and wide enough to lie in data files of its own, not inline in an index.
    rng = np.random.default_rng(0)
    return {
        "decoder": {"w": jnp.asarray(rng.normal(size=(64, width)), jnp.float32)},
        "layers": [jnp.ones(2), jnp.ones(3, jnp.bfloat16)],
        "stages": {0: jnp.zeros(1), 10: jnp.ones(1)},
    }


def make_state(width=64):
    params = make_params(width)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": params,
        "optimiser": optimiser.init(params),
        "step": jnp.int32(3),
        "key": jax.random.key(7),
    }


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three steps that keeps two; read only, copy it to do harm."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(), {"epoch": step}, {"config": {"width": 64}})
    return directory


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_a_state_comes_back_bit_for_bit(saved, abstract):
    template = jax.eval_shape(make_state) if abstract else make_state()
    state, data, meta = Checkpoints(saved, keep=2).restore(None, template)
    assert_same(state, make_state())
    assert data == {"epoch": 3} and meta == {"config": {"width": 64}}


def test_the_newest_are_kept(saved):
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.steps() == [2, 3] and checkpoints.latest() == 3
    assert checkpoints.restore(2, make_state())[1] == {"epoch": 2}
    assert checkpoints.meta(2) == {"config": {"width": 64}}


def test_a_save_under_way_survives_donation_and_mutation(tmp_path):
    donate = jax.jit(lambda x: x * 0, donate_argnums=0)
    array, host = jnp.arange(2_000_000.0), np.arange(5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"array": array, "host": host}, {}, {})
        array = donate(donate(array))
        host[:] = -1
        state = checkpoints.restore(1, {"array": array, "host": host})[0]
    np.testing.assert_array_equal(state["array"], np.arange(2_000_000, dtype=np.float32))
    np.testing.assert_array_equal(state["host"], np.arange(5))


def test_a_killed_write_is_never_picked_up(tmp_path):
    script = """
        import os, signal, sys
        import jax.numpy as jnp
        from focus_jax.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        checkpoints.save(1, {"a": jnp.ones(3)}, {}, {})
        checkpoints.wait()
        checkpoints.save(2, {"a": jnp.ones(40_000_000)}, {}, {})
        while not any("tmp" in name or name == "2" for name in os.listdir(sys.argv[1])):
            pass  # the write begins in a thread of its own
        os.kill(os.getpid(), signal.SIGKILL)
    """
    code = run_python(script, str(tmp_path), devices=1).returncode
    assert code == -signal.SIGKILL
    assert any("tmp" in path.name for path in tmp_path.iterdir()), "the kill came too late"
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, {"a": jnp.zeros(3)}, {}, {})
        assert checkpoints.steps() == [1, 2]


@contextlib.contextmanager
def full_disk(size=4096):
    """No file grows past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Writes that were under way beside the failing one are dropped with a complaint.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("told_by", ["check", "save", "wait", "close"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, told_by):
    match = r"could not be written to .*the last good checkpoint is of step 1; free the disk"
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(), {"epoch": 1}, {})
        checkpoints.wait()
        with full_disk(), pytest.raises(CheckpointNotWritten, match=match):
            checkpoints.save(2, make_state(), {"epoch": 2}, {})
            if told_by == "save":
                checkpoints.save(3, make_state(), {}, {})
            while told_by == "check":
                checkpoints.check()
                time.sleep(0.01)
            getattr(checkpoints, told_by)()
        assert checkpoints.steps() == [1]
        state, data, _ = checkpoints.restore(None, make_state())
        assert data == {"epoch": 1}
        assert_same(state, make_state())
        # Once there is room the same object goes on, and nothing of the failure is left.
        checkpoints.save(2, make_state(), {"epoch": 2}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert Checkpoints(tmp_path, keep=2).restore(None, make_state())[1] == {"epoch": 2}


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    with pytest.raises(NotADirectoryError, match=r"checkpoints is a file, .* move it away"):
        checkpoints.save(1, make_state(), {}, {})
    with pytest.raises(CheckpointNotWritten, match="there is none; free the disk, mend the folder"):
        Checkpoints(tmp_path / "checkpoints" / "deeper", keep=1).save(1, make_state(), {}, {})


def test_saving_a_step_again_needs_a_rewind(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "copy")
    with Checkpoints(directory, keep=2) as checkpoints:
        with pytest.raises(ValueError, match=r"already holds step 3; call rewind\(2\)"):
            checkpoints.save(3, make_state(), {}, {})
        checkpoints.rewind(2)
        assert checkpoints.steps() == [2]
        checkpoints.save(3, make_state(), {"epoch": 33}, {})
        assert checkpoints.restore(None, make_state())[1] == {"epoch": 33}


def test_what_is_not_json_is_named(tmp_path):
    with pytest.raises(ValueError, match="data cannot be written as JSON"):
        Checkpoints(tmp_path / "a", keep=1).save(1, {}, {"path": Path("x")}, {})
    with pytest.raises(ValueError, match="meta cannot be written as JSON"):
        save_params(tmp_path / "b", make_params(), {"path": Path("x")})


def test_absent_checkpoints_are_named(saved, tmp_path):
    reader = Checkpoints(tmp_path / "none", keep=1)
    assert reader.latest() is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint directory .*none; train one with"):
        reader.restore(None, {})
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint in"):
        load_params(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 .*holds \[2, 3\]"):
        Checkpoints(saved, keep=2).restore(9, make_state())


def test_another_shape_names_the_first_path_and_both_shapes(saved):
    wider = make_state(width=65)
    # The parameter, and its two moments in the optimiser state.
    match = r"at params/decoder/w it has float32\[64, 64\].*needs float32\[64, 65\] \(3 of"
    with pytest.raises(CheckpointMismatch, match=match):
        Checkpoints(saved, keep=2).restore(None, wider)


def test_missing_and_unexpected_paths_are_counted(saved):
    params = make_params()
    more = {**params, "router": {"w": jnp.ones(4), "b": jnp.ones(1)}}
    with pytest.raises(CheckpointMismatch, match=r"params/router/b it has nothing.*2 missing"):
        load_params(saved, more)
    with pytest.raises(CheckpointMismatch, match=r"needs nothing .*0 missing.*, 4 unexpected"):
        load_params(saved, {"decoder": params["decoder"]})
    with pytest.raises(CheckpointMismatch, match=r"at key it has uint32\[2\].*needs nothing"):
        Checkpoints(saved, keep=2).restore(None, {"params": params})


def test_a_change_of_kind_is_a_mismatch_and_of_precision_is_not(saved):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    assert_same(load_params(saved, half)[0], half)
    whole = jax.tree.map(lambda x: x.astype(jnp.int32), make_params())
    with pytest.raises(CheckpointMismatch, match=r"has float32\[64, 64\].*needs int32\[64, 64\]"):
        load_params(saved, whole)


def test_an_abstract_mesh_is_refused_with_the_mend(saved):
    mesh = AbstractMesh((4,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_params()
    )
    with pytest.raises(ValueError, match=r"rebuild it as NamedSharding\(mesh, spec\)"):
        load_params(saved, template)


def harmed_copies(saved, tmp_path):
    """Copies of the run with one file of step 3 cut or removed; and which file."""
    files = [path for path in sorted((saved / "3").rglob("*")) if path.is_file()]
    for number, path in enumerate(files):
        for cut in (True, False):
            copy = shutil.copytree(saved, tmp_path / f"{number}{cut}")
            victim = copy / path.relative_to(saved)
            if cut:
                os.truncate(victim, victim.stat().st_size // 2)
            else:
                victim.unlink()
            yield copy, path.relative_to(saved)


# Reads that were under way beside the failing one are dropped with a complaint.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_harm_to_any_file_is_either_found_or_without_effect(saved, tmp_path):
    found = set()
    for copy, path in harmed_copies(saved, tmp_path):
        try:
            state, data, meta = Checkpoints(copy, keep=2).restore(3, make_state())
        except CheckpointDamaged as error:
            assert "(step 3) is damaged" in str(error) and "one of [2]" in str(error)
            found.add(path.name if path.parent.name != "d" else "data file")
        else:
            assert_same(state, make_state())
            assert data == {"epoch": 3} and meta == {"config": {"width": 64}}
    gc.collect()
    assert found >= {"_METADATA", "manifest.ocdbt", "metadata", "data file"}


def test_damage_without_another_step_says_so(tmp_path):
    save_params(tmp_path / "base", {"w": jnp.ones(3)}, {})
    (tmp_path / "base" / "state" / "_METADATA").unlink()
    with pytest.raises(CheckpointDamaged, match=r"\(base\) is damaged.*no other step"):
        load_params(tmp_path / "base", {"w": jnp.ones(3)})


def test_params_alone_from_a_run_a_step_or_their_own_folder(saved, tmp_path):
    params, meta = make_params(), {"config": {"width": 64}}
    save_params(tmp_path / "base", params, meta)
    for path in (saved, saved / "2", tmp_path / "base"):
        assert load_meta(path) == meta
        loaded, loaded_meta = load_params(path, params)
        assert_same(loaded, params)
        assert loaded_meta == meta


def test_params_without_a_template_are_dicts_and_lists(saved):
    params = make_params()
    params["stages"] = {str(key): value for key, value in params["stages"].items()}
    assert_same(load_params(saved)[0], params)


def test_params_are_not_overwritten_unasked(tmp_path):
    save_params(tmp_path / "p", {"w": jnp.ones(1)}, {"version": 1})
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_params(tmp_path / "p", {"w": jnp.ones(2)}, {"version": 2})
    save_params(tmp_path / "p", {"w": jnp.ones(2)}, {"version": 2}, overwrite=True)
    assert load_meta(tmp_path / "p") == {"version": 2}
    assert load_params(tmp_path / "p")[0]["w"].shape == (2,)


def test_a_checkpoint_without_params_is_named(tmp_path):
    with Checkpoints(tmp_path, keep=1, async_=False) as checkpoints:
        checkpoints.save(1, {"weights": jnp.ones(1)}, {}, {})
    with pytest.raises(CheckpointMismatch, match=r"no parameters under `params`.*weights"):
        load_params(tmp_path)


def run_python(script, *args, devices):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_sharded_arrays_come_back_in_the_shardings_asked_for(tmp_path):
    script = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from focus_jax.checkpoint import Checkpoints, load_params
        mesh = jax.make_mesh((2, 2), ("data", "model"))
        host = np.arange(64.0, dtype=np.float32).reshape(8, 8)
        keys = jax.random.split(jax.random.key(0), 4)
        at = lambda *spec: NamedSharding(mesh, P(*spec))
        state = {
            "params": {"w": jax.device_put(host, at("data", "model"))},
            "keys": jax.device_put(keys, at("data")),
        }
        with Checkpoints(sys.argv[1], keep=1) as checkpoints:
            checkpoints.save(1, state, {}, {})
            same = checkpoints.restore(1, state)[0]
            other = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=at("model", None))
            moved = load_params(sys.argv[1], {"w": other})[0]["w"]
            plain = load_params(sys.argv[1])[0]["w"]
        assert same["params"]["w"].sharding == at("data", "model"), same["params"]["w"].sharding
        assert same["keys"].sharding.is_equivalent_to(at("data"), 1), same["keys"].sharding
        assert (jax.random.key_data(same["keys"]) == jax.random.key_data(keys)).all()
        assert moved.sharding == other.sharding and len(plain.sharding.device_set) == 1
        for array in (same["params"]["w"], moved, plain):
            np.testing.assert_array_equal(np.asarray(array), host)
    """
    result = run_python(script, str(tmp_path), devices=4)
    assert result.returncode == 0, result.stderr
