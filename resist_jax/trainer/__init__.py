"""Training of anybody's network: the public face of `rounds` and `exchange`."""

from resist_jax.trainer.trainer import Trainer

__all__ = ['Trainer']
