"""The same job with all visual tokens: what FocusLLaVA is measured against."""

from dataclasses import replace

import glyphs_focus

from focus_jax.experiment import Experiment


def get_config() -> Experiment:
    config = glyphs_focus.get_config()
    compress = replace(
        config.compress,
        vision=replace(config.compress.vision, enabled=False),
        text=replace(config.compress.text, enabled=False),
    )
    return replace(config, name="glyphs_full", compress=compress)
