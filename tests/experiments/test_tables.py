"""Tables and pictures say what the result files say."""

import json

import pytest

from experiments import (
  ablation,
  accelerator,
  checkpoint_cost,
  claims,
  deeper,
  ensemble,
  headline,
  levers,
  local_iterations,
  paper,
  pictures,
  runs,
  slow_report,
  storm,
  table2,
  table3,
  to_accuracy,
)
from experiments.compile import tables as compiled
from experiments.experiment import Results, jobs
from resist_jax.errors import ConfigError


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
    'config': {'local_steps': 3, 'num_rounds': 2, 'eval_every': 1},
    'summary': {
      'seed': seed,
      'num_devices': 4,
      'num_workers': 4,
      'image_shape': [32, 32, 3],
      'class_names': list('0123456789'),
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


def mark_busy(path):
  made = json.loads(path.read_text())
  made['provenance']['busy'] = True
  path.write_text(json.dumps(made))


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
  mark_busy(results.target(table2.cell('cifar10', 'resist', 8), 0))
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
    ['ResIST', '16', '1.25', '2 cores of P, JAX 1'],
    ['local SGD', '20', '1.00', '2 cores of P, JAX 1'],
    ['ResIST', '3', '2.00', '2 cores of Q, JAX 1'],
    ['local SGD', '6', '1.00', '2 cores of Q, JAX 1'],
    ['data parallel', '4', '1.50', '2 cores of Q, JAX 1'],
  ]
  assert {len(row) for row in table.rows} == {len(table.head)}
  figures = table3.figures(results)
  (axes,) = figures['cifar10'].figure().axes
  assert sorted(line.get_xdata()[-1] for line in axes.lines) == [3, 4, 6]
  assert figures['cifar100'] is None


def test_the_ablation_at_cpu90_is_judged_and_says_its_length(tmp_path):
  results = Results('ablation', 'cpu90', tmp_path)
  for workers in ablation.COLUMNS:
    for cell in ablation.columns(workers, 'cpu90').values():
      put(results, cell, record(0.8))
  assert (
    'cpu90 scale, half of its rounds' in ablation.tables(results)[0].caption
  )
  said = [claim.text for claim in claims._ablation(results)]
  assert any('8 workers' in text and 'minimum depth' in text for text in said)


def test_the_readme_compares_seconds_of_one_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, 'RESULTS', tmp_path)
  results, initial = Results('table2', 'paper', tmp_path), ''
  there = record(0.6, seed=1, seconds=2.0)
  there['provenance'] = {**there['provenance'], 'processor': 'A'}
  both = {'resist': [record(0.5, seconds=20.0), there]}
  both['local_sgd'] = [record(0.5, seconds=30.0)]
  for protocol, made in both.items():
    put(results, table2.cell('cifar100', protocol, 4, initial), *made)
  where = headline._machine_of(initial)
  resist = headline._paper_runs('resist', initial)
  assert headline._accuracy_and_seconds(resist, where) == ['55.0 ± 7.1', '20 s']
  assert where in headline._timed_on(resist, where)
  assert not headline._timed_on(resist[:1], where)


