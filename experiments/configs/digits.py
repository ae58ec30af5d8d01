"""The card `digits` of the package, for `--config=PATH`."""

from resist_jax.run.cards.digits import get_config as get_config
