"""What one process measures, and how it takes time and memory."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from focus_jax.config import DTypeName

PREFIX = 8  # of the text's tokens stand before the image
ENOUGH = 20.0  # seconds of repeats in one round; what takes longer runs once
BIG = 8  # tiles of a batch from which on methods are measured with fewer decoder layers
Measured = dict[str, float]


@dataclass(frozen=True)
class Job:
    """What one process measures. `hf_config` is config.json of the same sizes for transformers."""

    side: str
    checkpoint: str
    preset: str
    layers: int
    dtype: DTypeName
    tiles: tuple[int, ...]
    batch: tuple[int, ...]
    text: int
    new_tokens: int
    keep: float
    attention: Literal["xla", "blocked", "cudnn"]
    hf_config: dict[str, Any] | None = None
    visual: tuple[int, ...] = ()


def model_config(job: Job) -> Any:
    """The sizes of the job's checkpoint or preset, in its dtype. ValueError: an unknown preset."""
    from focus_jax import hf
    from focus_jax.config import PRESETS

    if job.checkpoint:
        cfg = hf.read_config(hf.resolve(job.checkpoint))
    elif job.preset not in PRESETS:
        raise ValueError(f"--preset {job.preset!r}: choose one of {', '.join(sorted(PRESETS))}")
    else:
        cfg = PRESETS[job.preset]()
        layers = job.layers or cfg.decoder.layers
        cfg = replace(cfg, decoder=replace(cfg.decoder, layers=layers))
    cfg = replace(cfg, param_dtype=job.dtype, compute_dtype=job.dtype, stacked=False)
    return replace(cfg, attention=job.attention)


def method_of(job: Job, cfg: Any) -> Any:
    """All visual tokens, or a text-guided cut at a quarter of the decoder's depth."""
    from focus_jax.compress.focusllava import focusllava
    from focus_jax.compress.text_guided import TextGuided

    cut = TextGuided(layer=max(1, cfg.decoder.layers // 4), keep=job.keep)
    return focusllava(vision=None, text=cut if job.side == "cut" else None)


def planned(job: Job) -> dict[str, float]:
    """How many times fewer operations the cut's prompt takes, by row: decoder, head and cut."""
    from focus_jax.compress.plan import plan
    from focus_jax.models.vlm import dims_of, sizes_of

    cfg, out = model_config(job), {}
    for tiles in job.tiles:
        flops = [
            plan(
                method_of(replace(job, side=side), cfg), dims_of(cfg, tiles), sizes_of(cfg),
                job.text - PREFIX, prefix_tokens=PREFIX, head_tokens=1,
            ).flops
            for side in ("full", "cut")
        ]  # fmt: skip
        every, fewer = (f.decoder + f.head + f.samplers for f in flops)
        out[f"prefill:{tiles}"] = every / fewer
    return out


def clock(call: Callable[[], Any]) -> float:
    """The least seconds of up to five runs, fewer where they take long."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < ENOUGH:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def resident(key: str) -> float:
    """VmHWM or VmRSS in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return float(found[1]) * 1024 if found else 0.0


def forget_peak() -> None:
    """The high-water mark of resident memory, which loading has raised, begins anew."""
    clear = Path("/proc/self/clear_refs")
    if clear.is_file():
        clear.write_text("5")
