"""Tower and decoder against the reference implementation in torch, tiny and random."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from focus_jax.config import (  # noqa: E402
    DecoderConfig,
    ModelConfig,
    RopeScaling,
    VisionConfig,
)
from focus_jax.models.attention import Rows  # noqa: E402
from tests.models.hf_weights import decoder_tree, vision_tree  # noqa: E402
from tests.models.tiny_models import random_model, random_tree  # noqa: E402
from tests.quick import compiled  # noqa: E402

VISION = VisionConfig(image_size=28, patch_size=7, width=32, layers=3, heads=4, mlp_width=48)
DECODER = DecoderConfig(
    vocab_size=61, width=48, layers=3, heads=6, kv_heads=2, head_dim=8, mlp_width=72,
    rope_theta=500.0,
)  # fmt: skip
BASE = ModelConfig(vision=VISION, decoder=DECODER)


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)


def model_with(cfg: ModelConfig, tree: dict):
    """A model that holds the arrays of `tree`; all their names must exist."""
    shapes = {name: leaf.shape for name, leaf in random_tree(cfg).items()}
    part = next(iter(tree)).split(".")[0]
    needed = {name: shape for name, shape in shapes.items() if name.startswith(part)}
    assert {name: leaf.shape for name, leaf in tree.items()} == needed
    return random_model(cfg, tree=tree)


def roughen(module):
    """Random biases and norms as well, which a fresh module has at 0 and 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


@pytest.fixture(scope="module")
def towers():
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=7, hidden_act="quick_gelu", attn_implementation="eager",
    )  # fmt: skip
    theirs = roughen(transformers.CLIPVisionModel(config))
    ours = model_with(BASE, vision_tree(theirs, 3)).vision
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    mean, std = np.asarray(VISION.pixel_mean), np.asarray(VISION.pixel_std)
    scaled = ((pixels / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    out = theirs(torch.from_numpy(scaled.copy()), output_hidden_states=True, output_attentions=True)
    return theirs, ours, jnp.asarray(pixels), out


def test_tower_features(towers):
    _, ours, pixels, out = towers
    close(ours(pixels)["features"], out.hidden_states[-2][:, 1:])


@pytest.mark.parametrize("feature_layer", [-1, 0, 1])
def test_tower_feature_layer(towers, feature_layer):
    theirs, _, pixels, out = towers
    cfg = replace(BASE, vision=replace(VISION, feature_layer=feature_layer))
    ours = model_with(cfg, vision_tree(theirs, 3)).vision
    close(ours(pixels)["features"], out.hidden_states[feature_layer][:, 1:])


def test_tower_hands_out_what_is_asked(towers):
    theirs, ours, pixels, out = towers
    names = ("cls_attention@1", "queries@-1", "cls_query@2", "keys@2", "hidden@2", "hidden@0")
    handed = compiled(lambda tower, x: tower(x, names))(ours, pixels)
    assert set(handed) == {"features", "class_token", *names}
    close(handed["features"], out.hidden_states[-2][:, 1:])
    close(handed["class_token"], out.hidden_states[-2][:, :1])
    np.testing.assert_allclose(handed["cls_query@2"], handed["queries@-1"][:, :1], atol=1e-5)
    close(handed["cls_attention@1"], out.attentions[1][:, :, 0, 1:])
    close(handed["hidden@2"], out.hidden_states[2])
    close(handed["hidden@0"], out.hidden_states[0])
    layers = getattr(theirs, "vision_model", theirs).encoder.layers
    normed = layers[2].layer_norm1(out.hidden_states[2])
    close(handed["queries@-1"], layers[2].self_attn.q_proj(normed))
    close(handed["keys@2"], layers[2].self_attn.k_proj(normed))


@pytest.mark.parametrize("request_", ["values@1", "keys", "keys@x", "keys@3", "keys@-4"])
def test_tower_refuses_what_it_does_not_have(towers, request_):
    _, ours, pixels, _ = towers
    with pytest.raises(ValueError, match="tower"):
        ours(pixels, (request_,))


LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position=64)
CASES = {
    "grouped": DECODER,
    "tied": replace(DECODER, tie_embeddings=True),
    "one key head, default theta": replace(DECODER, kv_heads=1, rope_theta=10000.0),
    "wide heads": replace(DECODER, head_dim=12),
    "linear": replace(DECODER, rope_scaling=RopeScaling("linear", factor=4.0)),
    "llama3": replace(DECODER, rope_theta=10000.0, rope_scaling=LLAMA3),
}


def rope_parameters(cfg: DecoderConfig) -> dict:
    scaling = cfg.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": cfg.rope_theta}
    out = {"rope_type": scaling.kind, "rope_theta": cfg.rope_theta, "factor": scaling.factor}
    if scaling.kind == "llama3":
        out |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return out


def llama(cfg: DecoderConfig):
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=512, rope_parameters=rope_parameters(cfg),
        tie_word_embeddings=cfg.tie_embeddings, attn_implementation="eager",
    )  # fmt: skip
    return roughen(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize("name", CASES)
def test_decoder_hidden_and_logits(name):
    cfg = CASES[name]
    theirs = llama(cfg)
    ours = model_with(replace(BASE, decoder=cfg), decoder_tree(theirs, cfg.layers)).decoder
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 19))
    position = np.stack([np.arange(19), np.sort(np.random.default_rng(1).permutation(100)[:19])])

    @compiled
    def run(decoder, tokens, position):
        x = decoder.embed(tokens)
        x, cache, _ = decoder.run(0, x, position, Rows(jnp.array([19, 19])), keep=True)
        return decoder.norm(x), decoder.logits(x), cache

    hidden, logits, cache = run(ours, jnp.asarray(tokens), jnp.asarray(position))
    args = {"position_ids": torch.from_numpy(position), "use_cache": True}
    # An explicit mask: without one, gaps in the positions mean packed sequences there.
    mask = torch.full((19, 19), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 19, 19)
    out = theirs.model(torch.from_numpy(tokens), attention_mask=mask, **args)
    close(hidden, out.last_hidden_state)
    close(logits, theirs.lm_head(out.last_hidden_state))
    for layer in range(cfg.layers):
        kept = out.past_key_values.layers[layer]
        close(cache.k[layer], kept.keys.flatten(0, 1))
        close(cache.v[layer], kept.values.flatten(0, 1))


def test_decoder_step_continues_the_prompt():
    """Rows decoded one at a time behind prompts of unlike lengths equal one run."""
    cfg = replace(DECODER, rope_scaling=RopeScaling("linear", factor=2.0))
    decoder = random_model(replace(BASE, decoder=cfg)).decoder
    x = jax.random.normal(jax.random.key(0), (2, 9, cfg.width))
    position = jnp.broadcast_to(jnp.arange(9), (2, 9))
    rows = jnp.array([9, 9])
    run = compiled(lambda decoder, rows: decoder.run(0, x, position, Rows(rows), keep=True)[:2])
    step = compiled(lambda decoder, row, at, cache: decoder.step(0, row, at[:, None], cache, at))
    whole, _ = run(decoder, rows)
    length = jnp.array([6, 4])
    _, cache = run(decoder, length)
    for _ in range(3):
        row = jnp.take_along_axis(x, length[:, None, None], axis=1)
        out, cache = step(decoder, row, length, cache)
        want = jnp.take_along_axis(whole, length[:, None, None], axis=1)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
        length = length + 1
