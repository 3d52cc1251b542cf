"""One table of parameters: their names here, in Hugging Face's LLaVA, and the way between.

Linear kernels are (in, out) here and (out, in) there; convolutions HWIO here and OIHW there.
"""

import re
from typing import NamedTuple

import numpy as np

from focus_jax.safetensors_io import Transform, transposed


class Row(NamedTuple):
    """One parameter; `{}` stands for the layer, which is the leading axis here."""

    ours: str
    theirs: str
    transform: Transform = "same"


class Part(NamedTuple):
    """Rows that share what stands before them.

    `read`: a regex of what any layout puts there. `write`: what the checkpoints of llava-hf have
    there, which every version of transformers reads; None where we only read.
    """

    ours: str
    read: str
    write: str | None
    rows: tuple[Row, ...]


DECODER = (
    Row("embed.embedding", "embed_tokens.weight"),
    Row("layers.norm_1.scale", "layers.{}.input_layernorm.weight"),
    Row("layers.q.kernel", "layers.{}.self_attn.q_proj.weight", "linear"),
    Row("layers.k.kernel", "layers.{}.self_attn.k_proj.weight", "linear"),
    Row("layers.v.kernel", "layers.{}.self_attn.v_proj.weight", "linear"),
    Row("layers.out.kernel", "layers.{}.self_attn.o_proj.weight", "linear"),
    Row("layers.norm_2.scale", "layers.{}.post_attention_layernorm.weight"),
    Row("layers.gate.kernel", "layers.{}.mlp.gate_proj.weight", "linear"),
    Row("layers.up.kernel", "layers.{}.mlp.up_proj.weight", "linear"),
    Row("layers.down.kernel", "layers.{}.mlp.down_proj.weight", "linear"),
    Row("norm.scale", "norm.weight"),
)
VISION = (
    Row("class_token", "embeddings.class_embedding"),
    Row("stem.kernel", "embeddings.patch_embedding.weight", "conv"),
    Row("position", "embeddings.position_embedding.weight"),
    Row("pre_norm.scale", "pre_layrnorm.weight"),  # CLIP's own spelling
    Row("pre_norm.bias", "pre_layrnorm.bias"),
    Row("layers.norm_1.scale", "encoder.layers.{}.layer_norm1.weight"),
    Row("layers.norm_1.bias", "encoder.layers.{}.layer_norm1.bias"),
    Row("layers.q.kernel", "encoder.layers.{}.self_attn.q_proj.weight", "linear"),
    Row("layers.q.bias", "encoder.layers.{}.self_attn.q_proj.bias"),
    Row("layers.k.kernel", "encoder.layers.{}.self_attn.k_proj.weight", "linear"),
    Row("layers.k.bias", "encoder.layers.{}.self_attn.k_proj.bias"),
    Row("layers.v.kernel", "encoder.layers.{}.self_attn.v_proj.weight", "linear"),
    Row("layers.v.bias", "encoder.layers.{}.self_attn.v_proj.bias"),
    Row("layers.out.kernel", "encoder.layers.{}.self_attn.out_proj.weight", "linear"),
    Row("layers.out.bias", "encoder.layers.{}.self_attn.out_proj.bias"),
    Row("layers.norm_2.scale", "encoder.layers.{}.layer_norm2.weight"),
    Row("layers.norm_2.bias", "encoder.layers.{}.layer_norm2.bias"),
    Row("layers.up.kernel", "encoder.layers.{}.mlp.fc1.weight", "linear"),
    Row("layers.up.bias", "encoder.layers.{}.mlp.fc1.bias"),
    Row("layers.down.kernel", "encoder.layers.{}.mlp.fc2.weight", "linear"),
    Row("layers.down.bias", "encoder.layers.{}.mlp.fc2.bias"),
    Row("post_norm.scale", "post_layernorm.weight"),
    Row("post_norm.bias", "post_layernorm.bias"),
)
PROJECTOR = (
    Row("linear_1.kernel", "linear_1.weight", "linear"),
    Row("linear_1.bias", "linear_1.bias"),
    Row("linear_2.kernel", "linear_2.weight", "linear"),
    Row("linear_2.bias", "linear_2.bias"),
)
# The original LLaVA numbers the projector's layers, and has no number where there is one layer.
ORIGINAL_PROJECTOR = (
    Row("linear_1.kernel", "0.weight", "linear"),
    Row("linear_1.bias", "0.bias"),
    Row("linear_2.kernel", "2.weight", "linear"),
    Row("linear_2.bias", "2.bias"),
    Row("linear_1.kernel", "weight", "linear"),
    Row("linear_1.bias", "bias"),
)
PARTS = (
    Part(
        "decoder.",
        r"(?:language_model\.model|model\.language_model|language_model|model)\.",
        "language_model.model.",
        DECODER,
    ),
    Part(
        "decoder.",
        r"(?:language_model\.)?",
        "language_model.",
        (Row("head.kernel", "lm_head.weight", "linear"),),
    ),
    Part(
        "vision.",
        r"(?:(?:model\.)?vision_tower\.(?:vision_tower\.)?)?(?:vision_model\.)?",
        "vision_tower.vision_model.",
        VISION,
    ),
    Part("projector.", r"(?:model\.)?multi_modal_projector\.", "multi_modal_projector.", PROJECTOR),
    Part("projector.", r"model\.mm_projector\.", None, ORIGINAL_PROJECTOR),
    Part("", r"(?:model\.)?", "", (Row("image_newline", "image_newline"),)),
)
# Buffers that older versions saved, and the half of CLIP that reads text.
LEFTOVERS = re.compile(r".*(?:rotary_emb\.inv_freq|embeddings\.position_ids)")
CLIP_TEXT = re.compile(r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale")


class Place(NamedTuple):
    """Where a tensor of a checkpoint belongs; `layer` is None where there are no layers."""

    ours: str
    layer: int | None
    transform: Transform


PATTERNS = tuple(
    (
        re.compile(part.read + re.escape(row.theirs).replace(r"\{\}", r"(\d+)")),
        part.ours + row.ours,
        row.transform,
    )
    for part in PARTS
    for row in part.rows
)
WRITTEN = {
    part.ours + row.ours: (part.write + row.theirs, row.transform)
    for part in PARTS
    if part.write is not None
    for row in part.rows
}


def place_of(theirs: str) -> Place | None:
    """Where a checkpoint's tensor belongs, whatever its layout; None: we know no such tensor."""
    for pattern, ours, transform in PATTERNS:
        if match := pattern.fullmatch(theirs):
            return Place(ours, int(match[1]) if match.groups() else None, transform)
    return None


def name_there(ours: str, layer: int | None) -> str:
    """The name that llava-hf's checkpoints give a parameter."""
    return WRITTEN[ours][0].format(layer)


def has_layers(ours: str) -> bool:
    """Whether a parameter is stacked [L, ...] here."""
    return "{}" in WRITTEN[ours][0]


def transform_of(ours: str) -> Transform:
    return WRITTEN[ours][1]


def shape_there(shape: tuple[int, ...], transform: Transform) -> tuple[int, ...]:
    """The shape that one layer of a parameter has in a checkpoint."""
    if transform == "linear":
        return shape[::-1]
    return (shape[3], shape[2], shape[0], shape[1]) if transform == "conv" else shape


def turned_back(array: np.ndarray, transform: Transform) -> np.ndarray:
    """One layer of a parameter as a checkpoint has it."""
    if transform == "linear":
        return transposed(array)
    return array.transpose(3, 2, 0, 1) if transform == "conv" else array
