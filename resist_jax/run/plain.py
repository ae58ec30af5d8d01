"""A trained network as plain layers: what other libraries call them.

Residual scales and gates are multiplied into the last layer of each branch, and
norm statistics into means and variances, so that nothing of ResIST remains.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.models import ResNet, rescale_branches, without_gates
from resist_jax.run.export import Predictor

Arrays = dict[str, np.ndarray]
# What a norm adds to variances, by its kind.
EPSILON = {'batch': 1e-5, 'group': 1e-6}


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


class Place(NamedTuple):
  """Where an array of a network is, here and in PyTorch.

  Attributes:
    path: Keys in the tree of parameters.
    block: Index on the leading axis of a chain; None where there is no chain.
    layer: Name of its layer in PyTorch, such as `stages.2.1.conv1`.
    kind: Name of the array there: `weight` or `bias`.
  """

  path: tuple[str, ...]
  block: int | None
  layer: str
  kind: str

  @property
  def name(self) -> str:
    """Its name in PyTorch."""
    return f'{self.layer}.{self.kind}'

  def get(self, tree: Mapping[str, Any]) -> np.ndarray:
    """Returns the array that a tree of parameters has here."""
    for key in self.path:
      tree = tree[key]
    found: Any = tree
    return found if self.block is None else found[self.block]


def places(params: Mapping[str, Any]) -> Iterator[Place]:
  """Yields the place of each array of a network.

  Args:
    params: Its parameters, or anything of their structure and shapes.
  """
  for path, leaf in jax.tree.leaves_with_path(params):
    keys = tuple(str(part.key) for part in path)
    piece, inner, last = keys[0], keys[1:-1], keys[-1]
    inner = tuple(key for key in inner if key != 'GroupNorm_0')
    kind = 'bias' if last == 'bias' else 'weight'
    if not piece.startswith('stage'):
      if piece == 'stem' and not inner:
        inner = ('whitening' if last == 'whitening' else 'conv',)
      yield Place(keys, None, '.'.join((piece, *inner)), kind)
      continue
    stage, part = piece.removeprefix('stage').split('_')
    layer = f'stages.{int(stage) - 1}.{{}}.{".".join(inner)}'
    if part == 'chain':
      for i in range(leaf.shape[0]):
        yield Place(keys, i, layer.format(i + 1), kind)
    else:  # A head that was cut has its layers in two pieces.
      block = 0 if part == 'branch' else None
      yield Place(keys, block, layer.format(0), kind)


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
  params = without_gates(jax.tree.map(np.asarray, params), model.network)
  statistics = jax.tree.map(np.asarray, model.variables['batch_stats'])
  found: Arrays = {
    'mean': model.mean.reshape(-1, 1, 1),
    'std': model.std.reshape(-1, 1, 1),
  }
  for place in places(params):
    array = place.get(params)
    found[place.name] = array.transpose(_axes(array))
    if place.path[-1] == 'scale' and statistics:
      mean, square = (at.get(statistics) for at in _measured(place))
      variance = np.maximum(square - np.square(mean), 0)
      found[f'{place.layer}.running_mean'] = mean
      found[f'{place.layer}.running_var'] = variance
      found[f'{place.layer}.num_batches_tracked'] = np.zeros((), np.int64)
  return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _axes(array: np.ndarray) -> tuple[int, ...]:
  """Returns the order of axes in PyTorch: of a kernel, or of a vector."""
  return {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, (0,))


def _measured(place: Place) -> tuple[Place, Place]:
  """Returns where the statistics of a batch norm are, given its scale."""
  norm = place.path[:-1]
  mean, square = ((*norm, name) for name in ('mean', 'mean_square'))
  return place._replace(path=mean), place._replace(path=square)


def variables(
  given: Mapping[str, np.ndarray],
  network: ResNet,
  names: Callable[[str], str],
) -> dict[str, Any]:
  """Returns the variables of a network from its arrays in PyTorch.

  Args:
    given: As `arrays` returns them. Without `running_mean` and `running_var`,
      there are no statistics.
    network: The network, whose residual scales are 1.
    names: Maps the name of a layer to that which it has in `given`.

  Returns:
    `params` and `batch_stats`, on the host, as in `Predictor.variables`.

  Raises:
    ValueError: If the arrays are those of another network.
  """
  if network.gate is not None:
    raise ValueError(
      'the network has gates, which PyTorch has in the last layers of its '
      'branches: give the same network without gate.'
    )
  unread = dict(given)

  def read(layer: str, kind: str) -> np.ndarray:
    name = f'{names(layer)}.{kind}'
    if name not in given:
      raise ValueError(
        f'there is no array {name}: the network has other layers, or they have '
        'other names.'
      )
    unread.pop(name, None)
    return given[name]

  first = 'whitening' if network.stem == 'whitened' else 'conv'
  channels = read(f'stem.{first}', 'weight').shape[1]
  params, statistics = _zeros(network, channels)
  if not any(name.endswith('.running_mean') for name in given):
    statistics = {}
  for place in places(params):
    array = read(place.layer, place.kind)
    _fill(params, place, array.transpose(np.argsort(_axes(array))))
    if place.path[-1] == 'scale' and statistics:
      mean = read(place.layer, 'running_mean')
      square = read(place.layer, 'running_var') + np.square(mean)
      for at, value in zip(_measured(place), (mean, square), strict=True):
        _fill(statistics, at, value)
  left = [name for name in unread if name.split('.')[-1] not in _UNREAD]
  if left:
    raise ValueError(
      f'the network has no place for {len(left)} arrays, such as {left[0]}: it '
      'has fewer layers.'
    )
  return {'params': params, 'batch_stats': statistics}


# Arrays that are no variables of a network.
_UNREAD = ('mean', 'std', 'num_batches_tracked')


def _zeros(network: ResNet, channels: int) -> tuple[dict, dict]:
  """Returns zeros in the place of parameters and of statistics."""
  image = jnp.zeros((1, 32, 32, channels), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)
  _, more = jax.eval_shape(
    partial(network.apply, mutable=['batch_stats']), shapes, image
  )
  params, statistics = (
    jax.tree.map(lambda x: np.zeros(x.shape, np.float32), tree)
    for tree in (shapes['params'], more.get('batch_stats', {}))
  )
  return params, statistics


def _fill(tree: Mapping[str, Any], place: Place, value: np.ndarray) -> None:
  """Writes an array into a tree of arrays of zeros."""
  at = place.get(tree)
  if at.shape != value.shape:
    raise ValueError(
      f'{place.name} has the shape {value.shape}, and {"/".join(place.path)} '
      f'{at.shape}, by our order of axes: the network is another one.'
    )
  at[...] = value
