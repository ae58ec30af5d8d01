"""What compilers have said of a training step, from the committed records."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.compile import tables, targets
from resist_jax.models import ResNet


class Step(NamedTuple):
  """A local step of a worker, as a compiler says.

  Attributes:
    flops: Floating-point operations.
    hbm_bytes: Bytes between the device and its memory.
    memory: Bytes that the device holds meanwhile, without the images.
    source: Which compiler said so, for which devices.
  """

  flops: float
  hbm_bytes: float
  memory: int
  source: str


def described(
  network: ResNet, image_shape: tuple[int, ...], batch_size: int
) -> dict[str, Any]:
  """Describes the step of a network as its record does.

  Args:
    network: A sub-network, or the whole one.
    image_shape: `(H, W, C)`.
    batch_size: Images that a device trains on in a step.

  Returns:
    JSON values by name; equal for steps that compile to the same program.
  """
  return {
    'stage_sizes': list(network.stage_sizes),
    'widths': list(network.widths),
    'bottleneck': network.bottleneck,
    'pre_activation': network.pre_activation,
    'norm': network.norm,
    'stem': network.stem,
    'dtype': np.dtype(network.dtype).name,
    'num_classes': network.num_classes,
    'image_shape': list(image_shape),
    'batch_size': batch_size,
  }


def steps(
  chip: str, folder: pathlib.Path = tables.FOLDER
) -> list[tuple[dict[str, Any], Step]]:
  """Reads what a compiler said of local steps.

  Args:
    chip: A key of `chips.CHIPS`.
    folder: Where the folders of all targets are.

  Returns:
    For each step that was compiled for this chip, what it is (`described`) and
    what the compiler said.
  """
  found = []
  for path in sorted(p for p in folder.iterdir() if p.is_dir()):
    for record in tables.load(path):
      target = targets.parse(record['target'])
      read = record['programs'].get('step')
      if target.kind != chip or not read or not record.get('step'):
        continue
      held = read['memory']['arguments'] + read['memory']['temporary']
      step = Step(
        read['flops'],
        read['hbm_bytes'],
        held - record['data_bytes'],
        f'compiled for {target.name} by {tables.compiler(record)}',
      )
      found.append((record['step'], step))
  return found
