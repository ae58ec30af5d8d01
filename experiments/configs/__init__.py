"""The cards of `resist_jax.run.cards`, by path, and `language`, only here."""
