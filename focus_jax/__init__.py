"""focus_jax: FocusLLaVA in JAX/Flax, and visual-token compression as a value.

import focus_jax as fj
vlm = fj.load("llava-hf/llava-v1.6-vicuna-7b-hf", dtype="bfloat16")
vlm.generate(["What is written on the sign?"], images=["photo.jpg"], max_new_tokens=64)
vlm.with_method(fj.methods.focusllava(vision=None, text_layer=16, keep=0.25)).generate(...)
"""

from importlib import import_module
from typing import Any

__all__ = ["Sampling", "load", "methods"]


def __getattr__(name: str) -> Any:
    """What users import, loaded when asked for: importing the package alone stays quick."""
    if name == "methods":
        return import_module("focus_jax.methods")
    if name == "load":
        return import_module("focus_jax.pipeline").load
    if name == "Sampling":
        return import_module("focus_jax.sampling").Sampling
    raise AttributeError(f"module 'focus_jax' has no attribute {name!r}")
