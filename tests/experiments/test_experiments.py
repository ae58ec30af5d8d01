"""The paper's experiments: what they train, keep and show."""

import dataclasses
import errno
import itertools
import json
import pathlib
import signal

import pytest

from experiments import (
  ablation,
  digits,
  ensemble,
  experiment,
  local_iterations,
  runs,
  sections,
  table2,
)
from experiments.experiment import Cell, Results, changed
from experiments.table import Table
from resist_jax import models
from resist_jax.errors import ConfigError, NonFiniteError, WorkdirLostError
from resist_jax.run import checks
from resist_jax.run.interrupt import Interrupt

EXPERIMENTS = {e.name: e for e in sections.EXPERIMENTS}
GIVEN = [(n, scale) for n, e in EXPERIMENTS.items() for scale in e.scales]


@pytest.mark.parametrize(('name', 'scale'), GIVEN)
def test_every_cell_is_a_valid_run(name, scale):
  cells = EXPERIMENTS[name].cells(scale)
  for cell in cells:
    checks.validate(cell.config(scale))
  targets = [Results(name, scale).target(cell, 0) for cell in cells]
  assert len(set(targets)) == len(targets)


@pytest.mark.parametrize(('name', 'scale'), GIVEN)
def test_a_cell_that_lives_elsewhere_is_the_same_there(name, scale):
  """Or one experiment would train what another one shows as its own."""
  for cell in EXPERIMENTS[name].cells(scale):
    if cell.home:
      there = {c.name: c for c in EXPERIMENTS[cell.home].cells(scale)}
      other = there[cell.name]
      assert other.config(scale).to_dict() == cell.config(scale).to_dict()


