"""Compiled programs kept between processes."""

import os
from pathlib import Path

import jax

OFF = "FOCUS_JAX_NO_CACHE"


def keep_compiled() -> None:
    """Keep compiled programs on disk, where nothing else was decided.

    The folder is jax's own setting (JAX_COMPILATION_CACHE_DIR), else focus_jax in the user's cache
    folder. FOCUS_JAX_NO_CACHE=1 switches it off.
    """
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if os.environ.get(OFF) or chosen:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "focus_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
