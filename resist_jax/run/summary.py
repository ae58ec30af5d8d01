"""What is kept of a finished run, in `summary.json`."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import os
import platform
from typing import Any

import jax

from resist_jax import accounting
from resist_jax.rounds import mesh_sizes
from resist_jax.rounds.storage import digest_of_arrays
from resist_jax.run import phases, stopping
from resist_jax.run.phases import Phase, Traffic
from resist_jax.run.setup import Setup

PyTree = Any


def summarise(
  setup: Setup,
  phase: Phase,
  params: PyTree,
  progress: Mapping[str, Any],
  draw: int,
) -> dict[str, Any]:
  """Returns what is kept of a run.

  Args:
    setup: Setup of the run.
    phase: Phase of its last round.
    params: Global parameters.
    progress: What the run counted; `last` is the newest row of its log.
    draw: See `State.draw`, of the last state.

  Returns:
    JSON values.
  """
  config, last = setup.config, progress['last']
  typical = phases.describe(setup, phases.typical_name(config))
  tests = tuple(f'{name}_' for name in setup.task.dataset.tests)
  measures = {k: v for k, v in last.items() if k.startswith(tests)}
  best = progress['best_test_accuracy_paper']
  return {
    'protocol': config.protocol,
    'exchange': config.exchange if setup.chains else 'all_reduce',
    'wire_format': config.wire_format,
    'dataset': config.data.name,
    **setup.dataset.describe(),
    'model': config.model.module or config.model.name,
    'num_workers': config.num_workers,
    'depths': list(setup.depths),
    'num_devices': setup.mesh.devices.size,
    'devices_per_worker': config.devices_per_worker,
    'rounds': progress['round'],
    'local_steps': config.local_steps,
    **measures,
    **({'best_test_accuracy_paper': best} if best else {}),
    'best': {
      name: progress['best'].get(name) for name in ('by', 'value', 'round')
    },
    # Why it ended before the last round; None if it did not.
    'stopped_early': _stopped_early(config, progress),
    'final_train_loss': last['train_loss'],
    'left_out_total': progress['left_out_total'],
    **_sizes(setup),
    **_traffic(setup, phase, typical, progress, draw),
    **_memory_and_flops(setup, phase, typical, progress['peaks']),
    'seconds_training': progress['seconds_training'],
    'seconds_total': progress['seconds_total'],
    'images_per_second': (
      progress['images_total'] / progress['seconds_training']
    ),
    'seed': config.seed,
    **_conditions(setup),
    'params_hash': digest_of_arrays(params),
  }


def _conditions(setup: Setup) -> dict[str, Any]:
  """Returns what the run ran on, and with which packages."""
  kind = setup.mesh.devices.flat[0].device_kind
  names = 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint'
  versions = {name: importlib.metadata.version(name) for name in names}
  return {
    'device': f'{kind}, {os.cpu_count()} cores on host',
    'versions': {'python': platform.python_version(), **versions},
  }


def _stopped_early(config, progress: Mapping[str, Any]) -> str | None:
  done, count = progress['round'], config.num_rounds
  why = stopping.reason(config, progress['best'])
  return (
    f'after round {done} of {count}: {why}' if why and done < count else None
  )


def _sizes(setup: Setup) -> dict[str, Any]:
  sizes, name = setup.sizes, 'resist' if setup.chains else 'local_sgd'
  return {
    'params_total': sizes.total,
    'params_per_worker': accounting.params_per_worker(
      sizes, phases.protocol_named(setup, name)
    ),
    'params_shared': sizes.shared,
    # One number where one chain is cut, and 0 where none is.
    'params_per_block': (
      sizes.block if len(sizes.block) > 1 else sum(sizes.block.values())
    ),
    'num_blocks': sizes.num_blocks,
  }


def _traffic(
  setup: Setup,
  phase: Phase,
  typical: Traffic,
  progress: Mapping[str, Any],
  draw: int,
) -> dict[str, Any]:
  """Returns bytes of a round and of the run, and those of the baselines."""
  config = setup.config
  before = phase.protocol.assign(config.seed, draw - 1)
  after = phase.protocol.assign(config.seed, draw, before)
  sent = typical.wire_bytes()
  traffic = {
    'bytes_per_round': typical.bytes_per_round,
    'bytes_total': progress['bytes_total'],
    'wire_bytes_per_round': sent,
    'wire_bytes_per_round_and_worker': sent / config.num_workers,
    'wire_bytes_last_round': {
      'protocol': phase.name,
      'predicted': phase.wire_bytes(before, after),
    },
    'wire_bytes_total': progress['wire_bytes_total'],
    'evaluation_wire_bytes_total': progress['evaluation_wire_bytes_total'],
    'group_bytes_per_step': {'predicted': _group_bytes(setup, phase)},
  }
  # Baselines in their usual form: exact, data parallel with its own momentum.
  exact = config.copy_and_resolve_references()
  exact.wire_format = 'float32'
  exactly = dataclasses.replace(setup, config=exact)
  for name in ('local_sgd', 'data_parallel'):
    baseline = phases.describe(exactly, name)
    traffic[f'bytes_per_round_{name}'] = baseline.bytes_per_round
    traffic[f'wire_bytes_per_round_{name}'] = baseline.wire_bytes()
  return traffic


def _group_bytes(setup: Setup, phase: Phase) -> int:
  """Predicts what a step of the last phase sends inside groups."""
  _, G = mesh_sizes(setup.mesh)
  if G == 1:
    return 0
  lengths = _depths(phase)
  statistics = setup.task.statistics(lengths)
  metrics = 1 + len(setup.task.metrics)
  return accounting.predicted_group_bytes(
    phase.sizes, phase.protocol, G, statistics, metrics
  )


def _depths(phase: Traffic) -> dict[str, int]:
  protocol = phase.protocol
  return {name: protocol.slots_per_worker(name) for name in protocol.num_blocks}


def _memory_and_flops(
  setup: Setup, phase: Phase, typical: Traffic, peaks: Mapping[str, int]
) -> dict[str, Any]:
  """Returns memory and arithmetic of a device: predicted, and compiled."""
  config, devices = setup.config, setup.mesh.devices.size
  images = config.batch_size * config.num_workers // devices
  programs = phase.trainer.programs
  assert programs is not None
  D, _ = mesh_sizes(setup.mesh)
  flops = setup.task.flops(_depths(typical))
  # A loss that is not ours may loop, and this process may not have the programs
  # of the busiest worker.
  knows = flops is not None and (
    jax.process_count() == 1 or not any(programs.groups.values())
  )
  return {
    'memory_per_device': {
      'predicted': accounting.predicted_memory(
        typical.sizes,
        typical.protocol,
        D,
        in_turn=programs.in_turn,
        moments=typical.moments,
      ),
      'compiled': accounting.compiled_memory(programs),
      'compiled_protocol': phase.name,
      'peaks': dict(peaks),
    },
    'flops_per_image': {
      'predicted': flops,
      'compiled': (
        accounting.compiled_flops(programs, images) if knows else None
      ),
      'compiled_protocol': phase.name,
    },
  }
