"""From the tower's width to the decoder's."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from focus_jax.sharding import Layout, in_use, pinned


class Projector(nnx.Module):
    """LLaVA's connector: one linear map, or two with an exact GELU between them."""

    def __init__(
        self,
        kind: Literal["linear", "mlp2x_gelu"],
        width_in: int,
        width_out: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        layout: Layout | None = None,
    ):
        self.layout = layout

        def linear(a: int, b: int) -> nnx.Linear:
            return nnx.Linear(a, b, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.linear_1 = linear(width_in, width_out)
        self.linear_2 = linear(width_out, width_out) if kind == "mlp2x_gelu" else None

    def __call__(self, features: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        """Project features; the leading axes are free."""
        own = in_use(self.layout, self, "projector.")
        hidden = own.linear_1(features)
        if own.linear_2 is not None:
            hidden = own.linear_2(jax.nn.gelu(hidden, approximate=False))
        return pinned(self.layout, hidden, "batch")
