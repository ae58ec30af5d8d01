"""A whole run excludes a worker that fails, counts it, and says so."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_train import rows, stopped_at, tiny_config
from wire import train_and_compare

from resist_jax.data import Resident
from resist_jax.errors import NonFiniteError
from resist_jax.run import classification, train

NO_EXAMPLE = -1  # The loss of this example is not a number.


@pytest.fixture
def poison(monkeypatch):
  """Makes workers useless in some rounds of whole runs: `{round: workers}`."""
  rounds = {}
  batches, make_loss = Resident.batches, classification.make_loss

  def spoilt_batches(self, round_index):
    numbers = np.array(batches(self, round_index))
    numbers[list(rounds.get(round_index, ())), -1, 0] = NO_EXAMPLE
    return numbers

  def make_poisoned_loss(*args):
    loss_fn = make_loss(*args)

    def poisoned_loss(params, present, batch, key, constants):
      loss, metrics = loss_fn(params, present, batch, key, constants)
      return jnp.where((batch == NO_EXAMPLE).any(), jnp.nan, loss), metrics

    return poisoned_loss

  monkeypatch.setattr(Resident, 'batches', spoilt_batches)
  monkeypatch.setattr(classification, 'make_loss', make_poisoned_loss)
  return rounds


@pytest.mark.slow
def test_a_run_goes_on_without_a_worker_and_says_so(poison, tmp_path, caplog):
  poison |= {0: (2,), 2: (0, 3)}
  whole = train_and_compare(tiny_config(), tmp_path / 'whole')
  assert whole['left_out_total'] == 3
  log = rows(tmp_path / 'whole')
  assert [row.get('left_out', []) for row in log] == [[2], [], [0, 3], []]
  assert 'round 1 goes on without worker 2: ' in caplog.text
  assert 'round 3 goes on without worker 0, 3: ' in caplog.text
  text = (tmp_path / 'whole' / 'metrics.jsonl').read_text()
  assert 'NaN' not in text
  assert 0 < log[2]['train_loss'] < 10

  # The count goes on with the run, and so do the bits.
  config = tiny_config(num_rounds=4)
  with pytest.MonkeyPatch.context() as patch:
    stopped_at(2, patch, tmp_path / 'stopped', config)
  again = train.train(config, str(tmp_path / 'stopped'))
  assert again['params_hash'] == whole['params_hash']
  assert again['left_out_total'] == 3


@pytest.mark.slow
def test_data_parallel_goes_on_without_workers(poison, tmp_path):
  poison |= {0: (1, 2)}
  config = tiny_config(protocol='data_parallel', num_rounds=2)
  summary = train_and_compare(config, tmp_path)
  assert [row.get('left_out') for row in rows(tmp_path)] == [[1, 2], None]
  assert summary['left_out_total'] == 2


def test_when_all_workers_fail_the_last_checkpoint_stays(poison, tmp_path):
  poison |= {1: (1,), 2: range(4)}
  with pytest.raises(NonFiniteError, match=r'round 3: .* 0, 1, 2, 3 are'):
    train.train(tiny_config(checkpoint_every=1), str(tmp_path))
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == [
    '1', '2',
  ]  # fmt: skip
  assert not (tmp_path / 'summary.json').exists()


@pytest.mark.slow
def test_one_worker_that_fails_stops_a_run_that_excludes_none(poison, tmp_path):
  poison |= {1: (3,)}
  config = tiny_config(checkpoint_every=1, **{'faults.leave_out': False})
  with pytest.raises(NonFiniteError, match=r'round 2: .* worker 3 are'):
    train.train(config, str(tmp_path))
  # A run that excludes workers continues from the checkpoint, even if the
  # config saved with it lacks the field.
  path = tmp_path / 'config.json'
  saved = json.loads(path.read_text())
  del saved['faults']
  path.write_text(json.dumps(saved))
  summary = train.train(tiny_config(checkpoint_every=1), str(tmp_path))
  assert summary['rounds'] == 4
  assert summary['left_out_total'] == 1


@pytest.mark.slow
def test_a_run_excludes_a_worker_whose_loss_is_far_off(tmp_path, caplog):
  """With a factor just over 1 some worker is always excluded."""
  config = tiny_config(**{'faults.loss_factor': 1.0001, 'num_rounds': 1})
  summary = train.train(config, str(tmp_path))
  (row,) = rows(tmp_path)
  assert summary['left_out_total'] == len(row['left_out']) > 0
  assert 'its loss or its update is far larger' in caplog.text
