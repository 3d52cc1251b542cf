"""One micro run, trained once, for every test that needs a checkpoint."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

# Read when jax is imported, so they stand here: tests run small programs once or twice, and quick
# compilation beats quick code.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["FOCUS_JAX_NO_CACHE"] = "1"  # tests leave nothing in the user's cache folder
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

PROGRAM = Path(__file__).with_name("micro.py")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Thousands of compiled programs are gigabytes, and no other module wants them."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """`workdir` of a finished run of `program` with `flags` over it; do not write into it."""
    from focus_jax.cli.train import main

    root = tmp_path_factory.mktemp("micro")
    flags = ["--data.directory", str(root / "data")]
    workdir = root / "micro"
    code = main(["--config", str(PROGRAM), "--workdir", str(workdir), "--quiet", *flags])
    assert code == 0
    return SimpleNamespace(workdir=workdir, program=PROGRAM, flags=flags)


@pytest.fixture(scope="module")
def kept_programs(tmp_path_factory):
    """Programs on disk, for runs that compile the same steps again and again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
