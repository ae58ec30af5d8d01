"""Whole runs on digits with a tiny network: what is written, and resumed."""

import itertools
import json
import os
import re
import signal

from covering import rest_is_slow
import jax
import numpy as np
import pytest
from wire import train_and_compare

from resist_jax import data, report, rounds
from resist_jax.errors import ConfigError, NonFiniteError
from resist_jax.run import config as config_lib
from resist_jax.run import export, metrics, phases, restore, train
from resist_jax.run.evaluate import Evaluator
from resist_jax.run.interrupt import Interrupted
from resist_jax.run.setup import Setup, prepare
from resist_jax.trainer import Trainer


def tiny_config(**fields):
  config = config_lib.get_config()
  config.model.name = 'PreActResNet18'
  config.model.stage_sizes, config.model.widths = (1, 6), (8, 8)
  config.partition = (2,)
  config.num_rounds, config.local_steps, config.batch_size = 4, 2, 16
  # A checkpoint takes a quarter of a second.
  config.eval_every, config.checkpoint_every = 2, 4
  config.num_devices = 4
  config.evaluation.statistics_images = 200
  config.log.report = config.log.tensorboard = False  # Pictures take a second.
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def least_config(**fields):
  """Two workers with a block each, for what no decomposition matters to."""
  least = {'num_workers': 2, 'num_devices': 2, 'model.stage_sizes': (1, 3)}
  return tiny_config(**{**least, **fields})


# What a recipe may change from the paper's.
RECIPE = {
  'model.init': 'torch',
  'optimizer.nesterov': True,
  'label_smoothing': 0.1,
  'data.augment': 'crop_flip',
  'data.pad': 2,
  'data.fill': 'reflection',
  'data.flips': 'alternating',
}


def rows(folder):
  return report.read_rows(folder / 'metrics.jsonl')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """One whole run: `(folder, summary)`."""
  folder = tmp_path_factory.mktemp('finished')
  return folder, train_and_compare(tiny_config(**{'log.report': True}), folder)


def test_curves_may_begin_before_the_first_round(finished, tmp_path):
  _, without = finished
  summary = train.train(tiny_config(**{'evaluation.at_start': True}), tmp_path)
  first, *rest = rows(tmp_path)
  assert [row['round'] for row in (first, *rest)] == [0, 1, 2, 3, 4]
  assert 0 < first['test_accuracy'] < 0.3  # Untrained, it guesses.
  costs = 'seconds_training', 'bytes_total', 'wire_bytes_total'
  assert [first[name] for name in costs] == [0, 0, 0]
  assert summary['params_hash'] == without['params_hash']
  tests, sent = (s['evaluation_wire_bytes_total'] for s in (without, summary))
  assert sent == tests // 2 * 3  # After rounds 2 and 4, and now before 1.
  assert summary['bytes_total'] == without['bytes_total']


def test_a_run_leaves_what_it_promises(finished):
  folder, summary = finished
  for name in (
    'config.json', 'data.json', 'metrics.jsonl', 'summary.json', 'model',
    'report.html', 'decomposition.png', 'accuracy_by_round.png',
  ):  # fmt: skip
    assert (folder / name).exists(), name
  assert not (folder / 'tensorboard').exists()  # As its config says.
  assert json.loads((folder / 'summary.json').read_text()) == summary
  assert summary['protocol'] == 'resist'
  assert summary['num_workers'] == 4
  assert summary['num_devices'] == 4
  assert summary['rounds'] == 4
  assert summary['params_total'] == (
    summary['params_shared'] + 5 * summary['params_per_block']
  )
  assert summary['bytes_total'] == 4 * summary['bytes_per_round']
  assert summary['bytes_per_round'] < summary['bytes_per_round_local_sgd']
  memory = summary['memory_per_device']
  # The number of the round is an argument, too.
  read = memory['compiled']['begin']['arguments'] - 4
  assert read == memory['predicted']['parameters']
  largest = max(program['peak'] for program in memory['compiled'].values())
  assert memory['peaks'] == {'resist': largest}
  for name in (
    'local_steps', 'test_accuracy', 'test_accuracy_paper', 'seconds_training',
    'best_test_accuracy_paper', 'params_per_worker', 'seconds_total', 'seed',
    'images_per_second', 'versions', 'device', 'final_train_loss',
  ):  # fmt: skip
    assert name in summary, name
  assert len(summary['params_hash']) == 64


