"""Counts of what one training step of a residual network computes."""

from collections.abc import Mapping, Sequence
from functools import partial
import math

from flax import linen as nn
import jax
import numpy as np

from resist_jax.models.blocks import output_of
from resist_jax.models.layers import BatchNorm, Conv, GroupNorm16
from resist_jax.models.resnet import ResNet


def num_statistics(
  network: ResNet, image_shape: tuple[int, ...], lengths: Mapping[str, int]
) -> int:
  """Counts the means and mean squares that batch norm computes in a step.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    lengths: For each partitioned chain by name, the number of blocks that a
      worker runs.

  Returns:
    Two per channel of every batch norm layer; 0 with group norm.
  """
  network = network.with_chain_lengths(lengths)

  def measured(images):
    params = network.init(jax.random.key(0), images)['params']
    return network.apply({'params': params}, images, mutable=['batch_stats'])[1]

  images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
  leaves = jax.tree.leaves(jax.eval_shape(measured, images))
  return sum(math.prod(leaf.shape) for leaf in leaves)


def num_activations(
  network: ResNet,
  image_shape: tuple[int, ...],
  lengths: Mapping[str, int],
  fused: bool,
) -> int:
  """Counts the numbers that the gradient needs of the forward pass.

  A norm needs its input. A convolution needs its input, too; that is a norm and
  a ReLU away from what the norm keeps, so a compiler that fuses these into the
  convolution (TPU) does not store it. One that calls a library for each
  convolution (GPU) does.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    lengths: For each partitioned chain by name, the number of blocks that a
      worker runs.
    fused: Whether norms and ReLUs are part of the convolution after them.

  Returns:
    Numbers for one image, of the compute dtype.
  """
  network = network.with_chain_lengths(lengths)
  kinds = (BatchNorm, GroupNorm16) if fused else (BatchNorm, GroupNorm16, Conv)
  x = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
  total = 0
  for name, _ in network.pieces():
    module = network.clone(norm_axis=None).make_piece(name)
    x, entering = jax.eval_shape(partial(_output_and_inputs, module, kinds), x)
    total += sum(math.prod(array.shape) for array in entering)
  return total


def _output_and_inputs(module, kinds, x):
  """Applies a piece; returns also what enters its layers of these kinds."""
  entering = {}  # Arrays that two layers share are there once.

  def record(next_call, args, kwargs, context):
    if context.method_name == '__call__' and isinstance(context.module, kinds):
      entering[id(args[0])] = args[0]
    return next_call(*args, **kwargs)

  with nn.intercept_methods(record):
    key = jax.random.key(0)
    y, _ = module.init_with_output(key, x, method=output_of)
  return y, list(entering.values())


def predicted_flops(
  network: ResNet,
  image_shape: tuple[int, ...],
  lengths: Mapping[str, int],
  passes: int = 1,
) -> float:
  """Predicts the floating-point operations of training on one image.

  Counts the multiplications and additions of the convolutions and the
  classifier, for the forward pass and both gradients. The stem needs no
  gradient of its input, and fixed filters before it need none. Products with
  padding are not counted: XLA does not count them either, and on small images
  they would matter.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    lengths: For each partitioned chain by name, the number of blocks that a
      worker runs.
    passes: Forward passes; only one of them has gradients.

  Returns:
    The number of floating-point operations.
  """
  forward = [
    2 * taps * channels * features
    for taps, channels, features in _layers(
      network.with_chain_lengths(lengths), image_shape
    )
  ]
  fixed = 0
  if network.stem == 'whitened':
    *image, channels = image_shape
    taps = math.prod(2 * side - 1 for side in image)  # Padded on two sides.
    fixed = 2 * taps * channels * 8 * channels
  return (passes + 2) * sum(forward) - forward[0] + passes * fixed


def _layers(network: ResNet, image_shape: tuple[int, ...]):
  """Yields each layer's products per channel pair, channels in and out."""
  *image, channels = image_shape
  features = network.widths[0]
  size = 7 if network.stem == 'imagenet' else 3
  stride = 1 if network.stem == 'small' else 2
  if network.stem == 'whitened':
    channels *= 8
  yield _taps(image, size, stride), channels, features
  image = _strided(image, stride)
  if network.stem == 'imagenet':
    image = _strided(image, 2)  # Max pooling.
  channels = features
  stages = zip(network.stage_sizes, network.widths, strict=True)
  for stage, (blocks, features) in enumerate(stages, start=1):
    out = 4 * features if network.bottleneck else features
    for block in range(blocks):
      stride = 2 if stage > 1 and block == 0 else 1
      entered, image = image, _strided(image, stride)
      if stride != 1 or channels != out:
        yield _taps(entered, 1, stride), channels, out
      if network.bottleneck:
        yield _taps(entered, 1, 1), channels, features
        yield _taps(entered, 3, stride), features, features
        yield _taps(image, 1, 1), features, out
      else:
        yield _taps(entered, 3, stride), channels, features
        yield _taps(image, 3, 1), features, features
      channels = out
  yield 1, channels, network.num_classes


def _strided(image: Sequence[int], stride: int) -> list[int]:
  return [-(-side // stride) for side in image]


def _taps(image: Sequence[int], size: int, stride: int) -> int:
  """Counts the pixels under a kernel, summed over its positions in an image."""
  pad = (size - 1) // 2
  return math.prod(
    sum(
      min(place + size, side + pad) - max(place, pad)
      for place in range(0, side + 2 * pad - size + 1, stride)
    )
    for side in image
  )