def flat(config, prefix=''):
  for key, value in config.items():
    if isinstance(value, dict):
      yield from flat(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_committed_results_are_of_these_cells(name):
  """A card that changes leaves results behind that it no longer describes."""
  for scale in EXPERIMENTS[name].scales:
    for cell in EXPERIMENTS[name].cells(scale):
      for record in Results(name, scale).of(cell):
        assert record['provenance']['commit'] != 'unknown'
        assert not changed(cell, scale, record), cell.name


def test_results_of_an_older_card_are_told(tmp_path, capsys):
  """Else old and new settings would stand in one table."""
  (cell, *_) = digits.EXPERIMENT.cells('smoke')
  results = Results('digits', 'smoke', tmp_path)
  config = experiment.as_json(cell.config('smoke'))
  record = {'config': {**config, 'lr': 7.0, 'seed': 3}}
  runs.write_record(results.target(cell, 0), record)
  assert changed(cell, 'smoke', record) == {'lr': (config['lr'], 7.0)}
  with pytest.raises(SystemExit) as ended:
    experiment.main(
      digits.EXPERIMENT, None, ['--scale=smoke', f'--results={tmp_path}']
    )
  assert ended.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert 'there are results of it with 7.0: name another folder' in line
  del config['average']  # A group of fields that came later.
  assert not changed(cell, 'smoke', {'config': config})


def test_no_result_file_is_of_no_cell():
  known = {
    Results(name, scale).target(cell, 0).name.removesuffix('_seed0.json')
    for name, scale in GIVEN
    for cell in EXPERIMENTS[name].cells(scale)
  }
  for name in EXPERIMENTS:
    for path in (runs.RESULTS / name).rglob('*_seed*.json'):
      assert path.stem.split('_seed')[0] in known, path


@pytest.mark.parametrize('number', [0, 1, 3])
def test_members_of_an_ensemble_are_as_deep_as_a_worker(number):
  config = Cell('', 'cifar10', 's4').config('paper')
  alone = ensemble.member(config, number)
  checks.validate(alone)
  assert tuple(alone.model.stage_sizes) == (3, 4, 7, 3)
  assert alone.num_rounds * alone.local_steps == 313 * 50
  other = ensemble.member(config, number + 1)
  assert alone.seed != other.seed


def test_the_sweep_of_l_keeps_the_steps():
  for scale in ('cpu', 'paper'):
    for cell in local_iterations.cells(scale):
      config = cell.config(scale)
      card = table2.cell('cifar100', 'resist', config.num_workers).config(scale)
      steps = card.num_rounds * card.local_steps
      trained = config.num_rounds * config.local_steps
      assert abs(trained - steps) <= config.local_steps / 2


def ablated(scale):
  """The rows of each number of workers, and what each changes in the last."""
  rows = {
    workers: [
      dict(flat(cell.config(scale).to_dict()))
      for cell in ablation.columns(workers, scale).values()
    ]
    for workers in ablation.COLUMNS
  }
  changes = [
    {k for k in before if before[k] != after[k]}
    for listed in rows.values()
    for before, after in itertools.pairwise(listed)
  ]
  return rows, changes


def test_the_ablation_adds_one_thing_a_row():
  _, changes = ablated('cpu')
  another_l = {'local_steps', 'num_rounds', 'eval_every', 'checkpoint_every'}
  assert changes == [
    {'partition_strided'},
    # Dealing one section only, there is a hand-over and a minimum depth.
    {'partition', 'exchange', 'min_depth'},
    {'residual_scale'},
    {'model.pre_activation'},
    another_l,
    {'min_depth'},
    another_l,
    another_l,
  ]


def test_the_ablation_at_cpu90_adds_one_thing_a_row():
  rows, changes = ablated('cpu90')
  for workers, listed in rows.items():
    card = table2.cell('cifar10', 'resist', workers).config('cpu90')
    for row in listed:  # All train as long, with the same share of warm-up.
      steps = row['num_rounds'] * row['local_steps']
      assert steps == card.num_rounds * card.local_steps // 2
      warm = row['optimizer.warmup_rounds'] * row['local_steps']
      wanted = card.optimizer.warmup_rounds * card.local_steps // 2
      assert 0 <= wanted - warm < row['local_steps']
  another_l = {'local_steps', 'num_rounds', 'eval_every', 'checkpoint_every'}
  another_l |= {'optimizer.warmup_rounds'}
  assert changes == [
    # A strided block cannot be handed over; two workers halve the others.
    {'partition_strided', 'exchange', 'min_depth'},
    {'residual_scale'},
    {'model.pre_activation'},
    another_l,
    {'min_depth'},
    another_l,
    another_l,
  ]


def test_columns_nearer_to_the_paper_differ_as_the_small_ones():
  short = list(ablation.columns(8, 'cpu').values())[:2]
  closer = list(ablation.closer(8, 'cpu').values())
  longer, chain = closer[:2], closer[2:]
  for cells in (short, longer, chain):
    before, after = (dict(flat(c.config('cpu').to_dict())) for c in cells)
    assert {k for k in before if before[k] != after[k]} == {'min_depth'}
  rounds = [cells[0].config('cpu').num_rounds for cells in (short, longer)]
  assert rounds[1] == 4 * rounds[0]
  # The chain, and its depth, are those of the paper's card.
  ours, theirs = chain[1].config('cpu'), short[1].config('paper')
  assert not theirs.model.stage_sizes  # Those of the name:
  named = getattr(models, theirs.model.name)(num_classes=10)
  assert ours.model.name == theirs.model.name
  assert ours.model.stage_sizes == named.stage_sizes
  assert ours.min_depth == theirs.min_depth
  assert not ablation.closer(2, 'cpu')
  assert not ablation.closer(8, 'paper')
  assert len({cell.name for cell in short + closer}) == 6


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
  folder = tmp_path_factory.mktemp('experiment')
  results, unfinished = folder / 'results', folder / 'runs'
  return ['--scale=smoke', '--only=resist', '--seeds=1',
          f'--results={results}', f'--runs={unfinished}']  # fmt: skip


def small(cell):
  """Returns the cell with a network that compiles in seconds."""
  network = {
    'model.stage_sizes': (1, 5),
    'model.widths': (8, 8),
    'partition': (2,),
  }
  return dataclasses.replace(cell, overrides={**cell.overrides, **network})


@pytest.mark.experiments  # It trains, and draws pictures.
def test_a_command_goes_on_and_skips_what_is_done(arguments, capsys):
  command = dataclasses.replace(
    digits.EXPERIMENT,
    cells=lambda scale: [small(cell) for cell in digits.cells(scale)],
  )
  results = pathlib.Path(arguments[3].split('=')[1])
  unfinished = pathlib.Path(arguments[4].split('=')[1])
  target = results / 'quantised/smoke/digits_resist_float32_seed0.json'
  # As a stop after the first round leaves it.
  begun = small(digits.cell('resist')).config('smoke')
  begun.num_rounds = 1
  folder = unfinished / 'quantised/smoke' / target.stem
  runs.train.train(begun, str(folder))
  first = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[0])

  experiment.main(command, 'What it does.', arguments)
  found = json.loads(target.read_text())
  assert [row['round'] for row in found['curve']] == [1, 2]
  assert found['curve'][0]['seconds_training'] == first['seconds_training']
  assert found['config']['data']['dir'] == ''
  assert not folder.exists()
  shown = results / 'digits/smoke'
  assert '| ResIST |' in (shown / 'table.md').read_text()
  assert (shown / 'decomposition.png').exists()

  before = target.stat().st_mtime_ns
  capsys.readouterr()
  experiment.main(command, 'What it does.', arguments)
  assert target.stat().st_mtime_ns == before
  assert 'ResIST' in capsys.readouterr().out


