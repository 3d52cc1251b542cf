"""config.json of Hugging Face's and the original LLaVA checkpoints, as a `ModelConfig`."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from focus_jax import hf_names
from focus_jax.config import DecoderConfig, ModelConfig, RopeScaling, VisionConfig
from focus_jax.safetensors_io import directory_entries

Layout = Literal["hf", "original"]
# Published configs leave out what equals the library's defaults, which therefore stand here.
DECODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "sliding_window": None,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
}  # fmt: skip
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
# Towers that original checkpoints name; heads cannot be told from the tensors' shapes.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
}


class Described(NamedTuple):
    """What config.json says: the model, the layout, and the id that stands for an image."""

    config: ModelConfig
    layout: Layout
    image_token: int | None


# ------------------------------------------------------------------------------ reading


def describe(directory: Path, vision_tower: Path | None = None) -> Described:
    """Read a LLaVA directory's config.json.

    `vision_tower`: CLIP's own directory, for original checkpoints, which only name theirs.
    FileNotFoundError: no config.json. ValueError: an architecture or an option outside ours.
    """
    file = directory / "config.json"
    text = read_json(file)
    kind = text.get("model_type")
    unquantized(file, text)
    if kind in ("llava", "llava_next") and not is_original(text):
        return hf_described(file, text)
    if kind in ORIGINAL_TYPES:
        return original_described(file, text, vision_tower)
    if kind in DECODER_DEFAULTS:
        raise ValueError(
            f"{file} is a decoder alone (model_type {kind!r}): name a LLaVA checkpoint, or begin "
            "from parts with read_parts(decoder, clip)"
        )
    known = ["llava", "llava_next", *list(ORIGINAL_TYPES)[1:]]
    raise refusal(file, "model_type", kind, known)


def is_original(text: Mapping[str, Any]) -> bool:
    """Whether a config is the original's; both call themselves `llava`."""
    return "text_config" not in text and any(key.startswith("mm_") for key in text)


def hf_described(file: Path, text: Mapping[str, Any]) -> Described:
    """`llava` or `llava_next` as transformers writes them."""
    only(file, text, "vision_feature_select_strategy", ("default",), "default")
    only(file, text, "projector_hidden_act", ("gelu",), "gelu")
    only(file, text, "multimodal_projector_bias", (True,), True)
    # Without any vision_config transformers takes LLaVA's own tower, else CLIP's defaults.
    vision = (
        vision_config(file, text["vision_config"], "vision_config.")
        if text.get("vision_config")
        else VisionConfig()
    )
    vision = with_feature_layer(file, vision, "vision_feature_layer", text)
    decoder_text = dict(text.get("text_config") or {})
    decoder_text["tie_word_embeddings"] = is_tied(file.parent, text, decoder_text)
    cfg = ModelConfig(
        vision=with_pixel_statistics(file.parent, vision),
        decoder=decoder_config(file, decoder_text, "text_config."),
    )
    if text["model_type"] == "llava_next":
        pinpoints = text.get("image_grid_pinpoints") or NEXT_PINPOINTS
        cfg = with_tiles(file, cfg, [(h, w) for h, w in pinpoints])
    token = text.get("image_token_index", text.get("image_token_id", 32000))
    return Described(cfg, "hf", token)


