"""Experiments with resist_jax: configs, benchmarks and their results."""
