"""What a run has done so far, and what a round or a test adds to it."""

import dataclasses
import math
from typing import Any, NamedTuple

from absl import logging
import ml_collections
import numpy as np

from resist_jax.decomposition import Assignment
from resist_jax.errors import NonFiniteError
from resist_jax.rounds import State
from resist_jax.run import phases, same_data, stopping
from resist_jax.run.checkpoint import Restored
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
    tests: The examples on which the newest row was tested, by the name of the
      test; see `same_data.describe`.
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


class Dispatched(NamedTuple):
  """A round, or several as one, that may still be running on the devices.

  Attributes:
    done: How many rounds are done when it ends.
    phase: Its phase.
    before: Who holds which blocks while it runs, by chain.
    after: Who holds them afterwards.
    metrics: What it measures, an array of all workers by name.
  """

  done: int
  phase: Phase
  before: dict[str, Assignment]
  after: dict[str, Assignment]
  metrics: dict[str, Any]


def begun(setup: Setup, restored: Restored | None) -> Progress:
  """Returns the progress at the beginning of a run, or of a part of it.

  Args:
    setup: Setup of the run.
    restored: The checkpoint to go on from; None before the first round.

  Returns:
    The counters. What was measured on other tests than those there now is left
    out.
  """
  progress = Progress(**restored.progress) if restored else Progress()
  by_speed = setup.config.depths == 'by_speed'
  tests = {t: setup.described[f'split {t}'] for t in setup.dataset.tests}
  changed = tuple(
    f'{test}_'
    for test, then in progress.tests.items()
    if not same_data.agree(then, tests.get(test))
  )
  judged = stopping.judged_by(setup).lstrip('+-')
  return dataclasses.replace(
    progress,
    residual_scale=phases.global_scale(setup),
    depths_by_speed=list(setup.depths) if by_speed else [],
    best={} if judged.startswith(changed) else progress.best,
    last={k: v for k, v in progress.last.items() if not k.startswith(changed)},
    tests=tests,
  )


def after_round(
  setup: Setup,
  running: Dispatched,
  progress: Progress,
  measured: dict[str, np.ndarray],
  seconds: float,
  rate: float,
) -> Progress:
  """Returns the progress after a round, whose row of the log it makes.

  Args:
    setup: Setup of the run.
    running: The round, which has ended.
    progress: The progress before it.
    measured: Its metrics, read to the host: a row of each worker.
    seconds: Seconds of training so far.
    rate: The learning rate of its last step.

  Raises:
    NonFiniteError: If training diverges.
  """
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
      if name in measured  # A loss may measure more in a test.
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


def after_test(progress: Progress, test: Test, state: State) -> Progress:
  """Returns the progress after a test of the global network.

  Args:
    progress: The progress before it.
    test: What tests.
    state: What the workers hold.

  Raises:
    NonFiniteError: If an output is not finite.
  """
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


def _update_norms(measured: dict[str, np.ndarray]) -> dict[str, list]:
  """Returns a field of the log, where updates are judged; None: not finite."""
  if 'update_norm' not in measured:
    return {}
  return {'update_norms': [*map(_finite, measured['update_norm'])]}


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


def _finite(number: float) -> float | None:
  """Returns a number of the log; None if it is infinite or NaN."""
  return float(number) if math.isfinite(number) else None
