"""Runs that stop early, and the best checkpoint: alike after a resume."""

import json
import os
import pathlib
import shutil
import signal

import pytest
from several import Several
from test_train import least_config, rows

from resist_jax import report
from resist_jax.errors import ConfigError
from resist_jax.run import stopping, train
from resist_jax.run.interrupt import Interrupted


def remembered(accuracies, min_gain):
  """What is remembered after tests of rounds 1, 2, and so on."""
  best = {}
  for done, accuracy in enumerate(accuracies, start=1):
    row = {'round': done, 'x': accuracy}
    best = stopping.updated(best, '+x', row, min_gain)
  return best


@pytest.mark.parametrize(
  ('accuracies', 'min_gain', 'want'),
  [
    ([0.5], 0.0, (0.5, 1, 0)),
    ([0.5, 0.5, 0.4], 0.0, (0.5, 1, 2)),
    ([0.5, 0.4, 0.6], 0.0, (0.6, 3, 0)),
    # Small gains add up until they count; the best is the highest anyway.
    ([0.5, 0.56, 0.58], 0.1, (0.58, 3, 2)),
    ([0.5, 0.56, 0.62], 0.1, (0.62, 3, 0)),
  ],
)
def test_what_counts_as_a_gain(accuracies, min_gain, want):
  best = remembered(accuracies, min_gain)
  assert (best['value'], best['round'], best['tests_since']) == want


def test_a_run_stops_when_its_patience_ends():
  config = least_config()
  worse = [remembered([0.5] + [0.4] * count, 0.0) for count in range(4)]
  assert not any(stopping.reason(config, best) for best in worse)
  config.early_stopping.patience = 2
  stops = [bool(stopping.reason(config, best)) for best in worse]
  assert stops == [False, False, True, True]
  assert '0.5000 after round 1' in stopping.reason(config, worse[2])


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('test_acuracy', 'Did you mean test_accuracy.*test_accuracy_paper, or aut'),
    (
      'validation_accuracy',
      'data.validation to a share .*test_accuracy',
    ),
  ],
)
def test_an_accuracy_that_is_not_measured_is_refused(name, says, tmp_path):
  with pytest.raises(ConfigError, match=says) as caught:
    train.train(least_config(best_by=name), tmp_path)
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


STOPS = {
  'num_rounds': 20,
  'local_steps': 1,
  'eval_every': 2,
  'early_stopping.patience': 2,
  'early_stopping.min_gain': 1.0,  # Nothing is a gain.
  'best_by': 'test_accuracy_paper',
}


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """A run that stops early: `(folder, summary)`."""
  folder = tmp_path_factory.mktemp('stopped')
  return folder, train.train(least_config(**STOPS), folder)


def test_the_summary_says_that_a_run_stopped_early_and_why(stopped):
  folder, summary = stopped
  log = rows(folder)
  assert [row['round'] for row in log] == [1, 2, 3, 4, 5, 6]
  assert 'test_accuracy' in log[-1]
  assert summary['rounds'] == 6
  accuracies = [row['test_accuracy_paper'] for row in log[1::2]]
  best = accuracies.index(max(accuracies))
  assert summary['best'] == {
    'by': 'test_accuracy_paper',
    'value': accuracies[best],
    'round': log[1::2][best]['round'],
  }
  assert summary['stopped_early'].startswith(
    'after round 6 of 20: 2 tests in a row had no gain of more than 1 in '
    f'test_accuracy_paper, which was {accuracies[0]:.4f} before'
  )
  assert summary['params_hash']
  assert json.loads((folder / 'summary.json').read_text()) == summary


def test_the_same_command_again_leaves_a_run_stopped(stopped):
  folder, summary = stopped
  assert train.train(least_config(**STOPS), folder) == summary


def test_another_gain_is_judged_by_the_whole_log(stopped, tmp_path):
  """By the gains of before, it would stay stopped."""
  folder = tmp_path / 'run'
  shutil.copytree(stopped[0], folder)
  log = [
    {**row, 'test_accuracy_paper': row['round'] / 20}
    if 'test_accuracy_paper' in row
    else row
    for row in rows(folder)
  ]
  lines = ''.join(json.dumps(row) + '\n' for row in log)
  (folder / 'metrics.jsonl').write_text(lines)
  fields = {**STOPS, 'early_stopping.min_gain': 0.0, 'num_rounds': 7}
  summary = train.train(least_config(**fields), folder)
  assert (summary['rounds'], summary['stopped_early']) == (7, None)


