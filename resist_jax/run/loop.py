"""The rounds of a run: trained, timed, logged, tested and saved."""

import dataclasses
import math
import time
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import NamedSharding
import ml_collections
import numpy as np

from resist_jax import accounting, data
from resist_jax.decomposition import Assignment
from resist_jax.errors import NonFiniteError
from resist_jax.rounds import State, assemble
from resist_jax.rounds.arrays import place_parts, to_host
from resist_jax.rounds.mesh import SHARDED, workers_here
from resist_jax.rounds.state import assignments_on_host
from resist_jax.run import (
  lengths,
  metrics,
  phases,
  processes,
  restore,
  same_data,
  stopping,
)
from resist_jax.run.callbacks import Callbacks
from resist_jax.run.checkpoint import Checkpoints, Restored
from resist_jax.run.config import TRAINED_BY
from resist_jax.run.interrupt import Interrupt, Interrupted
from resist_jax.run.phases import Phase
from resist_jax.run.setup import Setup
from resist_jax.run.task import Test


@dataclasses.dataclass(frozen=True)
class Progress:
  """The counters of a run; a checkpoint holds them.

  Attributes:
    round: Rounds completed.
    bytes_total: Bytes sent so far, by the paper's count.
    wire_bytes_total: Bytes that rounds sent so far from device to device.
    evaluation_wire_bytes_total: Bytes that tests sent so far.
    images_total: Images that all workers trained on so far.
    seconds_training: Seconds without compilation, tests, logs and checkpoints;
      what is written while a round runs may slow it down.
    seconds_total: Seconds with everything.
    left_out_total: How often a round excluded a worker.
    best_test_accuracy_paper: Best accuracy of the evaluations so far.
    residual_scale: Residual scale of the global network's cut chains; 1 for
      any other chain.
    depths_by_speed: Depths measured when the run began; empty if the config
      does not ask for them.
    best: What `stopping` remembers of the tests.
    last: The newest row of the log.
    tests: The examples of the tests of the newest row, by name; see
      `same_data.describe`.
    peaks: Bytes of a device that the largest program of each protocol needs.
    settings: The fields of `TRAINED_BY` in the newest round.
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
  best: dict[str, Any] = dataclasses.field(default_factory=dict)
  last: dict[str, Any] = dataclasses.field(default_factory=dict)
  tests: dict[str, Any] = dataclasses.field(default_factory=dict)
  peaks: dict[str, int] = dataclasses.field(default_factory=dict)
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


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
  """A round, or several as one, that may still be running on the devices."""

  done: int  # How many rounds are done when it ends.
  phase: Phase
  before: dict[str, Assignment]
  after: dict[str, Assignment]
  metrics: dict[str, Any]


class _Due(NamedTuple):
  """What follows a round.

  Attributes:
    last: Whether no other round follows.
    evaluates: Whether the global network is tested.
    saves: Whether a checkpoint is written.
    leaves: Whether another phase begins.
  """

  last: bool
  evaluates: bool
  saves: bool
  leaves: bool


class Loop:
  """The rounds of a run that are left.

  Attributes:
    setup: Setup of the run.
    state: What the workers hold.
    phase: The phase of the next round, or after the last one that of the last;
      its trainer takes as many rounds at once as the round before did.
    progress: What is done.
    test: What tests the global network.
  """

  state: State
  phase: Phase

  def __init__(
    self,
    setup: Setup,
    checkpoints: Checkpoints,
    log: metrics.Log,
    callbacks: Callbacks,
    interrupt: Interrupt,
  ):
    """Takes what a run needs.

    Args:
      setup: Setup of the run.
      checkpoints: Where its states are saved.
      log: Where its rows are written.
      callbacks: What is called with each row.
      interrupt: What records signals.
    """
    self.setup, self._checkpoints = setup, checkpoints
    self._log, self._callbacks = log, callbacks
    self._interrupt = interrupt
    self.test = phases.make_test(setup)
    self._judged_by = stopping.judged_by(setup)
    self._rate = setup.schedule
    self._lengths = lengths.make(setup.config, self._rate)
    self._clock = Clock(0.0)
    self._running: _Dispatched | None = None
    fields = setup.config.to_dict()
    self._settings = {name: fields[name] for name in TRAINED_BY}
    self._asked = 0  # The signal that some process got, or 0.
    self.progress = Progress()

  def run(self) -> None:
    """Trains to the end; `begin` must come before.

    Raises:
      NonFiniteError: If training diverges.
      Interrupted: On a signal, after a checkpoint.
    """
    config = self.setup.config
    if config.evaluation.at_start and not self.progress.round:
      self._test_at_start()
    self._log.begin()
    self._apart = True  # Whether the processes may be at different points.
    index = self.progress.round
    while index < config.num_rounds:
      if stopping.reason(config, self.progress.best):
        break
      count = self._lengths.at(index)
      self._dispatch(index, count)
      due = self._due(index, index + count)
      index += count
      if jax.process_count() == 1:
        self._asked = self._interrupt.signum or 0
      if not (any(due) or self._asked or self._waits):
        self._checkpoints.finish(wait=False)
        continue
      self._read()
      self._checkpoints.finish(wait=False)
      if any(due) or self._asked:
        self._pause(due)
      else:
        self._write()
    self._end()

  def begin(self, restored: Restored | None, started: float) -> None:
    """Compiles the first rounds, and prepares their state.

    Args:
      restored: The checkpoint to go on from; None before the first round.
      started: When this part of the run began, by `time.perf_counter`.

    Raises:
      ConfigError: If the checkpoint is that of another network.
    """
    setup = self.setup
    progress = Progress(**restored.progress) if restored else Progress()
    by_speed = setup.config.depths == 'by_speed'
    tests = {t: setup.described[f'split {t}'] for t in setup.dataset.tests}
    others = [
      test
      for test, then in progress.tests.items()
      if not same_data.agree(then, tests.get(test))
    ]
    changed = tuple(f'{test}_' for test in others)
    judged = self._judged_by.lstrip('+-')
    self.progress = dataclasses.replace(
      progress,
      residual_scale=phases.global_scale(setup),
      depths_by_speed=list(setup.depths) if by_speed else [],
      best={} if judged.startswith(changed) else progress.best,
      last={
        k: v for k, v in progress.last.items() if not k.startswith(changed)
      },
      tests=tests,
    )
    self._before = progress.seconds_total - started
    self._clock = Clock(progress.seconds_training)
    # A run that has stopped early stays in the phase of its last round.
    ended = bool(stopping.reason(setup.config, self.progress.best))
    self._enter(restore.start(setup, restored, ended), self.progress.round)
    if ended or self.progress.round == setup.config.num_rounds:
      count = self.progress.last.get('rounds', 1)
      again = restore.at_once(setup, self.phase, self.state, {count})
      self.phase = again[count]

  def _enter(self, begun: tuple[Phase, State], done: int) -> None:
    """Goes on with a phase, for which `done` rounds are done."""
    self.phase, self.state = begun
    counts = self._lengths.of_phase(done)
    self._at_once = restore.at_once(self.setup, self.phase, self.state, counts)
    # Where no round is left, those of several rounds as one are not compiled.
    before = self.progress.peaks.get(self.phase.name, 0)
    peak = max(before, *map(_peak, self._at_once.values()))
    peaks = {**self.progress.peaks, self.phase.name: peak}
    self.progress = dataclasses.replace(self.progress, peaks=peaks)

  def _dispatch(self, index: int, count: int) -> None:
    """Begins a round, or `count` as one.

    Where the host dispatches steps, it also ends.
    """
    processes.doing(f'round {index + 1}', count)
    if self._apart:
      # Time spent waiting for other processes is not counted.
      processes.barrier()
      self._apart = False
    self._clock.start()
    before = assignments_on_host(self.state)
    batches = data.of_rounds(self.setup.pipeline, index, count)
    self.phase = self._at_once[count]
    self.state, measured = self.phase.trainer.round(self.state, batches)
    # An accelerator runs this round while that before is read and logged.
    if self._running:
      self._read(ahead=True)
      self._write()
    after = assignments_on_host(self.state)
    done = index + count
    self._running = _Dispatched(done, self.phase, before, after, measured)
    # Where the host dispatches steps, it has waited for them: the clock is read
    # now, or the time of the next round would count for this one.
    self._waits = 'seconds_local' in measured or self._callbacks.read_state
    # To gather the rows of several processes is a program, too: behind the next
    # round, it would read the clock at the end of that.
    self._waits |= jax.process_count() > 1

  def _due(self, before: int, done: int) -> _Due:
    config = self.setup.config
    last = done == config.num_rounds

    def passed(every: int) -> bool:
      return done // every > before // every

    return _Due(
      last,
      evaluates=last or passed(config.eval_every),
      saves=last or passed(config.checkpoint_every),
      leaves=not last and phases.name_at(config, done) != self.phase.name,
    )

  def _read(self, ahead: bool = False) -> None:
    """Waits for the round that runs, and notes what it did.

    Args:
      ahead: Whether the next one runs already, so that the clock goes on.
    """
    assert self._running
    gathered = _gathered(self.setup, self._running, self._interrupt)
    if not ahead:
      self._clock.stop()
    seconds = self._clock.seconds()
    step = self._running.done * self.setup.config.local_steps - 1
    rate: Any = self._rate(step)
    noted = _noted(
      self.setup, self._running, self.progress, gathered, seconds, float(rate)
    )
    self.progress = dataclasses.replace(noted, settings=self._settings)
    self._asked = self._asked or int(gathered['signum'].max())
    self._running = None

  def _write(self) -> None:
    """Logs the newest row."""
    self._log.write(self.progress.last)
    self._callbacks(self.progress.last, self.state)

  def _pause(self, due: _Due) -> None:
    """Tests, saves, stops, or goes on to another phase."""
    self._apart, done = True, self.progress.round
    if due.evaluates:
      processes.doing(f'the test after round {done}')
      self._test()
      due = self._due_after_test(due)
    if due.saves:
      # A round that the log has is lost only with a save that was under way,
      # so at most one is: the checkpoint before is whole before this row.
      self._checkpoints.finish()
    self._write()
    elapsed = self._before + time.perf_counter()
    self.progress = dataclasses.replace(self.progress, seconds_total=elapsed)
    if jax.process_count() == 1:  # It may have come during the test.
      self._asked = self._interrupt.signum or 0
    processes.doing(f'the checkpoint of round {done}')
    if due.saves or self._asked:
      self._save()
    if due.evaluates:
      self._checkpoints.tested(done)
    if self._asked and not due.last:
      self._checkpoints.finish()
      raise Interrupted(
        self._asked,
        f'stopped after round {done} of {self.setup.config.num_rounds}; the '
        'same command goes on from there.',
      )
    if due.leaves:
      whole = assemble(self.state)
      self._enter(restore.begin_phase(self.setup, done, whole), done)

  def _test_at_start(self) -> None:
    """Logs a test of the network before round 1, as round 0 of the curves."""
    processes.doing('the test before round 1')
    tested = _tested(self.progress, self.test, self.state)
    counted = ('seconds_training', 'bytes_total', 'wire_bytes_total')
    row = {'round': 0, 'protocol': self.phase.name, **dict.fromkeys(counted, 0)}
    row = {**row, **tested.last, 'slots': {}, 'num_blocks': {}}
    self._log.before(row)
    self._callbacks(row, self.state)
    sent = tested.evaluation_wire_bytes_total
    self.progress = dataclasses.replace(
      self.progress, evaluation_wire_bytes_total=sent
    )

  def _test(self) -> None:
    progress = _tested(self.progress, self.test, self.state)
    gain = self.setup.config.early_stopping.min_gain
    best = stopping.updated(progress.best, self._judged_by, progress.last, gain)
    self.progress = dataclasses.replace(progress, best=best)

  def _due_after_test(self, due: _Due) -> _Due:
    """Returns what is due where a test decides about it, too."""
    config, best = self.setup.config, self.progress.best
    stops = bool(stopping.reason(config, best))
    keeps = config.keep_best and best.get('round') == self.progress.round
    return due._replace(
      last=due.last or stops,
      saves=due.saves or stops or keeps,
      leaves=due.leaves and not stops,
    )

  def _save(self) -> None:
    best = self.progress.best.get('round')
    self._checkpoints.save(
      self.state,
      dataclasses.asdict(self.progress),
      best if self.setup.config.keep_best else None,
    )

  def _end(self) -> None:
    # Ended by a lower num_rounds, or given more tests since.
    wanted = [
      f'{test}_{self.setup.task.measures[0]}'
      for test in self.setup.dataset.tests
    ]
    if not all(name in self.progress.last for name in wanted):
      self.progress = _tested(self.progress, self.test, self.state)
      self._checkpoints.tested(self.progress.round)
    self._checkpoints.finish()


def _peak(phase: Phase) -> int:
  """Returns the bytes of a device for the largest program of a phase."""
  programs = phase.trainer.programs
  assert programs is not None  # It is compiled.
  compiled = accounting.compiled_memory(programs)
  return max(program['peak'] for program in compiled.values())


def _gathered(
  setup: Setup, running: _Dispatched, interrupt: Interrupt
) -> dict[str, np.ndarray]:
  """Waits for a round, and returns its metrics of all workers.

  They include `signum`, the signal that a worker's process got, or 0: all
  processes read the same, so they stop after the same round.
  """
  arrays = dict(running.metrics)
  here = {
    'signum': interrupt.signum or 0,
    'seconds_local': arrays.pop('seconds_local', 0),
  }
  gathered = {k: _allgather_scalar(setup, v) for k, v in here.items()}
  return to_host({**arrays, **gathered})


def _noted(
  setup: Setup,
  running: _Dispatched,
  progress: Progress,
  measured: dict[str, np.ndarray],
  seconds: float,
  rate: float,
) -> Progress:
  """Returns the progress with a round, whose row of the log it makes."""
  config, done = setup.config, running.done
  count = running.phase.protocol.rounds_at_once
  excluded = _excluded(config, done, measured)
  steps = running.phase.protocol.steps
  images = config.num_workers * steps * config.batch_size
  healthy = measured['healthy']
  sent = running.phase.wire_bytes(running.before, running.after)
  row: dict[str, Any] = {
    'round': done,
    **({'rounds': count} if count > 1 else {}),
    'protocol': running.phase.name,
    'train_loss': float(measured['loss'][healthy].mean()),
    **{
      f'train_{name}': _finite(measured[name][healthy].mean())
      for name in setup.task.metrics
    },
    **({'left_out': excluded} if excluded else {}),
    **_update_norms(measured),
    'lr': rate,
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
  )


def _update_norms(measured: dict[str, np.ndarray]) -> dict[str, list]:
  """Returns a field of the log, where updates are judged; None: not finite."""
  if 'update_norm' not in measured:
    return {}
  return {'update_norms': [*map(_finite, measured['update_norm'])]}


def _finite(number: float) -> float | None:
  """Returns a number of the log; None if it is infinite or NaN."""
  return float(number) if math.isfinite(number) else None


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
      f'round {done}: the loss, the parameters or a carried moment of worker '
      f'{broken} are not finite'
    )
  far = ', '.join(map(str, np.flatnonzero(finite & ~healthy)))
  for workers, reason in (
    (broken, 'its loss, its parameters, a gradient or a moment is not finite'),
    (far, 'its loss or its update is far larger than those of the others'),
  ):
    if workers:
      logging.warning(
        'round %d goes on without worker %s: %s', done, workers, reason
      )
  return np.flatnonzero(~healthy).tolist()


def _tested(progress: Progress, test: Test, state: State) -> Progress:
  """Returns the progress after a test of the global network."""
  measures, broken, sent = test(state)
  if broken:
    listed = ', '.join(f'{name} ({n} examples)' for name, n in broken.items())
    raise NonFiniteError(
      f'round {progress.round}: the outputs of the network are not finite in '
      f'the test {listed}'
    )
  logged = {name: _finite(value) for name, value in measures.items()}
  best = max(
    progress.best_test_accuracy_paper, logged.get('test_accuracy_paper') or 0.0
  )
  return dataclasses.replace(
    progress,
    best_test_accuracy_paper=best,
    evaluation_wire_bytes_total=progress.evaluation_wire_bytes_total + sent,
    last={**progress.last, **logged},
  )
