"""The card `cifar100` of the package, for `--config=PATH`."""

from resist_jax.run.cards.cifar100 import get_config as get_config
