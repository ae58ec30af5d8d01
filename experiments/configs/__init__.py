"""Experiment cards: each says its paper, its cost and its exact command."""
