"""What the prefill of one question takes: all models in turn, round by round.

In a round all meet the same disturbance of a machine that others use as well, so ratios within a
round tell more than times do.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focus_jax.generate import run_prefill
from focus_jax.models.vlm import VLM, Inputs
from focus_jax.objectives import inputs_of
from focus_jax.study.answers import Batch, device_part


def prompts_of(batch: Batch, count: int) -> Inputs:
    """`count` questions of a batch, one a sample, each with its image, as a prefill takes them."""
    images, questions = batch["tokens"].shape[:2]
    at = np.arange(count) % (images * questions)
    image, question = at // questions, at % questions
    inputs = inputs_of(device_part(batch))
    own: dict[str, Any] = {
        name: getattr(inputs, name)[image, question][:, None]
        for name in ("tokens", "token_valid", "instruction", "label")
    }
    asks = own["token_valid"] & ~own["label"]
    own |= {"token_valid": asks, "label": jnp.zeros_like(asks)}
    rest = {name: value for name, value in inputs._asdict().items() if name not in own}
    shared: dict[str, Any] = {k: None if a is None else a[image] for k, a in rest.items()}
    return inputs._replace(**shared, **own)


def prefill_ms(models: Mapping[str, VLM], inputs: Inputs, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one question's prefill for each model in each round.

    Every round has another order; one round more than these, before them, compiles.
    """
    names, key = list(models), jax.random.key(0)
    found: dict[str, list[float]] = {name: [] for name in names}
    order, samples = np.random.default_rng(0), inputs.tokens.shape[0]
    for number in range(1 + rounds):
        for place in order.permutation(len(names)).tolist():
            start = time.perf_counter()
            jax.block_until_ready(run_prefill(models[names[place]], inputs, key, room=1))
            if number:
                seconds = time.perf_counter() - start
                found[names[place]].append(1e3 * seconds / samples)
    return found
