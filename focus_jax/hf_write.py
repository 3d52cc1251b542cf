"""A model as a directory that transformers loads, with the method's learned parts beside it."""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from focus_jax import hf_config, hf_names
from focus_jax import safetensors_io as io
from focus_jax.compress.baselines import full
from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
from focus_jax.models.lora import merged, without_lora
from focus_jax.models.params import (
    abstract,
    canonical,
    check_same,
    is_sampler,
    named_leaves,
    shape_of,
)

DTypeOut = Literal["float32", "float16", "bfloat16"]
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SAMPLERS, METHOD = "samplers.safetensors", "method.json"
# What a checkpoint holds beside its weights and config.json.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip


def shapes(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the base model."""
    return canonical(named_leaves(abstract(replace(cfg, stacked=True), full())))


def existing(directory: str | Path) -> Path:
    """A directory that is there."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    return path


def write(
    directory: str | Path,
    cfg: ModelConfig,
    tree: Mapping[str, Any],
    *,
    source: str | Path | None = None,
    image_token: int | None = None,
    dtype: DTypeOut | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> Path:
    """A directory that transformers loads as LlavaForConditionalGeneration or LLaVA-NeXT's.

    source: a checkpoint whose tokenizer, processor and further config keys are taken over.
    image_token: the id that stands for an image; None is the source's. dtype: None is the tree's.
    Low-rank updates are added to their kernels. The directory appears whole or not at all.
    FileExistsError: it is there and not `overwrite`.
    ValueError: a model that transformers does not have, or learned parts (see `export`).
    """
    learned = [name for name in tree if is_sampler(name)]
    if learned:
        raise ValueError(f"the tree has {io.listed(learned)}: use export, or leave them out")
    with appearing(Path(directory), overwrite) as room:
        write_base(room, cfg, tree, source, image_token, dtype, max_shard_bytes)
    return Path(directory)


def export(
    directory: str | Path,
    cfg: ModelConfig,
    tree: Mapping[str, Any],
    method_text: Mapping[str, Any],
    *,
    source: str | Path | None = None,
    image_token: int | None = None,
    dtype: DTypeOut | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> Path:
    """A compressed model: the base as `write` makes it, with the method and its parts beside it.

    method_text: JSON, kept in `method.json`. Learned parts keep their names and their dtype, and
    `read` brings them back. Arguments and errors as in `write`.
    """
    base = {name: leaf for name, leaf in tree.items() if not is_sampler(name)}
    learned = {name: leaf for name, leaf in tree.items() if is_sampler(name)}
    text = json.dumps(method_text, indent=2) + "\n"
    with appearing(Path(directory), overwrite) as room:
        write_base(room, cfg, base, source, image_token, dtype, max_shard_bytes)
        (room / METHOD).write_text(text)
        if learned:
            tensors = [
                io.Tensor(name, tuple(leaf.shape), np.dtype(leaf.dtype), partial(on_host, leaf))
                for name, leaf in sorted(learned.items())
            ]
            io.write_file(room / SAMPLERS, tensors)
    return Path(directory)


@contextmanager
def appearing(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside the target, which takes its place when all went well."""
    target = directory.expanduser().absolute()
    if target.is_file():
        raise FileExistsError(f"{target} is a file: name a directory")
    if target.exists() and not overwrite and any(target.iterdir()):
        raise FileExistsError(f"{target} exists: name another directory or pass overwrite=True")
    target.parent.mkdir(parents=True, exist_ok=True)
    room = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    room.mkdir()
    try:
        yield room
        if target.is_dir() and any(target.iterdir()):
            swapped(room, target)
        else:
            room.rename(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def swapped(room: Path, target: Path) -> None:
    """Put a directory in another's place, and remove the other; on failure it stands again."""
    old = target.rename(f"{room}.old")
    try:
        room.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def write_base(
    room: Path,
    cfg: ModelConfig,
    tree: Mapping[str, Any],
    source: str | Path | None,
    image_token: int | None,
    dtype: str | None,
    max_shard_bytes: float,
) -> None:
    cfg, tree = without_lora(cfg), merged(tree, cfg.lora)
    check_same(shapes(cfg), tree)
    text: dict[str, Any] = {}
    if source is not None:
        text = hf_config.read_json(existing(source) / "config.json")
        copy_companions(existing(source), room)
    if image_token is None:
        image_token = text.get("image_token_index", text.get("image_token_id"))
    if image_token is None or not 0 <= image_token < cfg.decoder.vocab_size:
        raise ValueError(
            f"the token that stands for an image is {image_token}, and the vocabulary has "
            f"{cfg.decoder.vocab_size}: give image_token=, or a source whose config.json has it"
        )
    kind = dtype_of(tree, dtype)
    kept = text if "text_config" in text else without_original(text)
    config = config_json(cfg, kind, int(image_token), kept)
    write_json(room / "config.json", config)
    if not any((room / f).exists() for f in ("preprocessor_config.json", "processor_config.json")):
        write_json(room / "preprocessor_config.json", preprocessor_json(cfg))
        write_json(room / "processor_config.json", processor_json(cfg))
    tensors = [t for name, leaf in tree.items() for t in tensors_of(name, leaf, DTYPES[kind])]
    io.write_directory(room, sorted(tensors, key=lambda t: natural(t.name)), max_shard_bytes)


def dtype_of(tree: Mapping[str, Any], dtype: str | None) -> str:
    """The name of the dtype to write: the one asked for, or the tree's own."""
    kind = dtype or str(np.dtype(tree["decoder.embed.embedding"].dtype))
    if kind not in DTYPES:
        raise ValueError(f"dtype {kind!r} cannot be written: choose {' or '.join(DTYPES)}")
    return kind


def without_original(text: Mapping[str, Any]) -> dict[str, Any]:
    """Of an original checkpoint's config only the special tokens mean anything to transformers."""
    kept = {
        key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text
    }
    return {"text_config": kept} if kept else {}


def write_json(file: Path, text: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")


def copy_companions(source: Path, room: Path) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, room / file.name)


def tensors_of(name: str, leaf: Any, dtype: np.dtype) -> Iterator[io.Tensor]:
    """A parameter as the tensors of a checkpoint, a layer each."""
    turn = hf_names.transform_of(name)
    layered = hf_names.has_layers(name)
    whole = shape_of(leaf)
    shape = hf_names.shape_there(whole[1:] if layered else whole, turn)
    for i in range(whole[0]) if layered else [None]:
        there = hf_names.name_there(name, i)
        yield io.Tensor(there, shape, dtype, partial(as_there, leaf, i, turn, dtype))


def as_there(leaf: Any, layer: int | None, turn: io.Transform, dtype: np.dtype) -> np.ndarray:
    """A parameter, or one layer of it, as a checkpoint has it."""
    return hf_names.turned_back(on_host(leaf, layer).astype(dtype, copy=False), turn)


def on_host(leaf: Any, layer: int | None = None) -> np.ndarray:
    """An array or one layer of it; from an accelerator only that layer travels."""
    if isinstance(leaf, list):
        return on_host(leaf[layer or 0])
    if isinstance(leaf, jax.Array) and any(d.platform != "cpu" for d in leaf.devices()):
        return np.asarray(leaf if layer is None else leaf[layer])
    return np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 2 stands before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


# ------------------------------------------------------------------------------ config.json


def config_json(
    cfg: ModelConfig, dtype: str, image_token: int, source: Mapping[str, Any]
) -> dict[str, Any]:
    """A complete config.json for transformers; `source`: a config whose further keys are kept.

    ValueError: a model that transformers' LLaVA does not have.
    """
    check_kinds(cfg)
    vision, tiled = cfg.vision, cfg.image_newline
    out = {
        **source,
        "architectures": [f"Llava{'Next' if tiled else ''}ForConditionalGeneration"],
        "model_type": "llava_next" if tiled else "llava",
        "dtype": dtype,
        "image_seq_length": vision.patches,
        "image_token_index": image_token,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": cfg.decoder.tie_embeddings,
        "text_config": decoder_json(cfg.decoder, dtype, source.get("text_config") or {}),
        "vision_config": vision_json(vision, dtype, source.get("vision_config") or {}),
    }
    for key in ("torch_dtype", "vocab_size", "image_token_id", "transformers_version"):
        out.pop(key, None)
    if tiled:
        side = vision.image_size
        out["image_grid_pinpoints"] = [[rows * side, cols * side] for rows, cols in cfg.grids]
    return out


def check_kinds(cfg: ModelConfig) -> None:
    """ValueError for a model that transformers' LLaVA does not have."""
    unlike = {
        "vision.stem": (cfg.vision.stem, "patch"),
        "vision.class_token": (cfg.vision.class_token, True),
        "projector": (cfg.projector, "mlp2x_gelu"),
    }
    for key, (found, needed) in unlike.items():
        if found != needed:
            raise ValueError(
                f"{key} {found!r} cannot be written for transformers, whose LLaVA has {needed!r}: "
                "such a model stays with what trained it"
            )


def decoder_json(cfg: DecoderConfig, dtype: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """text_config. Rotary settings stand in both the newer and the older keys."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if cfg.rope_scaling is not None:
        kind = cfg.rope_scaling.kind
        scaling = {"rope_type": kind, "factor": cfg.rope_scaling.factor}
        if kind == "llama3":
            scaling |= {
                "low_freq_factor": cfg.rope_scaling.low_freq_factor,
                "high_freq_factor": cfg.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": cfg.rope_scaling.original_max_position,
            }
    out = {
        "model_type": "llama",  # a Mistral without a window is the same network
        **source,
        "dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_position,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_scaling is None else scaling,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **scaling},
        "tie_word_embeddings": cfg.tie_embeddings,
        "sliding_window": None,
    }
    if out["model_type"] == "llama":
        out |= {"attention_bias": False, "mlp_bias": False}
        del out["sliding_window"]
    out.pop("torch_dtype", None)
    return out


def vision_json(cfg: VisionConfig, dtype: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """vision_config."""
    out = {
        **source,
        "model_type": "clip_vision_model",
        "dtype": dtype,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_channels": 3,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "hidden_act": cfg.activation,
        "layer_norm_eps": cfg.norm_eps,
    }
    out.pop("torch_dtype", None)
    return out


def processor_json(cfg: ModelConfig) -> dict[str, Any]:
    """processor_config.json: how text and images come together in transformers."""
    return {
        "processor_class": "LlavaNextProcessor" if cfg.image_newline else "LlavaProcessor",
        "image_token": "<image>", "patch_size": cfg.vision.patch_size,
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip


def preprocessor_json(cfg: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json of transformers' image processor for this model."""
    vision = cfg.vision
    side = {"height": vision.image_size, "width": vision.image_size}
    name = "LlavaNextImageProcessor" if cfg.image_newline else "CLIPImageProcessor"
    out: dict[str, Any] = {
        "image_processor_type": name,
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": vision.image_size},
        "resample": 3, "do_center_crop": True, "crop_size": side,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }  # fmt: skip
    if cfg.image_newline:
        grids = [[r * vision.image_size, c * vision.image_size] for r, c in cfg.grids]
        out |= {"do_pad": True, "image_grid_pinpoints": grids}
    return out
