"""Compiles the programs of a case, and reads what the compiler says of them."""

import collections
from collections.abc import Mapping
import dataclasses
import time
from typing import Any

import jax
from jax._src.lib import xla_client
import numpy as np

from experiments.compile import known, programs
from experiments.compile.cases import Case
from experiments.compile.faults import faults
from experiments.compile.memory import compile_for
from experiments.compile.programs import Call, Problem
from experiments.compile.targets import Target
from experiments.runs import provenance
from resist_jax import accounting, models
from resist_jax.accounting import hbm, hlo

ROUNDS = ('one_program', 'host_stepped', 'streamed', 'exchange')
# The programs that compute gradients.
TRAINS = ('round', 'step', 'plain step')


def _operations(low, executable) -> float:
  """Returns floating-point operations; the body of a loop counts once."""
  found = executable.cost_analysis()
  if found is not None:
    return found['flops']
  # The GPU compiler leaves this to the client, and here is only that of CPUs.
  # Convolutions are calls of a library by now: their operations are those of
  # the program as it was written.
  client = jax.devices('cpu')[0].client
  analyse = xla_client._xla.hlo_module_cost_analysis
  written = low.compiler_ir('hlo').as_hlo_module()
  return analyse(client, written)['flops']


def record(case: Case, target: Target, scale: str) -> dict[str, Any]:
  """Compiles a case and describes what came of it.

  Args:
    case: What to compile.
    target: What to compile it for.
    scale: A key of `cases.SCALES`.

  Returns:
    JSON values: where it comes from, the case, and its programs, each as read
    and as predicted.
  """
  # Without this, the cache may return a program whose scopes have other names.
  jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  size = case.num_devices * case.devices_per_worker
  mesh = target.mesh(size, case.devices_per_worker)
  found = programs.problem(case, mesh, scale)
  read, predicted = {}, {}
  for name, call in programs.calls(case, found, mesh).items():
    predicted[name] = predict(name, call, case, found, target)
    read[name] = _read(name, call, case, found, target)
  where = provenance(f'{size} x {target.kind}, which are not here')
  where['versions'] |= target.compiler()
  return {
    'provenance': where,
    'target': target.name,
    'scale': scale,
    'case': dataclasses.asdict(case),
    'batch_size': found.batch_size,
    'local_steps': found.protocol.local_steps,
    'step': _described(case, found),
    'data_bytes': _argument_bytes((found.constants,)),
    'programs': read,
    'predicted': predicted,
  }


def _described(case: Case, found: Problem) -> dict[str, Any] | None:
  """Says which network a worker trains; None where it is no ResNet."""
  if found.task is None:
    return None
  network = found.task.network.with_chain_lengths(_lengths(found))
  images = found.batch_size // case.devices_per_worker
  return known.described(network, found.task.image_shape, images)


def _read(
  name: str, call: Call, case: Case, found: Problem, target: Target
) -> dict[str, Any]:
  """Compiles a program and reads what `predict` predicts, and more."""
  function, args = call
  since = time.perf_counter()
  low = function.lower(*args)
  middle = time.perf_counter()
  executable, memory = compile_for(target, low, case.network == 'gpt')
  end = time.perf_counter()
  written, text = low.as_text(), executable.as_text()
  kinds = collections.Counter(c.kind for c in hlo.collectives(text))
  wire = {'between_workers': _wire(text, case, found, False)}
  if case.devices_per_worker > 1:
    wire['inside_groups'] = _wire(text, case, found, True)
  # Between slices, conditionals lose their names.
  scopes = _scopes(found) if target.slices == 1 else None
  return {
    'memory': memory,
    'donated': executable.memory_analysis().alias_size_in_bytes,
    'collectives': dict(kinds),
    'wire': wire,
    'faults': faults(name, args, written, text, scopes),
    'flops': _operations(low, executable),
    'hbm_bytes': hbm.memory_traffic(text),
    'estimated_cycles': hbm.estimated_cycles(text),
    'seconds': {'lower': middle - since, 'compile': end - middle},
  }


def _wire(text: str, case: Case, found: Problem, inside: bool) -> int | str:
  """Returns the bytes that a program sends, or why they cannot be read."""
  try:
    return hlo.wire_bytes(text, _scopes(found), case.devices_per_worker, inside)
  except ValueError as error:
    return str(error)


