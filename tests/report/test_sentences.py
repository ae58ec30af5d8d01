"""What stands on top of a report, and what it ranks."""

import json

from pages import check_alone
import pytest

from resist_jax import report
from resist_jax.report import compare, curves, groups, records, sentence

CONFIG = {'lr': 0.1, 'num_rounds': 2, 'data': {'name': 'digits', 'dir': ''}}


def put(path, accuracy, protocol='resist', seed=0, **fields):
  """Writes a finished run of two rounds; round 0 is a test before them."""
  path.mkdir(parents=True)
  config = {**CONFIG, 'protocol': protocol, 'seed': seed}
  (path / 'config.json').write_text(json.dumps(config))
  costs = {'resist': 1, 'local_sgd': 4, 'data_parallel': 40}[protocol]
  rows = [
    {
      'round': number,
      'protocol': protocol,
      'test_accuracy': share * accuracy,
      'seconds_training': 2.0 * number,
      'bytes_total': 3e6 * costs * number,
      'wire_bytes_total': 1e6 * costs * number,
      'slots': {},
    }
    for number, share in enumerate((0.1, 0.5, 1))
  ]
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (path / 'metrics.jsonl').write_text(lines)
  summary = {
    'protocol': protocol,
    'dataset': 'digits',
    'class_names': ['zero', 'one'],
    'image_shape': [8, 9, 1],
    'model': 'Tiny',
    'num_workers': 4,
    'rounds': 2,
    'test_accuracy': accuracy,
    'seconds_training': 4.0 * costs,
    'bytes_total': int(6e6 * costs),
    'wire_bytes_total': int(2e6 * costs),
    'bytes_per_round': int(3e6 * costs),
    'wire_bytes_per_round': int(1e6 * costs),
    'wire_bytes_per_round_local_sgd': int(4e6),
    'wire_bytes_per_round_data_parallel': int(40e6),
    'device': 'cpu',
    'num_devices': 4,
    'seed': seed,
    **fields,
  }
  (path / 'summary.json').write_text(json.dumps(summary))
  return path


def said(*paths):
  return sentence.sentences(groups.grouped(records.load_runs(paths)))


@pytest.mark.parametrize(
  'fields', [{'num_devices': 1}, {'device': 'other'}, {'device': None}]
)
def test_seconds_are_compared_on_equal_devices_only(tmp_path, fields):
  ours = put(tmp_path / 'ours', 0.8)
  theirs = put(tmp_path / 'theirs', 0.8, 'local_sgd')
  assert 'took 25% of its seconds' in ' '.join(said(ours, theirs))
  other = put(tmp_path / 'other', 0.8, 'local_sgd', **fields)
  assert 'took' not in ' '.join(said(ours, other))


def test_bytes_of_a_round_are_a_mean_where_phases_differ(tmp_path):
  folder = put(tmp_path / 'ours', 0.8, bytes_total=123e6, wire_bytes_total=41e6)
  plain = ' '.join(said(folder))
  assert '1 MB in a round: 25% of what local SGD would send' in plain
  rows = (folder / 'metrics.jsonl').read_text().splitlines()
  last = {**json.loads(rows[-1]), 'protocol': 'data_parallel'}
  lines = [*rows[:-1], json.dumps(last), '']
  (folder / 'metrics.jsonl').write_text('\n'.join(lines))
  cost = ' '.join(said(folder))
  assert '20.5 MB in a round: 512% of what local SGD would send' in cost
  assert '51% of what data parallel' in cost


def test_a_run_from_before_phases_had_a_protocol_is_the_same(tmp_path):
  folders = [put(tmp_path / f'seed{seed}', 0.8, seed=seed) for seed in (0, 1)]
  for folder, more in zip(
    folders, ({}, {'protocol': 'local_sgd'}), strict=True
  ):
    config = json.loads((folder / 'config.json').read_text())
    config['phases'] = {'full_after': 1, 'full_before': 0, **more}
    (folder / 'config.json').write_text(json.dumps(config))
  assert len(groups.grouped(records.load_runs(folders))) == 1


