"""What a run is remembered by, in `summary.json`."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import itertools
import os
import platform
from typing import Any

from absl import logging

from resist_jax import accounting, models
from resist_jax.rounds.state import Protocol, mesh_sizes
from resist_jax.run import classification
from resist_jax.run.checkpoint import digest
from resist_jax.run.config import cut_chains
from resist_jax.run.phase import Phase
from resist_jax.run.setup import Setup

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
    'depths': list(setup.depths),
    'num_devices': devices.size,
    'devices_per_worker': config.devices_per_worker,
    'rounds': progress['round'],
    'local_steps': config.local_steps,
    **accuracies,
    'best_test_accuracy_paper': progress['best_test_accuracy_paper'],
    'final_train_loss': last['train_loss'],
    'left_out_total': progress['left_out_total'],
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
      sizes, config.num_workers, cut_chains(config), setup.depths
    ),
    'params_shared': sizes.shared,
    # One number where one chain is cut, and 0 where none is.
    'params_per_block': (
      sizes.block if len(sizes.block) > 1 else sum(sizes.block.values())
    ),
    'num_blocks': sizes.num_blocks,
  }


def typical_protocol(setup: Setup) -> Protocol:
  """Returns the protocol that a run is remembered by.

  Args:
    setup: Of the run.

  Returns:
    That of the rounds between full-model phases, if there are any.
  """
  config = setup.config
  last = config.num_rounds - 1 - config.phases.full_after
  return setup.protocol(setup.phase_name(max(config.phases.full_before, last)))


def _traffic(
  setup: Setup, phase: Phase, progress: Mapping[str, Any]
) -> dict[str, Any]:
  """Bytes of a round and of the run, and those of the baselines."""
  (D, G), protocol = mesh_sizes(setup.mesh), typical_protocol(setup)
  sizes = setup.sizes_for(protocol)
  sent = round(accounting.wire_bytes(sizes, protocol, D, None, G))
  sent_by = {
    'bytes_per_round': accounting.paper_bytes(sizes, protocol),
    'bytes_total': progress['bytes_total'],
    'wire_bytes_per_round': sent,
    'wire_bytes_per_round_and_worker': sent / protocol.num_workers,
    'wire_bytes_last_round': _last_round(setup, phase, progress['round']),
    'wire_bytes_total': progress['wire_bytes_total'],
    'evaluation_wire_bytes_total': progress['evaluation_wire_bytes_total'],
    'group_bytes_per_step': _group_bytes(setup, phase),
  }
  # Baselines as they come: exact, and data parallel with its own momentum.
  for name in ('local_sgd', 'data_parallel'):
    protocol = dataclasses.replace(setup.protocol(name), wire_format='float32')
    sizes = setup.sizes_for(protocol)
    sent_by[f'bytes_per_round_{name}'] = accounting.paper_bytes(sizes, protocol)
    sent_by[f'wire_bytes_per_round_{name}'] = round(
      accounting.wire_bytes(sizes, protocol, D, None, G)
    )
  return sent_by


def _last_round(setup: Setup, phase: Phase, done: int) -> dict[str, Any]:
  """Predicts what the last round sent, and reads it from its program."""
  before, after = itertools.islice(setup.deals(phase, done - 1), 2)
  taken = {}
  if phase.protocol.exchange == 'hand_over':
    for name in before:
      taken |= accounting.branches(name, before[name], after[name])
  return {
    'protocol': phase.name,
    'predicted': phase.wire_bytes(before, after),
    'compiled': _compiled_wire_bytes(phase, taken),
  }


def _group_bytes(setup: Setup, phase: Phase) -> dict[str, Any]:
  """Predicts what a step of the last round sent inside groups; reads it."""
  protocol, T = phase.protocol, phase.protocol.local_steps
  shape = setup.dataset.train.images.shape[1:]
  lengths = {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}
  statistics = models.num_statistics(setup.network, shape, lengths)
  metrics = 1 + len(classification.METRICS)
  sent = _compiled_wire_bytes(phase, {}, inside=True)
  return {
    'predicted': accounting.predicted_group_bytes(
      phase.sizes, protocol, phase.devices_per_worker, statistics, metrics
    ),
    'compiled': None if sent is None else sent // T,
  }


def _compiled_wire_bytes(
  phase: Phase, taken: Mapping[str, int], inside: bool = False
) -> int | None:
  try:
    return accounting.compiled_wire_bytes(
      phase.run, phase.protocol.local_steps, taken, inside
    )
  # Where XLA writes its programs in a way that we do not know.
  except (ValueError, LookupError, StopIteration) as error:
    logging.warning('wire bytes cannot be read: %s', error)
    return None


def _footprint(setup: Setup, phase: Phase) -> dict[str, Any]:
  """Memory and arithmetic of a device: predicted, and of the last phase."""
  config, devices = setup.config, setup.mesh.devices.size
  protocol = typical_protocol(setup)
  lengths = {
    name: protocol.slots_per_worker(name) for name in protocol.num_blocks
  }
  images = config.batch_size * config.num_workers // devices
  image_shape = setup.dataset.train.images.shape[1:]
  return {
    'memory_per_device': {
      'predicted': accounting.predicted_memory(
        setup.sizes_for(protocol), protocol, phase.num_devices
      ),
      'compiled': accounting.compiled_memory(phase.run),
      'compiled_protocol': phase.name,
    },
    'flops_per_image': {
      'predicted': models.predicted_flops(setup.network, image_shape, lengths),
      'compiled': accounting.compiled_flops(phase.run, images),
      'compiled_protocol': phase.name,
    },
  }
