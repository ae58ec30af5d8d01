"""Residual networks as Flax linen modules, whose families are data.

The parameters of a network are a plain dictionary. Each stage has a head, its
first block, and a chain, the identical blocks after it, whose parameters are
stacked on a leading axis.
"""

from resist_jax.models.accelerated import computed_kernels
from resist_jax.models.arithmetic import (
  num_activations,
  num_statistics,
  predicted_flops,
)
from resist_jax.models.blocks import Block, Branch, Classifier, Shortcut, Stem
from resist_jax.models.resnet import (
  FAMILY,
  INITIAL,
  STEMS,
  PreActBottleneckResNet50,
  PreActBottleneckResNet101,
  PreActBottleneckResNet152,
  PreActResNet18,
  PreActResNet34,
  PreActResNet101,
  PreActResNet152,
  PreActResNet200,
  PreActResNetTiny,
  ResNet,
  branch_name,
  chain_name,
  head_name,
  initial_params,
  rescale_branches,
  stage_of,
  without_gates,
)
from resist_jax.models.whitening import whitening

__all__ = [
  'FAMILY',
  'INITIAL',
  'STEMS',
  'Block',
  'Branch',
  'Classifier',
  'PreActBottleneckResNet50',
  'PreActBottleneckResNet101',
  'PreActBottleneckResNet152',
  'PreActResNet18',
  'PreActResNet34',
  'PreActResNet101',
  'PreActResNet152',
  'PreActResNet200',
  'PreActResNetTiny',
  'ResNet',
  'Shortcut',
  'Stem',
  'branch_name',
  'chain_name',
  'computed_kernels',
  'head_name',
  'initial_params',
  'num_activations',
  'num_statistics',
  'predicted_flops',
  'rescale_branches',
  'stage_of',
  'whitening',
  'without_gates',
]
