"""Tests of the report and its pictures, on made-up run directories."""

import json
import os
import re
import tracemalloc

import numpy as np
from pages import Tags, check_alone
import pytest

from resist_jax import report
from resist_jax.errors import ConfigError
from resist_jax.report import plots, records

PNG_HEAD = b'\x89PNG\r\n\x1a\n'
SLOTS = {'stage3_chain': [[0, 2], [1, 2]]}


def make_run(path, num_rounds=4, finished=True, config=None, slots=SLOTS):
  """Writes a run of two workers and three blocks; round 1 is a full model."""
  path.mkdir(parents=True)
  config = {'protocol': 'resist', 'num_rounds': 4, **(config or {})}
  (path / 'config.json').write_text(json.dumps(config))
  rows = []
  for number in range(1, num_rounds + 1):
    row = {
      'round': number,
      'protocol': 'resist' if number > 1 else 'local_sgd',
      'train_loss': 1 / number,
      'train_accuracy': 0.5,
      'lr': 0.1,
      'seconds_training': 2.0 * number,
      'bytes_total': 3_000_000 * number,
      'images_per_second': 900.0,
      'slots': slots if number > 1 else {},
      'num_blocks': {'stage3_chain': 3},
    }
    if number % 2 == 0:
      row |= {'test_accuracy': 0.5, 'test_accuracy_paper': 0.1 * number}
    rows.append(row)
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (path / 'metrics.jsonl').write_text(lines)
  if finished:
    summary = {
      'protocol': 'resist',
      'dataset': 'digits',
      'model': 'PreActResNetTiny',
      'num_workers': 2,
      'num_devices': 1,
      'rounds': num_rounds,
      'local_steps': 5,
      'test_accuracy': 0.5,
      'test_accuracy_paper': 0.4,
      'best_test_accuracy_paper': 0.4,
      'params_total': 1000,
      'params_per_worker': 250,
      'bytes_per_round': 3_000_000,
      'bytes_per_round_local_sgd': 6_000_000,
      'bytes_total': 12_000_000,
      'seconds_training': 8.0,
      'seconds_total': 9.0,
      'images_per_second': 900.0,
      'seed': 7,
      'versions': {'jax': '0.10.2'},
      'device': 'cpu',
      'params_hash': '0123456789abcdef0123',
      'final_train_loss': 0.25,
    }
    (path / 'summary.json').write_text(json.dumps(summary))
  return path


def is_picture(path):
  content = path.read_bytes()
  return content.startswith(PNG_HEAD) and len(content) > 5000


def test_image_splits_a_shared_block_into_equal_strips():
  everyone, nobody = plots.EVERYONE, plots.NOBODY
  rounds = [
    [[0, 2], [1, 2]],  # Block 2 has two workers.
    None,  # Every worker holds every block.
    [[2], [0], [2], [2]],  # Block 2 has three, block 1 none.
  ]
  image = plots.decomposition_image(rounds, num_blocks=3)
  # Two and three workers: six strips are the fewest that divide by both.
  expected = [
    *[[0, everyone, 1]] * 6,
    *[[1, everyone, nobody]] * 6,
    *[[0, everyone, 0]] * 2,
    [0, everyone, 2],
    [1, everyone, 2],
    *[[1, everyone, 3]] * 2,
  ]
  np.testing.assert_array_equal(image, expected)


def test_image_stays_small_for_many_numbers_of_holders():
  # 1 to 11 holders: their least common multiple is 27720.
  slots = [[b for b in range(11) if b >= worker] for worker in range(11)]
  image = plots.decomposition_image([slots], num_blocks=11)
  strips = image.shape[0] // 11
  assert strips <= 120
  last = image.reshape(11, strips)[10]
  counts = np.bincount(last)
  assert len(counts) == 11
  assert counts.max() - counts.min() <= 1


def test_report_of_one_run(tmp_path):
  run = make_run(tmp_path / 'run')
  page = report.write_report([run], tmp_path / 'out')
  assert page == tmp_path / 'out' / 'report.html'
  names = {
    'accuracy_by_round.png',
    'accuracy_by_bytes.png',
    'accuracy_by_seconds.png',
    'decomposition.png',
  }
  assert {p.name for p in page.parent.iterdir()} == names | {'report.html'}
  assert all(is_picture(page.parent / name) for name in names)
  text = page.read_text()
  tags = check_alone(page)
  assert (tags.tags.count('img'), len(tags.loads)) == (1, 1)
  assert text.count('<svg class="chart"') == 5
  for cell in ('50.00%', '40.00%', '12 MB', '25.0%', 'jax 0.10.2', '>7<'):
    assert cell in text
  assert 'unfinished' not in text


