"""Experiments with resist_jax: cards, tables, figures and their results."""
