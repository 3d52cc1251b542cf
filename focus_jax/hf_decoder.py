"""A decoder alone, in and out: a text-only Llama's directory, as transformers writes one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from focus_jax import hf_config, hf_write
from focus_jax import safetensors_io as io
from focus_jax.config import DecoderConfig, DTypeName, ModelConfig, VisionConfig
from focus_jax.hf import Tree, Where, load
from focus_jax.models.lora import merged, without_lora
from focus_jax.models.params import check_same

OURS = "decoder."
# What llava-hf's names have before those of a decoder alone.
WITHIN = "language_model."
# Some tower has to be named; nothing of it is read.
NO_TOWER = VisionConfig(layers=1, feature_layer=-1)


def read(
    directory: str | Path,
    *,
    param_dtype: DTypeName = "float32",
    sharding: Where | None = None,
    workers: int = 4,
) -> tuple[DecoderConfig, Tree]:
    """A text-only Llama's (or Mistral's) config and its parameters, `decoder.*` of a model's tree.

    Arguments and errors as in `hf.read`.
    """
    path = hf_write.existing(directory)
    decoder = hf_config.text_config(path)
    cfg = ModelConfig(vision=NO_TOWER, decoder=decoder, param_dtype=param_dtype)
    entries = io.directory_entries(path).values()
    return decoder, load(cfg, entries, shapes(cfg), path, sharding, workers)


def write(
    directory: str | Path,
    cfg: ModelConfig,
    tree: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: hf_write.DTypeOut | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> Path:
    """The decoder of a model as a directory that transformers loads as LlamaForCausalLM.

    tree: of the whole model, or `decoder.*` alone. dtype: None is the tree's. Low-rank updates are
    added to their kernels. The directory, with the tokenizer, appears whole or not at all.
    FileExistsError: it is there and not `overwrite`.
    ValueError: the tree lacks a parameter or has one of another shape.
    """
    cfg, tree = without_lora(cfg), merged(tree, cfg.lora)
    own = {name: leaf for name, leaf in tree.items() if name.startswith(OURS)}
    check_same(shapes(cfg), own)
    kind = hf_write.dtype_of(own, dtype)
    config = {
        **hf_write.decoder_json(cfg.decoder, kind, {}),
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tensors = [
        tensor._replace(name=tensor.name.removeprefix(WITHIN))
        for name, leaf in own.items()
        for tensor in hf_write.tensors_of(name, leaf, hf_write.DTYPES[kind])
    ]
    with hf_write.appearing(Path(directory), overwrite) as room:
        tokenizer.save_pretrained(room)
        hf_write.write_json(room / "config.json", config)
        ordered = sorted(tensors, key=lambda t: hf_write.natural(t.name))
        io.write_directory(room, ordered, max_shard_bytes)
    return Path(directory)


def shapes(cfg: ModelConfig) -> dict[str, Any]:
    """The decoder's parameters."""
    return {name: leaf for name, leaf in hf_write.shapes(cfg).items() if name.startswith(OURS)}
