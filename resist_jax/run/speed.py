"""Depths for workers of unequal speed, from times measured as a run begins."""

from collections.abc import Sequence
import dataclasses
import time

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from resist_jax.decomposition import join, split
from resist_jax.rounds import device_groups, mesh_sizes
from resist_jax.run import phases
from resist_jax.run.setup import Setup

STEPS = 3  # Steps in a round that is timed.
REPEATS = 3  # Rounds that are timed; the fastest counts.


def depths_by_speed(
  shared_seconds: Sequence[float],
  block_seconds: Sequence[float],
  num_blocks: int,
) -> tuple[int, ...]:
  """Chooses depths with which the slowest worker finishes soonest.

  A step takes a worker its shared seconds, and its block seconds per block.
  Each block goes to the worker that would finish it first; no other choice of
  depths makes the slowest step shorter.

  Args:
    shared_seconds: Seconds of a step without blocks, of each worker.
    block_seconds: Seconds of a step for each block, of each worker.
    num_blocks: L, at least S.

  Returns:
    Depths, at least 1 and L together.

  >>> depths_by_speed((0, 0, 0), (1, 1, 3), num_blocks=14)
  (6, 6, 2)
  >>> depths_by_speed((5, 0), (1, 1), num_blocks=11)  # One has a slow start.
  (3, 8)
  """
  depths = [1] * len(block_seconds)
  for _ in range(num_blocks - len(depths)):
    done = [
      shared + (depth + 1) * block
      for shared, block, depth in zip(
        shared_seconds, block_seconds, depths, strict=True
      )
    ]
    depths[done.index(min(done))] += 1
  return tuple(depths)


def split_seconds(
  few: int, many: int, seconds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Splits step times by a line through two depths.

  Args:
    few: The smaller depth that was timed.
    many: The larger one.
    seconds: `float[S, 2]`, of each worker's step at both depths.

  Returns:
    `(shared_seconds, block_seconds)`, `float[S]` each.

  >>> split_seconds(1, 3, np.array([[5.0, 9.0]]))
  (array([3.]), array([2.]))
  """
  # A block lost in noise still costs something: a hundredth of the step.
  block = (seconds[:, 1] - seconds[:, 0]) / (many - few)
  block = np.maximum(block, seconds[:, 1] / 100)
  return np.maximum(seconds[:, 0] - few * block, 0), block


def with_depths(setup: Setup, measured: Sequence[int]) -> Setup:
  """Chooses depths by speed, where the config asks for that.

  Args:
    setup: Setup of the run.
    measured: Depths that an earlier part of the run chose. They hold while the
      number of workers is the same, so that a resumed run repeats bit for bit.

  Returns:
    The setup with depths.
  """
  if setup.config.depths != 'by_speed' or not setup.chains:
    return setup
  (length,) = setup.chains.values()
  depths = tuple(measured)
  if len(depths) != setup.config.num_workers:
    times = split_seconds(*time_workers(setup))
    shared, block = (seconds.tolist() for seconds in times)
    depths = depths_by_speed(shared, block, length)
    logging.info(
      'depths by speed: %s; seconds a step but for blocks: %s, a block: %s',
      depths, *(x.round(5).tolist() for x in times),
    )  # fmt: skip
  return dataclasses.replace(setup, depths=depths)


def time_workers(setup: Setup) -> tuple[int, int, np.ndarray]:
  """Times local steps at a depth of one and at that of an even division.

  Each device is timed alone, with one worker. The virtual devices of a CPU
  share its cores, so only the first one of a process is timed.

  Args:
    setup: Setup of the run.

  Returns:
    `(few, many, seconds)`: both depths, and `float[S, 2]`.
  """
  workers, (groups, size) = setup.config.num_workers, mesh_sizes(setup.mesh)
  devices = setup.mesh.devices.reshape(groups, size)[:, 0].tolist()
  (length,) = setup.chains.values()
  few, many = 1, max(2, -(-length // workers))
  rows = [i for i, d in enumerate(devices) if d in setup.mesh.local_devices]
  seconds = np.zeros((len(devices), 2))
  for row in rows[:1] if setup.on_cpu else rows:
    seconds[row] = [_step_seconds(setup, row, depth) for depth in (few, many)]
  if setup.on_cpu:
    seconds[rows] = seconds[rows[0]]
  if jax.process_count() > 1:  # Each has timed its own; the rest are zeros.
    seconds = multihost_utils.process_allgather(seconds).sum(axis=0)
  return few, many, np.repeat(seconds, workers // len(devices), axis=0)


def _step_seconds(setup: Setup, row: int, depth: int) -> float:
  """Times a lone worker's local step on one device."""
  (chain,) = setup.chains
  mesh = Mesh(setup.mesh.devices[row : row + 1], setup.mesh.axis_names)
  config = setup.config.copy_and_resolve_references()
  config.num_workers, config.exchange = 1, 'masked_psum'
  config.local_steps = min(STEPS, config.local_steps)
  config.phases.full_before = config.phases.full_after = 0
  config.shared_every = 0
  lone = dataclasses.replace(
    setup, config=config, chains={chain: depth}, mesh=mesh
  )
  group = device_groups.DeviceGroup(mesh, (row,), (depth,))
  phase = phases.make_phase(lone, phases.name_at(config, 0))
  constants = device_groups.part(setup.constants, group)
  trainer = dataclasses.replace(phase.trainer, constants=constants)

  # Times do not depend on values.
  shared, chains = split(setup.task.shapes(), [chain])
  chains[chain] = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((depth, *s.shape[1:]), s.dtype),
    chains[chain],
  )
  params = jax.tree.map(
    lambda s: np.full(s.shape, 0.01, s.dtype), join(shared, chains)
  )
  state = trainer.init(params)
  batches = _batches(setup, config.local_steps)
  trainer = trainer.compile(state, batches)
  best = float('inf')
  for repeat in range(1 + REPEATS):  # The first one warms up.
    start = time.perf_counter()
    given = iter(batches) if isinstance(batches, list) else batches
    state, metrics = trainer.round(state, given)
    jax.block_until_ready((state.shared, state.chain, metrics))
    if repeat:
      best = min(best, time.perf_counter() - start)
  return best / config.local_steps


def _batches(setup: Setup, steps: int):
  """Returns what a lone worker trains on: always the first example."""
  shapes = setup.pipeline.batch_shapes()
  zeros = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), shapes)
  return zeros[:steps] if isinstance(zeros, list) else zeros[:, :steps]
