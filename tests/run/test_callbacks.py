"""Callbacks see each round; TensorBoard and Weights & Biases are two of them.

What they wrote is read by their own packages, which are skipped where they are
missing; that of a config alone is not.
"""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
from several import ROOT
from test_train import least_config, rows

from resist_jax import data, rounds
from resist_jax.errors import ConfigError
from resist_jax.run import callbacks, export, train
from resist_jax.run.config import flat
from resist_jax.run.interrupt import Interrupted
from resist_jax.run.tensorboard import shown


def needs(package):
  missing = importlib.util.find_spec(package) is None
  return pytest.mark.skipif(missing, reason=f'{package} is not installed')


class Told(callbacks.Callback):
  """Keeps what it learns."""

  def __init__(self):
    self.began, self.rows, self.ended = [], [], []
    self.params = None

  def begin(self, run):
    self.began.append((run.round, run.config.num_rounds, run.workdir))

  def __call__(self, row, state):
    assert int(state.round) == row['round']
    self.params = rounds.assemble(state).params
    self.rows.append(row)

  def end(self, summary):
    self.ended.append(summary)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of two rounds: `(folder, summary, what a callback was told)`."""
  folder, told, calls = tmp_path_factory.mktemp('called'), Told(), []

  def function(row, state):
    calls.append((row.pop('round'), int(state.round)))  # Its own copy.

  config = least_config(num_rounds=2, local_steps=1)
  config.log.tensorboard = True
  summary = train.train(config, folder, callbacks=[function, told])
  assert list((folder / 'tensorboard').iterdir())
  assert calls == [(1, 1), (2, 2)]
  return folder, summary, told


def test_a_callback_gets_each_row_and_its_state(finished):
  folder, summary, told = finished
  assert told.rows == rows(folder)
  assert told.began == [(0, 2, folder)]
  assert told.ended == [summary]
  trained = export.load(folder).variables['params']
  jax.tree.map(np.testing.assert_array_equal, told.params, trained)


def test_the_round_before_is_whole_when_a_round_is_logged(tmp_path):
  # So a kill at any time costs one logged round at most.
  whole = []

  def look(row, state):
    listed = tmp_path / f'digests/{row["round"] - 1}.json'
    whole.append(listed.exists())

  config = least_config(num_rounds=3, local_steps=1, checkpoint_every=1)
  config.eval_every = 3
  train.train(config, tmp_path, callbacks=[look])
  assert whole == [False, True, True]


def test_a_callback_learns_that_a_run_stopped_and_goes_on(tmp_path):
  told = Told()

  def stop(row, state):
    if row['round'] == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  config = least_config(num_rounds=2, local_steps=1, checkpoint_every=1)
  with pytest.raises(Interrupted):
    train.train(config, tmp_path, callbacks=[told, stop])
  assert told.ended == [None]
  done = len(told.rows)
  summary = train.train(config, tmp_path, callbacks=[told])
  assert told.began == [(0, 2, tmp_path), (done, 2, tmp_path)]
  assert told.ended == [None, summary]
  assert [row['round'] for row in told.rows] == [1, 2]


@pytest.mark.slow
def test_the_test_before_round_1_is_told_as_any_row(tmp_path):
  told = Told()
  fields = {'num_rounds': 1, 'local_steps': 1, 'evaluation.at_start': True}
  fields['log.tensorboard'] = True
  train.train(least_config(**fields), tmp_path, callbacks=[told])
  assert [row['round'] for row in told.rows] == [0, 1]
  assert told.rows == rows(tmp_path)
  assert 'test_accuracy' in told.rows[0]
  files = (tmp_path / 'tensorboard').glob('events*')
  events = b''.join(path.read_bytes() for path in files)
  assert events.count(b'test_accuracy_paper') == 2


@pytest.mark.parametrize('wrong', [None, 'print', Told])
def test_what_cannot_be_called_is_refused(wrong, tmp_path):
  with pytest.raises(ValueError, match=r'callbacks hold .*: give functions'):
    train.train(least_config(), tmp_path, callbacks=[wrong])
  assert not list(tmp_path.iterdir())


class Quick(callbacks.Callback):
  """Leaves the state alone."""

  reads_state = False

  def __call__(self, row, state):
    assert state is None


def test_only_who_reads_the_state_holds_up_an_accelerator():
  called = callbacks.Callbacks([Quick()])
  assert not called.reads_state
  called({'round': 1}, object())
  assert callbacks.Callbacks([Quick(), Told()]).reads_state


# TensorBoard.


def test_small_training_images_are_enlarged():
  count, shape = 11, (8, 8, 3)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
  found = shown(data.Split(images, np.zeros(count, np.int32)))
  assert found.shape == (11, 32, 32, 3)
  np.testing.assert_array_equal(
    found[:, ::4, ::4], images[data.sample(count, 32)]
  )


@needs('tensorboard')
@pytest.mark.filterwarnings('ignore')  # Those of its imports.
def test_tensorboard_reads_what_it_is_given(finished):
  from tensorboard.backend.event_processing import event_accumulator

  folder, summary, _ = finished
  accumulator = event_accumulator.EventAccumulator(
    str(folder / 'tensorboard'), {event_accumulator.IMAGES: 0}
  ).Reload()
  losses = accumulator.Scalars('train_loss')
  assert [event.step for event in losses] == [1, 2]
  assert [event.value for event in losses] == pytest.approx(
    [row['train_loss'] for row in rows(folder)]
  )
  (text,) = accumulator.Tensors('config/text_summary')
  lines = text.tensor_proto.string_val[0].decode()
  written = json.loads((folder / 'config.json').read_text())
  assert json.loads(lines) == written
  (images,) = accumulator.Images('training_images')
  assert (images.width, images.height) == (256, 128)
  (curve,) = accumulator.Images('accuracy_by_round')
  assert curve.step == 2
  assert curve.width > 600
  assert summary['rounds'] == 2


@needs('tensorboard')
@pytest.mark.filterwarnings('ignore')
def test_tensorboard_compares_settings_with_final_metrics(finished):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.plugins.hparams import plugin_data_pb2

  folder, summary, _ = finished
  accumulator = event_accumulator.EventAccumulator(
    str(folder / 'tensorboard' / 'final')
  ).Reload()

  def content(tag):
    metadata = accumulator.SummaryMetadata(f'_hparams_/{tag}')
    parsed = plugin_data_pb2.HParamsPluginData()
    parsed.ParseFromString(metadata.plugin_data.content)
    return parsed

  given = content('session_start_info').session_start_info.hparams
  assert set(given) == set(flat(least_config()))
  assert given['lr'].number_value == least_config().lr
  assert given['partition'].string_value == '(2,)'
  assert given['partition_strided'].bool_value is False
  names = {
    info.name.tag for info in content('experiment').experiment.metric_infos
  }
  assert {'final/test_accuracy', 'final/wire_bytes_total'} <= names
  for name in names:  # Each is a scalar of that folder.
    (event,) = accumulator.Scalars(name)
    value = summary[name.removeprefix('final/')]
    assert event.value == pytest.approx(value), name


# Weights & Biases.


def test_a_missing_package_is_named_before_anything_is_written(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'wandb', None)  # As if it were not there.
  config = least_config(**{'log.wandb_project': 'digits'})
  with pytest.raises(ConfigError, match='pip install wandb') as caught:
    train.train(config, tmp_path)
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


def lines(path):
  """Yields the entries of a log of LevelDB, as wandb keeps one, unparsed.

  After seven bytes that name the format there are blocks of 32 KiB. A part of
  an entry has its checksum, length and kind before it; 1 and 4 end an entry.
  """
  content, at, entry = path.read_bytes(), 7, b''
  while at + 7 <= len(content):
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
    _, length, kind = struct.unpack_from('<IHB', content, at)
    entry += content[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
      yield entry
      entry = b''


def records(folder):
  """Returns what runs in a folder have logged, by kind; see wandb's proto."""
  from wandb.proto import wandb_internal_pb2

  found = {}
  for path in sorted(folder.glob('wandb/offline-run-*/*.wandb')):
    for line in lines(path):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(line)
      kind = record.WhichOneof('record_type')
      found.setdefault(kind, []).append(getattr(record, kind))
  return found


