"""transformers' side, in torch: the same sizes, inputs and dtype."""

import os
import time
from collections.abc import Callable
from typing import Any

from focus_jax.benchmark.job import PREFIX, Job, Measured, clock, forget_peak, resident


def measure_hf(job: Job) -> Measured:
    """transformers with sdpa attention; the decode with whichever cache is faster."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "--against hf runs in torch, which is not installed: pip install torch"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    out: Measured = {}
    start = time.perf_counter()
    model = hf_model(job, device)
    if job.checkpoint:
        out["load"] = time.perf_counter() - start
    forget_peak()
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    cfg, dtype = model.config, getattr(torch, job.dtype)
    width, side = cfg.text_config.hidden_size, cfg.vision_config.image_size

    def noise(*shape: int) -> Any:
        return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    def timed(call: Callable[..., Any], given: Any) -> float:
        def whole() -> None:
            call(model, given)
            finish()

        return clock(whole)

    prompt = None
    with torch.inference_mode():
        hf_prefill(model, noise(1, PREFIX, width).to(device, dtype))
        for tiles, visual in zip(job.tiles, job.visual, strict=True):
            pixels = noise(tiles, 3, side, side).to(device, dtype)
            out[f"tower:{tiles}"] = timed(hf_see, pixels)
            rows = noise(1, visual + job.text, width).to(device, dtype)
            out[f"prefill:{tiles}"] = timed(hf_prefill, rows)
            prompt = prompt or hf_prefill(model, rows)
        for batch in job.batch:
            kinds = ("dynamic", "static")
            out[f"decode:{batch}"] = max(hf_decode(job, model, prompt, batch, k) for k in kinds)
    on_gpu = device.type == "cuda"
    out["memory"] = float(torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM"))
    return out


def hf_model(job: Job, device: Any) -> Any:
    """The checkpoint, or the preset's sizes with random weights."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    transformers.logging.set_verbosity_error()
    text = job.hf_config or {}
    name = "LlavaNext" if text["model_type"] == "llava_next" else "Llava"
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    dtype = getattr(torch, job.dtype)
    if job.checkpoint:
        from focus_jax import hf

        model = kind.from_pretrained(
            str(hf.resolve(job.checkpoint)), dtype=dtype, attn_implementation="sdpa"
        )
        return model.to(device).eval()
    config = getattr(transformers, f"{name}Config").from_dict(text)
    config._attn_implementation = "sdpa"
    with no_init_weights():
        model = kind(config).to(dtype).to(device).eval()
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    noise = noise.to(device, dtype)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            flat = leaf.view(-1)
            if name.endswith("bias") or "norm" in name:
                flat.fill_(float(name.endswith("weight")))
                continue
            for part in flat.split(noise.numel()):
                part.copy_(noise[: part.numel()])
    return model


def hf_see(model: Any, pixels: Any) -> Any:
    """Tower and projector, as `get_image_features` runs them."""
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return model.model.multi_modal_projector(seen[model.config.vision_feature_layer][:, 1:])


def hf_prefill(model: Any, rows: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """The first new token after these rows, and keys and values of each layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.text_config)
    inner = model.model.language_model
    hidden = inner(inputs_embeds=rows, past_key_values=cache, use_cache=True).last_hidden_state
    token = model.lm_head(hidden[:, -1]).argmax(-1)
    layers: Any = cache.layers
    return token, [(layer.keys, layer.values) for layer in layers]


def hf_decode(job: Job, model: Any, prompt: Any, batch: int, kind: str) -> float:
    """Tokens a second of all rows together, one forward pass for each."""
    import torch
    from transformers import DynamicCache, StaticCache

    config, best = model.config.text_config, []
    token, kept = prompt
    for _ in range(3):
        rows = kept[0][0].shape[2]
        cache = (
            DynamicCache(config=config)
            if kind == "dynamic"
            else StaticCache(config=config, max_cache_len=rows + job.new_tokens)
        )
        for layer, (k, v) in enumerate(kept):
            cache.update(k.repeat(batch, 1, 1, 1), v.repeat(batch, 1, 1, 1), layer)
        said = token.repeat(batch)[:, None]
        start = time.perf_counter()
        for at in range(rows, rows + job.new_tokens - 1):
            position = torch.full((batch, 1), at, device=said.device)
            hidden = model.model.language_model(
                input_ids=said, position_ids=position, past_key_values=cache, use_cache=True
            ).last_hidden_state
            said = model.lm_head(hidden[:, -1]).argmax(-1)[:, None]
        said.cpu()
        best.append(time.perf_counter() - start)
    return batch * (job.new_tokens - 1) / min(best)