def test_the_log_has_a_row_a_round(finished):
  log = rows(finished[0])
  assert [row['round'] for row in log] == [1, 2, 3, 4]
  assert ['test_accuracy' in row for row in log] == [False, True, False, True]
  for row in log:
    blocks = itertools.chain(*row['slots']['stage2_chain'])
    assert sorted(blocks) == [0, 1, 2, 3, 4]
  seconds = [row['seconds_training'] for row in log]
  assert seconds == sorted(seconds)
  assert log[0]['lr'] > log[-1]['lr']


def test_a_trained_model_loads_in_three_lines(finished):
  folder, summary = finished
  predict = export.load(folder)
  test = prepare(tiny_config()).dataset.tests['test']
  hits = np.asarray(predict(test.images)).argmax(-1) == test.labels
  assert hits.mean() == pytest.approx(summary['test_accuracy'])


def test_the_same_command_again_changes_nothing(finished):
  folder, summary = finished
  again = train.train(tiny_config(), str(folder))
  assert again == summary
  assert len(rows(folder)) == 4


@pytest.mark.parametrize(
  'fields',
  [
    {'protocol': 'local_sgd'},
    {'num_workers': 2, 'num_devices': 2},
    {'min_depth': 3},
    {'phases.full_after': 1},
  ],
)
def test_a_complete_run_gets_no_other_name(fields, finished):
  """Else its results would count as those of other settings."""
  folder, _ = finished
  written = {p: p.read_bytes() for p in folder.glob('*.json')}
  with pytest.raises(ConfigError, match=f'has ended, .*{next(iter(fields))}'):
    train.train(tiny_config(**fields), folder)
  assert {p: p.read_bytes() for p in folder.glob('*.json')} == written


def stopped_at(round_index, monkeypatch, folder, config, signum=signal.SIGTERM):
  """Runs until a signal arrives while a round is being logged."""
  write = metrics.MetricsLog.write

  def write_and_signal(self, row):
    write(self, row)
    if row['round'] == round_index:
      os.kill(os.getpid(), signum)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsLog, 'write', write_and_signal)
    with pytest.raises(Interrupted, match='the same command goes on') as stop:
      train.train(config, str(folder))
  assert stop.value.signum == signum


@pytest.mark.parametrize(
  'fields',
  [
    RECIPE,
    pytest.param(
      {'optimizer.carry_momentum': True, 'min_depth': 3},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'exchange': 'masked_psum', 'min_depth': 3}, marks=pytest.mark.slow
    ),
    pytest.param({'wire_format': 'int8'}, marks=pytest.mark.slow),
    pytest.param({'protocol': 'data_parallel'}, marks=pytest.mark.slow),
    pytest.param(
      {'protocol': 'local_sgd', 'data.sharded': True}, marks=pytest.mark.slow
    ),
    pytest.param(
      {'phases.full_before': 1, 'phases.full_after': 1}, marks=pytest.mark.slow
    ),
  ],
  ids=[
    'resist',
    'carried',
    'psum',
    'int8',
    'data_parallel',
    'local_sgd',
    'phases',
  ],
)
def test_a_stopped_run_ends_bit_equal_to_one_that_was_not(
  fields, monkeypatch, tmp_path
):
  whole = train_and_compare(tiny_config(**fields), tmp_path / 'whole')
  stopped_at(1, monkeypatch, tmp_path / 'stopped', tiny_config(**fields))
  log = rows(tmp_path / 'stopped')
  assert len(log) < 4
  again = train.train(tiny_config(**fields), str(tmp_path / 'stopped'))
  # No round is trained twice: it would have taken other seconds.
  assert rows(tmp_path / 'stopped')[: len(log)] == log
  assert again['params_hash'] == whole['params_hash']
  for name in ('test_accuracy', 'final_train_loss', 'bytes_total'):
    assert again[name] == whole[name]
  both = rows(tmp_path / 'stopped'), rows(tmp_path / 'whole')
  losses = [[row['train_loss'] for row in log] for log in both]
  assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_that_never_stopped_is_reproducible(finished, tmp_path):
  again = train.train(tiny_config(), str(tmp_path))
  assert again['params_hash'] == finished[1]['params_hash']
  other = train.train(tiny_config(seed=1, num_rounds=1), str(tmp_path / 'b'))
  assert other['params_hash'] != again['params_hash']