def test_report_of_several_runs_shows_what_differs(tmp_path):
  first = make_run(tmp_path / 'a' / 'run', config={'lr': {'peak': 0.1}})
  other = make_run(tmp_path / 'b' / 'run', config={'lr': {'peak': 0.2}})
  third = make_run(tmp_path / 'c' / 'run', slots={})
  page = report.write_report([first, other, third], tmp_path / 'out')
  text = page.read_text()
  assert 'a/run' in text
  assert 'b/run' in text
  cells = zip(('a/run', 'b/run', 'c/run'), ('0.1', '0.2', '-'), strict=True)
  row = ''.join(f'<td data-head="{head}">{cell}</td>' for head, cell in cells)
  assert f'<th>lr.peak</th>{row}' in text
  assert 'num_rounds' not in text
  assert is_picture(page.parent / 'decomposition_1.png')
  assert is_picture(page.parent / 'decomposition_2.png')
  assert not (page.parent / 'decomposition_3.png').exists()


def test_settings_are_shown_in_their_own_letters(tmp_path):
  run = make_run(tmp_path / 'run', config={'data.name': '/data/照片'})
  page = report.write_report([run], tmp_path / 'out')
  assert '/data/照片' in page.read_text()


def test_run_without_summary_is_shown_by_its_rounds(tmp_path):
  run = make_run(tmp_path / 'run', num_rounds=3, finished=False)
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"round": 4, "train_lo')  # Its writer was killed.
  (loaded,) = records.load_runs([run])
  assert [row['round'] for row in loaded.rows] == [1, 2, 3]
  text = report.summary_table([loaded.summary])
  assert '3 of 4, unfinished' in text
  assert '50.00%' in text
  assert '9 MB' in text
  assert report.write_report([run], run).exists()


def test_older_summary_does_not_hide_new_rounds(tmp_path):
  run = make_run(tmp_path / 'run')
  line = (run / 'metrics.jsonl').read_text().splitlines()[-1]
  with (run / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({**json.loads(line), 'round': 5}) + '\n')
  (loaded,) = records.load_runs([run])
  assert 'unfinished' in report.summary_table([loaded.summary])


def test_number_of_workers_may_change(tmp_path):
  run = make_run(tmp_path / 'run')
  row = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
  row |= {'round': 4, 'slots': {'stage3_chain': [[0], [1], [2]]}}
  with (run / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps(row) + '\n')  # Round 4 again, after a resume.
  (loaded,) = records.load_runs([run])
  assert len(loaded.rows) == 4
  assert loaded.summary['num_workers'] == '2, then 3'
  assert report.write_report([run], run).exists()


def test_run_without_evaluation(tmp_path):
  run = make_run(tmp_path / 'run', num_rounds=1, finished=False)
  page = report.write_report([run], tmp_path / 'out')
  assert is_picture(page.parent / 'accuracy_by_round.png')
  assert not (page.parent / 'decomposition.png').exists()


def test_long_runs_are_cut_and_say_so():
  row = {'slots': SLOTS, 'num_blocks': {'stage3_chain': 3}}
  rows = [{'round': r, **row} for r in range(1, 101)]
  figure = plots.decomposition_figure('run', rows)
  assert figure is not None
  assert figure.get_suptitle() == 'run: the first 60 of 100 rounds'
  # A warm-up longer than the picture would leave nothing to see.
  rows = [{**r, 'slots': {}} if r['round'] <= 80 else r for r in rows]
  figure = plots.decomposition_figure('run', rows)
  assert figure is not None
  assert figure.get_suptitle() == 'run: rounds 76 to 100 of 100'


def test_rounds_at_once_are_drawn_as_so_many_rounds():
  row = {'slots': SLOTS, 'num_blocks': {'stage3_chain': 3}}
  rows = [{'round': 1, **row}, {'round': 5, 'rounds': 4, **row}]
  figure = plots.decomposition_figure('run', rows)
  assert figure is not None
  pixels = np.asarray(figure.axes[0].images[0].get_array())
  assert pixels.shape[1] == 5
  assert (pixels == pixels[:, :1]).all()


