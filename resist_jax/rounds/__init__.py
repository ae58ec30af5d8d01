"""Local training and the exchange after it, on a mesh."""

from resist_jax.rounds.compiled import Round, make_round

__all__ = ['Round', 'make_round']
