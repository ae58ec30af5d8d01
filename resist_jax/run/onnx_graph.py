"""A trained network as an ONNX graph."""

import importlib
import math
from typing import Any

import numpy as np

from resist_jax.run import plain
from resist_jax.run.export import Predictor

_OPSET = 21  # The first whose group norm has a scale for each channel.


class Graph:
  """The nodes of a network, in order."""

  def __init__(self, model: Predictor):
    """Reads the arrays of a network."""
    self.onnx: Any = importlib.import_module('onnx')
    self.about = plain.describe(model)
    self.arrays = plain.arrays(model)
    self.nodes: list[Any] = []
    self.constants: dict[str, np.ndarray] = {}

  def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node, and returns the name of its output."""
    name = f'{kind.lower()}_{len(self.nodes)}'
    node = self.onnx.helper.make_node(
      kind, inputs, [name], name=name, **attributes
    )
    self.nodes.append(node)
    return name

  def take(self, name: str) -> str:
    """Names an array of the network as a constant."""
    self.constants[name] = self.arrays[name]
    return name

  def conv(self, x: str, name: str, stride: int) -> str:
    """Adds a convolution."""
    weight = self.take(f'{name}.weight')
    pad = (self.arrays[weight].shape[-1] - 1) // 2
    return self.add('Conv', x, weight, pads=[pad] * 4, strides=[stride] * 2)

  def norm(self, x: str, name: str) -> str:
    """Adds a norm."""
    kind = self.about['norm']
    parts = [self.take(f'{name}.{part}') for part in ('weight', 'bias')]
    more = {'epsilon': plain.EPSILON[kind]}
    if kind == 'batch':
      measured = ('running_mean', 'running_var')
      parts += [self.take(f'{name}.{part}') for part in measured]
      return self.add('BatchNormalization', x, *parts, **more)
    channels = len(self.arrays[parts[0]])
    groups = channels // math.gcd(16, channels)
    return self.add('GroupNormalization', x, *parts, num_groups=groups, **more)

  def relu(self, x: str) -> str:
    """Adds a ReLU."""
    return self.add('Relu', x)


def build(model: Predictor) -> Any:
  """Returns a network as an ONNX model.

  Args:
    model: The network.

  Returns:
    A model that maps `images`, `uint8[B, H, W, C]`, to `logits`,
    `float32[B, classes]`.
  """
  graph = Graph(model)
  onnx, about = graph.onnx, graph.about
  helper, kinds = onnx.helper, onnx.TensorProto
  graph.constants['white'] = np.array(255, np.float32)
  x = graph.add('Cast', 'images', to=kinds.FLOAT)
  x = graph.add('Transpose', x, perm=[0, 3, 1, 2])
  x = graph.add('Div', x, 'white')
  x = graph.add('Sub', x, graph.take('mean'))
  x = _stem(graph, graph.add('Div', x, graph.take('std')))
  for stage, size in enumerate(about['stage_sizes']):
    for block in range(size):
      stride = 2 if stage and not block else 1
      x = _block(graph, x, f'stages.{stage}.{block}.', stride)
  x = graph.add('Flatten', graph.add('GlobalAveragePool', x))
  parts = graph.take('classifier.weight'), graph.take('classifier.bias')
  graph.add('Gemm', x, *parts, transB=1)
  graph.nodes[-1].output[0] = 'logits'
  shapes = ['batch', *about['image_shape']], ['batch', len(model.class_names)]
  made = helper.make_graph(
    graph.nodes,
    'resist_jax',
    [helper.make_tensor_value_info('images', kinds.UINT8, shapes[0])],
    [helper.make_tensor_value_info('logits', kinds.FLOAT, shapes[1])],
    [onnx.numpy_helper.from_array(a, n) for n, a in graph.constants.items()],
  )
  opset = [helper.make_opsetid('', _OPSET)]
  found = helper.make_model(made, opset_imports=opset, ir_version=10)
  onnx.checker.check_model(found, full_check=True)
  return found


def _stem(graph: Graph, x: str) -> str:
  kind = graph.about['stem']
  if kind == 'whitened':
    weight = graph.take('stem.whitening.weight')
    x = graph.relu(graph.add('Conv', x, weight, pads=[0, 0, 1, 1]))
  x = graph.conv(x, 'stem.conv', 1 if kind == 'small' else 2)
  if not graph.about['pre_activation']:
    x = graph.relu(graph.norm(x, 'stem.norm'))
  if kind == 'imagenet':
    sizes = {'kernel_shape': [3, 3], 'strides': [2, 2], 'pads': [1] * 4}
    x = graph.add('MaxPool', x, **sizes)
  return x


def _block(graph: Graph, x: str, place: str, stride: int) -> str:
  before = graph.about['pre_activation']
  depth = 3 if graph.about['bottleneck'] else 2
  branch = graph.relu(graph.norm(x, f'{place}norm1')) if before else x
  shortcut = x
  if f'{place}shortcut.weight' in graph.arrays:
    shortcut = graph.conv(branch, f'{place}shortcut', stride)
    if not before:
      shortcut = graph.norm(shortcut, f'{place}norm_shortcut')
  wide = 2 if depth == 3 else 1  # The convolution that has the stride.
  for i in range(1, depth + 1):
    if before and i > 1:
      branch = graph.relu(graph.norm(branch, f'{place}norm{i}'))
    branch = graph.conv(branch, f'{place}conv{i}', stride if i == wide else 1)
    if not before:
      branch = graph.norm(branch, f'{place}norm{i}')
      branch = branch if i == depth else graph.relu(branch)
  out = graph.add('Add', shortcut, branch)
  return out if before else graph.relu(out)