def test_a_round_of_joined_ones_sends_what_its_share_is(tmp_path):
  """The summary counts an exchange, of which several rounds may have one."""
  run = make_run(tmp_path / 'run')
  log = run / 'metrics.jsonl'
  found = [json.loads(line) for line in log.read_text().splitlines()]
  joined = [{**found[3], 'rounds': 2, 'round': r, 'protocol': 'resist'}
            for r in (2, 4)]  # fmt: skip
  log.write_text(''.join(json.dumps(row) + '\n' for row in joined))
  summary = json.loads((run / 'summary.json').read_text())
  summary |= {'wire_bytes_per_round': 900, 'wire_bytes_total': 1800}
  (run / 'summary.json').write_text(json.dumps(summary))
  (loaded,) = records.load_runs([run])
  assert loaded.summary['wire_bytes_per_round'] == 450


def test_a_test_of_a_network_without_accuracy_is_a_further_test():
  fields = ['test_loss', 'test_perplexity', 'held_loss', 'held_perplexity']
  assert records.further_tests(fields) == ['held']


def test_the_largest_program_of_all_phases_counts(tmp_path):
  run = make_run(tmp_path / 'run')
  summary = json.loads((run / 'summary.json').read_text())
  summary['memory_per_device'] = {
    'predicted': {'parameters': 5},
    'compiled': {'step': {'peak': 1000}},
    'peaks': {'resist': 1000, 'local_sgd': 3000},
  }
  text = report.summary_table([summary])
  assert re.search('peak memory per device +3 kB', text), text


def test_names_of_runs_are_text(tmp_path):
  names = ['<b>bold & "co"', '_hidden', 'a$b$']
  runs = [make_run(tmp_path / name) for name in names]
  text = report.write_report(runs, tmp_path / 'out').read_text()
  tags = Tags()
  tags.feed(text)
  assert 'b' not in tags.tags
  assert '&lt;b&gt;' in text
  figure = plots.accuracy_figure(dict.fromkeys(names, ()), 'round')
  assert not figure.legends  # Nothing to name yet.
  rows = {name: records.load_runs([tmp_path / name])[0].rows for name in names}
  figure = plots.accuracy_figure(rows, 'round')
  shown = [text.get_text() for text in figure.legends[0].get_texts()]
  assert shown[:3] == names


def test_a_folder_may_have_any_name(tmp_path, capsys):
  names = [os.fsdecode(b'r\xff'), 'two\nlines']
  runs = [str(make_run(tmp_path / name)) for name in names]
  assert report.main([*runs, f'--out={tmp_path / names[1]}']) == 0
  assert 'report.html' in capsys.readouterr().out
  assert report.main([runs[0]]) == 0


def test_bytes_of_very_different_runs_share_a_logarithmic_axis():
  evaluated = {'round': 1, 'test_accuracy': 0.5}
  runs = {
    'cheap': [{**evaluated, 'bytes_total': 10**6}],
    'dear': [{**evaluated, 'bytes_total': 10**9}],
  }
  (axes,) = plots.accuracy_figure(runs, 'bytes_total').axes
  assert axes.get_xscale() == 'log'
  assert 'MB' in axes.get_xlabel()


@pytest.mark.parametrize('count', [1, 4, 8, 9, 40])
def test_workers_have_different_colours(count):
  assert len(set(plots.colours(count))) == count


def test_two_runs_fit_a_terminal(tmp_path):
  run = records.load_runs([make_run(tmp_path / 'run')])[0].summary
  wide = {**run, 'device': 'x' * 200, 'model': None, 'versions': None}
  table = report.summary_table([wide, wide], labels=['y' * 200, 'other'])
  assert max(map(len, table.splitlines())) <= 100
  assert table.splitlines()[0].split()[-1] == 'other'
  (line,) = report.summary_table([{}, {'seconds_training': 3}]).splitlines()
  assert line.split() == ['seconds', 'of', 'training', '-', '3.0']
  assert report.summary_table([{}, {}]) == ''


def test_a_table_calls_examples_and_bytes_by_their_names():
  counted = {
    'images_per_second': 7, 'wire_bytes_total': 2e6, 'bytes_total': 3e6,
  }  # fmt: skip
  rows = [
    line.split('  ')[0]
    for line in report.summary_table([{**counted, 'unit': 'windows'}]).split(
      '\n'
    )
  ]
  assert rows == ['sent by all devices', "paper's count", 'windows per second']
  both = [{**counted, 'unit': 'windows'}, counted]
  assert 'examples per second' in report.summary_table(both)
  assert 'images per second' in report.summary_table([counted])


def break_nothing_there(run):
  for path in run.iterdir():
    path.unlink()


def break_no_round(run):
  (run / 'metrics.jsonl').write_text('')


def break_not_json(run):
  (run / 'metrics.jsonl').write_text('{"round": 1\n')


def break_bytes(run):
  (run / 'metrics.jsonl').write_bytes(b'\xff\xfe\x00\n')


