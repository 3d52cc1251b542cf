"""FocusLLaVA on LLaVA-NeXT with Vicuna-7B: five tiles an image."""

import _llava_recipe

from focus_jax.config import llava_next_vicuna_7b
from focus_jax.experiment import Experiment


def get_config() -> Experiment:
    return _llava_recipe.experiment("focusllava_7b", llava_next_vicuna_7b())
