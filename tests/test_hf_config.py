"""config.json against transformers' own reading of it, and every refusal."""

import json
from dataclasses import replace

import pytest

from focus_jax import hf, hf_config
from focus_jax.config import (
    DecoderConfig,
    RopeScaling,
    VisionConfig,
    llava_1_5_7b,
    llava_1_5_13b,
    llava_next_llama3_8b,
    llava_next_vicuna_7b,
)

# As the hub has them, with what they leave out left out.
TOWER = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "max_position_embeddings": 4096,
    "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
    "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
    "projector_hidden_act": "gelu", "text_config": VICUNA, "tie_word_embeddings": False,
    "vision_config": TOWER, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NEXT = {**LLAVA, "model_type": "llava_next", "image_grid_pinpoints": PINPOINTS}
ORIGINAL = {
    "model_type": "llava", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None, "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
    "image_aspect_ratio": "pad", "hidden_act": "silu",
}  # fmt: skip
ANYRES = {
    "model_type": "llava_llama", "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS,
}  # fmt: skip


@pytest.fixture
def config_of(tmp_path):
    """The ModelConfig of a config.json with these contents."""

    def read(text, **files):
        (tmp_path / "config.json").write_text(json.dumps(text))
        for name, contents in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(contents))
        return hf.read_config(tmp_path)

    return read


def padded(preset, vocabulary=32064):
    """A preset in the dtypes of `read`, with the hub's vocabulary."""
    decoder = replace(preset.decoder, vocab_size=vocabulary)
    return replace(preset, decoder=decoder, compute_dtype="float32", remat="none")


def test_published_configs_are_the_presets(config_of):
    assert config_of(LLAVA) == padded(llava_1_5_7b())
    large = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
    large |= {"num_hidden_layers": 40, "num_key_value_heads": 40}
    assert config_of({**LLAVA, "text_config": VICUNA | large}) == padded(llava_1_5_13b())
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    assert config_of(NEXT) == replace(padded(llava_next_vicuna_7b()), grids=grids)
    llama3 = {
        "model_type": "llama", "intermediate_size": 14336, "num_key_value_heads": 8,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "vocab_size": 128320,
    }  # fmt: skip
    found = config_of({**NEXT, "text_config": llama3})
    assert found == replace(padded(llava_next_llama3_8b(), 128320), grids=grids)


def test_original_configs_are_the_presets(config_of):
    assert config_of(ORIGINAL) == padded(llava_1_5_7b(), 32000)
    found = config_of(ORIGINAL | ANYRES)
    assert found.max_tiles == 5 and found.image_newline
    assert found.grids == ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))  # (width, height) there
    as_text = ANYRES | {"image_grid_pinpoints": json.dumps(PINPOINTS)}
    assert config_of(ORIGINAL | as_text) == found


def test_mistral_and_rotary_settings(config_of):
    mistral = {
        "model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "vocab_size": 32064,
    }  # fmt: skip
    found = config_of({**NEXT, "text_config": mistral}).decoder
    assert found == DecoderConfig(
        vocab_size=32064, kv_heads=8, mlp_width=14336, rope_theta=1e6, max_position=32768
    )
    long = VICUNA | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    found = config_of({**LLAVA, "text_config": long}).decoder
    assert found.rope_scaling == RopeScaling("linear", 4.0) and found.rope_theta == 1e4
    newer = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    found = config_of({**LLAVA, "text_config": VICUNA | {"rope_parameters": newer}}).decoder
    assert found.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)
    assert found.rope_theta == 5e5


