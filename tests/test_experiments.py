"""The paper's experiments: what they train, keep and show."""

import dataclasses
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
  paper,
  pictures,
  runs,
  sections,
  site,
  table2,
  table3,
)
from experiments.experiment import Cell, Results
from experiments.table import Table
from resist_jax import validation
from resist_jax.interrupt import Interrupt

EXPERIMENTS = {e.name: e for e in sections.EXPERIMENTS}
GIVEN = [(n, scale) for n in EXPERIMENTS for scale in experiment.SCALES]


@pytest.mark.parametrize(('name', 'scale'), GIVEN)
def test_every_cell_is_a_valid_run(name, scale):
  cells = EXPERIMENTS[name].cells(scale)
  for cell in cells:
    validation.validate(cell.config(scale))
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
  free = dict.fromkeys(('data.dir', 'seed', 'model.dtype'))
  for scale in experiment.SCALES:
    for cell in EXPERIMENTS[name].cells(scale):
      now = json.loads(json.dumps(cell.config(scale).to_dict()))
      now = dict(flat(now)) | free
      for record in Results(name, scale).of(cell):
        then = dict(flat(record['config'])) | free
        assert record['provenance']['commit'] != 'unknown'
        # A field that came later had its default then.
        assert {k: now[k] for k in then} == then, cell.name


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
  validation.validate(alone)
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
      assert steps - config.local_steps < trained <= steps


def test_the_ablation_adds_one_thing_a_row():
  changes = []
  for workers in ablation.COLUMNS:
    rows = [
      dict(flat(cell.config('cpu').to_dict()))
      for cell in ablation.columns(workers, 'cpu').values()
    ]
    for before, after in itertools.pairwise(rows):
      changes.append({k for k in before if before[k] != after[k]})
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


def record(accuracy, seed=0, seconds=10.0):
  rows = [
    {'round': r, 'test_accuracy': a, 'seconds_training': s,
     'wire_bytes_total': 1e6 * r}
    for r, a, s in ((1, accuracy / 2, seconds / 2), (2, accuracy, seconds))
  ]  # fmt: skip
  return {
    'provenance': {
      'device': '4 x cpu', 'cores': 2, 'processor': 'P', 'versions': {'jax': 1}
    },
    'config': {'local_steps': 3, 'num_rounds': 2},
    'summary': {
      'seed': seed,
      'test_accuracy': accuracy,
      'test_accuracy_paper': accuracy + 0.01,
      'best_test_accuracy_paper': accuracy + 0.02,
      'seconds_training': seconds,
    },
    'curve': rows,
  }  # fmt: skip


def put(results, cell, *records):
  for found in records:
    target = results.target(cell, found['summary']['seed'])
    target.parent.mkdir(parents=True, exist_ok=True)
    runs.write_record(target, found)
    assert json.loads(target.read_text()) == found


def test_table2_lays_means_and_deviations_beside_the_paper(tmp_path):
  results = Results('table2', 'cpu', tmp_path)
  assert table2.tables(results) == []
  cell = table2.cell('cifar100', 'resist', 4)
  put(results, cell, record(0.5), record(0.52, seed=1))
  (table,) = table2.tables(results)
  (row,) = table.rows
  assert row[:3] == ['CIFAR-100', 'ResIST', '4']
  assert row[3:] == ['51.0 ± 1.4', '52.0 ± 1.4', '53.0 ± 1.4', '71.30 ± 0.20']
  assert len(row) == len(table.head)
  assert 'up to 2 seeds' in table.caption


def test_table3_finds_the_first_test_at_the_target(tmp_path):
  results = Results('table3', 'cpu', tmp_path)
  put(results, table2.cell('cifar10', 'local_sgd', 8), record(0.5, seconds=20))
  put(results, table2.cell('cifar10', 'resist', 8), record(0.9, seconds=8))
  (table,) = table3.tables(results)
  rows = {row[1]: row for row in table.rows}
  assert rows['local SGD'][3:7] == ['20', '1.00', '45.0%', '20']
  assert rows['ResIST'][3:7] == ['8', '2.50', '45.0%', '4']
  assert rows['ResIST'][7] == '2671 s, 3.77'
  runs.mark_busy(results.target(table2.cell('cifar10', 'resist', 8), 0))
  assert table3.tables(results) == []
  assert len(table2.tables(results)[0].rows) == 2


def test_table3_compares_the_runs_of_one_machine_only(tmp_path):
  results = Results('table3', 'cpu', tmp_path)
  fast = [record(0.5, seed=1, seconds=s) for s in (6.0, 3.0, 4.0)]
  for made in fast:
    made['provenance'] = {**made['provenance'], 'processor': 'Q'}
  slow = [record(0.5, seconds=s) for s in (20.0, 16.0)]
  for protocol, *made in zip(
    ('local_sgd', 'resist'), slow, fast[:2], strict=True
  ):
    put(results, table2.cell('cifar10', protocol, 4), *made)
  put(results, table2.cell('cifar10', 'data_parallel', 4), fast[2])
  put(results, table2.cell('cifar100', 'data_parallel', 4), fast[2])
  (table,) = table3.tables(results)
  assert table.head[-1] == 'machine'
  assert [[row[1], *row[3:5], row[-1]] for row in table.rows] == [
    ['ResIST', '16', '1.25', '2 cores of P'],
    ['local SGD', '20', '1.00', '2 cores of P'],
    ['ResIST', '3', '2.00', '2 cores of Q'],
    ['local SGD', '6', '1.00', '2 cores of Q'],
    ['data parallel', '4', '1.50', '2 cores of Q'],
  ]
  assert {len(row) for row in table.rows} == {len(table.head)}
  figures = table3.figures(results)
  (axes,) = figures['cifar10'].axes
  assert sorted(line.get_xdata()[-1] for line in axes.lines) == [3, 4, 6]
  assert figures['cifar100'] is None


