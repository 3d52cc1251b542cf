"""FocusLLaVA on LLaVA-NeXT with Llama-3-8B-Instruct: the paper's probable base; five tiles."""

from dataclasses import replace

import _llava_recipe

from focus_jax.config import llava_next_llama3_8b
from focus_jax.experiment import Experiment


def get_config() -> Experiment:
    config = _llava_recipe.experiment("focusllava_llama3_8b", llava_next_llama3_8b())
    return replace(config, data=replace(config.data, template="llama3"))
