"""A run from a config: build, restore, loop over rounds, evaluate, save."""

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import NamedSharding
import ml_collections
import numpy as np

from resist_jax import data, folders, report
from resist_jax.decomposition import Assignment
from resist_jax.errors import ConfigError, NonFiniteError
from resist_jax.rounds import State, assemble
from resist_jax.rounds.arrays import place_parts, to_host
from resist_jax.rounds.mesh import SHARDED, workers_here
from resist_jax.rounds.state import assignments_on_host
from resist_jax.run import (
  export,
  metrics,
  phases,
  processes,
  restore,
  speed,
)
from resist_jax.run import workdir as workdir_lib
from resist_jax.run.checkpoint import Checkpoints, Restored
from resist_jax.run.checks import validate
from resist_jax.run.config import for_processes
from resist_jax.run.evaluate import Evaluator
from resist_jax.run.interrupt import Interrupt, Interrupted
from resist_jax.run.lock import locked
from resist_jax.run.phases import Phase
from resist_jax.run.setup import Setup, describe_data, naming, prepare
from resist_jax.run.summary import summarise


@dataclasses.dataclass(frozen=True)
class Progress:
  """The counters of a run; a checkpoint holds them.

  Attributes:
    round: Rounds completed.
    bytes_total: Bytes sent so far, by the paper's count.
    wire_bytes_total: Bytes that rounds sent so far from device to device.
    evaluation_wire_bytes_total: Bytes that tests sent so far.
    images_total: Images that all workers trained on so far.
    seconds_training: Seconds without compilation, tests and checkpoints.
    seconds_total: Seconds with everything.
    left_out_total: How often a round excluded a worker.
    best_test_accuracy_paper: Best accuracy of the evaluations so far.
    residual_scale: Residual scale of the global network's cut chains; 1 for
      any other chain.
    depths_by_speed: Depths measured when the run began; empty if the config
      does not ask for them.
    last: The newest row of the log.
  """

  round: int = 0
  bytes_total: int = 0
  wire_bytes_total: int = 0
  evaluation_wire_bytes_total: int = 0
  images_total: int = 0
  seconds_training: float = 0.0
  seconds_total: float = 0.0
  left_out_total: int = 0
  best_test_accuracy_paper: float = 0.0
  residual_scale: dict[str, float] = dataclasses.field(default_factory=dict)
  depths_by_speed: list[int] = dataclasses.field(default_factory=list)
  last: dict[str, Any] = dataclasses.field(default_factory=dict)


def train(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  dataset: data.Dataset | None = None,
) -> dict[str, Any]:
  """Trains a network from its newest checkpoint, or from scratch, to the end.

  Args:
    config: As made by `config.get_config`.
    workdir: Folder of the run; the same config in it goes on where it stopped.
    dataset: What to train on, such as `data.from_arrays` makes; None for the
      one that the config names. A run goes on with the same images only.

  Returns:
    What `summary.json` holds.

  Raises:
    ConfigError: On a mistake of the user's, before anything is written.
    NonFiniteError: If training diverges; the message says how to go on.
    WorkdirLostError: If the workdir is deleted or moved meanwhile.
    Interrupted: On SIGTERM or SIGINT, after a checkpoint.
  """
  started = time.perf_counter()
  folder = folders.resolve(workdir, 'workdir')
  config = for_processes(config, jax.process_count())
  validate(config)
  config = naming(config, dataset)
  workdir_lib.check(folder, config.to_dict())
  setup = prepare(config, dataset)
  if jax.process_count() > 1:
    processes.agree(
      describe_data(setup.dataset), 'give each host the same data.'
    )
  # Process 0 writes what is not on the devices; all write checkpoints.
  first = jax.process_index() == 0
  with locked(folder) if first else contextlib.nullcontext():
    if first:  # While data were read, another run may have begun and ended.
      workdir_lib.check(folder, config.to_dict())
    _check_shared(folder)
    return _train_in(folder, setup, started)