def test_ensembles_are_drawn_beside_resist_on_as_many_workers(tmp_path):
  results = Results('ensemble', 'cpu', tmp_path)
  for workers in (2, 4, 8):
    for data in table2.DATA:
      put(results, table2.cell(data, 'resist', workers), record(0.5))
  put(results, ensemble.cell('cifar10', 4), record(0.4))
  (axes,) = ensemble.figures(results)['ensemble'].axes
  assert axes.get_title() == 'CIFAR-10'
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ['4']
  put(results, ensemble.cell('cifar10', 2), record(0.4))
  (axes,) = ensemble.figures(results)['ensemble'].axes
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ['2', '4']


def test_columns_nearer_to_the_paper_differ_as_the_small_ones():
  short = list(ablation.columns(8, 'cpu').values())[:2]
  again = list(ablation.again(8, 'cpu').values())
  longer, chain = again[:2], again[2:]
  for cells in (short, longer, chain):
    before, after = (dict(flat(c.config('cpu').to_dict())) for c in cells)
    assert {k for k in before if before[k] != after[k]} == {'min_depth'}
  rounds = [cells[0].config('cpu').num_rounds for cells in (short, longer)]
  assert rounds[1] == 4 * rounds[0]
  # The chain, and its depth, are those of the paper's card.
  theirs = short[1].config('paper')
  assert chain[1].config('cpu').model.stage_sizes == theirs.model.stage_sizes
  assert chain[1].config('cpu').min_depth == theirs.min_depth
  assert not ablation.again(2, 'cpu')
  assert not ablation.again(8, 'paper')
  assert len({cell.name for cell in short + again}) == 6


def test_ablation_stands_beside_the_paper(tmp_path):
  results = Results('ablation', 'cpu', tmp_path)
  for workers in ablation.COLUMNS:
    listed = ablation.columns(workers, 'cpu') | ablation.again(workers, 'cpu')
    for cell in listed.values():
      put(results, cell, record(0.4))
  (table,) = ablation.tables(results)
  theirs = {(int(row[0]), float(row[-1])) for row in table.rows}
  assert theirs == {
    (workers, accuracy)
    for workers, row in paper.ABLATION.items()
    for accuracy in row.values()
  }
  assert [len(f.axes) for f in ablation.figures(results).values()] == [2, 2]


def test_curves_show_the_mean_of_the_seeds(tmp_path):
  records = [record(0.4), record(0.6, seed=1)]
  figure = pictures.curves({'title': {'ours': records}}, 'round')
  (axes,) = figure.axes
  (line,) = axes.lines
  assert line.get_ydata().tolist() == pytest.approx([25, 50])
  (band,) = axes.collections
  low, high = band.get_datalim(axes.transData).intervaly
  assert (low, high) == pytest.approx((20, 60))
  assert pictures.curves({'title': {'ours': []}}, 'round') is None


def test_the_page_holds_every_table(tmp_path):
  table = Table('A < B', 'python -m x', ['a'], [['<1>'], ['2 ± 1']])
  figure = pictures.steps({'t': {'ours': {'a': [1.0], 'b': [2.0]}}})
  part = sections.Section('This & that', [table], {'curve': figure})
  text = site.page([part])
  assert '<h2>This &amp; that</h2>' in text
  assert '<td>&lt;1&gt;</td>' in text
  assert '<code>python -m x</code>' in text
  assert text.count('src="data:image/png;base64,') == 1
  assert 'http' not in text.split('<body>')[1]


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
  folder = tmp_path_factory.mktemp('experiment')
  results, unfinished = folder / 'results', folder / 'runs'
  return ['--scale=smoke', '--only=resist', '--seeds=1',
          f'--results={results}', f'--runs={unfinished}']  # fmt: skip


def test_a_command_goes_on_and_skips_what_is_done(arguments, capsys):
  command = digits.EXPERIMENT
  results = pathlib.Path(arguments[3].split('=')[1])
  unfinished = pathlib.Path(arguments[4].split('=')[1])
  target = results / 'quantised/smoke/digits_resist_float32_seed0.json'
  # As a stop after the first round leaves it.
  begun = digits.cell('resist').config('smoke')
  begun.num_rounds = 1
  folder = unfinished / 'digits/smoke' / target.stem
  runs.train.train(begun, str(folder))
  first = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[0])

  experiment.main(command, 'What it does.', arguments)
  found = json.loads(target.read_text())
  assert [row['round'] for row in found['curve']] == [1, 2]
  assert found['curve'][0]['seconds_training'] == first['seconds_training']
  assert found['config']['data']['dir'] == ''
  assert not folder.exists()
  shown = results / 'digits/smoke'
  assert (shown / 'table.md').read_text().startswith('Handwritten digits')
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
  with pytest.raises(SystemExit) as stop:
    experiment.main(command, 'What it does.', [f'--results={tmp_path}'])
  assert stop.value.code == 128 + signal.SIGTERM
  assert trained == ['resist']


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
