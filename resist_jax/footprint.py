"""Memory and arithmetic of a device: predicted, and read from the compiler."""

from collections.abc import Mapping
from typing import Any

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
    num_devices: D; each holds what its S / D workers hold.

  Returns:
    Bytes: `parameters` of the sub-networks; `optimizer`, their momentum;
    `gradients`, of one step; and `exchange`, what the format keeps besides:
    the shared part as last agreed, and what rounding left out.
  """
  S = protocol.num_workers
  params = BYTES_PER_PARAM * accounting.params_per_worker(
    sizes, S, protocol.min_depth if protocol.num_blocks else 0
  )
  kept = BYTES_PER_PARAM * sizes.shared if protocol.sends_changes else 0
  if protocol.keeps_residual:
    shapes = exchange.residual_shapes(sizes.shared, S)
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
  found = {}
  for name, program in run.compiled.items():
    stats = program.memory_analysis()
    parts = {
      'arguments': stats.argument_size_in_bytes,
      'outputs': stats.output_size_in_bytes - stats.alias_size_in_bytes,
      'temporary': stats.temp_size_in_bytes,
    }
    found[name] = {**parts, 'peak': sum(parts.values())}
  return found


def compiled_wire_bytes(
  run: Round, local_steps: int, branches: Mapping[str, int]
) -> int:
  """Reads what a compiled round sends from device to device.

  Args:
    run: After `Round.compile`.
    local_steps: T.
    branches: Of the routes taken, see `accounting.branches`.

  Returns:
    Bytes, of all devices together.
  """
  return sum(
    (local_steps if name == 'step' else 1)
    * hlo.wire_bytes(program.as_text(), branches)
    for name, program in run.compiled.items()
  )


def predicted_flops(
  network: ResNet, image_shape: tuple[int, ...], lengths: Mapping[str, int]
) -> float:
  """Predicts the arithmetic of training on one image.

  Counts products and sums of convolutions and of the classifier, forward and
  for both gradients; the stem needs no gradient of its input.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    lengths: Blocks in chains by name, where a worker runs fewer than all.

  Returns:
    Floating-point operations.
  """
  forward = [
    2 * pixels * size**2 * channels * features
    for pixels, size, channels, features in _products(
      network.with_chain_lengths(lengths), image_shape
    )
  ]
  return 3 * sum(forward) - forward[0]


def _products(network: ResNet, image_shape: tuple[int, ...]):
  """Yields output pixels, kernel size, and channels in and out, per layer."""
  height, width, channels = image_shape
  side, stride = (3, 1) if network.stem == 'small' else (7, 2)
  height, width = -(-height // stride), -(-width // stride)
  features = network.widths[0]
  yield height * width, side, channels, features
  if network.stem == 'imagenet':  # Max pooling.
    height, width = -(-height // 2), -(-width // 2)
  channels = features
  stages = zip(network.stage_sizes, network.widths, strict=True)
  for stage, (blocks, features) in enumerate(stages, start=1):
    out = 4 * features if network.bottleneck else features
    for block in range(blocks):
      stride = 2 if stage > 1 and block == 0 else 1
      entered = height * width
      height, width = -(-height // stride), -(-width // stride)
      pixels = height * width
      if stride != 1 or channels != out:
        yield pixels, 1, channels, out
      if network.bottleneck:
        yield entered, 1, channels, features
        yield pixels, 3, features, features
        yield pixels, 1, features, out
      else:
        yield pixels, 3, channels, features
        yield pixels, 3, features, features
      channels = out
  yield 1, 1, channels, network.num_classes


def compiled_flops(run: Round, images: int) -> float | None:
  """Reads the arithmetic of training on one image.

  Args:
    run: After `Round.compile`.
    images: That one local step of a device trains on.

  Returns:
    Floating-point operations, elementwise ones included; None where the
    program loops, since the compiler counts a loop's body once.
  """
  step: Any = run.compiled.get('step')
  return step and float(step.cost_analysis()['flops']) / images