def _train_in(
  folder: pathlib.Path, setup: Setup, started: float
) -> dict[str, Any]:
  """Trains in a workdir that no other run uses; see `train`."""
  config, writes = setup.config, jax.process_index() == 0
  checkpoints = Checkpoints(folder, setup.mesh)
  with Interrupt() as interrupt:
    processes.doing('the start')
    restored = _restore(checkpoints, setup)
    measured = restored.progress.get('depths_by_speed') if restored else None
    setup = speed.with_depths(setup, measured or ())
    done = restored.progress['round'] if restored else 0
    if writes:
      workdir_lib.write_json(folder / 'config.json', config.to_dict())
    with metrics.open_log(folder, done, config.num_rounds, writes) as log:
      try:
        state, phase, progress = _loop(
          setup, checkpoints, log, interrupt, restored, started
        )
      except NonFiniteError as error:
        remedy = _remedy(config, folder, checkpoints.distrust())
        raise NonFiniteError(f'{error}. {remedy}') from error
      except OSError:
        log.check()  # If the workdir is gone, that is the reason.
        raise
      log.check()
  processes.doing('the export')
  params = assemble(state).params
  statistics = phases.make_evaluator(setup).statistics(state)
  export.save(folder, _predictor(setup, params, statistics))
  summary = summarise(setup, phase, params, dataclasses.asdict(progress))
  if writes:
    workdir_lib.write_json(folder / 'summary.json', summary)
    report.write_report([folder], folder)
  return summary


def _check_shared(folder: pathlib.Path) -> None:
  """Checks that all processes have the same workdir, by a file in it."""
  if jax.process_count() == 1:
    return
  if jax.process_index() == 0:
    workdir_lib.mark(folder)
  processes.barrier()
  processes.agree(
    {'workdir': {'run_id': workdir_lib.marked(folder)}},
    'give all processes the same folder, on a file system that they share.',
  )


def _remedy(
  config: ml_collections.ConfigDict, folder: pathlib.Path, good: int | None
) -> str:
  """Says how to go on after a divergence, from a known good round if any."""
  if good is None:
    return (
      f'Lower lr (now {config.lr}) or raise optimizer.warmup_rounds, and '
      'choose another workdir; the last good checkpoint of this one is kept.'
    )
  return (
    f'What was saved later is moved to {folder / "set_aside"}; the same '
    f'command goes on from round {good}, the last one whose test was finite. '
    f'If it ends here again, lower lr (now {config.lr}) in another workdir.'
  )


def _predictor(setup: Setup, params, statistics) -> export.Predictor:
  """Returns the network to deploy."""
  return export.Predictor(
    setup.network,
    {'params': params, 'batch_stats': statistics},
    phases.global_scales(setup),
    setup.dataset.mean,
    setup.dataset.std,
    setup.dataset.class_names,
    setup.image_shape,
    setup.dataset.resized,
  )


def _restore(checkpoints: Checkpoints, setup: Setup) -> Restored | None:
  """Returns the newest checkpoint, or None before the first round."""
  try:
    restored = checkpoints.restore()
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if restored is None:
    return None
  done = restored.progress['round']
  if done > setup.config.num_rounds:
    raise ConfigError(
      f'num_rounds is {setup.config.num_rounds}, but this workdir has trained '
      f'{done} rounds already: raise num_rounds or choose another workdir.'
    )
  logging.info('going on after round %d', done)
  return restored


class Clock:
  """Adds up the seconds of training, between `start` and `stop`."""

  def __init__(self, seconds: float):
    """Starts from a sum of seconds, such as that of a resumed run."""
    self._seconds = seconds
    self._since: float | None = None

  @property
  def stopped(self) -> bool:
    """Whether the clock is not running."""
    return self._since is None

  def start(self) -> None:
    """Starts the clock if it is not running."""
    self._since = self._since or time.perf_counter()

  def stop(self) -> None:
    """Stops the clock."""
    self._seconds, self._since = self.seconds(), None

  def seconds(self) -> float:
    """Returns the seconds so far, including those since the last `start`."""
    if self._since is None:
      return self._seconds
    return self._seconds + time.perf_counter() - self._since


class _Dispatched(NamedTuple):
  """A round that may still be running on the devices."""

  index: int
  phase: Phase
  before: dict[str, Assignment]
  after: dict[str, Assignment]
  metrics: dict[str, Any]


