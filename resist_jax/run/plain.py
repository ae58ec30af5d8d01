"""A trained network as plain layers: what other libraries call them.

Residual scales are multiplied into the last layer of each branch, and norm
statistics into means and variances, so that nothing of ResIST remains.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from resist_jax.models import rescale_branches
from resist_jax.models.resnet import branch_name, chain_name, head_name
from resist_jax.run.export import Predictor

Arrays = dict[str, np.ndarray]
_EPSILON = {'batch': 1e-5, 'group': 1e-6}


def describe(model: Predictor) -> dict[str, Any]:
  """Returns what a network is, as arguments of `torch_network.Network`."""
  network = model.network
  names = ('bottleneck', 'pre_activation', 'norm', 'stem')
  return {
    'class_names': list(model.class_names),
    'image_shape': list(model.image_shape),
    'stage_sizes': list(network.stage_sizes),
    'widths': list(network.widths),
    **{name: getattr(network, name) for name in names},
  }


def arrays(model: Predictor) -> Arrays:
  """Returns the arrays of a network, by the names that PyTorch gives them.

  Args:
    model: The network.

  Returns:
    `float32`: kernels are `[out, in, height, width]`, the classifier is
    `[classes, features]`. Batch norms also have `num_batches_tracked`, a number
    that PyTorch counts and nothing reads.
  """
  factors = {name: float(scale[0]) for name, scale in model.scales.items()}
  params = rescale_branches(model.variables['params'], factors, model.network)
  params = jax.tree.map(np.asarray, params)
  statistics = jax.tree.map(np.asarray, model.variables['batch_stats'])
  found = {
    'mean': model.mean.reshape(-1, 1, 1),
    'std': model.std.reshape(-1, 1, 1),
    **_layers('stem.', *_stem(params['stem'], statistics.get('stem', {}))),
    'classifier.weight': params['classifier']['kernel'].T,
    'classifier.bias': params['classifier']['bias'],
  }
  for place, layers, measured in _blocks(model, params, statistics):
    found |= _layers(place, layers, measured)
  return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _stem(params, statistics):
  layers: dict[str, Any] = {'conv': {'kernel': params['kernel']}}
  if 'norm' in params:
    layers['norm'] = params['norm']
  return layers, statistics


def _blocks(
  model: Predictor, params: Mapping[str, Any], statistics: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
  """Yields the place of each block, its layers, and their statistics."""
  for stage, size in enumerate(model.network.stage_sizes, start=1):
    head, branch = head_name(stage), branch_name(stage)
    first = []
    for tree in (params, statistics):
      cut = jax.tree.map(lambda x: x[0], tree.get(branch, {}))
      # A head that was cut has its layers in two places.
      first.append({**tree.get(head, {}), **cut})
    yield f'stages.{stage - 1}.0.', first[0], first[1]
    for i in range(size - 1):
      own = [
        jax.tree.map(lambda x, i=i: x[i], tree.get(chain_name(stage), {}))
        for tree in (params, statistics)
      ]
      yield f'stages.{stage - 1}.{i + 1}.', own[0], own[1]


def _layers(
  place: str, layers: Mapping[str, Any], statistics: Mapping[str, Any]
) -> Arrays:
  """Returns the arrays of some layers."""
  found: Arrays = {}
  for name, layer in layers.items():
    if 'kernel' in layer:
      found[f'{place}{name}.weight'] = layer['kernel'].transpose(3, 2, 0, 1)
      continue
    layer = layer.get('GroupNorm_0', layer)
    found[f'{place}{name}.weight'] = layer['scale']
    found[f'{place}{name}.bias'] = layer['bias']
    if name in statistics:
      mean = statistics[name]['mean']
      square = statistics[name]['mean_square']
      variance = np.maximum(square - np.square(mean), 0)
      found[f'{place}{name}.running_mean'] = mean
      found[f'{place}{name}.running_var'] = variance
      found[f'{place}{name}.num_batches_tracked'] = np.zeros((), np.int64)
  return found


def epsilon(norm: str) -> float:
  """Returns what a norm of a kind adds to variances."""
  return _EPSILON[norm]
