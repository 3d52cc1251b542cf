"""What `python -m focus_jax bench` measures: each side in a process of its own."""
