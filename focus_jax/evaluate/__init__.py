"""Scores, intervals and benchmarks."""