def test_seconds_to_an_accuracy_are_those_of_a_quiet_machine(tmp_path):
  results = Results('to_accuracy', 'cpu90', tmp_path)
  assert to_accuracy.tables(results) == []
  made = record(0.84)
  made['config'] |= {'local_steps': 6}
  made['curve'] = [
    {'round': r, 'test_accuracy': a, 'seconds_training': 90.0 * r,
     'wire_bytes_total': 1e9 * r}
    for r, a in ((1, 0.1), (2, 0.81), (3, 0.79), (4, 0.84))
  ]  # fmt: skip
  run = to_accuracy.cell('cifar10', 'resist', 4)
  put(results, run, made)
  ((row,),) = (table.rows for table in to_accuracy.tables(results))
  assert row == [
    'CIFAR-10', 'ResIST', '4', '84.0', '85.0', '2.00 GB',
    'not reached', 'not reached', 'not reached', '4.00 GB',
  ]  # fmt: skip
  paced = record(0.1)
  ends = (9.0, 10.0, 11.25, 12.25)  # A step takes 1 / 3 s, a round 2 s.
  paced['config'] = {'local_steps': 3}
  paced['curve'] = [
    {'round': r, 'seconds_training': s} for r, s in enumerate(ends, start=1)
  ]
  put(results, to_accuracy.pace('resist', 4), paced)
  table, predicted = to_accuracy.tables(results)
  assert table.rows[0][5] == '4 s, 2.00 GB'
  assert len(table.head) == len(table.rows[0])
  assert {len(row) for row in predicted.rows} == {len(predicted.head)}
  # A worker computes for 2 / 4 s in a round. In two rounds it sends 161 Mbit.
  assert [row[3:5] for row in predicted.rows] == [
    ['100 Mbit/s', '3 s'],
    ['1 Gbit/s', '1 s'],
  ]
  mark_busy(results.target(to_accuracy.pace('resist', 4), 0))
  ((row,),) = (table.rows for table in to_accuracy.tables(results))
  assert row[5] == '2.00 GB'


def test_a_table_names_the_command_that_makes_it_again():
  made = record(0.5, seed=2)
  made['config'] |= {'data': {'name': 'cifar10'}}
  made['config'] |= {'model': {'dtype': 'bfloat16'}}
  assert table2.EXPERIMENT.made_by('paper', [record(0.5), made]) == (
    'python -m experiments.table2 --scale=paper --seeds=3 --dtype=bfloat16 '
    '--data_dir=FOLDER'
  )
  command = to_accuracy.EXPERIMENT.made_by('cpu90', [record(0.5)])
  assert command == 'python -m experiments.to_accuracy --data_dir=FOLDER'


def test_a_run_of_half_the_rounds_ends_its_schedule():
  whole, half = (
    to_accuracy.cell('cifar10', 'local_sgd', 4, recipe).config('cpu90')
    for recipe in (to_accuracy.PLAIN, to_accuracy.HALF)
  )
  assert (whole.num_rounds, half.num_rounds) == (98, 49)
  assert half.optimizer.warmup_rounds == whole.optimizer.warmup_rounds // 2
  with half.unlocked():
    half.num_rounds = whole.num_rounds
    half.optimizer.warmup_rounds = whole.optimizer.warmup_rounds
  assert half.to_dict() == whole.to_dict()


def test_table2_tells_other_initial_values_apart(tmp_path):
  results = Results('table2', 'paper', tmp_path)
  put(results, table2.cell('cifar100', 'resist', 4), record(0.7))
  put(results, table2.cell('cifar100', 'resist', 4, 'he'), record(0.6))
  (table,) = table2.tables(results)
  assert [row[1:4] for row in table.rows] == [
    ['ResIST', '4', '70.0'],
    ['ResIST, initial values of He et al.', '4', '60.0'],
  ]
  given = table2.cell('cifar100', 'resist', 4, 'he').config('paper').model.init
  assert given == 'he'
  assert table2.cell('cifar100', 'resist', 4).config('paper').model.init == (
    'torch'
  )


def test_ensembles_are_drawn_beside_resist_on_as_many_workers(tmp_path):
  results = Results('ensemble', 'cpu', tmp_path)
  for workers in (2, 4, 8):
    for data in table2.DATA:
      put(results, table2.cell(data, 'resist', workers), record(0.5))
  put(results, ensemble.cell('cifar10', 4), record(0.4))
  (axes,) = ensemble.figures(results)['ensemble'].figure().axes
  assert axes.get_title() == 'CIFAR-10'
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ['4']
  put(results, ensemble.cell('cifar10', 2), record(0.4))
  (axes,) = ensemble.figures(results)['ensemble'].figure().axes
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ['2', '4']