def is_tied(directory: Path, whole: Mapping[str, Any], decoder: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding.

    Newer versions ask the whole model's flag, older ones the decoder's: where the two disagree,
    the files tell whether a head was saved.
    """
    given = [text.get("tie_word_embeddings") for text in (whole, decoder)]
    flags = {bool(flag) for flag in given if flag is not None}
    if len(flags) < 2:
        return flags == {True}
    places = map(hf_names.place_of, directory_entries(directory))
    return not any(place and place.ours == "decoder.head.kernel" for place in places)


def original_described(file: Path, text: Mapping[str, Any], vision_tower: Path | None) -> Described:
    """`liuhaotian/llava-*`: the decoder's config with LLaVA's options among its own."""
    only(file, text, "mm_vision_select_feature", ("patch",), "patch")
    only(file, text, "mm_resampler_type", (None,), None)
    only(file, text, "mm_use_im_start_end", (False,), False)
    only(file, text, "mm_projector_type", ("linear", "mlp2x_gelu"), "linear")
    only(file, text, "mm_patch_merge_type", ("flat", "spatial_unpad"), "flat")
    only(file, text, "image_aspect_ratio", ("square", "pad", "anyres"), "square")
    tiled = text.get("image_aspect_ratio") == "anyres"
    newline = text.get("mm_patch_merge_type") == "spatial_unpad"
    if tiled != newline:
        raise ValueError(
            f"{file} has image_aspect_ratio {text.get('image_aspect_ratio')!r} with "
            f"mm_patch_merge_type {text.get('mm_patch_merge_type')!r}: supported are 'anyres' with "
            "'spatial_unpad' (LLaVA-NeXT), or neither (LLaVA-1.5)"
        )
    kind = ORIGINAL_TYPES[text["model_type"]]
    vision = original_tower(file, text, vision_tower)
    cfg = ModelConfig(
        vision=with_feature_layer(file, vision, "mm_vision_select_layer", text),
        decoder=decoder_config(file, {**text, "model_type": kind}, ""),
        projector=text.get("mm_projector_type", "linear"),
    )
    if tiled:
        cfg = with_tiles(file, cfg, [(h, w) for w, h in original_pinpoints(file, text)])
    return Described(cfg, "original", None)


def original_tower(file: Path, text: Mapping[str, Any], directory: Path | None) -> VisionConfig:
    """The tower that an original checkpoint names, or the one in CLIP's directory."""
    name = text.get("mm_vision_tower")
    if directory is None and name and Path(name).is_dir():
        directory = Path(name)
    if directory is not None:
        return tower_config(directory)
    if name in KNOWN_TOWERS:
        return KNOWN_TOWERS[name]
    raise ValueError(
        f"{file} names the tower {name!r} (mm_vision_tower): give its directory as vision_tower="
    )


def original_pinpoints(file: Path, text: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(width, height) of the original's grids, which may stand in a string."""
    found = text.get("image_grid_pinpoints") or []
    try:
        pairs = json.loads(found) if isinstance(found, str) else found
        return [(int(w), int(h)) for w, h in pairs]
    except (TypeError, ValueError) as error:
        raise refusal(file, "image_grid_pinpoints", found, ["a list of pairs"]) from error


def tower_config(directory: Path) -> VisionConfig:
    """A directory with CLIP, whole or its vision half."""
    file = directory / "config.json"
    text = read_json(file)
    unquantized(file, text)
    prefix = ""
    if text.get("model_type") == "clip":
        text, prefix = text.get("vision_config") or {}, "vision_config."
        text = {"model_type": "clip_vision_model", **text}
    elif text.get("model_type") != "clip_vision_model":
        raise refusal(file, "model_type", text.get("model_type"), ["clip_vision_model", "clip"])
    return with_pixel_statistics(directory, vision_config(file, text, prefix))


def text_config(directory: Path) -> DecoderConfig:
    """A directory with a decoder alone."""
    file = directory / "config.json"
    text = read_json(file)
    unquantized(file, text)
    if text.get("model_type") not in DECODER_DEFAULTS:
        raise refusal(file, "model_type", text.get("model_type"), list(DECODER_DEFAULTS))
    return decoder_config(file, text, "")


def decoder_config(file: Path, given: Mapping[str, Any], prefix: str) -> DecoderConfig:
    """Sizes of a Llama or Mistral; `prefix` is how errors name the keys."""
    kind = given.get("model_type", "llama")
    if kind not in DECODER_DEFAULTS:
        raise refusal(file, f"{prefix}model_type", kind, list(DECODER_DEFAULTS))
    text = DECODER_DEFAULTS[kind] | dict(given)
    unquantized(file, text)
    for key in ("attention_bias", "mlp_bias"):
        only(file, text, key, (False,), False, prefix)
    only(file, text, "hidden_act", ("silu",), "silu", prefix)
    positions, window = text["max_position_embeddings"], text["sliding_window"]
    if window is not None and window < positions:
        raise ValueError(
            f"{file} has {prefix}sliding_window {window} below max_position_embeddings "
            f"{positions}: attention within a window is not supported; set it to null if the "
            "checkpoint was trained without (a Mistral config that lacks the key means 4096)"
        )
    heads = text["num_attention_heads"]
    theta, scaling = rotary_of(file, text, prefix)
    return DecoderConfig(
        vocab_size=text["vocab_size"], width=text["hidden_size"],
        layers=text["num_hidden_layers"], heads=heads,
        kv_heads=text["num_key_value_heads"] or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        mlp_width=text["intermediate_size"], norm_eps=float(text["rms_norm_eps"]),
        rope_theta=theta, rope_scaling=scaling,
        tie_embeddings=bool(text.get("tie_word_embeddings")), max_position=positions,
    )  # fmt: skip


def rotary_of(file: Path, text: Mapping[str, Any], prefix: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.get(key) or {}
    theta = float(rope.get("rope_theta", text.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise refusal(file, f"{prefix}{key}.rope_type", kind, ["default", "linear", "llama3"])
    only(file, {**text, **rope}, "partial_rotary_factor", (None, 1, 1.0), None, prefix)
    try:
        if kind == "linear":
            return theta, RopeScaling("linear", float(rope["factor"]))
        if kind == "llama3":
            return theta, RopeScaling(
                "llama3",
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ValueError(f"{file} lacks {prefix}{key}.{error.args[0]} for {kind!r}") from error
    return theta, None


def vision_config(file: Path, given: Mapping[str, Any], prefix: str) -> VisionConfig:
    """Sizes of a CLIP tower."""
    only(file, given, "model_type", ("clip_vision_model",), "clip_vision_model", prefix)
    text = VISION_DEFAULTS | dict(given)
    unquantized(file, text)
    only(file, text, "num_channels", (3,), 3, prefix)
    only(file, text, "hidden_act", ("quick_gelu", "gelu"), "quick_gelu", prefix)
    return VisionConfig(
        image_size=text["image_size"], patch_size=text["patch_size"], width=text["hidden_size"],
        layers=text["num_hidden_layers"], heads=text["num_attention_heads"],
        mlp_width=text["intermediate_size"], activation=text["hidden_act"],
        norm_eps=float(text["layer_norm_eps"]), feature_layer=-1,
    )  # fmt: skip


def with_feature_layer(
    file: Path, vision: VisionConfig, key: str, text: Mapping[str, Any]
) -> VisionConfig:
    layer = text.get(key, -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise refusal(file, key, layer, ["one layer as a whole number"])
    return replace(vision, feature_layer=layer)


def with_tiles(file: Path, cfg: ModelConfig, sizes: Iterable[tuple[int, int]]) -> ModelConfig:
    """The grids of LLaVA-NeXT; `sizes` are (height, width) in pixels."""
    side, grids = cfg.vision.image_size, []
    sizes = list(sizes)
    if not sizes:
        raise refusal(file, "image_grid_pinpoints", sizes, ["a list of pairs"])
    for height, width in sizes:
        if height % side or width % side or not (height and width):
            raise ValueError(
                f"{file} has [{height}, {width}] among image_grid_pinpoints, which is no multiple "
                f"of the tower's image_size {side}"
            )
        grids.append((height // side, width // side))
    most = 1 + max(map(math.prod, grids))
    return replace(cfg, max_tiles=most, grids=tuple(grids), image_newline=True)


def with_pixel_statistics(directory: Path, vision: VisionConfig) -> VisionConfig:
    """Mean and standard deviation of pixels from the preprocessor's file, where there is one."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (directory / name).exists():
            continue
        text = read_json(directory / name)
        text = text.get("image_processor") or text
        if "image_mean" in text and "image_std" in text:
            mean, std = ([float(x) for x in text[key]] for key in ("image_mean", "image_std"))
            return replace(
                vision, pixel_mean=(mean[0], mean[1], mean[2]), pixel_std=(std[0], std[1], std[2])
            )
    return vision


def read_json(file: Path) -> dict[str, Any]:
    """FileNotFoundError or ValueError naming the file."""
    if not file.exists():
        raise FileNotFoundError(f"there is no {file.name} in {file.parent}")
    try:
        text = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}): download it again") from error
    if not isinstance(text, dict):
        raise ValueError(f"{file} holds no JSON object: download it again")
    return text


def unquantized(file: Path, text: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if text.get(key):
            method = text[key].get("quant_method", "?")
            raise ValueError(
                f"{file} has {key} ({method}): quantized checkpoints are not supported; name the "
                "float16 or bfloat16 one"
            )


def only(
    file: Path,
    text: Mapping[str, Any],
    key: str,
    supported: tuple[Any, ...],
    absent: Any,
    prefix: str = "",
) -> None:
    """ValueError unless a key has one of the supported values; `absent` is what none means."""
    found = absent if text.get(key) is None else text[key]
    if isinstance(found, list) or found not in supported:
        raise refusal(file, prefix + key, found, supported)


def refusal(file: Path, key: str, found: Any, supported: Iterable[Any]) -> ValueError:
    words = " or ".join(s if isinstance(s, str) else json.dumps(s) for s in supported)
    return ValueError(f"{file} has {key} {found!r}: supported is {words}")
