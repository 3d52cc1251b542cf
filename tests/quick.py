"""Compilation for tests: small programs run once, so quick compilation beats quick code."""

from functools import partial

import jax

compiled = partial(
    jax.jit,
    compiler_options={"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 0},
)
