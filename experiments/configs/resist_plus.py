"""The card `resist_plus` of the package, for `--config=PATH`."""

from resist_jax.run.cards.resist_plus import get_config as get_config
