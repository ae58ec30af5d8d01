"""The card `deeper` of the package, for `--config=PATH`."""

from resist_jax.run.cards.deeper import get_config as get_config
