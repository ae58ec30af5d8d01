"""The cards of `resist_jax.run.cards`, by path; `--config=NAME` is shorter."""
