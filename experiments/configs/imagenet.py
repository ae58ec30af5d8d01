"""The card `imagenet` of the package, for `--config=PATH`."""

from resist_jax.run.cards.imagenet import get_config as get_config