def test_a_seed_that_is_not_tested_yet_is_left_out_of_the_mean(tmp_path):
  runs = [
    put(tmp_path / f'cifar10_seed{seed}', accuracy, seed=seed)
    for seed, accuracy in ((10, 0.7), (11, 0.72), (12, 0.9))
  ]
  summary = json.loads((runs[2] / 'summary.json').read_text())
  summary['test_accuracy'] = None
  (runs[2] / 'summary.json').write_text(json.dumps(summary))
  (group,) = groups.grouped(records.load_runs(runs))
  assert f'{group.summary["test_accuracy"]:.1%}' == '71.0% ± 1.4%'
  assert group.name == 'cifar10'  # And not cifar10_seed1.


def test_a_seed_that_is_not_tested_yet_hides_no_curve(tmp_path):
  runs = [put(tmp_path / f'seed{seed}', 0.7, seed=seed) for seed in (0, 1, 2)]
  log = runs[2] / 'metrics.jsonl'
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  for row in rows:
    del row['test_accuracy']
  log.write_text(''.join(json.dumps(row) + '\n' for row in rows[1:2]))
  (runs[2] / 'summary.json').unlink()
  (group,) = groups.grouped(records.load_runs(runs))
  curve = group.curve('round', 'test_accuracy')
  assert [(point.x, point.seeds) for point in curve] == [(0, 2), (1, 2), (2, 2)]
  page = ' '.join(said(*runs))
  assert '2 seeds are too few' in page
  assert 'unfinished' in page  # The first run has nothing to say of that.


def test_a_test_at_the_very_end_is_on_the_curve(tmp_path):
  folder = put(tmp_path / 'run', 0.8, sets_loss=0.5)
  log = folder / 'metrics.jsonl'
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  rows[-1]['test_accuracy'] = None
  log.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (group,) = groups.grouped(records.load_runs([folder]))
  assert group.curve('round', 'test_accuracy')[-1].y == 0.8
  assert [p.x for p in group.curve('round', 'sets_loss')] == [2]


def test_what_a_module_calls_its_data_is_told(tmp_path):
  folder = put(tmp_path / 'run', 0.8)
  (folder / 'summary.json').unlink()
  (folder / 'data.json').write_text(json.dumps({'called': 'shakespeare'}))
  (run,) = records.load_runs([folder])
  assert run.summary['dataset'] == 'shakespeare'


def test_one_run_is_told_beside_what_baselines_would_send(tmp_path):
  result, cost, seeds, task = said(put(tmp_path / 'run', 0.875))
  assert result == (
    'After 2 rounds on digits, run (ResIST) classifies 87.5% of the test '
    'images correctly.'
  )
  assert '1 MB in a round: 25% of what local SGD would send' in cost
  assert '2.5% of what data parallel would send' in cost
  assert 'one seed' in seeds
  assert task == (
    '4 workers trained Tiny on digits: 2 classes (zero, one), images of 8 x 9 '
    'pixels in 1 channel.'
  )


def test_two_protocols_of_one_seed_are_not_ranked(tmp_path):
  runs = put(tmp_path / 'a', 0.9), put(tmp_path / 'b', 0.8, 'local_sgd')
  result, beside, seeds, _ = said(*runs)
  assert result == (
    'After 2 rounds on digits, ResIST classifies 90.0% of the test images '
    'correctly and local SGD 80.0%.'
  )
  assert beside == (
    'ResIST sent 25% of the bytes of local SGD and took 25% of its seconds. '
    'ResIST ends 10.0 points above local SGD, which does not rank them: one '
    'seed ranks nothing.'
  )
  assert 'one seed' in seeds