def test_a_stop_between_runs_ends_the_next_one_early():
  with Interrupt() as outer:
    signal.raise_signal(signal.SIGTERM)
    with Interrupt() as inner:
      assert inner.signum == outer.signum == signal.SIGTERM


@pytest.mark.parametrize(
  ('wrong', 'told'),
  [
    (['--seeds=0'], 'at least 1'),
    (['--scale=huge'], 'invalid choice'),
    (['--dtype=float8'], 'dtype'),
    (['--only=nothing'], 'digits_resist_float32, digits_local'),
    (['--scale=paper'], 'there are no runs'),
  ],
)
def test_wrong_arguments_are_told(arguments, wrong, told, capsys):
  with pytest.raises(SystemExit) as stop:
    experiment.main(digits.EXPERIMENT, 'What it does.', [*arguments, *wrong])
  assert stop.value.code == 2
  assert told in capsys.readouterr().err


def test_a_stop_in_a_last_round_stops_the_experiment(tmp_path):
  """The run that heard of it completes; no other one begins."""
  trained = []

  def stopped(config, target, folder):
    del target, folder
    with Interrupt():
      signal.raise_signal(signal.SIGTERM)
    trained.append(config.protocol)

  command = dataclasses.replace(digits.EXPERIMENT, train=stopped)
  args = [f'--results={tmp_path}', f'--runs={tmp_path}/runs']
  with pytest.raises(SystemExit) as stop:
    experiment.main(command, 'What it does.', args)
  assert stop.value.code == 128 + signal.SIGTERM
  assert trained == ['resist']


@pytest.mark.parametrize(
  ('error', 'code', 'told'),
  [
    (OSError(errno.ENOSPC, 'No space left'), 1, 'make room in'),
    (WorkdirLostError('the workdir was moved.'), 1, 'was moved'),
    (ConfigError('lr is -1; it must be more than 0.'), 2, 'lr is -1'),
    (RuntimeError('RESOURCE_EXHAUSTED: 9 GB'), 1, 'the memory does not suffi'),
  ],
)
def test_what_ends_a_run_is_told_in_a_line(tmp_path, capsys, error, code, told):
  def train(config, target, folder):
    raise error

  failing = dataclasses.replace(digits.EXPERIMENT, train=train)
  args = [f'--results={tmp_path}', f'--runs={tmp_path}', '--scale=smoke']
  with pytest.raises(SystemExit) as stop:
    experiment.main(failing, 'What it does.', args)
  assert stop.value.code == code
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: digits_resist_float32_seed0: ')
  assert told in line


def test_a_run_that_diverges_keeps_no_other_from_being_trained(
  tmp_path, capsys
):
  trained = []

  def train(config, target, folder):
    trained.append(target.stem)
    if len(trained) == 2:
      raise NonFiniteError('a loss is nan.')

  command = dataclasses.replace(digits.EXPERIMENT, train=train)
  args = [f'--results={tmp_path}', f'--runs={tmp_path}', '--scale=smoke']
  with pytest.raises(SystemExit) as stop:
    experiment.main(command, 'What it does.', args)
  assert stop.value.code == 1
  assert len(trained) == len(digits.cells('smoke')) > 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line == f'error: {trained[1]}: a loss is nan.'


