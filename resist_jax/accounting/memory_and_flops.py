"""Memory and arithmetic of a device: predicted, and read from the compiler."""

from collections.abc import Sequence
from typing import Any

from resist_jax.accounting.sizes import Sizes, num_moments, params_per_worker
from resist_jax.exchange import BYTES_PER_NUMBER, collectives
from resist_jax.rounds import Protocol, Round


def predicted_memory(
  sizes: Sizes,
  protocol: Protocol,
  num_devices: int,
  activations: int | None = None,
  in_turn: bool = False,
  moments: Sequence[Sizes] | None = None,
) -> dict[str, int]:
  """Predicts what a device holds in a round, without data.

  Args:
    sizes: Sizes of the network, as the protocol cuts it.
    protocol: Who holds what.
    num_devices: D, or the number of groups; each holds its S / D workers.
    activations: Bytes that the gradient of one worker needs of the forward pass
      on a device, such as `models.num_activations` counts; None leaves them
      out.
    in_turn: Whether a device updates each of its workers before the next one
      trains, as accelerators do where it can be done.
    moments: Sizes of each moment of the optimiser; None for one like the
      parameters.

  Returns:
    Bytes: `parameters` of the sub-networks; `optimizer`, their moments;
    `gradients` of one step, `in_turn` of one worker beside a copy of its
    parameters; `exchange`, what is kept besides: the shared part as last
    agreed, what rounding removed, the blocks as last agreed where workers may
    be excluded, the state of the outer optimiser, the average over rounds, and
    the sub-network as last agreed where the loss gets it; and `activations`, of
    one worker, because the workers of a device take turns.
  """
  S = protocol.num_workers
  params = BYTES_PER_NUMBER * params_per_worker(sizes, protocol)
  shared = BYTES_PER_NUMBER * sizes.shared
  kept = shared if protocol.keeps_shared else 0
  if protocol.keeps_blocks:
    kept += params - shared
  if protocol.keeps_error:
    shapes = collectives.error_shapes(sizes.shared, S)
    kept += BYTES_PER_NUMBER * sum(shape[1] for shape in shapes.values())
  if protocol.outer is not None:
    kept += num_moments(protocol.outer) * params
  kept += params * (bool(protocol.average) + protocol.give_agreed)
  held = {
    'parameters': params,
    'optimizer': params if moments is None else _held(moments, protocol),
    'gradients': params,
    'exchange': kept,
  }
  held = {name: size * (S // num_devices) for name, size in held.items()}
  if in_turn:
    held['gradients'] = min(2 * params, held['gradients'])
  return held if activations is None else {**held, 'activations': activations}


def _held(moments: Sequence[Sizes], protocol: Protocol) -> int:
  numbers = (params_per_worker(sizes, protocol) for sizes in moments)
  return BYTES_PER_NUMBER * sum(numbers)


def compiled_memory(run: Round) -> dict[str, dict[str, int]]:
  """Reads what each program of a compiled round needs on a device.

  Args:
    run: A round that `Round.compile` returned.

  Returns:
    For each program, bytes of its `arguments`, of `outputs` that take no
    argument's place, of `temporary` values, and the `peak`, their sum. On a
    TPU, `temporary` is more than is reserved: libtpu seems to count holes
    between values twice.
  """
  return {
    name: memory_parts(program.memory_analysis())
    for name, program in run.programs.items()
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


def compiled_flops(run: Round, images: int) -> float | None:
  """Reads the arithmetic of training on one image.

  Args:
    run: A round that `Round.compile` returned.
    images: How many images one local step of a device trains on.

  Returns:
    Floating-point operations, elementwise ones included; where workers are
    unequal, those of the busiest device. None where the program loops, because
    the compiler counts the body of a loop once.
  """
  if run.loops:
    return None
  steps: Any = [p for k, p in run.programs.items() if k.startswith('step')]
  return max(float(p.cost_analysis()['flops']) for p in steps) / images
