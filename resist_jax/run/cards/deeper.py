"""Deeper networks, as in the paper's table of ResNet152 and ResNet200.

Paper: stages [3, 4, 36, 3] and [3, 4, 50, 3], 100 steps a round, 80 epochs over
all workers; minimum depth unpublished, here the workers' equal share.
Accuracy there on CIFAR-10 with 2 and 4 workers: ResNet152 by ResIST 92.01,
90.67 %, by local SGD 92.27, 91.39 %; ResNet200 92.10, 90.27 and 92.31, 91.35 %.

Cost on 2 and 4 workers: ResNet152 44 and 30 PFLOP, 33 and 39 GB on the wire,
ResNet200 55 and 36 PFLOP, 39 and 44 GB; local SGD 70 and 91 PFLOP.

Command: python -m resist_jax --config=deeper:152,s4 --workdir=runs/deeper \
           --config.data.dir=FOLDER
Words: 152 or 200 (default) layers; s2, s4, s8, cpu and smoke as for cifar10
CPU: chains of 14 and 20 blocks. CIFAR-100: --config.data.name=cifar100
"""

import ml_collections

from resist_jax.run.cards import cifar10

CHAINS = {'152': 35, '200': 49}  # L
CPU_CHAINS = {'152': 14, '200': 20}
PAPER_ROUNDS = {2: 157, 4: 78, 8: 39}  # 80 epochs of 50,000 over all workers.


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """Returns the config; for other words see `cifar10.get_config`."""
  words = [word for word in argument.split(',') if word]
  if len({*words} & {*CHAINS}) > 1:
    raise ValueError('152 and 200 exclude each other: leave one.')
  depth = next((word for word in words if word in CHAINS), '200')
  rest = [word for word in words if word not in CHAINS]
  if 'cpu90' in rest:
    raise ValueError("'cpu90' is a scale of cifar10 and cifar100: use cpu.")
  config = cifar10.get_config(','.join(rest))
  small = bool({'cpu', 'smoke'} & set(rest))
  length = (CPU_CHAINS if small else CHAINS)[depth]
  config.model.name = f'PreActResNet{depth}'
  config.min_depth = -(-length // config.num_workers)
  if small:
    config.model.stage_sizes = (3, 4, 1 + length, 3)
  else:
    config.local_steps = 100
    config.num_rounds = PAPER_ROUNDS[config.num_workers]
  return config