def test_ablation_stands_beside_the_paper(tmp_path):
  results = Results('ablation', 'cpu', tmp_path)
  for workers in ablation.COLUMNS:
    listed = ablation.columns(workers, 'cpu') | ablation.closer(workers, 'cpu')
    for cell in listed.values():
      put(results, cell, record(0.4))
  (table,) = ablation.tables(results)
  theirs = {(int(row[0]), float(row[-1])) for row in table.rows}
  assert theirs == {
    (workers, accuracy)
    for workers, row in paper.ABLATION.items()
    for accuracy in row.values()
  }
  drawn = ablation.figures(results).values()
  assert [len(f.figure().axes) for f in drawn] == [2, 2]


def test_curves_show_the_mean_of_the_seeds(tmp_path):
  records = [record(0.4), record(0.6, seed=1)]
  figure = pictures.curves({'title': {'ours': records}}, 'round')
  (axes,) = figure.figure().axes
  (line,) = axes.lines
  assert line.get_ydata().tolist() == pytest.approx([25, 50])
  (band,) = axes.collections
  low, high = band.get_datalim(axes.transData).intervaly
  assert (low, high) == pytest.approx((20, 60))
  assert pictures.curves({'title': {'ours': []}}, 'round') is None


@pytest.mark.parametrize('devices', [1, 2])
def test_runs_whose_workers_share_devices_are_drawn_by_the_papers_count(
  devices,
):
  """Not all that they exchange is on the wire."""
  alone = record(0.4)
  alone['summary']['num_devices'] = devices
  for row in alone['curve']:
    row['wire_bytes_total'] = 1e5 * (devices - 1) * row['round']
    row['bytes_total'] = 2e6 * row['round']
  figure = pictures.curves({'title': {'ours': [alone]}}, 'wire_bytes_total')
  (axes,) = figure.figure().axes
  assert axes.lines[0].get_xdata().tolist() == [2, 4]
  assert axes.get_xlabel() == "sent, by the paper's count (MB)"


def test_accelerators_have_a_section(tmp_path, monkeypatch):
  made = {
    'command': 'python -m x',
    'provenance': {'device': '1 x GPU', 'versions': {'jax': 1}},
    'config': {'rounds': 2, 'local_steps': 3, 'workers': 4},
    'results': [
      {'platform': p, 'case': 'local_sgd', 'largest': 1e-9, 'of_norm': 1e-10}
      for p in ('cpu', 'accelerator')
    ],
  }
  (tmp_path / 'accelerator').mkdir()
  (tmp_path / 'accelerator' / 'GPU.json').write_text(json.dumps(made))
  monkeypatch.setattr(runs, 'RESULTS', tmp_path)
  (table,) = accelerator.tables()
  assert [row[0] for row in table.rows] == ['CPU', 'GPU']
  assert table.rows[1][1:] == ['local sgd', '1.0e-09', '1.0e-10']
  assert '(GPU, JAX 1)' in table.caption


@pytest.mark.parametrize(
  ('name', 'shown'),
  [
    ('storm/calm.json', lambda root: storm.tables()),
    ('table1/table1.json', lambda root: claims.counts()),
    ('checkpoint_cost/a.json', lambda root: checkpoint_cost.tables()),
    ('slow_network/digits_a.json', slow_report.tables),
    ('compile/target/a.json', lambda root: compiled.tables(root / 'compile')),
  ],
)
def test_a_damaged_result_is_named(name, shown, tmp_path, monkeypatch):
  damaged = tmp_path / name
  damaged.parent.mkdir(parents=True)
  damaged.write_text('{"provenance": ')
  monkeypatch.setattr(runs, 'RESULTS', tmp_path)
  monkeypatch.setattr(checkpoint_cost, 'RESULT', damaged)
  with pytest.raises(ConfigError, match='cannot be read') as refusal:
    list(shown(tmp_path))
  assert str(damaged) in str(refusal.value)