@pytest.mark.parametrize(
  ('base', 'told'),
  [
    (
      0.8,
      'ResIST is better than local SGD by 10.0 points, with 3 seeds or more',
    ),
    (
      0.95,
      'ResIST is worse than local SGD by 5.0 points, with 3 seeds or more',
    ),
    (0.895, 'ResIST and local SGD are level in accuracy: less than 1 point'),
  ],
)
def test_three_seeds_are_ranked(base, told, tmp_path):
  for seed in range(3):
    put(tmp_path / 'a' / f'{seed}', 0.9 + 0.001 * seed, seed=seed)
    put(tmp_path / 'b' / f'{seed}', base + 0.001 * seed, 'local_sgd', seed)
  result, beside, _ = said(tmp_path / 'a', tmp_path / 'b')
  assert 'ResIST classifies 90.1 ± 0.1% of the test images' in result
  assert result.endswith('(mean and deviation of 3 seeds).')
  assert told in beside


def test_two_seeds_are_too_few(tmp_path):
  for seed in range(2):
    put(tmp_path / f'a{seed}', 0.9, seed=seed)
    put(tmp_path / f'b{seed}', 0.5, 'local_sgd', seed)
  told = ' '.join(said(*sorted(tmp_path.iterdir())))
  assert '2 seeds rank nothing' in told
  assert '2 seeds are too few to rank runs; 3 would do.' in told


def test_data_parallel_is_compared_with_local_sgd(tmp_path):
  runs = (
    put(tmp_path / 'a', 0.9, 'data_parallel'),
    put(tmp_path / 'b', 0.8, 'local_sgd'),
  )
  assert said(*runs)[1].startswith(
    'Data parallel sent 10 times the bytes of local SGD and took 10 times its '
    'seconds.'
  )


def test_an_unfinished_run_and_one_without_a_test_are_named(tmp_path):
  run = put(tmp_path / 'run', 0.9)
  (run / 'summary.json').unlink()
  (run / 'config.json').write_text(
    json.dumps({**CONFIG, 'num_rounds': 7, 'protocol': 'resist', 'seed': 0})
  )
  new = put(tmp_path / 'new', 0.1, 'local_sgd')
  (new / 'summary.json').unlink()
  row = json.dumps({'round': 1, 'slots': {}})
  (new / 'metrics.jsonl').write_text(f'{row}\n')
  told = said(run, new)
  assert told[0] == (
    'On digits, ResIST (after 2 of 7 rounds, unfinished) classifies 90.0% of '
    'the test images correctly. Local SGD has not been tested yet.'
  )
  assert told[1] == (
    'ResIST and local SGD have not trained for the same rounds.'
  )
  assert 'differ in more than their protocol (num_rounds)' in ' '.join(told)


def test_other_data_cannot_be_compared(tmp_path):
  other = put(tmp_path / 'b', 0.5, 'local_sgd', dataset='cifar10')
  told = said(put(tmp_path / 'a', 0.9), other)
  assert 'Accuracies on different data cannot be compared.' in told
  assert not any('points' in text for text in told[:-2])


def test_a_network_that_classifies_nothing_is_told_by_its_loss(tmp_path):
  run = put(tmp_path / 'run', 0.5, test_loss=1.25)
  for name in ('summary.json', 'metrics.jsonl'):
    text = (run / name).read_text().replace('"test_accuracy"', '"test_loss"')
    (run / name).write_text(text)
  summary = json.loads((run / 'summary.json').read_text())
  assert summary['test_loss'] == 1.25
  assert said(run)[0] == (
    'After 2 rounds on digits, run (ResIST) reaches a test loss of 1.25.'
  )
  shown = curves.html(groups.grouped(records.load_runs([run])))
  assert shown.startswith('<h2>Test loss</h2>')
  assert shown.count('test loss: 0.5</title>') == 3


def test_further_tests_are_named(tmp_path):
  run = put(tmp_path / 'run', 0.9, v6_accuracy=0.25, v6_accuracy_paper=0.5)
  assert (
    '90.0% of the test images correctly (25.0% on the test v6)'
    in (said(run)[0])
  )


