"""Memory and arithmetic of a device: predicted, and read from the compiler."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import numpy as np

from resist_jax import accounting, exchange, hlo
from resist_jax.accounting import BYTES_PER_PARAM, Sizes
from resist_jax.model import ResNet
from resist_jax.rounds import Round
from resist_jax.state import Protocol


def predicted_memory(
  sizes: Sizes, protocol: Protocol, num_devices: int
) -> dict[str, int]:
  """Predicts what a device holds in a round, without activations and data.

  Args:
    sizes: Of the network, as the protocol cuts it.
    protocol: Who holds what.
    num_devices: D, or groups of them; each holds what its S / D workers hold.

  Returns:
    Bytes: `parameters` of the sub-networks; `optimizer`, their momentum;
    `gradients`, of one step; and `exchange`, what the format keeps besides:
    the shared part as last agreed, and what rounding left out; and where
    workers may be left out, their blocks as last agreed.
  """
  S = protocol.num_workers
  params = BYTES_PER_PARAM * accounting.params_per_worker(
    sizes, S, protocol.min_depth, protocol.depths
  )
  shared = BYTES_PER_PARAM * sizes.shared
  kept = shared if protocol.sends_changes else 0
  if protocol.keeps_blocks:
    kept += params - shared
  if protocol.keeps_error:
    shapes = exchange.error_shapes(sizes.shared, S)
    kept += BYTES_PER_PARAM * sum(shape[1] for shape in shapes.values())
  held = {
    'parameters': params,
    'optimizer': params,
    'gradients': params,
    'exchange': kept,
  }
  return {name: size * (S // num_devices) for name, size in held.items()}


def compiled_memory(run: Round) -> dict[str, dict[str, int]]:
  """Reads what each program of a compiled round needs on a device.

  Args:
    run: After `Round.compile`.

  Returns:
    For each program, bytes of its `arguments`, of `outputs` that take no
    argument's place, of `temporary` values, and the `peak`, their sum.
  """
  return {
    name: memory_parts(program.memory_analysis())
    for name, program in run.compiled.items()
  }


def memory_parts(stats: Any) -> dict[str, int]:
  """Sorts what the compiler says of a program's memory.

  Args:
    stats: XLA's `CompiledMemoryStats`.

  Returns:
    Bytes, see `compiled_memory`.
  """
  parts = {
    'arguments': stats.argument_size_in_bytes,
    'outputs': stats.output_size_in_bytes - stats.alias_size_in_bytes,
    'temporary': stats.temp_size_in_bytes,
  }
  return {**parts, 'peak': sum(parts.values())}


def compiled_wire_bytes(
  run: Round,
  local_steps: int,
  branches: Mapping[str, int],
  inside: bool = False,
) -> int:
  """Reads what a compiled round sends between the devices of two workers.

  Args:
    run: After `Round.compile`.
    local_steps: T.
    branches: Of the routes taken, see `accounting.branches`.
    inside: Read what devices of the same worker send each other instead.

  Returns:
    Bytes, of all devices together.
  """
  return sum(
    (local_steps if name.startswith('step') else 1)
    * hlo.wire_bytes(program.as_text(), branches, run.group_size, inside)
    for name, program in run.compiled.items()
  )


def predicted_group_bytes(
  sizes: Sizes,
  protocol: Protocol,
  devices_per_worker: int,
  statistics: int,
  num_metrics: int,
) -> int:
  """Predicts what a local step sends between the devices of a worker.

  Args:
    sizes: Of the network, as the protocol cuts it.
    protocol: Who holds what.
    devices_per_worker: G.
    statistics: See `num_statistics`.
    num_metrics: How many the loss function reports, the loss included.

  Returns:
    Bytes, of all devices together: rings of gradients, metrics, and statistics
    of batch norm with their gradients.
  """
  S = protocol.num_workers
  params = accounting.params_per_worker(sizes, S, protocol.min_depth)
  numbers = params + num_metrics + 2 * statistics
  return S * 2 * (devices_per_worker - 1) * BYTES_PER_PARAM * numbers


def num_statistics(
  network: ResNet, image_shape: tuple[int, ...], lengths: Mapping[str, int]
) -> int:
  """Counts the means and mean squares that batch norm takes in a step.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    lengths: Blocks in chains by name, where a worker runs fewer than all.

  Returns:
    Two for every channel of every such layer.
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
  """Predicts the arithmetic of training on one image.

  Counts products and sums of convolutions and of the classifier, forward and
  for both gradients; the stem needs no gradient of its input. Products with
  padding are none, as the compiler counts: on small images they matter.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    lengths: Blocks in chains by name, where a worker runs fewer than all.

  Returns:
    Floating-point operations.
  """
  forward = [
    2 * taps * channels * features
    for taps, channels, features in _products(
      network.with_chain_lengths(lengths), image_shape
    )
  ]
  return 3 * sum(forward) - forward[0]


def _products(network: ResNet, image_shape: tuple[int, ...]):
  """Yields products per pair of channels, and channels in and out, by layer."""
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
  """Counts the pixels under a kernel, over all of its places in an image."""
  pad = (size - 1) // 2
  return math.prod(
    sum(
      min(place + size, side + pad) - max(place, pad)
      for place in range(0, side + 2 * pad - size + 1, stride)
    )
    for side in image
  )


def compiled_flops(run: Round, images: int) -> float | None:
  """Reads the arithmetic of training on one image.

  Args:
    run: After `Round.compile`.
    images: That one local step of a device trains on.

  Returns:
    Floating-point operations, elementwise ones included; where workers are
    unequal, on the device that has most. None where the program loops, since
    the compiler counts a loop's body once.
  """
  if run.loops:
    return None
  steps: Any = [p for k, p in run.compiled.items() if k.startswith('step')]
  return max(float(p.cost_analysis()['flops']) for p in steps) / images
