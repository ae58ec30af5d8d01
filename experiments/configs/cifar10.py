"""The card `cifar10` of the package, for `--config=PATH`."""

from resist_jax.run.cards.cifar10 import get_config as get_config
