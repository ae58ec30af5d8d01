"""Counts of what one training step of a residual network computes."""

from collections.abc import Mapping, Sequence
import math

import jax
import numpy as np

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


def predicted_flops(
  network: ResNet, image_shape: tuple[int, ...], lengths: Mapping[str, int]
) -> float:
  """Predicts the floating-point operations of training on one image.

  Counts the multiplications and additions of the convolutions and the
  classifier, for the forward pass and both gradients. The stem needs no
  gradient of its input. Products with padding are not counted: XLA does not
  count them either, and on small images they would matter.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    lengths: For each partitioned chain by name, the number of blocks that a
      worker runs.

  Returns:
    The number of floating-point operations.
  """
  forward = [
    2 * taps * channels * features
    for taps, channels, features in _layers(
      network.with_chain_lengths(lengths), image_shape
    )
  ]
  return 3 * sum(forward) - forward[0]


def _layers(network: ResNet, image_shape: tuple[int, ...]):
  """Yields each layer's products per channel pair, channels in and out."""
  *image, channels = image_shape
  features = network.widths[0]
  size = 7 if network.stem == 'imagenet' else 3
  stride = 1 if network.stem == 'small' else 2
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
