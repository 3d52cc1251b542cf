"""focus_jax: FocusLLaVA in JAX/Flax, and visual-token compression as a value."""