@pytest.mark.slow
def test_the_number_of_devices_changes_rounding_only(finished, tmp_path):
  losses = []
  for folder, devices in ((finished[0], 4), (tmp_path, 2)):
    if devices == 2:
      train.train(tiny_config(num_devices=2), str(folder))
    losses.append([row['train_loss'] for row in rows(folder)])
  np.testing.assert_allclose(*losses, rtol=1e-3)


# What may change where a run goes on.
ELASTIC = {
  'S=2': {'num_workers': 2, 'num_devices': 2},
  'S=8': {'num_workers': 8, 'min_depth': 1, 'exchange': 'masked_psum'},
  'D=2': {'num_devices': 2},
  'replicas': {'min_depth': 3},
  'int8': {'wire_format': 'int8'},
  'local_sgd': {'protocol': 'local_sgd'},
  'data_parallel': {'protocol': 'data_parallel'},
  'stream_blocks': {'evaluation.stream_blocks': True},
}


@pytest.mark.slow
@pytest.mark.parametrize('form', ELASTIC)
def test_a_checkpoint_goes_on_with_other_workers_or_another_protocol(
  form, monkeypatch, tmp_path
):
  fields = ELASTIC[form]
  stopped_at(1, monkeypatch, tmp_path, tiny_config(), signal.SIGINT)
  before = rows(tmp_path)
  start = len(before)
  summary = train.train(tiny_config(**fields), str(tmp_path))
  assert summary['rounds'] == 4
  for name, value in fields.items():
    assert name not in summary or summary[name] == value
  log = rows(tmp_path)
  assert [row['round'] for row in log] == [1, 2, 3, 4]
  assert log[:start] == before
  assert log[start - 1]['protocol'] == 'resist'
  assert log[start]['train_loss'] < log[0]['train_loss'] + 0.3
  assert np.isfinite(summary['final_train_loss'])


@pytest.mark.slow
def test_a_run_goes_on_as_the_same_function(tmp_path, monkeypatch):
  """S=4 tests branches at 1/4, S=2 at 1/2: logits stay the same."""
  train.train(tiny_config(num_rounds=1), str(tmp_path))
  # No round follows, so none is compiled.
  monkeypatch.setattr(restore, '_compiled', lambda setup, phase, *_: phase)
  logits = []
  for fields in ({}, *ELASTIC.values(), {'depths': (3, 1, 2, 1)}):
    setup = prepare(tiny_config(**fields))
    checkpoints = train.Checkpoints(tmp_path, setup.mesh)
    restored = checkpoints.restore()
    _, state = restore.start(setup, restored)
    assert int(state.round) == 1
    variables = {
      'params': rounds.assemble(state).params,
      'batch_stats': phases.make_test(setup).statistics(state),
    }
    predict = setup.task.predictor(variables, phases.global_scales(setup))
    logits.append(np.asarray(predict(setup.dataset.train.images[:50])))
    np.testing.assert_allclose(
      logits[-1], logits[0], rtol=1e-3, atol=1e-5, err_msg=str(fields)
    )


def test_a_signal_during_an_evaluation_is_not_lost(tmp_path, monkeypatch):
  """A round that is evaluated but not due for a checkpoint saves one then."""
  evaluate = Evaluator.__call__

  def evaluate_and_signal(self, state):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(self, state)

  config = least_config(checkpoint_every=3, eval_every=2)
  with monkeypatch.context() as patch:
    patch.setattr(Evaluator, '__call__', evaluate_and_signal)
    with pytest.raises(Interrupted, match='stopped after round 2'):
      train.train(config, str(tmp_path))
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['2']


def test_a_round_is_timed_before_the_next_one_begins(tmp_path, monkeypatch):
  """Where the host dispatches steps, they would count for the round before."""
  logged, batches = [], data.Resident.batches

  def batches_of(self, index):
    logged.append(len(rows(tmp_path)))
    return batches(self, index)

  monkeypatch.setattr(data.Resident, 'batches', batches_of)
  rare = dict.fromkeys(('num_rounds', 'eval_every', 'checkpoint_every'), 4)
  train.train(least_config(**rare), str(tmp_path))
  assert logged == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_whole_run_as_on_an_accelerator(tmp_path, monkeypatch, finished):
  """One program a round, which donates its state: the log still has slots."""
  monkeypatch.setattr(Setup, 'on_cpu', property(lambda _: False))
  train.train(tiny_config(num_workers=2, num_devices=1), str(tmp_path))
  log = rows(tmp_path)
  blocks = itertools.chain(*log[-1]['slots']['stage2_chain'])
  assert sorted(blocks) == [0, 1, 2, 3, 4]


