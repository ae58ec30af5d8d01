"""A GPT on bytes of Python's standard library, cut by ResIST.

Command: python -m resist_jax --config=experiments/configs/language.py \
           --workdir=runs/language
"""

import ml_collections

from experiments.text import SOURCES
from resist_jax.run.config import get_config as defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the card."""
  config = defaults()
  config.model.module = 'experiments.language_run'
  config.model.options = {
    'layers': 8,
    'width': 48,
    'heads': 4,
    'length': 48,
    'test_windows': 512,
  }
  config.data.name = SOURCES  # Or the path of a file, or tfds:NAME.
  config.num_rounds, config.local_steps, config.batch_size = 25, 20, 4
  config.lr = 3e-3
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_rounds = 1
  config.optimizer.weight_decay = 0.1
  return config