def break_not_a_round(run):
  (run / 'metrics.jsonl').write_text('{"round": "one", "slots": {}}\n')


def break_slots(run):
  (run / 'metrics.jsonl').write_text('{"round": 1, "slots": {"c": [0]}}\n')


def break_config(run):
  (run / 'config.json').write_bytes(b'\xff')


def break_summary(run):
  (run / 'summary.json').write_text('[]')


def break_with(**fields):
  """Returns a damage: a row in the middle that has other fields."""

  def damage(run):
    first, second, *rest = (run / 'metrics.jsonl').read_text().splitlines()
    second = json.dumps({**json.loads(second), **fields})
    lines = '\n'.join([first, second, *rest, ''])
    (run / 'metrics.jsonl').write_text(lines)

  return damage


ABSURD = [
  {'round': -1},
  {'round': 10**12},
  {'round': True},
  {'round': None},
  {'rounds': 9},
  {'rounds': '1'},
  {'slots': None},
  {'slots': []},
  {'slots': {'c': []}},
  {'slots': {'c': [[0], None]}},
  {'slots': {'c': [['0']]}},
  {'slots': {'c': [[-1]]}},
  {'slots': {'c': [[10**9]]}},
  {'slots': {'c': [[0, 3]]}, 'num_blocks': {'c': 3}},
  {'slots': {'c': [[]] * 10**5}},
  {'slots': {f'c{i}': [[0]] for i in range(1000)}},
  {'num_blocks': {'stage3_chain': 10**9}},
  {'num_blocks': {'stage3_chain': 3.0}},
  {'num_blocks': 3},
  {'train_loss': 'low'},
  {'train_loss': []},
  {'test_accuracy': float('nan')},
  {'test_accuracy': float('inf')},
  {'seconds_training': 10**400},
  {'other_accuracy': {}},
  {'more': 'x' * 2**21},
]