def _scopes(found: Problem) -> Mapping[str, int]:
  return accounting.branches(found.protocol, _moves(found))


def _moves(found: Problem):
  """Returns the assignments of the first round and of the second."""
  before = found.protocol.assign(0, 0)
  after = found.protocol.assign(0, 1, before)
  return {name: (before[name], after[name]) for name in before}


def predict(
  name: str, call: Call, case: Case, found: Problem, target: Target
) -> dict[str, Any]:
  """Predicts what the compiler will say of a program.

  Args:
    name: Its name in the case.
    call: The program.
    case: What is compiled.
    found: What is trained.
    target: What it is compiled for.

  Returns:
    JSON values by name: bytes of the `arguments` on a device; of its `scratch`,
    by part, where a program trains; and `wire` bytes of one execution.
  """
  return {
    'arguments': _argument_bytes(_read_arguments(name, call[1], found)),
    'scratch': _scratch(name, case, found, target) if name in TRAINS else {},
    'wire': _predicted_wire(name, case, found),
  }


def _read_arguments(name: str, args: tuple, found: Problem) -> tuple:
  """Leaves out what a program does not read: moments that restart."""
  if name == 'finish' and not found.protocol.carry:
    return (args[0]._replace(opt_state=None), *args[1:])
  return args


def _argument_bytes(args: tuple) -> int:
  """Returns the bytes of a program's arguments on the first device."""
  total = 0
  for x in jax.tree.leaves(args):
    if isinstance(x, jax.ShapeDtypeStruct | np.generic):
      sharding = getattr(x, 'sharding', None)
      shape = sharding.shard_shape(x.shape) if sharding else x.shape
      total += int(np.prod(shape)) * x.dtype.itemsize
  return total


def _scratch(name, case, found, target) -> dict[str, int]:
  """Predicts what a program that trains needs besides its arguments."""
  task = found.task
  if task is None:
    return {}  # Activations are counted for residual networks.
  fused = target.platform == 'tpu'
  numbers = models.num_activations(
    task.network, task.image_shape, _lengths(found), fused
  )
  width = np.dtype(case.dtype).itemsize
  images = found.batch_size // case.devices_per_worker
  held = accounting.predicted_memory(
    found.sizes,
    found.protocol,
    case.num_devices,
    width * numbers * images,
    in_turn=case.devices_per_worker == 1
    and not found.protocol.average_gradients,
  )
  parts = ['activations', 'gradients']
  if name == 'round':
    parts += ['exchange'] + ['optimizer'] * (not found.protocol.carry)
  return {part: held[part] for part in parts}


def _lengths(found: Problem) -> dict[str, int]:
  protocol = found.protocol
  return {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}


def _predicted_wire(name, case, found) -> dict[str, float]:
  """Predicts what one execution of a program sends."""
  D, G = case.num_devices, case.devices_per_worker
  sizes, protocol = found.sizes, found.protocol
  if case.form not in ROUNDS:
    verb, *chain = name.split(' ', 1)
    blocks = {
      'gather': sizes.num_blocks,
      'fetch': dict.fromkeys(sizes.block, 1),
    }
    count = blocks.get(verb, {}).get(chain[0] if chain else '', 0)
    block = sizes.block[chain[0]] if count else 0
    sent = 2 * (D - 1) * G * accounting.BYTES_PER_NUMBER * block * count
    return {'between_workers': sent}
  # All communication between workers is in the exchange, unless they average
  # gradients; then it is in the only program.
  sends = name in ('round', 'finish')
  moves = _moves(found)
  between = accounting.wire_bytes(sizes, protocol, D, moves, G) if sends else 0
  if G == 1:
    return {'between_workers': between}
  assert found.task is not None
  statistics = found.task.statistics(_lengths(found))
  metrics = 1 + len(found.metrics)
  inside = accounting.predicted_group_bytes(
    sizes, protocol, G, statistics, metrics
  )
  steps = {'round': protocol.local_steps, 'step': 1}.get(name, 0)
  return {'between_workers': between, 'inside_groups': steps * inside}