def test_numbers_of_two_dtypes_are_not_compared(tmp_path, capsys):
  cell, *_ = digits.cells('smoke')
  target = Results('digits', 'smoke', tmp_path).target(cell, 0)
  target.parent.mkdir(parents=True)
  made = {'config': {'model': {'dtype': 'bfloat16'}}, 'summary': {'seed': 0}}
  runs.write_record(target, made)
  args = [f'--results={tmp_path}', '--scale=smoke', f'--only={cell.name}']
  with pytest.raises(SystemExit) as stop:
    experiment.main(digits.EXPERIMENT, 'What it does.', args)
  assert stop.value.code == 2
  told = capsys.readouterr().err
  assert 'set --dtype=bfloat16' in told
  assert json.loads(target.read_text()) == made


@pytest.mark.parametrize('found', ['a cell that is not trained', 'beside'])
def test_a_table_shows_no_numbers_of_two_dtypes(found, tmp_path, capsys):
  if found == 'beside':
    made, run, other = ensemble.EXPERIMENT, *_ensemble_beside_resist()
  else:
    made, (run, other, *_) = digits.EXPERIMENT, digits.cells('smoke')
  target = Results(made.name, 'smoke', tmp_path).target(other, 0)
  target.parent.mkdir(parents=True)
  wide = {'config': {'model': {'dtype': 'bfloat16'}}, 'summary': {'seed': 0}}
  runs.write_record(target, wide)
  args = [f'--results={tmp_path}', '--scale=smoke', f'--only={run.name}']
  with pytest.raises(SystemExit) as stop:
    experiment.main(made, 'What it does.', args)
  assert stop.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert f'there are results of {other.name} in bfloat16' in line


def _ensemble_beside_resist():
  return ensemble.cell('cifar10', 2), table2.cell('cifar10', 'resist', 2)


def test_a_copy_of_a_result_is_no_further_seed(tmp_path):
  cell, *_ = digits.cells('smoke')
  results = Results('digits', 'smoke', tmp_path)
  for name in ('seed0', 'seed0_old', 'seed0 (1)', 'seed1'):
    target = results.folder(cell) / f'{cell.name}_{name}.json'
    runs.write_record(target, {'summary': {'seed': int(name[4])}})
  assert [r['summary']['seed'] for r in results.of(cell)] == [0, 1]


@pytest.mark.parametrize('text', ['{"summary": {', '[]', '<<<<<<< HEAD'])
def test_a_damaged_result_is_one_line(text, tmp_path, capsys):
  cell, *_ = digits.cells('smoke')
  target = Results('digits', 'smoke', tmp_path).target(cell, 0)
  target.parent.mkdir(parents=True)
  target.write_text(text)
  args = [f'--results={tmp_path}', '--scale=smoke', '--show']
  with pytest.raises(SystemExit) as stop:
    experiment.main(digits.EXPERIMENT, 'What it does.', args)
  assert stop.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert str(target) in line
  assert target.read_text() == text


def test_tables_are_shown_where_nothing_can_be_written(tmp_path, capsys):
  results = Results('digits', 'smoke', tmp_path)
  (tmp_path / 'digits').write_text('')  # A file where the folder would be.
  table = Table('What it shows.', '', ['a'], [['1']])
  made = dataclasses.replace(digits.EXPERIMENT, tables=lambda results: [table])
  experiment.show(made, results)
  said = capsys.readouterr()
  assert 'What it shows.' in said.out
  assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(('name', 'scale'), GIVEN)
def test_every_cell_can_be_trained_alone(name, scale):
  cells = EXPERIMENTS[name].cells(scale)
  for cell in cells:
    assert experiment.named(cells, cell.name) == [cell]


def test_results_that_cannot_be_written_cost_no_training(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  runs_folder = tmp_path / 'runs'
  args = [
    '--scale=smoke',
    f'--results={tmp_path}/file',
    f'--runs={runs_folder}',
  ]
  with pytest.raises(SystemExit) as stop:
    experiment.main(digits.EXPERIMENT, 'What it does.', args)
  assert stop.value.code == 2
  assert 'is not a folder' in capsys.readouterr().err
  assert not runs_folder.exists()
