"""A run from a config: build, restore, loop over rounds, evaluate, save."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import ml_collections
import numpy as np

from resist_jax import accounting, export, metrics, report
from resist_jax import state as state_lib
from resist_jax import workdir as workdir_lib
from resist_jax.build import Phase, Setup, prepare
from resist_jax.checkpoint import Checkpoints, Restored, digest
from resist_jax.clock import Clock
from resist_jax.config import ConfigError, validate
from resist_jax.interrupt import Interrupt, Interrupted
from resist_jax.model import rescale_branches

PyTree = Any


class NonFiniteError(ArithmeticError):
  """Training diverged; the last good checkpoint is kept."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """What a run has done; it travels in the checkpoint.

  Attributes:
    round: Rounds completed.
    bytes_total: Sent so far, by the paper's count.
    images_total: Trained on so far, over all workers.
    seconds_training: Without compilation, tests and checkpoints.
    seconds_total: With everything.
    best_test_accuracy_paper: Over the evaluations so far.
    residual_scale: Of the global model's cut chains; 1 where none is named.
    last: The newest row of the log.
  """

  round: int = 0
  bytes_total: int = 0
  images_total: int = 0
  seconds_training: float = 0.0
  seconds_total: float = 0.0
  best_test_accuracy_paper: float = 0.0
  residual_scale: dict[str, float] = dataclasses.field(default_factory=dict)
  last: dict[str, Any] = dataclasses.field(default_factory=dict)


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains a network from its newest checkpoint, or from scratch, to the end.

  Args:
    config: As made by `config.get_config`.
    workdir: Folder of the run; the same config in it goes on where it stopped.

  Returns:
    What `summary.json` holds.

  Raises:
    ConfigError: On a mistake of the user's, before anything is written.
    NonFiniteError: If a worker's loss or parameters are not finite.
    Interrupted: On SIGTERM or SIGINT, after a checkpoint.
  """
  started = time.perf_counter()
  folder = pathlib.Path(workdir)
  validate(config)
  workdir_lib.check(folder, config.to_dict())
  setup = prepare(config)

  checkpoints = Checkpoints(folder)
  with Interrupt() as interrupt, checkpoints:
    restored = _restore(checkpoints, setup)
    workdir_lib.write_json(folder / 'config.json', config.to_dict())
    done = restored.progress['round']
    with metrics.MetricsLog(folder, done, config.num_rounds) as log:
      params, progress = _loop(
        setup, checkpoints, log, interrupt, restored, started
      )
  summary = _summary(setup, params, progress)
  export.save(folder, setup.evaluator.predictor(params))
  workdir_lib.write_json(folder / 'summary.json', summary)
  report.write_report([folder], folder)
  return summary


def _restore(checkpoints: Checkpoints, setup: Setup) -> Restored:
  """Returns the newest checkpoint, or the state before the first round."""
  try:
    restored = checkpoints.restore()
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if restored is None:
    params = setup.initial_params()
    return Restored(params, None, dataclasses.asdict(Progress()))
  done = restored.progress['round']
  if done > setup.config.num_rounds:
    raise ConfigError(
      f'num_rounds is {setup.config.num_rounds}, but this workdir has trained '
      f'{done} rounds already: raise num_rounds or choose another workdir.'
    )
  logging.info('going on after round %d', done)
  return restored._replace(params=_as_scaled_now(setup, restored))


def _as_scaled_now(setup: Setup, restored: Restored) -> PyTree:
  """Keeps the global model the same function where S or the protocol changed.

  Residual branches of another S are tested at another scale: what the scale
  gains, their last layer gives.
  """
  before = restored.progress['residual_scale']
  now = setup.global_scale()
  factors = {
    chain: before.get(chain, 1.0) / now.get(chain, 1.0)
    for chain in before.keys() | now.keys()
  }
  changed = {chain: factor for chain, factor in factors.items() if factor != 1}
  return rescale_branches(restored.params, changed, setup.network)


class _Dispatched(NamedTuple):
  """A round that may still be running on the devices."""

  index: int
  phase: Phase
  slots: dict[str, jax.Array]
  metrics: dict[str, jax.Array]