@pytest.mark.slow
def test_a_run_that_stops_between_two_phases_stays_in_the_first(tmp_path):
  fields = {**STOPS, 'phases.full_before': 6}
  summary = train.train(least_config(**fields), tmp_path)
  assert summary['rounds'] == 6
  assert summary['wire_bytes_last_round']['protocol'] == 'local_sgd'
  assert train.train(least_config(**fields), tmp_path) == summary
  more = {**fields, 'early_stopping.patience': 0, 'num_rounds': 7}
  summary = train.train(least_config(**more), tmp_path)
  assert summary['wire_bytes_last_round']['protocol'] == 'resist'


def interrupted(folder, at, config):
  """Trains until a round has a row, and is stopped after it."""

  def stop(row, state):
    if row['round'] == at:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Interrupted):
    train.train(config, folder, callbacks=[stop])


@pytest.mark.parametrize('at', [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_stops_at_the_same_round(at, stopped, tmp_path):
  interrupted(tmp_path, at, least_config(**STOPS))
  again = train.train(least_config(**STOPS), tmp_path)
  for name in ('params_hash', 'stopped_early', 'best', 'rounds'):
    assert again[name] == stopped[1][name], name


def test_another_measure_judges_all_tests_so_far(stopped, tmp_path, caplog):
  folder, _ = stopped
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  fields = {**STOPS, 'early_stopping.patience': 0, 'num_rounds': 6}
  fields |= {'best_by': 'test_accuracy', 'keep_best': True}
  summary = train.train(least_config(**fields), tmp_path)
  tests = {row['round']: row['test_accuracy'] for row in rows(folder)[1::2]}
  best = max(tests, key=lambda done: (tests[done], -done))
  assert summary['best'] == {
    'by': 'test_accuracy', 'value': tests[best], 'round': best
  }  # fmt: skip
  saved = (tmp_path / 'checkpoints' / str(best)).exists()
  assert saved or f'round {best} is the best so far' in caplog.text


def test_the_test_before_the_first_round_is_never_the_best(tmp_path):
  fields = {'evaluation.at_start': True, 'local_steps': 1, 'num_rounds': 2}
  fields |= {'eval_every': 1, 'lr': 1e-30}  # All tests are as good as any.
  train.train(least_config(**fields), tmp_path)
  summary = train.train(
    least_config(**fields, best_by='test_accuracy_paper'), tmp_path
  )
  assert summary['best']['round'] == 1


@pytest.mark.slow
def test_more_patience_goes_on_where_a_run_stopped(stopped, tmp_path):
  shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
  more = {**STOPS, 'early_stopping.patience': 3}
  summary = train.train(least_config(**more), tmp_path)
  assert summary['rounds'] == 8
  whole = {**STOPS, 'early_stopping.patience': 0, 'num_rounds': 8}
  summary = train.train(least_config(**whole), tmp_path)
  assert summary['stopped_early'] is None


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """A run that keeps all its checkpoints: `(folder, summary)`."""
  folder = tmp_path_factory.mktemp('kept')
  config = least_config(local_steps=1, keep_checkpoints=0, checkpoint_every=1)
  return folder, train.train(config, folder)


@pytest.mark.slow
@pytest.mark.parametrize('step', [1, 2, 3])
def test_a_run_goes_on_from_any_checkpoint(step, kept, tmp_path):
  folder, summary = kept
  assert sorted(p.name for p in (folder / 'checkpoints').iterdir()) == list(
    '1234'
  )
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  for newer in range(step + 1, 5):
    shutil.rmtree(tmp_path / 'checkpoints' / str(newer))
  config = least_config(local_steps=1, keep_checkpoints=0, checkpoint_every=1)
  again = train.train(config, tmp_path)
  assert again['params_hash'] == summary['params_hash']
  assert again['best'] == summary['best']


def test_the_best_round_is_saved_and_kept(tmp_path):
  """Though no checkpoint is due after it."""
  fields = {'local_steps': 1, 'checkpoint_every': 4, 'eval_every': 1}
  fields |= {'num_rounds': 5, 'keep_checkpoints': 1, 'keep_best': True}
  # So small a rate changes nothing: the first test is as good as any.
  summary = train.train(least_config(lr=1e-30, **fields), tmp_path)
  assert summary['best']['round'] == 1
  found = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
  assert found == {1, 4, 5}  # 4 was known good while 5 was written.


@pytest.mark.slow
def test_processes_stop_after_the_same_round(tmp_path):
  flags = [
    f'--config.{name}={value}'
    for name, value in {**STOPS, 'num_rounds': 1000000}.items()
  ]
  with Several(tmp_path / 'run', *flags) as several:
    codes = [several.wait(number) for number in range(2)]
    assert codes == [0, 0], several.output(0) + several.output(1)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['rounds'] == 6
  assert summary['stopped_early']
  log = report.read_rows(pathlib.Path(tmp_path / 'run' / 'metrics.jsonl'))
  assert len(log) == 6