def test_explicit_head_width(config_of):
    assert config_of({**LLAVA, "text_config": VICUNA | {"head_dim": 96}}).decoder.head_dim == 96


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_what_a_config_leaves_out_is_transformers_default(kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    for key, value in hf_config.DECODER_DEFAULTS[kind].items():
        assert theirs.get(key) == value or value is None, key


def test_what_the_tower_leaves_out_is_transformers_default():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionConfig().to_dict()
    assert {key: theirs[key] for key in hf_config.VISION_DEFAULTS} == hf_config.VISION_DEFAULTS
    empty = transformers.LlavaConfig().vision_config
    ours = VisionConfig()
    assert (empty.hidden_size, empty.image_size) == (ours.width, ours.image_size)
    assert transformers.LlavaNextConfig().image_grid_pinpoints == hf_config.NEXT_PINPOINTS


def test_bare_config_has_llavas_own_tower(config_of):
    found = config_of({"model_type": "llava"})
    assert found.vision == VisionConfig() and found.decoder.max_position == 2048


def test_pixel_statistics(config_of, tmp_path):
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}
    found = config_of(LLAVA, processor_config={"image_processor": half}).vision
    assert (found.pixel_mean, found.pixel_std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    zero = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    assert config_of(LLAVA, preprocessor_config=zero).vision.pixel_std == (1.0, 1.0, 1.0)


DECODER_REFUSALS = {
    "model_type": "qwen2",
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
    "partial_rotary_factor": 0.5,
    "sliding_window": 1024,
    "quantization_config": {"quant_method": "gptq"},
}
VISION_REFUSALS = {"model_type": "siglip_vision_model", "hidden_act": "relu", "num_channels": 4}
REFUSALS = {
    "model_type": "llava_onevision",
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": [-2, -1],
    "projector_hidden_act": "relu",
    "multimodal_projector_bias": False,
    "quantization_config": {"quant_method": "bitsandbytes"},
    "image_grid_pinpoints": [[336, 500]],
}
ORIGINAL_REFUSALS = {
    "model_type": "llava_qwen",
    "mm_projector_type": "mlp3x_gelu",
    "mm_resampler_type": "spatial_pool",
    "mm_vision_select_feature": "cls_patch",
    "mm_patch_merge_type": "spatial",
    "mm_use_im_start_end": True,
    "image_aspect_ratio": "highres",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
}


def refusals():
    for base, prefix, table in (
        ("text_config", "text_config.", DECODER_REFUSALS),
        ("vision_config", "vision_config.", VISION_REFUSALS),
        (None, "", REFUSALS),
    ):
        for key, value in table.items():
            yield pytest.param(NEXT, base, key, value, id=prefix + key)
    for key, value in ORIGINAL_REFUSALS.items():
        yield pytest.param(ORIGINAL, None, key, value, id=f"original {key}")


@pytest.mark.parametrize("text,part,key,value", list(refusals()))
def test_refused_naming_file_key_and_value(config_of, text, part, key, value):
    changed = {**text, part: {**text[part], key: value}} if part else {**text, key: value}
    with pytest.raises(ValueError) as caught:
        config_of(changed)
    said = str(caught.value)
    leaf = value
    while isinstance(leaf, dict):
        leaf = next(iter(leaf.values()))
    leaf = leaf[0] if key == "image_grid_pinpoints" else leaf
    assert "config.json" in said and key in said, said
    assert str(leaf) in said or repr(leaf) in said, said
    assert "support" in said or "vision_tower=" in said or "multiple" in said, said


def test_window_that_a_mistral_implies(config_of):
    with pytest.raises(ValueError, match=r"sliding_window 4096 .* lacks the key"):
        config_of({**NEXT, "text_config": {"model_type": "mistral"}})


def test_original_options_that_do_not_go_together(config_of):
    with pytest.raises(ValueError, match=r"'anyres' with.*None"):
        config_of(ORIGINAL | {"image_aspect_ratio": "anyres"})
    with pytest.raises(ValueError, match=r"image_grid_pinpoints \[\]"):
        config_of(ORIGINAL | ANYRES | {"image_grid_pinpoints": None})


def test_files_that_are_not_there_or_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        hf.read_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hf.read_config(tmp_path)
    for text in ('{"model_type": "ll', "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json.*download it again"):
            hf.read_config(tmp_path)


def test_llama3_scaling_without_its_keys(config_of):
    rope = {"rope_type": "llama3", "factor": 8.0}
    with pytest.raises(ValueError, match=r"lacks text_config\.rope_scaling\.low_freq_factor"):
        config_of({**LLAVA, "text_config": VICUNA | {"rope_scaling": rope}})
