"""How large the gradients of a model's parts are."""

from collections.abc import Mapping

import optax
from jaxtyping import Array, Float


def gradient_norms(grads: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
    """`gradient_norm` of all named leaves, and `gradient_norm/decoder` and so on of each part.

    A part is the first word of a leaf's name.
    """
    parts: dict[str, dict[str, Array]] = {}
    for name, leaf in grads.items():
        parts.setdefault(name.partition(".")[0], {})[name] = leaf
    norms = {f"gradient_norm/{part}": optax.tree.norm(own) for part, own in sorted(parts.items())}
    return {"gradient_norm": optax.tree.norm(dict(grads)), **norms}
