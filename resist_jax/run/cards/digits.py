"""Handwritten digits, or any small image set: the first thing to run.

Paper: its CIFAR setting (pre-activation ResNet, section 3 partitioned, 1/S
residual scale at test time, momentum restarted every round), scaled down to
1,437 training images of 8x8 pixels and a network with a chain of 12 blocks.

Command: python -m resist_jax --config=digits --workdir=runs/digits
Words: smoke (seconds)
Baselines: --config.protocol=local_sgd, --config.protocol=data_parallel
Other sets: --config.data.name=cifar10 --config.data.dir=FOLDER
"""

import ml_collections

from resist_jax.run import fields


def get_config(scale: str = '') -> ml_collections.ConfigDict:
  """Returns the config; `smoke` shrinks it to seconds, `cpu` leaves it."""
  config = fields.get_config()
  config.model.name = 'PreActResNetTiny'
  config.num_workers = 4
  config.num_rounds = 20
  config.local_steps = 20  # Nine epochs of digits for each worker in all.
  config.batch_size = 32
  config.lr = 0.05
  config.eval_every = 4
  config.checkpoint_every = 10
  config.evaluation.batch_size = 120  # Divides the 360 test images of digits.
  if scale == 'smoke':
    config.num_rounds, config.local_steps = 2, 2
    config.eval_every = config.checkpoint_every = 1
  elif scale not in ('', 'cpu'):
    raise ValueError(f'unknown word {scale!r}: use digits or digits:smoke.')
  return config
