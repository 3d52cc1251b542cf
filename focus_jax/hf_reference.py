"""What transformers' own LLaVA computes on a prompt with photos, in torch, module by module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from focus_jax import hf_config

TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
DECODER, HEAD = "model.language_model", "lm_head"
# How these keys read in `Reference.seen`: a module's name is its output.
PIXELS, TOWER_FEATURES, MERGED = "preprocessing", "tower features", "merged embeddings"
NEWLINE, PACKED = "model.image_newline", "model.pack_image_features"


class Reference(NamedTuple):
    """One prompt through transformers in fp32; rows stand in the order of the merged sequence.

    `ids`: with as many image tokens as an image has rows. `features`: what stands for all images,
    packed, newlines included (no rows without an image). `tokens`: greedy, stop tokens ignored.
    `seen`: outputs of modules by their names there, and the arrays named above.
    """

    ids: Int[np.ndarray, " S"]
    features: Float[np.ndarray, "V D"]
    logits: Float[np.ndarray, "S W"]
    tokens: Int[np.ndarray, " N"]
    seen: dict[str, np.ndarray]


def torch_or_raise() -> Any:
    """torch, which only this comparison needs. ValueError without it."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "the reference runs in torch, which is not installed: pip install torch"
        ) from error
    return torch


def check_readable(directory: Path) -> None:
    """ValueError for LLaVA's original layout, which transformers cannot read."""
    text = hf_config.read_json(directory / "config.json")
    if hf_config.is_original(text) or text.get("model_type") in ("llava_llama", "llava_mistral"):
        raise ValueError(
            f"{directory} is in LLaVA's original layout, which transformers cannot read: convert "
            f"it with focus_jax.load({str(directory)!r}, vision_tower=CLIP).save(DIR), and "
            "compare DIR"
        )


def reference(
    directory: Path, text: str, images: Sequence[Path], new_tokens: int, depth: int
) -> Reference:
    """Run transformers' model and processor on the CPU in fp32; both are freed on return.

    text: with a marker "<image>" for each image. depth: how many of the tower's layers count.
    """
    torch = torch_or_raise()
    from transformers import GenerationConfig

    model = load_model(directory)
    processor = load_processor(directory)
    inputs = processor(
        images=[str(image) for image in images] or None, text=text, return_tensors="pt"
    )
    seen: dict[str, np.ndarray] = {}
    hooks = watch(model, seen, depth)
    with torch.inference_mode():
        out = model(**inputs)
        for hook in hooks:
            hook.remove()
        # The checkpoint's own settings would bring sampling, penalties and stop tokens.
        settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
        model.generation_config = settings
        told = model.generate(**inputs, generation_config=settings)
    if hasattr(model.model, "image_newline"):
        seen[NEWLINE] = array(model.model.image_newline)[None]
    ids = array(inputs["input_ids"])[0]
    logits = array(out.logits)[0]
    if images:
        features = array(out.image_hidden_states).reshape(-1, seen[MERGED].shape[-1])
    else:
        features = np.zeros((0, seen[MERGED].shape[-1]), np.float32)
    return Reference(ids, features, logits, array(told)[0, len(ids) :], seen)


def load_model(directory: Path) -> Any:
    """The model in fp32 on the CPU."""
    import torch
    import transformers

    kind = hf_config.read_json(directory / "config.json")["model_type"]
    name = "LlavaNext" if kind == "llava_next" else "Llava"
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    return model_class.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()


def load_processor(directory: Path) -> Any:
    """The checkpoint's processor, with images in PIL: torchvision resizes otherwise."""
    from transformers import AutoConfig, AutoProcessor

    processor = AutoProcessor.from_pretrained(str(directory), backend="pil", local_files_only=True)
    if processor.patch_size is None:  # files from before processors counted image tokens
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
    return processor


def watch(model: Any, seen: dict[str, np.ndarray], depth: int) -> list[Any]:
    """Hooks that keep what goes through the modules which have a counterpart here."""
    modules = dict(model.named_modules())
    tower = tower_name(modules)

    def output(name: str) -> Any:
        def keep(_module: Any, _args: Any, out: Any) -> None:
            seen[name] = array(out[0] if isinstance(out, tuple) else out)

        return modules[name].register_forward_hook(keep)

    def entry(name: str, key: str) -> Any:
        def keep(_module: Any, args: Any, kwargs: Any) -> None:
            seen[key] = array(args[0] if args else next(iter(kwargs.values())))

        return modules[name].register_forward_pre_hook(keep, with_kwargs=True)

    parts = [f"{tower}.embeddings", f"{tower}.pre_layrnorm", PROJECTOR]
    parts += [f"{tower}.encoder.layers.{i}" for i in range(depth)]
    layers = len(modules[f"{DECODER}.layers"])
    parts += [f"{DECODER}.layers.{i}" for i in range(layers)]
    parts += [f"{DECODER}.norm"]
    entries = ((TOWER, PIXELS), (PROJECTOR, TOWER_FEATURES), (f"{DECODER}.layers.0", MERGED))
    return [output(name) for name in parts] + [entry(*pair) for pair in entries]


def tower_name(modules: Any) -> str:
    """How the tower's modules begin; older versions have a level more."""
    inner = f"{TOWER}.vision_model"
    return inner if inner in modules else TOWER


def array(tensor: Any) -> np.ndarray:
    """A tensor on the host."""
    return tensor.detach().cpu().numpy()
