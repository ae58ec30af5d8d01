"""ResIST with an outer optimiser, not in the paper: CIFAR-10's card and levers.

Not in the paper. After each round the new global network is the old one plus a
step of SGD with Nesterov momentum along the change of the round, as in DiLoCo.
What it gains and costs: RESULTS.md, made by `python -m experiments.levers`.
Accuracy: 90.9 % with the words s4,cpu90 (one run; experiments.to_accuracy).

Command: python -m resist_jax --config=resist_plus:s4,cpu90 \
           --workdir=runs/plus --config.data.dir=FOLDER
Words: cifar10 (default) or cifar100; the others as for cifar10
Baseline: --config.protocol=local_sgd, with the same levers
"""

from typing import Any

import ml_collections

from resist_jax.run.cards import cifar10

DATA = ('cifar10', 'cifar100')
# By dotted name of the field.
LEVERS: dict[str, Any] = {
  'outer.lr': 1.0,
  'outer.momentum': 0.5,
  'outer.nesterov': True,
}


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """Returns the config; for other words see `cifar10.get_config`."""
  words = [word for word in argument.split(',') if word]
  if len({*words} & {*DATA}) > 1:
    raise ValueError(f'{" and ".join(DATA)} exclude each other: leave one.')
  rest = [word for word in words if word not in DATA]
  config = cifar10.get_config(','.join(rest))
  config.data.name = next((word for word in words if word in DATA), DATA[0])
  config.update_from_flattened_dict(LEVERS)
  return config