def _loop(
  setup: Setup,
  checkpoints: Checkpoints,
  log: metrics.Log,
  interrupt: Interrupt,
  restored: Restored | None,
  started: float,
) -> tuple[State, Phase, Progress]:
  """Trains the remaining rounds and returns what they end with."""
  config, evaluator = setup.config, phases.make_evaluator(setup)
  progress = Progress(**restored.progress) if restored else Progress()
  by_speed = config.depths == 'by_speed'
  progress = dataclasses.replace(
    progress,
    residual_scale=phases.global_scale(setup),
    depths_by_speed=list(setup.depths) if by_speed else [],
  )
  seconds_before = progress.seconds_total
  clock = Clock(progress.seconds_training)
  phase, state = restore.start(setup, restored)
  if config.evaluation.at_start and not progress.round:
    progress = _tested_at_start(progress, phase, evaluator, state, log)
  running, asked = None, 0
  for index in range(progress.round, config.num_rounds):
    processes.doing(f'round {index + 1}')
    if clock.stopped:
      # Time spent waiting for other processes is not counted.
      processes.barrier()
    clock.start()
    before = assignments_on_host(state)
    batches = setup.pipeline.batches(index)
    state, measured = phase.trainer.round(state, batches)
    # An accelerator runs this round while that before is read and logged.
    if running:
      progress, asked = _read(setup, running, progress, clock, interrupt)
      log.write(progress.last)
    after = assignments_on_host(state)
    running = _Dispatched(index, phase, before, after, measured)
    checkpoints.finish(wait=False)

    done = index + 1
    last = done == config.num_rounds
    evaluates = last or done % config.eval_every == 0
    saves = last or done % config.checkpoint_every == 0
    leaves = not last and phases.name_at(config, done) != phase.name
    if jax.process_count() == 1:
      asked = interrupt.signum or 0
    # Where the host dispatches steps, it has waited for them: the clock is read
    # now, or the time of the next round would count for this one.
    if not (
      evaluates or saves or leaves or asked or 'seconds_local' in measured
    ):
      continue
    progress, signum = _read(setup, running, progress, clock, interrupt)
    running, signum = None, asked or signum
    if not (evaluates or saves or leaves or signum):
      log.write(progress.last)
      continue
    clock.stop()
    if evaluates:
      processes.doing(f'the test after round {done}')
      progress = _evaluated(progress, evaluator, state)
    log.write(progress.last)
    elapsed = seconds_before + time.perf_counter() - started
    progress = dataclasses.replace(progress, seconds_total=elapsed)
    if jax.process_count() == 1:  # It may have come during the test.
      signum = interrupt.signum or 0
    processes.doing(f'the checkpoint of round {done}')
    if saves or signum:
      checkpoints.save(state, dataclasses.asdict(progress))
    if evaluates:
      checkpoints.tested(done)
    if signum and not last:
      checkpoints.finish()
      raise Interrupted(
        signum,
        f'stopped after round {done} of {config.num_rounds}; the same command '
        'goes on from there.',
      )
    if leaves:
      phase, state = restore.begin_phase(setup, done, assemble(state))
  # Ended by a lower num_rounds, or given more tests since.
  if any(f'{t}_accuracy' not in progress.last for t in setup.dataset.tests):
    progress = _evaluated(progress, evaluator, state)
    checkpoints.tested(progress.round)
  checkpoints.finish()
  return state, phase, progress


def _read(
  setup: Setup,
  running: _Dispatched,
  progress: Progress,
  clock: Clock,
  interrupt: Interrupt,
) -> tuple[Progress, int]:
  """Waits for a round and turns its metrics into a row of the log.

  Returns:
    `(progress, signum)`: what is done now; and the signal that some process
    got, or 0. All processes read the same, so they stop after the same round.
  """
  config, arrays = setup.config, dict(running.metrics)
  here = {
    'signum': interrupt.signum or 0,
    'seconds_local': arrays.pop('seconds_local', 0),
  }
  gathered = {k: _allgather_scalar(setup, v) for k, v in here.items()}
  measured = to_host({**arrays, **gathered})
  done = running.index + 1
  excluded = _excluded(config, done, measured)
  images = config.num_workers * config.local_steps * config.batch_size
  seconds, healthy = clock.seconds(), measured['healthy']
  sent = running.phase.wire_bytes(running.before, running.after)
  row: dict[str, Any] = {
    'round': done,
    'protocol': running.phase.name,
    'train_loss': float(measured['loss'][healthy].mean()),
    'train_accuracy': float(measured['accuracy'][healthy].mean()),
    **({'left_out': excluded} if excluded else {}),
    **_update_norms(measured),
    'lr': phases.rate_at(config, done * config.local_steps - 1),
    'seconds_training': seconds,
    # Those of the slowest process, which every exchange waits for.
    'seconds_local': float(measured['seconds_local'].max()) or None,
    'bytes_total': progress.bytes_total + running.phase.bytes_per_round,
    'wire_bytes_total': progress.wire_bytes_total + sent,
    'images_per_second': images / (seconds - progress.seconds_training),
    'slots': _slots_held(setup, running.before),
    'num_blocks': dict(setup.chains),
  }
  return dataclasses.replace(
    progress,
    round=done,
    bytes_total=row['bytes_total'],
    wire_bytes_total=row['wire_bytes_total'],
    images_total=progress.images_total + images,
    seconds_training=seconds,
    left_out_total=progress.left_out_total + len(excluded),
    last=row,
  ), int(measured['signum'].max())


