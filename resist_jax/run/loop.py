"""The rounds of a run: trained, timed, logged, tested and saved."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
import numpy as np

from resist_jax import accounting, data
from resist_jax.rounds import assemble
from resist_jax.rounds.arrays import place_parts, to_host
from resist_jax.rounds.mesh import SHARDED, workers_here
from resist_jax.rounds.state import assignments_on_host
from resist_jax.run import (
  lengths,
  metrics,
  phases,
  processes,
  restore,
  stopping,
)
from resist_jax.run.callbacks import Callbacks
from resist_jax.run.checkpoint import Checkpoints, Restored
from resist_jax.run.config import TRAINED_BY
from resist_jax.run.interrupt import Interrupt, Interrupted
from resist_jax.run.phases import Phase
from resist_jax.run.progress import Dispatched, after_round, after_test, begun
from resist_jax.run.setup import Setup


class Clock:
  """Adds up the seconds of training, between `start` and `stop`."""

  def __init__(self, seconds: float):
    """Starts from a sum of seconds, such as that of a resumed run."""
    self._seconds = seconds
    self._since: float | None = None

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
    phase: The phase of the next round, or of the last one if none follows. Its
      trainer takes as many rounds at once as the newest round did.
    progress: What is done.
    test: What tests the global network.
  """

  def __init__(
    self,
    setup: Setup,
    restored: Restored | None,
    started: float,
    checkpoints: Checkpoints,
    log: metrics.Log,
    callbacks: Callbacks,
    interrupt: Interrupt,
  ):
    """Compiles the first rounds, and prepares their state.

    Args:
      setup: Setup of the run.
      restored: The checkpoint to go on from; None before the first round.
      started: When this part of the run began, by `time.perf_counter`.
      checkpoints: Where its states are saved.
      log: Where its rows are written.
      callbacks: What is called with each row.
      interrupt: What records signals.

    Raises:
      ConfigError: If the checkpoint is that of another network.
    """
    self.setup, self._checkpoints = setup, checkpoints
    self._log, self._callbacks = log, callbacks
    self._interrupt = interrupt
    self.test = phases.make_test(setup)
    self._judged_by = stopping.judged_by(setup)
    self._rate = setup.schedule
    self._lengths = lengths.make(setup.config, self._rate)
    fields = setup.config.to_dict()
    self._settings = {name: fields[name] for name in TRAINED_BY}
    self._running: Dispatched | None = None
    self._asked = 0  # The signal that some process got, or 0.
    self._apart = True  # Whether the processes may be at different points.
    self.progress = begun(setup, restored)
    # With the time now, it gives the seconds of the whole run.
    self._before = self.progress.seconds_total - started
    self._clock = Clock(self.progress.seconds_training)
    # A run that has ended, early or not, stays in the phase of its last round.
    early = bool(stopping.reason(setup.config, self.progress.best))
    ended = early or self.progress.round == setup.config.num_rounds
    self.phase, self.state = restore.start(setup, restored, ended)
    self._at_once = {1: self.phase}
    self._prepare_phase()
    if ended:
      count = self.progress.last.get('rounds', 1)
      again = restore.at_once(setup, self.phase, self.state, {count})
      self.phase = again[count]

  def run(self) -> None:
    """Trains to the end.

    Raises:
      NonFiniteError: If training diverges.
      Interrupted: On a signal, after a checkpoint.
    """
    config = self.setup.config
    if config.evaluation.at_start and not self.progress.round:
      self._test_at_start()
    self._log.begin()
    index = self.progress.round
    while index < config.num_rounds:
      if stopping.reason(config, self.progress.best):
        break
      count = self._lengths.at(index)
      waits = self._dispatch(index, count)
      due = self._due(index, index + count)
      index += count
      if jax.process_count() == 1:
        self._asked = self._interrupt.signum or 0
      if not (any(due) or self._asked or waits):
        self._checkpoints.finish(wait=False)
        continue
      self._read()
      self._checkpoints.finish(wait=False)
      if any(due) or self._asked:
        self._pause(due)
      else:
        self._write()
    self._end()

  def _prepare_phase(self) -> None:
    """Compiles the rounds of the phase that begins, and notes their memory."""
    counts = self._lengths.of_phase(self.progress.round)
    self._at_once = restore.at_once(self.setup, self.phase, self.state, counts)
    # Where no round is left, those of several rounds as one are not compiled.
    before = self.progress.peaks.get(self.phase.name, 0)
    peak = max(before, *map(_peak, self._at_once.values()))
    peaks = {**self.progress.peaks, self.phase.name: peak}
    self.progress = dataclasses.replace(self.progress, peaks=peaks)

  def _dispatch(self, index: int, count: int) -> bool:
    """Begins a round, or `count` as one.

    Where the host dispatches steps, it also ends.

    Returns:
      Whether it has to be read before the next one begins.
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
    self._running = Dispatched(done, self.phase, before, after, measured)
    # Where the host dispatches steps, it has waited for them: the clock is read
    # now, or the time of the next round would count for this one.
    waits = 'seconds_local' in measured or self._callbacks.reads_state
    # To gather the rows of several processes is a program, too: behind the next
    # round, it would read the clock at the end of that.
    return waits or jax.process_count() > 1

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
    noted = after_round(
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
      self.phase, self.state = restore.begin_phase(self.setup, done, whole)
      self._prepare_phase()

  def _test_at_start(self) -> None:
    """Logs a test of the network before round 1, as round 0 of the curves."""
    processes.doing('the test before round 1')
    tested = after_test(self.progress, self.test, self.state)
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
    progress = after_test(self.progress, self.test, self.state)
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
      self.progress = after_test(self.progress, self.test, self.state)
      self._checkpoints.tested(self.progress.round)
    self._checkpoints.finish()


def _peak(phase: Phase) -> int:
  """Returns the bytes of a device for the largest program of a phase."""
  programs = phase.trainer.programs
  assert programs is not None  # It is compiled.
  compiled = accounting.compiled_memory(programs)
  return max(program['peak'] for program in compiled.values())


def _gathered(
  setup: Setup, running: Dispatched, interrupt: Interrupt
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
  gathered = {k: _in_rows(setup, v) for k, v in here.items()}
  return to_host({**arrays, **gathered})


def _in_rows(setup: Setup, number: float) -> jax.Array:
  """Returns `float32[S]`: each process's number, in its workers' rows."""
  S = setup.config.num_workers
  here = len(workers_here(setup.mesh, S))
  mine = np.full(here, number, np.float32)
  return place_parts(mine, NamedSharding(setup.mesh, SHARDED), S)
