"""How lmms-eval (from 0.6) finds `--model focus_jax`: the entry point "lmms_eval.models".

Apart from the model's class, so that lmms-eval with other models does not import jax.
"""

from typing import Any


def manifest() -> Any:
    """The model's name and where its class is, as lmms-eval wants them told."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "focus_jax.evaluate.lmms_eval.FocusJax"
    return ModelManifest(model_id="focus_jax", simple_class_path=path)