def _update_norms(measured: dict[str, np.ndarray]) -> dict[str, list]:
  """Returns a field of the log, where updates are judged; None: not finite."""
  if 'update_norm' not in measured:
    return {}
  norms = measured['update_norm'].tolist()
  return {'update_norms': [x if math.isfinite(x) else None for x in norms]}


def _allgather_scalar(setup: Setup, number: float) -> jax.Array:
  """Returns `float32[S]`: each process's number, in its workers' rows."""
  S = setup.config.num_workers
  here = len(workers_here(setup.mesh, S))
  mine = np.full(here, number, np.float32)
  return place_parts(mine, NamedSharding(setup.mesh, SHARDED), S)


def _slots_held(
  setup: Setup, assignments: dict[str, Assignment]
) -> dict[str, list[list[int]]]:
  """Returns the blocks of each worker, without empty slots."""
  return {
    name: [
      [block for block in worker if block < setup.chains[name]]
      for worker in assignment.slots.tolist()
    ]
    for name, assignment in assignments.items()
  }


def _excluded(
  config: ml_collections.ConfigDict, done: int, measured: dict[str, np.ndarray]
) -> list[int]:
  """Returns the workers that the aggregate of a round excludes."""
  finite, healthy = measured['finite'], measured['healthy']
  broken = ', '.join(map(str, np.flatnonzero(~finite)))
  if finite.any() and not healthy.any():
    raise NonFiniteError(
      f'round {done}: the losses or updates of all workers are far larger than '
      'usual (faults.update_factor=0 allows such updates)'
    )
  if broken and not (config.faults.leave_out and healthy.any()):
    raise NonFiniteError(
      f'round {done}: the loss or the parameters of worker {broken} are not '
      'finite'
    )
  far = ', '.join(map(str, np.flatnonzero(finite & ~healthy)))
  for workers, reason in (
    (broken, 'its loss, its parameters or a gradient is not finite'),
    (far, 'its loss or its update is far larger than those of the others'),
  ):
    if workers:
      logging.warning(
        'round %d goes on without worker %s: %s', done, workers, reason
      )
  return np.flatnonzero(~healthy).tolist()


def _tested_at_start(
  progress: Progress,
  phase: Phase,
  evaluator: Evaluator,
  state: State,
  log: metrics.Log,
) -> Progress:
  """Logs a test of the network before round 1, as round 0 of the curves."""
  processes.doing('the test before round 1')
  tested = _evaluated(progress, evaluator, state)
  counted = ('seconds_training', 'bytes_total', 'wire_bytes_total')
  row = {'round': 0, 'protocol': phase.name, **dict.fromkeys(counted, 0)}
  log.begin({**row, **tested.last, 'slots': {}, 'num_blocks': {}})
  sent = tested.evaluation_wire_bytes_total
  return dataclasses.replace(progress, evaluation_wire_bytes_total=sent)


def _evaluated(
  progress: Progress, evaluator: Evaluator, state: State
) -> Progress:
  """Returns the progress after a test of the global network."""
  accuracies, broken, sent = evaluator(state)
  if broken:
    listed = ', '.join(f'{name} ({n} images)' for name, n in broken.items())
    raise NonFiniteError(
      f'round {progress.round}: the outputs of the network are not finite in '
      f'the test {listed}'
    )
  best = max(
    progress.best_test_accuracy_paper, accuracies['test_accuracy_paper']
  )
  return dataclasses.replace(
    progress,
    best_test_accuracy_paper=best,
    evaluation_wire_bytes_total=progress.evaluation_wire_bytes_total + sent,
    last={**progress.last, **accuracies},
  )
