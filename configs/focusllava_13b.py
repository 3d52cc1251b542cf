"""FocusLLaVA on LLaVA-NeXT with Vicuna-13B: five tiles an image."""

from dataclasses import replace

import _llava_recipe

from focus_jax.config import llava_1_5_13b
from focus_jax.experiment import Experiment


def get_config() -> Experiment:
    model = replace(llava_1_5_13b(), max_tiles=5, image_newline=True)
    return _llava_recipe.experiment("focusllava_13b", model)
