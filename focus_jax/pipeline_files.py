"""What a directory says beside its weights: preprocessing, template, stop tokens, samplers."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
from transformers import PreTrainedTokenizerBase

from focus_jax import workdir
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.config import ModelConfig
from focus_jax.data.conversation import CHATML, LLAMA3, MISTRAL, VICUNA_V1, Template
from focus_jax.data.preprocess import ImageConfig, LayoutName
from focus_jax.experiment import (
    CompressConfig,
    Experiment,
    TextSampler,
    VisionSampler,
    parent_fields,
    usual_samplers,
)
from focus_jax.methods import method_from_json
from focus_jax.models.params import LAYERS, Leaf, is_sampler

# Of a large file so many blocks of so many bytes are looked at.
BLOCKS, BLOCK = 256, 4096


def is_run(directory: Path) -> bool:
    """Whether a directory is a training run rather than a checkpoint of Hugging Face's kind."""
    return (directory / "checkpoints").is_dir() and (directory / "config.json").is_file()


def digest(folders: Iterable[Path]) -> str:
    """Tells weights from others: a hash of their files' names, sizes and some blocks of each.

    Of a checkpoint of Hugging Face's kind the safetensors, of a run's step all that is in it.
    """
    seen = hashlib.sha256()
    for folder in folders:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.rglob("*"))
        for path in filter(Path.is_file, files):
            size = path.stat().st_size
            seen.update(f"{path.relative_to(folder)} {size} ".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(size // BLOCKS, BLOCK)):
                    file.seek(place)
                    seen.update(file.read(BLOCK))
    return seen.hexdigest()[:16]


def run_images(cfg: Experiment) -> ImageConfig:
    """How a run's photos become tiles: those of dialogues as in training, drawn scenes whole."""
    if workdir.has_dialogues(cfg):
        return workdir.image_config(cfg)
    return ImageConfig("squash", cfg.model.vision.image_size, cfg.model.vision.patch_size)


def for_generating(name: str, leaf: jax.Array, cfg: ModelConfig) -> Leaf:
    """A parameter in the dtype of generation; the decoder's layers apart, each where it lay."""
    leaf = leaf if is_sampler(name) else leaf.astype(cfg.param_dtype)
    if not name.startswith(LAYERS):
        return leaf
    return [leaf[layer] for layer in range(leaf.shape[0])]


def image_config(directory: Path, cfg: ModelConfig, mode: Literal["original", "hf"]) -> ImageConfig:
    """How a checkpoint's photos become tiles; one in LLaVA's own layout tells it in config.json."""
    files = ("preprocessor_config.json", "processor_config.json")
    if any((directory / name).is_file() for name in files):
        return ImageConfig.from_hf(directory, mode=mode)
    if mode == "hf":
        raise FileNotFoundError(f"no {' or '.join(files)} in {directory}: use images='original'")
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layouts: dict[str, LayoutName] = {"pad": "pad", "anyres": "anyres"}
    layout = layouts.get(settings.get("image_aspect_ratio", ""), "crop")
    size = cfg.vision.image_size
    grids = cfg.grids if layout == "anyres" else ()
    red, green, blue = (int(mean * 255) for mean in cfg.vision.pixel_mean)
    return ImageConfig(
        layout=layout,
        size=size,
        patch=cfg.vision.patch_size,
        pinpoints=tuple((cols * size, rows * size) for rows, cols in grids),
        background=(red, green, blue),
    )


def template_of(directory: Path, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The conversation format that a checkpoint was tuned with, told by its special tokens.

    Mistral's is told by the decoder's kind; Vicuna's stands for all that have none of their own.
    """
    for template, mark in ((LLAMA3, "<|eot_id|>"), (CHATML, "<|im_end|>")):
        if mark in tokenizer.all_special_tokens or mark in tokenizer.get_added_vocab():
            return template
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kinds = (settings.get("model_type", ""), settings.get("text_config", {}).get("model_type", ""))
    return MISTRAL if any("mistral" in kind for kind in kinds) else VICUNA_V1


def stop_tokens(
    directory: Path, tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, the template's, the generation settings'."""
    found = {tokenizer.eos_token_id}
    end = tokenizer(template.end.strip(), add_special_tokens=False)["input_ids"]
    if len(end) == 1:
        found.add(end[0])
    settings = directory / "generation_config.json"
    if settings.is_file():
        ids = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [ids])
    return tuple(sorted(int(token) for token in found if token is not None))


def samplers_of(cfg: ModelConfig, saved: dict[str, Any] | None) -> CompressConfig:
    """The samplers of the method that a checkpoint was saved with; usual ones where it has none."""
    out = usual_samplers(cfg)
    if saved is None:
        return out
    method = method_from_json(saved)
    texts = [cut for cut in method.cuts if isinstance(cut, TextGuided)]
    if isinstance(method.vision, VisionGuided):
        out = replace(out, vision=VisionSampler(**parent_fields(method.vision, VisionGuided)))
    if texts:
        out = replace(out, text=TextSampler(**parent_fields(texts[0], TextGuided)))
    return out