def test_levers_gain_over_the_run_of_the_same_seed(tmp_path):
  results = Results('levers', 'cpu90', tmp_path)
  assert levers.tables(results) == []

  def trained(cell, accuracy, seed=0, rounds=(1,) * 24):
    config = cell.config('cpu90')
    found = record(accuracy, seed)
    found['config'] = json.loads(json.dumps(config.to_dict()))
    found['curve'] = [
      {'round': i, 'rounds': n, 'protocol': config.protocol}
      for i, n in enumerate(rounds)
    ]
    put(results, cell, found)
    return found

  def cell(lever, protocol='resist'):
    return levers.cell(lever, protocol, 4, 'cpu90')

  for seed, accuracies in enumerate([(0.5, 0.52), (0.6, 0.63)]):
    for lever, accuracy in zip(('none', 'average'), accuracies, strict=True):
      trained(cell(lever), accuracy, seed)
  trained(cell('growing'), 0.4, rounds=(1,) * 8 + (2,) * 8)
  trained(cell('none', 'local_sgd'), 0.7)
  (table,) = levers.tables(results)
  none, average, growing = table.rows
  assert none[1:3] == ['none', '55.0 ± 7.1']
  assert none[3] == none[6] == ''
  assert average[2:4] == ['57.5 ± 7.8', '+2.5 ± 0.7']
  assert growing[3] == '-10.0'
  assert average[5:] == growing[5:] == ['', '', '']
  resist, more, fewer, local = (
    float(x) for x in (none[4], average[4], growing[4], none[7])
  )
  assert fewer < resist < more < local
  assert fewer == pytest.approx(resist * 16 / 24, abs=0.02)


def test_every_lever_changes_a_field():
  for scale in levers.EXPERIMENT.scales:
    configs = [c.config(scale).to_dict() for c in levers.cells(scale)]
    assert len({json.dumps(c, sort_keys=True) for c in configs}) == len(configs)


def on(version, made):
  """A record of the same processor under another version of JAX."""
  versions = {'versions': {'jax': version}}
  return {**made, 'provenance': {**made['provenance'], **versions}}


def test_no_setting_of_a_claim_is_lost_behind_another(tmp_path):
  """On one processor, one version of JAX speaks against it."""
  results = Results('table3', 'cpu', tmp_path)
  for protocol, *both in (('resist', 20.0, 10.0), ('local_sgd', 10.0, 20.0)):
    cell = table2.cell('cifar10', protocol, 4)
    made = [
      on(version, record(0.5, seed=version, seconds=seconds))
      for version, seconds in enumerate(both)
    ]
    put(results, cell, *made)
  (claim,) = claims.OF_EXPERIMENT['table3'](results)
  assert claim.verdict == claims.FAILS


def test_seconds_of_two_machines_are_not_compared(tmp_path):
  results = Results('deeper', 'cpu', tmp_path)
  (data, workers), *_ = deeper.RUNS['cpu']
  for version, protocol in enumerate(('local_sgd', 'resist')):
    made = on(version, record(0.5, seconds=20.0 - 10 * version))
    made['summary']['num_blocks'] = {'stage3_chain': 14}
    put(results, deeper.cell(data, '152', protocol, workers), made)
  (table,) = deeper.tables(results)
  assert table.rows[0][table.head.index('faster')] == ''
  results = Results('to_accuracy', 'cpu90', tmp_path)
  for protocol in ('resist', 'local_sgd'):
    put(results, to_accuracy.cell('cifar10', protocol, 4), record(0.84))
    mark_busy(results.target(to_accuracy.cell('cifar10', protocol, 4), 0))
  # Where the rounds were trained does not matter, where they were timed does.
  put(results, to_accuracy.pace('resist', 4), on(7, record(0.1)))
  put(results, to_accuracy.pace('local_sgd', 4), on(8, record(0.1)))
  shown, predicted = to_accuracy.tables(results)
  resist, local = (row[5] for row in shown.rows)
  assert (resist, local) == ('0.00 GB', '10 s, 0.00 GB')
  assert 'runs on 2 cores of P, JAX 8' in shown.caption
  assert {row[1] for row in predicted.rows} == {'local SGD'}
  both = [on(8, record(0.1)), on(7, record(0.1, seed=1, seconds=30.0))]
  put(results, to_accuracy.pace('local_sgd', 4), *both)
  shown, _ = to_accuracy.tables(results)
  resist, local = (row[5] for row in shown.rows)
  assert (resist, local) == ('10 s, 0.00 GB', '30 s, 0.00 GB')
  assert 'runs on 2 cores of P, JAX 7' in shown.caption


