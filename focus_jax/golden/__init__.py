"""Recorded runs of official code, run again by ours: `python -m focus_jax golden`."""