@pytest.mark.parametrize('fields', ABSURD, ids=range(len(ABSURD)))
def test_a_row_that_no_run_writes_is_named(fields, tmp_path, capsys):
  run = make_run(tmp_path / 'run')
  break_with(**fields)(run)
  assert report.main([str(run)]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert (
    f'{run / "metrics.jsonl"}, line 2, is not the record of a round' in line
  )
  assert not (run / 'report.html').exists()


@pytest.mark.parametrize(
  'text', ['7', 'null', '[]', '"round"', '{}', '[' * 10**5]
)
def test_a_line_that_is_no_row_is_named(text, tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(f'{text}\n')
  with pytest.raises(ConfigError, match=r'metrics.jsonl, line 1, is not'):
    report.read_rows(tmp_path / 'metrics.jsonl')


def test_a_log_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
  monkeypatch.setattr(records, 'MAX_ROWS', 10**4)
  run = make_run(tmp_path / 'run')
  row = (run / 'metrics.jsonl').read_text().splitlines()[-1]
  with (run / 'metrics.jsonl').open('a') as file:
    file.writelines(f'{row}\n' for _ in range(10**5))
  tracemalloc.start()
  with pytest.raises(ConfigError, match='has more than 10000 lines, too'):
    records.load_runs([run])
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 20e6


def test_slots_of_a_long_run_do_not_fill_the_memory(tmp_path):
  run = make_run(tmp_path / 'run', num_rounds=400, finished=False)
  (loaded,) = records.load_runs([run])
  assert [row['round'] for row in loaded.rows] == [*range(1, 401)]
  assert ['slots' in row for row in loaded.rows] == [True] * 61 + [False] * 339
  assert 'num_workers' not in loaded.summary  # They did not change.


def test_the_largest_picture_fits_in_memory():
  """As many blocks and workers as a row may have; blocks of 1 to 60 holders."""
  blocks, workers = records._MAX_BLOCKS, records._MAX_WORKERS
  slots = [[*range(w, blocks, workers)] for w in range(workers - 60)]
  slots += [[*range(w, 60)] for w in range(60)]
  image = plots.decomposition_image([slots] * records.MAX_ROUNDS, blocks)
  assert image.nbytes < 10e6


@pytest.mark.parametrize(
  ('fields', 'wrong'),
  [
    ({'rounds': 'four', 'bytes_total': float('nan'), 'params_per_worker': []},
     ('four', 'nan', '[]')),
    ({'rounds': [], 'bytes_per_round': 'many',
      'bytes_per_round_local_sgd': 'much'}, ('[]', 'many', 'much')),
    ({'versions': ['jax'], 'memory_per_device': 7, 'test_accuracy': 10**400,
      'bytes_total': 10**400, 'params_hash': 7}, ('jax', 30 * '0')),
    ({'x{y}_accuracy': 0.5, '0_accuracy': 0.5, 'é_accuracy_paper': 'high',
      'num_workers': {}, 'device': [[]]}, ('high',)),
  ],
)  # fmt: skip
def test_a_summary_of_wrong_types_becomes_dashes(fields, wrong, tmp_path):
  run = make_run(tmp_path / 'run')
  summary = json.loads((run / 'summary.json').read_text())
  (run / 'summary.json').write_text(json.dumps({**summary, **fields}))
  page = report.write_report([run], tmp_path / 'out').read_text()
  shown = re.findall('<(?:dd|p)>(.*?)</', page)  # Cells, and sentences.
  assert str(run) in shown
  for text in {*shown} - {str(run)}:  # A path may hold any word.
    assert not [word for word in wrong if word in text], text


def test_further_tests_have_rows_of_their_own(tmp_path):
  run = make_run(tmp_path / 'run')
  summary = json.loads((run / 'summary.json').read_text())
  summary |= {
    'cifar10_1_v6_accuracy': 0.125,
    'cifar10_1_v6_accuracy_paper': 0.25,
  }
  (run / 'summary.json').write_text(json.dumps(summary))
  text = report.summary_table([records.load_runs([run])[0].summary])
  assert 'cifar10_1_v6, as deployed   12.50%' in text
  assert 'cifar10_1_v6, as in paper   25.00%' in text
  assert '12.50%' in report.write_report([run], run).read_text()
  # A run that has not finished knows them from its log.
  (run / 'summary.json').unlink()
  fields = {'cifar10_1_v6_accuracy': 0.375, 'cifar10_1_v6_accuracy_paper': 0}
  break_with(**fields)(run)
  text = report.summary_table([records.load_runs([run])[0].summary])
  assert 'cifar10_1_v6, as deployed   37.50%' in text
  assert 'best' not in text.replace('best, as in paper', '')


def break_deep(run):
  deep = '{"a":' * 10**5 + '{}' + '}' * 10**5
  (run / 'config.json').write_text(deep)


@pytest.mark.parametrize(
  'damage',
  [
    break_nothing_there,
    break_deep,
    break_no_round,
    break_not_json,
    break_bytes,
    break_not_a_round,
    break_slots,
    break_config,
    break_summary,
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(damage, tmp_path, capsys):
  good, bad = make_run(tmp_path / 'good'), make_run(tmp_path / 'bad')
  damage(bad)
  before = sorted(tmp_path.rglob('*'))
  assert report.main([str(good), str(bad), f'--out={tmp_path / "out"}']) == 2
  assert sorted(tmp_path.rglob('*')) == before
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.startswith('error: ')
  assert captured.err.count('\n') == 1
  assert str(bad) in captured.err


def test_bad_arguments(tmp_path, capsys):
  run = make_run(tmp_path / 'run')
  assert report.main([str(tmp_path / 'nowhere')]) == 2
  assert report.main([str(run), str(run)]) == 2
  (tmp_path / 'file').write_text('')
  assert report.main([str(run), f'--out={tmp_path / "file"}']) == 2
  for args in ([], [str(run), '--ot=x']):
    with pytest.raises(SystemExit) as stop:
      report.main(args)
    assert stop.value.code == 2
  errors = capsys.readouterr().err.splitlines()
  assert len(errors) == 5
  assert all(line.startswith('error: ') for line in errors)


def test_default_places(tmp_path, capsys, monkeypatch):
  run, other = make_run(tmp_path / 'run'), make_run(tmp_path / 'other')
  monkeypatch.chdir(tmp_path)
  assert report.main(['run']) == 0
  assert (run / 'report.html').exists()
  assert report.main(['run', str(other)]) == 0
  assert (tmp_path / 'report' / 'report.html').exists()
  assert 'report.html' in capsys.readouterr().out


def test_runs_are_given_in_a_list_and_rows_by_any_path(tmp_path):
  run = make_run(tmp_path / 'run')
  with pytest.raises(ConfigError, match='it must be a list of workdirs'):
    report.load_runs(str(run))
  (loaded,) = report.load_runs([run])
  read = report.read_rows(str(run / 'metrics.jsonl'))
  assert [row['round'] for row in read] == [row['round'] for row in loaded.rows]


def test_paths_of_rows_may_begin_at_home(tmp_path, monkeypatch):
  make_run(tmp_path / 'run')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert report.read_rows('~/run/metrics.jsonl')


def test_a_report_of_no_run_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='run_dirs is empty'):
    report.write_report([], tmp_path)
