"""FocusLLaVA (arXiv 2411.14228): the vision-guided sampler, then the text-guided one."""

from focus_jax.compress.baselines import Full
from focus_jax.compress.method import Method
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided


def focusllava(
    vision: VisionGuided | None = None, text: TextGuided | tuple[TextGuided, ...] | None = None
) -> Method:
    """Both samplers, either, or (with neither) full tokens. The name says which are on.

    Several text-guided samplers at rising layers are one value too (PyramidDrop's schedule).
    """
    cuts = text if isinstance(text, tuple) else (text,) if text else ()
    names = {(True, True): "focusllava", (True, False): "vision_only", (False, True): "text_only"}
    name = names.get((vision is not None, bool(cuts)), "full")
    return Method(name, vision or Full(), cuts)
