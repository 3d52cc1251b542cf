"""This package's side: tower, prefill and decode of one model with random or loaded weights."""

import time
from collections.abc import Callable
from typing import Any

from focus_jax.benchmark.job import (
    PREFIX,
    Job,
    Measured,
    clock,
    forget_peak,
    method_of,
    model_config,
    resident,
)


def measure_ours(job: Job) -> Measured:
    """This package with the job's method."""
    import jax

    from focus_jax.models.vlm import VLM

    out: Measured = {}
    start = time.perf_counter()
    vlm = our_model(job)
    jax.block_until_ready(vlm)
    if job.checkpoint:
        out["load"] = time.perf_counter() - start
    forget_peak()
    key = jax.random.key(0)
    prompt = None
    for tiles in job.tiles:
        inputs = our_inputs(job, vlm.cfg, tiles)
        seen = finished(VLM.see, vlm, inputs, context(key))
        out[f"tower:{tiles}"] = clock(seen)
        prefilled = finished(prefill_once, vlm, inputs, seen()[0], key, room=job.new_tokens)
        out[f"prefill:{tiles}"] = clock(prefilled)
        prompt = prompt or prefilled()
    for batch in job.batch:
        out[f"decode:{batch}"] = our_decode(job, vlm, copies(prompt, batch), key)
    stats = jax.devices()[0].memory_stats() or {}
    out["memory"] = float(stats.get("peak_bytes_in_use", resident("VmHWM")))
    return out


def our_model(job: Job) -> Any:
    """The checkpoint, or a preset with random weights of usual sizes."""
    import jax
    import jax.numpy as jnp

    from focus_jax import hf
    from focus_jax.models.params import abstract, named_leaves, with_leaves, with_method

    cfg = model_config(job)
    method = method_of(job, cfg)
    if job.checkpoint:
        _, tree = hf.read(hf.resolve(job.checkpoint), param_dtype=job.dtype, stacked=False)
        return with_method(cfg, tree, method)
    shape = abstract(cfg, method)
    noise = 0.02 * jax.random.normal(jax.random.key(0), (1 << 20,))

    def fill(name: str, leaf: Any) -> Any:
        if name.endswith(("scale", "bias")):
            return jnp.full(leaf.shape, float(name.endswith("scale")), leaf.dtype)
        return jnp.resize(noise, leaf.shape).astype(leaf.dtype)  # one initialiser is too slow

    leaves = {name: fill(name, leaf) for name, leaf in named_leaves(shape).items()}
    return with_leaves(shape, leaves)


def our_inputs(job: Job, cfg: Any, tiles: int) -> Any:
    """One image of `tiles` tiles, nothing cut off, and a prompt whose words all ask."""
    import jax.numpy as jnp
    import numpy as np

    from focus_jax.models.vlm import Inputs

    rng = np.random.default_rng(0)
    side, grid, words = cfg.vision.image_size, cfg.vision.grid, job.text - PREFIX
    across = 2 if tiles == 5 else max(tiles - 1, 1)
    origin = [(0, 0)] + [(i // across * grid, i % across * grid) for i in range(tiles - 1)]
    every = jnp.ones((1, 1, words), bool)
    return Inputs(
        pixels=jnp.asarray(rng.integers(0, 256, (1, tiles, side, side, 3)), jnp.uint8),
        patch_valid=jnp.ones((1, tiles, grid**2), bool),
        origin=jnp.asarray(origin, jnp.int32)[None],
        prefix=jnp.asarray(rng.integers(0, cfg.decoder.vocab_size, (1, PREFIX)), jnp.int32),
        prefix_valid=jnp.ones((1, PREFIX), bool),
        tokens=jnp.asarray(rng.integers(0, cfg.decoder.vocab_size, (1, 1, words)), jnp.int32),
        token_valid=every,
        instruction=every,
        label=~every,
    )


def context(key: Any) -> Any:
    from focus_jax.compress.method import Context

    return Context(key)


def finished(function: Callable[..., Any], *args: Any, **static: Any) -> Callable[[], Any]:
    """A call of the compiled program with these arguments that waits for its results."""
    import jax

    program = jax.jit(function, static_argnames=tuple(static)).lower(*args, **static).compile()
    return lambda: jax.block_until_ready(program(*args))


def prefill_once(vlm: Any, inputs: Any, visual: Any, key: Any, room: int) -> Any:
    """What `generate.prefill` does with the visual tokens that the tower has made."""
    from focus_jax.generate import Prefilled

    streams = vlm.begin(inputs, visual)
    stages, slots = range(len(vlm.decoder.stages)), streams.visual.shape[1]
    hidden, caches = vlm.last_row(streams, stages, slots, context(key), room)
    return Prefilled(vlm.decoder.logits(hidden), caches)


def decode_many(vlm: Any, state: Any, until: Any, rules: Any, key: Any) -> Any:
    """Greedy tokens by `generate.decode`; takes the state over."""
    from focus_jax.generate import run_decode

    return run_decode(vlm, state, until, rules, key, greedy=True)


def copies(prompt: Any, batch: int) -> Any:
    """The same prompt `batch` times: it need not be run so often for a decode to be timed."""
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda a: jnp.tile(a, (batch, *[1] * (a.ndim - 1))), prompt)


def our_decode(job: Job, vlm: Any, prompt: Any, key: Any) -> float:
    """Tokens a second of all rows together; the prompt's own token is not counted."""
    import jax
    import jax.numpy as jnp

    from focus_jax.generate import run_begin
    from focus_jax.sampling import Sampling

    size, best = job.new_tokens, []
    rules, until = Sampling(max_new_tokens=size).rules(), jnp.asarray(size, jnp.int32)
    for _ in range(4):  # the first compiles
        fresh = jax.tree.map(jnp.copy, prompt)
        state = run_begin(fresh.logits, fresh.caches, rules, key, size=size, greedy=True)
        jax.block_until_ready(state)
        start = time.perf_counter()
        jax.block_until_ready(decode_many(vlm, state, until, rules, key))
        best.append(time.perf_counter() - start)
    return prompt.logits.shape[0] * (size - 1) / min(best[1:])
