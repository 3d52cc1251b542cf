"""Weights of torch modules under this project's canonical names, for parity tests."""

import jax.numpy as jnp
import numpy as np

VISION = {
    "norm_1.scale": "layer_norm1.weight",
    "norm_1.bias": "layer_norm1.bias",
    "norm_2.scale": "layer_norm2.weight",
    "norm_2.bias": "layer_norm2.bias",
    "up.kernel": "mlp.fc1.weight",
    "up.bias": "mlp.fc1.bias",
    "down.kernel": "mlp.fc2.weight",
    "down.bias": "mlp.fc2.bias",
} | {
    f"{ours}.{part}": f"self_attn.{theirs}_proj.{'weight' if part == 'kernel' else 'bias'}"
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))
    for part in ("kernel", "bias")
}
DECODER = {
    "norm_1.scale": "input_layernorm.weight",
    "norm_2.scale": "post_attention_layernorm.weight",
    "gate.kernel": "mlp.gate_proj.weight",
    "up.kernel": "mlp.up_proj.weight",
    "down.kernel": "mlp.down_proj.weight",
} | {
    f"{ours}.kernel": f"self_attn.{theirs}_proj.weight"
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
}


def numpy_state(module) -> dict[str, np.ndarray]:
    """A torch module's arrays; an enclosing `model.` or `vision_model.` is dropped."""
    state = {name: array.detach().numpy() for name, array in module.state_dict().items()}
    drop = ("vision_model.", "model.")
    for prefix in drop:
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def stacked(state: dict, table: dict, prefix: str, layers: int, to: str) -> dict:
    """All layers of a block, stacked; linear maps turned to (in, out)."""
    out = {}
    for ours, theirs in table.items():
        arrays = np.stack([state[f"{prefix}.{i}.{theirs}"] for i in range(layers)])
        arrays = np.swapaxes(arrays, 1, 2) if ours.endswith("kernel") else arrays
        out[f"{to}.layers.{ours}"] = jnp.asarray(arrays)
    return out


def vision_tree(module, layers: int) -> dict:
    """Canonical arrays of a CLIPVisionModel."""
    state = numpy_state(module)
    tree = stacked(state, VISION, "encoder.layers", layers, "vision")
    tree["vision.stem.kernel"] = state["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)
    tree["vision.class_token"] = state["embeddings.class_embedding"]
    tree["vision.position"] = state["embeddings.position_embedding.weight"]
    for ours, theirs in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm")):
        tree[f"vision.{ours}.scale"] = state[f"{theirs}.weight"]
        tree[f"vision.{ours}.bias"] = state[f"{theirs}.bias"]
    return {name: jnp.asarray(array) for name, array in tree.items()}


def decoder_tree(module, layers: int) -> dict:
    """Canonical arrays of a LlamaForCausalLM, without the head where it is tied."""
    state = numpy_state(module)
    tree = stacked(state, DECODER, "layers", layers, "decoder")
    tree["decoder.embed.embedding"] = state["embed_tokens.weight"]
    tree["decoder.norm.scale"] = state["norm.weight"]
    if not module.config.tie_word_embeddings:
        tree["decoder.head.kernel"] = state["lm_head.weight"].T
    return {name: jnp.asarray(array) for name, array in tree.items()}