def _loop(
  setup: Setup,
  checkpoints: Checkpoints,
  log: metrics.MetricsLog,
  interrupt: Interrupt,
  restored: Restored,
  started: float,
) -> tuple[PyTree, Progress]:
  """Trains the remaining rounds and returns the global model."""
  config, evaluator = setup.config, setup.evaluator
  params, velocity = restored.params, restored.velocity
  progress = dataclasses.replace(
    Progress(**restored.progress), residual_scale=setup.global_scale()
  )
  seconds_before = progress.seconds_total
  clock = Clock(progress.seconds_training)
  state = phase = running = None
  for index in range(progress.round, config.num_rounds):
    if state is None or phase is None:
      phase = setup.phase(index)
      state = _enter(setup, phase, index, params, velocity)
    clock.start()
    slots = state.slots
    state, measured = phase.run(
      state,
      setup.slots(phase, index + 1),
      setup.constants,
      setup.batches(index),
      index,
    )
    # This round runs while the metrics of the one before are read and logged.
    if running:
      progress = _read(setup, running, progress, clock)
      log.write(progress.last)
    running = _Dispatched(index, phase, slots, measured)

    done = index + 1
    last = done == config.num_rounds
    evaluates = last or done % config.eval_every == 0
    saves = last or done % config.checkpoint_every == 0
    leaves = not last and setup.phase_name(done) != phase.name
    if not (evaluates or saves or leaves or interrupt.signum):
      continue
    progress = _read(setup, running, progress, clock)
    running = None
    clock.stop()
    params, velocity = state_lib.assemble(state, phase.protocol.num_blocks)
    if evaluates:
      progress = _with_accuracies(progress, evaluator(params))
    log.write(progress.last)
    elapsed = seconds_before + time.perf_counter() - started
    progress = dataclasses.replace(progress, seconds_total=elapsed)
    signum = interrupt.signum  # Read once: it may come at any time.
    if saves or signum:
      checkpoints.save(params, velocity, dataclasses.asdict(progress))
    if signum and not last:
      raise Interrupted(
        signum,
        f'stopped after round {done} of {config.num_rounds}; the same command '
        'goes on from there.',
      )
    if leaves:
      state = None
  if 'test_accuracy' not in progress.last:  # Ended by a lower num_rounds.
    progress = _with_accuracies(progress, evaluator(params))
  return params, progress


def _enter(setup: Setup, phase: Phase, index: int, params, velocity):
  """Hands the global model out for the rounds of a phase, and compiles them."""
  if not phase.protocol.carry_velocity:
    velocity = None
  elif velocity is None:
    velocity = jax.tree.map(np.zeros_like, params)
  state = state_lib.distribute(
    params,
    setup.slots(phase, index),
    setup.config.num_workers,
    setup.mesh,
    velocity,
  )
  phase.run.compile(state, setup.constants, setup.batches(index))
  return state


def _read(
  setup: Setup, running: _Dispatched, progress: Progress, clock: Clock
) -> Progress:
  """Waits for a round and turns its metrics into a row of the log."""
  measured = {k: np.asarray(v) for k, v in running.metrics.items()}
  done = running.index + 1
  bad = np.flatnonzero(~measured['finite'])
  if len(bad):
    raise NonFiniteError(
      f'round {done}: the loss or the parameters of worker '
      f'{", ".join(map(str, bad))} are not finite. Lower lr (now '
      f'{setup.config.lr}) or raise optimizer.warmup_rounds, and choose '
      'another workdir; the last good checkpoint of this one is kept.'
    )
  config = setup.config
  images = config.num_workers * config.local_steps * config.batch_size
  seconds = clock.seconds()
  row = {
    'round': done,
    'protocol': running.phase.name,
    'train_loss': float(measured['loss'].mean()),
    'train_accuracy': float(measured['accuracy'].mean()),
    'lr': float(setup.schedule(done * config.local_steps - 1)),
    'seconds_training': seconds,
    'bytes_total': progress.bytes_total + running.phase.bytes_per_round,
    'images_per_second': images / (seconds - progress.seconds_training),
    'slots': {
      name: [[b for b in worker if b < setup.chains[name]] for worker in table]
      for name, table in (
        (name, np.asarray(table).tolist())
        for name, table in running.slots.items()
      )
    },
    'num_blocks': dict(setup.chains),
  }
  return dataclasses.replace(
    progress,
    round=done,
    bytes_total=row['bytes_total'],
    images_total=progress.images_total + images,
    seconds_training=seconds,
    last=row,
  )


def _with_accuracies(
  progress: Progress, accuracies: dict[str, float]
) -> Progress:
  best = max(
    progress.best_test_accuracy_paper, accuracies['test_accuracy_paper']
  )
  return dataclasses.replace(
    progress,
    best_test_accuracy_paper=best,
    last={**progress.last, **accuracies},
  )


def _summary(
  setup: Setup, params: PyTree, progress: Progress
) -> dict[str, Any]:
  """Returns what a run is remembered by."""
  config, sizes = setup.config, setup.sizes
  depth, workers = config.min_depth, config.num_workers
  devices = setup.mesh.devices
  accuracies = {k: v for k, v in progress.last.items() if '_accuracy' in k}
  del accuracies['train_accuracy']
  return {
    'protocol': config.protocol,
    'dataset': config.data.name,
    'model': config.model.name,
    'num_workers': workers,
    'num_devices': devices.size,
    'rounds': progress.round,
    'local_steps': config.local_steps,
    **accuracies,
    'best_test_accuracy_paper': progress.best_test_accuracy_paper,
    'final_train_loss': progress.last['train_loss'],
    'params_total': sizes.total,
    'params_per_worker': accounting.params_per_worker(sizes, workers, depth),
    'params_shared': sizes.shared,
    # One number where one chain is cut, and 0 where none is.
    'params_per_block': (
      sizes.block if len(sizes.block) > 1 else sum(sizes.block.values())
    ),
    'num_blocks': sizes.num_blocks,
    'bytes_per_round': setup.phase(
      config.num_rounds - 1 - config.phases.full_after
    ).bytes_per_round,
    'bytes_total': progress.bytes_total,
    'bytes_per_round_local_sgd': accounting.round_trip_bytes(
      setup.full_sizes(), workers
    ),
    'seconds_training': progress.seconds_training,
    'seconds_total': progress.seconds_total,
    'images_per_second': progress.images_total / progress.seconds_training,
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