@needs('wandb')
@pytest.mark.filterwarnings('ignore')
def test_weights_and_biases_keeps_a_run_in_offline_mode(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  fields = {'log.wandb_project': 'digits', 'local_steps': 1}
  train.train(least_config(num_rounds=1, **fields), tmp_path / 'mine')
  summary = train.train(least_config(num_rounds=2, **fields), tmp_path / 'mine')
  found = records(tmp_path / 'mine')
  runs = found['run']
  assert {(r.project, r.display_name) for r in runs} == {('digits', 'mine')}
  assert len({r.run_id for r in runs}) == 1  # The second part goes on.
  history = [
    {item.key or item.nested_key[0]: item.value_json for item in entry.item}
    for entry in found['history']
  ]
  assert [json.loads(entry['_step']) for entry in history] == [1, 2]
  for entry, row in zip(history, rows(tmp_path / 'mine'), strict=True):
    for name, value in callbacks.numbers(row).items():
      if name != 'round':
        assert json.loads(entry[name]) == value
  last = {
    item.key or item.nested_key[0]: item.value_json
    for entry in found['summary']
    for item in entry.update
  }
  assert json.loads(last['params_hash']) == summary['params_hash']
  assert [entry.exit_code for entry in found['exit']] == [0, 0]


@needs('wandb')
def test_weights_and_biases_without_a_login_is_one_line(tmp_path):
  """In a process of its own: wandb reads the environment once."""
  environment = {'HOME': str(tmp_path), 'WANDB_MODE': 'online'}
  words = ('--config=digits:smoke', '--config.log.wandb_project=digits')
  ran = subprocess.run(
    [sys.executable, '-m', 'resist_jax', *words, '--workdir=run'],
    env={**os.environ, **environment, 'PYTHONPATH': str(ROOT)},
    cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True,
  )  # fmt: skip
  assert ran.returncode == 2, ran.stderr
  (line,) = (x for x in ran.stderr.splitlines() if x.startswith('error: '))
  assert 'run wandb login' in line
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize(
  ('callbacks', 'says'),
  [
    (print, 'must be a list'),
    ([lambda row: None], 'does not take a row and a state'),
    ([3], 'no function of a row'),
  ],
)
def test_what_cannot_be_called_is_refused_before_anything(
  callbacks, says, tmp_path
):
  with pytest.raises(ValueError, match=says):
    train.train(least_config(), tmp_path / 'run', callbacks=callbacks)
  assert not (tmp_path / 'run').exists()


def test_a_folder_of_its_name_is_not_the_package(tmp_path, monkeypatch):
  """As wandb leaves one where it has run."""
  (tmp_path / 'wandb').mkdir()
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  config = least_config(**{'log.wandb_project': 'digits'})
  with pytest.raises(ConfigError, match='pip install wandb'):
    train.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