# Orbax's reads beside the one that fails complain from their threads.
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_newest_checkpoint_costs_its_rounds_only(
  finished, tmp_path, monkeypatch, caplog
):
  stopped_at(3, monkeypatch, tmp_path, tiny_config(checkpoint_every=1))
  steps = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  newest = tmp_path / 'checkpoints' / str(steps[-1])
  largest = max(
    (p for p in newest.rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  largest.write_bytes(largest.read_bytes()[:100])
  summary = train.train(tiny_config(checkpoint_every=1), str(tmp_path))
  assert f'falling back to round {steps[-2]}' in caplog.text
  assert summary['params_hash'] == finished[1]['params_hash']


def test_divergence_names_round_and_worker_and_keeps_the_checkpoint(tmp_path):
  config = least_config(lr=1e30, checkpoint_every=1)
  with pytest.raises(NonFiniteError, match=r'round 1: .* worker \d'):
    train.train(config, str(tmp_path))
  assert not list((tmp_path / 'checkpoints').iterdir())
  assert not (tmp_path / 'summary.json').exists()


def test_a_test_that_is_not_finite_ends_the_run_at_a_known_good_round(
  finished, tmp_path, monkeypatch
):
  """Training is fine until the state of the last round breaks."""
  config = tiny_config(checkpoint_every=1)
  train_round = Trainer.round

  def round_and_break(self, state, batches):
    state, metrics = train_round(self, state, batches)
    if state.round == 4:
      broken = jax.tree.map(lambda x: x * np.float32(np.nan), state.shared)
      state = state._replace(shared=broken)
    return state, metrics

  with monkeypatch.context() as patch:
    patch.setattr(Trainer, 'round', round_and_break)
    with pytest.raises(NonFiniteError) as caught:
      train.train(config, tmp_path)
  line = str(caught.value)
  assert '\n' not in line
  assert line.startswith('round 4: the outputs of the network are not finite')
  assert re.search(r'test_accuracy \(\d+ examples\), test_accuracy_paper', line)
  assert 'goes on from round 2, the last one whose test was finite' in line
  assert 'set_aside' in line
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == [
    '1', '2',
  ]  # fmt: skip
  assert (tmp_path / 'set_aside' / '3').is_dir()
  assert [row['round'] for row in rows(tmp_path)] == [1, 2, 3]
  again = train.train(config, tmp_path)
  assert again['params_hash'] == finished[1]['params_hash']


@pytest.mark.slow
def test_validation_is_reported_beside_the_test(tmp_path):
  config = tiny_config(**{'data.validation': 0.1, 'num_rounds': 1})
  summary = train.train(config, str(tmp_path))
  assert 0 <= summary['validation_accuracy'] <= 1
  assert 'validation_accuracy_paper' in summary


WHOLE_CHAIN = r'f32\[(\d,)*7,3,3,8,8\]'


@pytest.mark.parametrize('stream_blocks', rest_is_slow([True, False], [True]))
def test_no_program_of_a_whole_run_builds_the_chain(stream_blocks, tmp_path):
  """From the first value drawn to the last test, and on from a checkpoint.

  Rounds never build it. Evaluation does, unless blocks are streamed.
  """
  jax.clear_caches()
  compiled = []
  compile_round = rounds.Round.compile

  def compile_and_keep(self, *args):
    run = compile_round(self, *args)
    compiled.extend(program.as_text() for program in run.programs.values())
    return run

  config = tiny_config(num_rounds=1, min_depth=3)
  config.evaluation.stream_blocks = stream_blocks
  config.model.stage_sizes = (1, 8)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rounds.Round, 'compile', compile_and_keep)
    train.train(config, str(tmp_path))
    config.num_rounds = 2
    train.train(config, str(tmp_path))
  assert len(compiled) == 6
  text = '\n'.join(compiled)
  assert 'f32[1,3,3,3,8,8]' in text  # Each device holds three of the blocks,
  assert not re.search(WHOLE_CHAIN, text)  # none all seven.
  others = [
    module.to_string()
    for executable in jax.devices()[0].client.live_executables()
    for module in executable.hlo_modules()
  ]
  assert len(others) > 10
  found = re.search(WHOLE_CHAIN, '\n'.join(others))
  assert bool(found) != stream_blocks


@pytest.mark.slow
def test_blocks_that_are_streamed_give_the_same_accuracy(finished, tmp_path):
  """Evaluation leaves training alone, and both ways of it agree."""
  folder, whole = finished
  streamed = train_and_compare(
    tiny_config(**{'evaluation.stream_blocks': True}), tmp_path
  )
  assert streamed['params_hash'] == whole['params_hash']
  assert streamed['wire_bytes_total'] == whole['wire_bytes_total']
  for name in ('test_accuracy', 'test_accuracy_paper'):
    assert streamed[name] == pytest.approx(whole[name], abs=0.003)
  # A chain that is gathered once is sent once for each test.
  blocks = 5 * whole['params_per_block'] * 4 * 2 * (4 - 1)
  assert whole['evaluation_wire_bytes_total'] == 2 * blocks
  assert streamed['evaluation_wire_bytes_total'] % blocks == 0
  images = prepare(tiny_config()).dataset.tests['test'].images[:50]
  logits = [np.asarray(export.load(x)(images)) for x in (folder, tmp_path)]
  np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_chains_are_cut_at_once(tmp_path):
  config = tiny_config(partition=(1, 2), num_rounds=2)
  config.model.stage_sizes = (5, 6)
  summary = train.train(config, str(tmp_path))
  assert summary['num_blocks'] == {'stage1_chain': 4, 'stage2_chain': 5}
  assert set(rows(tmp_path)[0]['slots']) == {'stage1_chain', 'stage2_chain'}


def differing(folder, **fields):
  with pytest.raises(ConfigError) as caught:
    train.train(tiny_config(**fields), str(folder))
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_another_config_is_refused_and_nothing_is_touched(finished):
  folder, _ = finished
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
  message = differing(folder, lr=0.5)
  assert re.search(
    r'another config \(lr 0.03 -> 0.5\).* another workdir', message
  )
  message = differing(folder, **{'model.norm': 'group'})
  assert "model.norm 'batch' -> 'group'" in message
  message = differing(folder, num_rounds=3)
  assert 'trained 4 rounds already' in message
  after = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
  assert after == before


def test_a_log_without_its_checkpoints_is_not_begun_anew(tmp_path):
  train.train(least_config(num_rounds=2), tmp_path)
  log = (tmp_path / 'metrics.jsonl').read_text()
  (tmp_path / 'checkpoints').rename(tmp_path / 'elsewhere')
  with pytest.raises(
    ConfigError, match=r'has 2 rounds, .*no checkpoint: bring'
  ):
    train.train(least_config(num_rounds=3), tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_text() == log
  assert (tmp_path / 'summary.json').exists()
  (tmp_path / 'elsewhere').rename(tmp_path / 'checkpoints')
  there = []

  def look(row, state):
    there.append((tmp_path / 'summary.json').exists())

  config = least_config(num_rounds=3)
  summary = train.train(config, tmp_path, callbacks=[look])
  assert there == [False]  # It would tell of the end after round 2.
  assert summary['rounds'] == 3


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path):
  """Also with checkpoints from then on, which none of its rows has."""

  def end(row, state):
    if row['round'] == 3:
      raise RuntimeError('the host is gone')

  config = least_config(num_rounds=4, checkpoint_every=100)
  with pytest.raises(RuntimeError, match='the host is gone'):
    train.train(config, tmp_path, callbacks=[end])
  assert rows(tmp_path)[-1]['round'] == 3
  config = least_config(num_rounds=4, checkpoint_every=1)
  assert train.train(config, tmp_path)['rounds'] == 4


def test_checkpoints_without_a_config_are_refused(tmp_path):
  (tmp_path / 'checkpoints' / '7').mkdir(parents=True)
  (tmp_path / 'checkpoints' / '7' / '_CHECKPOINT_METADATA').touch()
  assert 'no config.json' in differing(tmp_path)


def test_loading_an_unfinished_run_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match='when it has finished'):
    export.load(tmp_path)
