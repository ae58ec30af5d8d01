"""CIFAR-10 on four workers.

Paper: Tables 1 and 2, PreActResNet101 with section 3 partitioned, batch 128 per
worker, T = 50, 160 epochs over all workers, learning rate 0.03 divided by 10
at 50 % and 75 % (published for CIFAR-100), at least 6 blocks per worker.
Expected: 92.35 % under the paper's protocol (local SGD 92.90 %).

Command: python -m resist_jax --config=experiments/configs/cifar10.py \
           --workdir=runs/cifar10 --config.data.dir=FOLDER
CPU: --config=experiments/configs/cifar10.py:cpu (a small network, some minutes
on two cores), and cifar10.py:smoke (a minute)
"""

import ml_collections

from resist_jax import config as config_lib


def get_config(scale: str = '') -> ml_collections.ConfigDict:
  """Returns the config; `cpu` and `smoke` shrink it."""
  config = config_lib.get_config()
  config.data.name = 'cifar10'
  config.num_workers = 4
  config.min_depth = 6
  config.num_rounds = 313  # 160 epochs of 50,000 over all workers.
  if scale in ('cpu', 'smoke'):
    config.model.name = 'PreActResNetTiny'
    config.model.stage_sizes = (1, 1, 9, 1)
    config.model.widths = (16, 32, 32, 64)
    config.min_depth = 0
    config.num_rounds, config.local_steps = 24, 25
    config.batch_size = 32
    config.lr = 0.05
    config.optimizer.schedule = 'cosine'
    config.eval_every = config.checkpoint_every = 12
    config.evaluation.statistics_images = 1000
  elif scale:
    raise ValueError(
      f'unknown scale {scale!r}: use cifar10.py, cifar10.py:cpu or '
      'cifar10.py:smoke.'
    )
  if scale == 'smoke':
    config.num_rounds, config.local_steps = 2, 2
  return config
