"""The seconds of training hold the rounds, and nothing else.

Time here goes on only where a test says so: each round takes a second, and what
is not training takes a hundred.
"""

import os
import signal
import types

import pytest
from test_train import least_config, rows

from resist_jax.rounds.compiled import Round
from resist_jax.run import loop, metrics, restore, train
from resist_jax.run.checkpoint import Checkpoints
from resist_jax.run.evaluate import Evaluator
from resist_jax.run.interrupt import Interrupted
from resist_jax.run.setup import Setup

LONG = 100


class Time:
  """Stands still but for what it is told."""

  def __init__(self, patch):
    self.now, self._patch = 0.0, patch
    stands = types.SimpleNamespace(perf_counter=lambda: self.now)
    for module in (loop, train):
      patch.setattr(module, 'time', stands)
    self.takes(loop, 'to_host', 1)  # Where a round is waited for.
    self.takes(Evaluator, '__call__', LONG)
    self.takes(Checkpoints, 'save', LONG)
    self.takes(restore, 'begin_phase', LONG)
    self.takes(Round, 'compile', LONG)

  def takes(self, place, name, seconds):
    """Lets each call of a function take so long."""
    function = getattr(place, name)

    def timed(*args, **kwargs):
      self.now += seconds
      return function(*args, **kwargs)

    self._patch.setattr(place, name, timed)


@pytest.fixture
def time(monkeypatch):
  return Time(monkeypatch)


def config_of(**fields):
  often = {'num_rounds': 5, 'local_steps': 1, 'checkpoint_every': 2}
  return least_config(**often, **fields)


def assert_a_second_each(folder, summary):
  log = rows(folder)
  assert [row['seconds_training'] for row in log] == [1, 2, 3, 4, 5]
  images = 16 * summary['num_workers']
  assert {row['images_per_second'] for row in log} == {images}
  assert summary['seconds_training'] == 5
  assert summary['images_per_second'] == images


@pytest.mark.parametrize(
  'fields',
  [
    {},
    pytest.param({'phases.full_before': 1}, marks=pytest.mark.slow),
    pytest.param({'protocol': 'data_parallel'}, marks=pytest.mark.slow),
    pytest.param(
      {'depths': (2, 1), 'model.stage_sizes': (1, 4)}, marks=pytest.mark.slow
    ),
  ],
)
def test_where_the_host_dispatches_steps(fields, time, tmp_path):
  time.takes(metrics.MetricsLog, 'write', LONG)
  time.takes(Checkpoints, '_write_manifest', LONG)

  def slow(row, state):
    time.now += LONG

  summary = train.train(config_of(**fields), tmp_path, callbacks=[slow])
  assert_a_second_each(tmp_path, summary)


@pytest.mark.slow
def test_after_a_stop(time, tmp_path):
  time.takes(metrics.MetricsLog, 'write', LONG)

  def stop(row, state):
    if row['round'] == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Interrupted):
    train.train(config_of(), tmp_path, callbacks=[stop])
  time.now += LONG
  assert_a_second_each(tmp_path, train.train(config_of(), tmp_path))


@pytest.mark.parametrize(
  'reads', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_as_on_an_accelerator(reads, time, tmp_path, monkeypatch):
  """A row is written beside the next round, unless somebody reads a state."""
  monkeypatch.setattr(Setup, 'on_cpu', property(lambda _: False))
  begun, told = [], []
  dispatch = Round.__call__

  def counted(self, state, *args):
    begun.append(int(state.round))
    return dispatch(self, state, *args)

  monkeypatch.setattr(Round, '__call__', counted)

  def slow(row, state):
    told.append((row['round'], len(begun)))
    time.now += LONG if reads else 0

  slow.reads_state = reads
  config = config_of(num_workers=2, num_devices=1, eval_every=5)
  config.checkpoint_every = 4
  summary = train.train(config, tmp_path, callbacks=[slow])
  assert_a_second_each(tmp_path, summary)
  ahead = [(1, 2), (2, 3), (3, 4), (4, 4), (5, 5)]
  apart = [(n, n) for n in range(1, 6)]
  assert told == (apart if reads else ahead)