def test_seconds_under_other_settings_are_not_compared(tmp_path):
  results = Results('table3', 'cpu', tmp_path)
  made = record(0.5)
  made['provenance']['environment'] = {
    'MALLOC_ARENA_MAX': '1', 'MALLOC_TOP_PAD_': '9', 'XLA_FLAGS': '--xla_a=1'
  }  # fmt: skip
  put(results, table2.cell('cifar10', 'resist', 8), record(0.5, seed=1), made)
  put(results, table2.cell('cifar10', 'local_sgd', 8), made)
  (group,) = table3.each_group(results, 'cifar10', 8)
  where = '2 cores of P, JAX 1, with XLA_FLAGS=--xla_a=1 and MALLOC_* set'
  assert group.machine == where
  assert [r['summary']['seed'] for r in group.runs['resist']] == [0]


def test_a_run_of_one_round_has_no_pace(tmp_path):
  results = Results('to_accuracy', 'smoke', tmp_path)
  made = record(0.84)
  made['curve'] = made['curve'][1:]
  put(results, to_accuracy.cell('cifar10', 'local_sgd', 4), made)
  (table,) = to_accuracy.tables(results)
  assert table.rows[0][5] == '0.00 GB'


def test_workers_on_one_device_would_send_as_much(tmp_path):
  """On one GPU nothing is sent, and the bytes are predicted."""
  results = Results('to_accuracy', 'cpu90', tmp_path)
  run = to_accuracy.cell('cifar10', 'local_sgd', 4)
  made = record(0.84)
  config = json.loads(json.dumps(run.config('cpu90').to_dict()))
  made |= {'config': config}
  made['summary']['num_devices'] = 1
  for row in made['curve']:
    row |= {'protocol': 'local_sgd', 'wire_bytes_total': 0}
  put(results, run, made)
  *_, table = to_accuracy.tables(results)[:1]
  sent = float(table.rows[0][5].removesuffix(' GB').split()[-1])
  assert sent == pytest.approx(2 * 0.1148, rel=0.02)


def test_settings_are_drawn_in_their_order(tmp_path):
  results = Results('local_iterations', 'cpu', tmp_path)
  for protocol, lengths in (('resist', (384, 0)), ('local_sgd', (96, 384, 0))):
    for steps in lengths:
      cell = local_iterations.cell(protocol, 4, steps, 'cpu')
      put(results, cell, record(0.5))
  (picture,) = local_iterations.figures(results).values()
  assert picture.charts[0].categories == ['96', '384', 'never']


def test_each_machine_measures_a_pace_of_its_own(tmp_path, monkeypatch):
  results = Results('to_accuracy', 'cpu90', tmp_path)
  here = record(0.1)['provenance']
  monkeypatch.setattr(runs, 'here', lambda: here)

  def left(seeds=1):
    todo = jobs(to_accuracy.EXPERIMENT, results, seeds, 'pace_resist_s4', False)
    return [seed for _, seed, _ in todo]

  assert left() == [0]
  put(results, to_accuracy.pace('resist', 4), on(7, record(0.1)))
  assert left() == [1]
  put(results, to_accuracy.pace('resist', 4), record(0.1, seed=1))
  assert left() == []
  assert left(2) == [2]
  mark_busy(results.target(to_accuracy.pace('resist', 4), 1))
  assert left() == [2]


def test_a_busy_machine_measures_no_pace(tmp_path):
  results = Results('to_accuracy', 'cpu90', tmp_path)

  def names(busy):
    todo = jobs(to_accuracy.EXPERIMENT, results, 1, '', busy)
    return {cell.name for cell, _, _ in todo}

  paces = {name for name in names(False) if name.startswith('pace')}
  assert names(False) - names(True) == paces
  assert paces
