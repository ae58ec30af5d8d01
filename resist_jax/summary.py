"""What a run is remembered by, in `summary.json`."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import itertools
import os
import platform
from typing import Any

from absl import logging

from resist_jax import accounting, footprint
from resist_jax.build import Phase, Setup
from resist_jax.checkpoint import digest

PyTree = Any


def summarise(
  setup: Setup, phase: Phase, params: PyTree, progress: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what a run is remembered by.

  Args:
    setup: Of the run.
    phase: Of its last round.
    params: Canonical global parameters.
    progress: What it counted; `last` is the newest row of its log.

  Returns:
    JSON values.
  """
  config, last = setup.config, progress['last']
  devices = setup.mesh.devices
  accuracies = {k: v for k, v in last.items() if '_accuracy' in k}
  del accuracies['train_accuracy']
  return {
    'protocol': config.protocol,
    'exchange': config.exchange if setup.chains else 'all_reduce',
    'wire_format': config.wire_format,
    'dataset': config.data.name,
    'model': config.model.name,
    'num_workers': config.num_workers,
    'num_devices': devices.size,
    'rounds': progress['round'],
    'local_steps': config.local_steps,
    **accuracies,
    'best_test_accuracy_paper': progress['best_test_accuracy_paper'],
    'final_train_loss': last['train_loss'],
    **_sizes(setup),
    **_traffic(setup, phase, progress),
    **_footprint(setup, phase),
    'seconds_training': progress['seconds_training'],
    'seconds_total': progress['seconds_total'],
    'images_per_second': (
      progress['images_total'] / progress['seconds_training']
    ),
    'seed': config.seed,
    'device': f'{devices.flat[0].device_kind}, {os.cpu_count()} cores on host',
    'versions': {
      'python': platform.python_version(),
      **{
        name: importlib.metadata.version(name)
        for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
      },
    },
    'params_hash': digest(params),
  }


def _sizes(setup: Setup) -> dict[str, Any]:
  config, sizes = setup.config, setup.sizes
  return {
    'params_total': sizes.total,
    'params_per_worker': accounting.params_per_worker(
      sizes, config.num_workers, config.min_depth
    ),
    'params_shared': sizes.shared,
    # One number where one chain is cut, and 0 where none is.
    'params_per_block': (
      sizes.block if len(sizes.block) > 1 else sum(sizes.block.values())
    ),
    'num_blocks': sizes.num_blocks,
  }


def _traffic(
  setup: Setup, phase: Phase, progress: Mapping[str, Any]
) -> dict[str, Any]:
  """Bytes of a round and of the run, and those of the baselines."""
  devices = setup.mesh.devices.size
  before, after = itertools.islice(setup.deals(phase, progress['round'] - 1), 2)
  taken = {}
  if phase.protocol.exchange == 'hand_over':
    for name in before:
      taken |= accounting.branches(name, before[name], after[name])
  traffic = {
    'bytes_per_round': phase.bytes_per_round,
    'bytes_total': progress['bytes_total'],
    'wire_bytes_per_round': phase.wire_bytes(),
    'wire_bytes_per_round_and_worker': (
      phase.wire_bytes() / phase.protocol.num_workers
    ),
    'wire_bytes_last_round': {
      'predicted': phase.wire_bytes(before, after),
      'compiled': _compiled_wire_bytes(phase, taken),
    },
    'wire_bytes_total': progress['wire_bytes_total'],
  }
  # Baselines as they come: exact, and data parallel with its own momentum.
  for name in ('local_sgd', 'data_parallel'):
    protocol = dataclasses.replace(setup.protocol(name), wire_format='float32')
    sizes = setup.full_sizes()
    traffic[f'bytes_per_round_{name}'] = accounting.paper_bytes(sizes, protocol)
    traffic[f'wire_bytes_per_round_{name}'] = round(
      accounting.wire_bytes(sizes, protocol, devices)
    )
  return traffic


def _compiled_wire_bytes(phase: Phase, taken: Mapping[str, int]) -> int | None:
  try:
    return footprint.compiled_wire_bytes(
      phase.run, phase.protocol.local_steps, taken
    )
  except ValueError as error:  # A program that XLA writes in another way.
    logging.warning('wire bytes cannot be read: %s', error)
    return None


def _footprint(setup: Setup, phase: Phase) -> dict[str, Any]:
  """Memory and arithmetic of a device, predicted and as compiled."""
  config, devices = setup.config, setup.mesh.devices.size
  lengths = {
    name: phase.protocol.slots_per_worker(name) for name in phase.sizes.block
  }
  images = config.batch_size * config.num_workers // devices
  image_shape = setup.dataset.train.images.shape[1:]
  return {
    'memory_per_device': {
      'predicted': footprint.predicted_memory(
        phase.sizes, phase.protocol, devices
      ),
      'compiled': footprint.compiled_memory(phase.run),
    },
    'flops_per_image': {
      'predicted': footprint.predicted_flops(
        setup.network, image_shape, lengths
      ),
      'compiled': footprint.compiled_flops(phase.run, images),
    },
  }