def test_a_run_that_goes_on_names_its_further_tests(tmp_path):
  """Those of a network of one's own have a loss, and not the paper's."""
  run = put(tmp_path / 'run', 0.9)
  (run / 'summary.json').unlink()
  log = run / 'metrics.jsonl'
  *lines, last = log.read_text().splitlines()
  row = {**json.loads(last), 'photos_loss': 0.5, 'photos_accuracy': 0.25}
  log.write_text('\n'.join([*lines, json.dumps(row), '']))
  assert '25.0% on the test photos' in said(run)[0]


def test_a_metric_that_ends_as_an_accuracy_does_is_no_test(tmp_path):
  run = put(tmp_path / 'run', 0.9, test_loss=0.5, test_token_accuracy=0.25)
  assert 'token' not in said(run)[0]
  assert 'token, as' not in report.summary_table(
    [records.load_runs([run])[0].summary]
  )
  assert 'Test test_token' not in curves.html(
    groups.grouped(records.load_runs([run]))
  )


def test_seeds_become_one_column_with_mean_and_deviation(tmp_path):
  for seed in range(3):
    put(tmp_path / 'some' / f'{seed}', 0.5 + 0.1 * seed, seed=seed)
  page = report.write_report([tmp_path / 'some'], tmp_path / 'out')
  check_alone(page)
  text = page.read_text()
  assert '<title>ResIST: some, 3 seeds</title>' in text
  assert '<dd>60.00% ± 10.00%</dd>' in text
  assert '<dt>seed</dt><dd>0, 1, 2</dd>' in text
  assert text.count('class="band"') == 3
  assert 'Round 0 is the network before training.' in text
  (group,) = groups.grouped(records.load_runs([tmp_path / 'some']))
  points = group.curve('round', 'test_accuracy', 100)
  assert [(p.x, p.seeds) for p in points] == [(0, 3), (1, 3), (2, 3)]
  last = points[-1]
  assert (last.y, last.low, last.high) == pytest.approx((60, 50, 70))


def test_only_seeds_are_put_together(tmp_path):
  one = put(tmp_path / 'one', 0.5)
  again = put(tmp_path / 'again', 0.6)  # The same seed.
  other = put(tmp_path / 'other', 0.7, seed=1)
  config = json.loads((other / 'config.json').read_text())
  (other / 'config.json').write_text(json.dumps({**config, 'lr': 0.2}))
  made = groups.grouped(records.load_runs([one, again, other]))
  assert [len(group.runs) for group in made] == [1, 1, 1]
  assert [group.name for group in made] == ['one', 'again', 'other']


def test_two_counts_of_bytes_never_share_an_axis(tmp_path):
  run = put(tmp_path / 'a', 0.9)
  alone = put(tmp_path / 'b', 0.8, 'local_sgd')
  lines = (alone / 'metrics.jsonl').read_text().splitlines()
  rows = [{**json.loads(line), 'wire_bytes_total': 0} for line in lines]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (alone / 'metrics.jsonl').write_text(text)
  shown = curves.html(groups.grouped(records.load_runs([run, alone])))
  assert 'communication, the paper&#x27;s count (MB)' in shown
  assert 'sent by all devices' not in shown
  shown = curves.html(groups.grouped(records.load_runs([run])))
  assert 'sent by all devices (MB)' in shown


@pytest.mark.parametrize(
  ('ours', 'theirs', 'verdict'),
  [
    ([], [50, 50, 50], 'untested'),
    ([60], [50, 51, 52], 'undecided'),
    ([60, 61], [50, 51], 'undecided'),
    ([60, 61, 62], [50, 51, 52], 'ahead'),
    ([50, 51, 52], [60, 61, 62], 'behind'),
    ([50, 50.1, 50.2], [50.9, 51, 51.1], 'level'),
    ([50, 50.1, 50.2], [51.2, 51.3, 51.4], 'behind'),
    ([40, 50, 60], [42, 52, 63], 'undecided'),  # Seeds differ by more.
    ([40, 50, 60], [40, 50, 60], 'undecided'),
  ],
)
def test_the_rule(ours, theirs, verdict):
  assert compare.compare(ours, theirs).verdict == verdict
