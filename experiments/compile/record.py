"""Compiles the programs of a case, and reads what the compiler says of them."""

import collections
import dataclasses
import time
from typing import Any

import jax

from experiments.compile import programs as lowered
from experiments.compile.cases import Case
from experiments.compile.programs import Call, Problem
from experiments.compile.targets import Target
from experiments.runs import provenance
from resist_jax import accounting
from resist_jax.accounting import hlo

LOOPS = ('one_program', 'host_stepped', 'streamed')
ROUNDS = (*LOOPS, 'exchange')


def compile_call(call: Call, target: Target) -> tuple[Any, dict[str, float]]:
  """Compiles a program.

  Args:
    call: A jitted function, and shapes.
    target: What to compile it for.

  Returns:
    `(executable, seconds)`: seconds by what was done.
  """
  function, args = call
  since = time.perf_counter()
  platform = 'cuda' if target.platform == 'gpu' else 'tpu'
  low = function.trace(*args).lower(lowering_platforms=(platform,))
  middle = time.perf_counter()
  executable = low.compile(compiler_options=target.options())
  seconds = {
    'lower': middle - since,
    'compile': time.perf_counter() - middle,
  }
  return executable, seconds


def record(case: Case, target: Target, scale: str) -> dict[str, Any]:
  """Compiles a case and describes what came of it.

  Args:
    case: What to compile.
    target: What to compile it for.
    scale: A key of `cases.SCALES`.

  Returns:
    JSON values: where it comes from, the case, its programs as read, and what
    `accounting` predicts.
  """
  # Without this, the cache may return a program whose scopes have other names.
  jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  size = case.num_devices * case.devices_per_worker
  mesh = target.mesh(size, case.devices_per_worker)
  found = lowered.problem(case, mesh, scale)
  read = {}
  for name, call in lowered.calls(case, found, mesh).items():
    executable, seconds = compile_call(call, target)
    read[name] = _read(executable, case, found) | {'seconds': seconds}
  where = provenance(f'{size} x {target.kind}, compiled for only')
  where['versions'] |= target.compiler()
  return {
    'provenance': where,
    'target': target.name,
    'scale': scale,
    'case': dataclasses.asdict(case),
    'batch_size': found.batch_size,
    'local_steps': found.protocol.local_steps,
    'programs': read,
    'predicted': predict(case, found),
  }


def _read(executable, case: Case, found: Problem) -> dict[str, Any]:
  text = executable.as_text()
  costs = executable.cost_analysis()
  kinds = collections.Counter(c.kind for c in hlo.collectives(text))
  return {
    'memory': accounting.memory_parts(executable.memory_analysis()),
    'donated': executable.memory_analysis().alias_size_in_bytes,
    'flops': costs.get('flops'),
    'hbm_bytes': costs.get('bytes accessed'),
    'collectives': dict(kinds),
    'wire': _wire(text, case, found, False),
    'wire_inside_groups': _wire(text, case, found, True),
  }


def _wire(text: str, case: Case, found: Problem, inside: bool):
  """Returns the bytes that a program sends, or why they cannot be read."""
  branches = {}
  if case.form in ROUNDS:
    branches = accounting.branches(found.protocol, _moves(found))
  try:
    return hlo.wire_bytes(text, branches, case.devices_per_worker, inside)
  except ValueError as error:
    return str(error)


def _moves(found: Problem):
  """Returns the assignments of the first round and of the second."""
  before = found.protocol.assign(0, 0)
  after = found.protocol.assign(0, 1, before)
  return {name: (before[name], after[name]) for name in before}


def predict(case: Case, found: Problem) -> dict[str, Any]:
  """Predicts what the compiler will say.

  Args:
    case: What to compile.
    found: What it trains.

  Returns:
    JSON values by name: bytes of `memory` of a device, by part; `wire` bytes of
    a round; FLOPs of a local step of a device.
  """
  D, G = case.num_devices, case.devices_per_worker
  sizes, protocol = found.sizes, found.protocol
  wire: float = 2 * (D - 1) * G * 4 * sum(
    sizes.block[name]
    * (sizes.num_blocks[name] if case.form == 'evaluation' else 1)
    for name in sizes.block
  )  # fmt: skip
  if case.form in ROUNDS:
    wire = accounting.wire_bytes(sizes, protocol, D, _moves(found), G)
  return {
    'memory': accounting.predicted_memory(sizes, protocol, D),
    'wire': wire,
  }
