"""A finished run is evaluated again, on its data and on other data."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_train import tiny_config

from resist_jax import data
from resist_jax.run import (
  assess,
  depth,
  evaluate_command,
  export,
  train,
  trained,
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('finished') / 'run'
  fields = {'evaluation.batch_size': 45, 'data.validation': 0.1}
  return folder, train.train(tiny_config(**fields), folder)


def command(capsys, *words):
  code = evaluate_command.main([*map(str, words)])
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def test_the_accuracies_are_those_of_the_run(finished, capsys, tmp_path):
  folder, summary = finished
  code, out, _ = command(capsys, folder, f'--out={tmp_path}', '--depths=0,5')
  assert code == 0
  found = json.loads((tmp_path / 'evaluation.json').read_text())
  for name in ('test', 'validation'):
    for end in ('', '_paper'):
      accuracy = summary[f'{name}_accuracy{end}']
      assert found['measures'][f'{name}_accuracy{end}'] == accuracy
      assert f'{accuracy:.2%}' in out
  counts = np.array(found['confusion']['test'])
  assert counts.sum() == 360
  assert counts.sum(axis=1).max() <= 37  # A row for each class that is.
  assert np.trace(counts) / 360 == pytest.approx(summary['test_accuracy'])
  with (tmp_path / 'confusion_test.csv').open() as file:
    head, *rows = csv.reader(file)
  assert head == ['', *map(str, range(10))]
  assert [[int(x) for x in row[1:]] for row in rows] == counts.tolist()
  for name in ('confusion_test', 'depth_test', 'depth_validation'):
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_the_whole_depth_is_the_whole_network(finished, capsys, tmp_path):
  folder, _ = finished
  words = ('--depths=0,1,5', '--draws=2', f'--out={tmp_path}')
  assert command(capsys, folder, *words)[0] == 0
  found = json.loads((tmp_path / 'evaluation.json').read_text())
  rows = found['depth']
  kinds = [(row['order'], row['blocks'], row['draw']) for row in rows]
  assert kinds == [
    ('first', 0, 0), ('first', 1, 0), ('random', 1, 0), ('random', 1, 1),
    ('first', 5, 0),
  ]  # fmt: skip
  for name, accuracy in found['measures'].items():
    assert rows[-1][name] == accuracy
  with (tmp_path / 'depth.csv').open() as file:
    assert [int(row['blocks']) for row in csv.DictReader(file)] == [
      0, 1, 1, 1, 5,
    ]  # fmt: skip


def test_a_network_of_fewer_blocks_is_a_shorter_chain(finished):
  folder, _ = finished
  model = export.load(folder)
  images = data.load('digits').tests['test'].images[:30]
  (name,), scale = model.scales, next(iter(model.scales.values()))
  assert scale.tolist() == [0.25] * 5
  blocks = depth.drawn(3, 5, draw=1)
  scales = {name: depth.keep(scale, blocks)}
  assert scales[name][blocks] == pytest.approx(0.25 * 5 / 3)
  shallower = dataclasses.replace(model, scales=scales)
  logits, _ = assess.Exported(shallower).logits(images, {})
  params = dict(model.variables['params'])
  import jax

  params[name] = jax.tree.map(lambda x: x[blocks], params[name])
  shorter = model.network.with_chain_lengths({name: 3})
  wanted = shorter.apply(
    {'params': params},
    data.normalise(images, model.mean, model.std),
    {name: scales[name][blocks]},
  )
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_shallower_network_runs_at_the_scale_of_the_training():
  """With the scale in training, a worker's blocks ran at S times theirs."""
  lengths, cuts = {'chain': 12}, {'chain': 4, 'other': None}
  config = tiny_config()
  assert depth.trained_scales(config, lengths, cuts) == {'chain': 1.0}
  config.residual_scale = 'training'
  trained_at = depth.trained_scales(config, lengths, {'chain': None})
  assert trained_at == {'chain': 4.0}
  whole = np.ones(12, np.float32)
  for blocks, want in ((2, 4.0), (3, 4.0), (6, 2.0), (12, 1.0)):
    kept = depth.keep(whole, np.arange(blocks), trained_at['chain'])
    assert kept[:blocks].tolist() == [want] * blocks
  # With a minimum depth, 16 copies of 12 blocks are held by 4 workers.
  assert depth.trained_scales(config, lengths, cuts) == {'chain': 3.0}
  config.protocol = 'local_sgd'
  assert depth.trained_scales(config, lengths, cuts) == {'chain': 1.0}


def test_another_set_is_tested_with_the_classes_of_the_run(
  finished, capsys, tmp_path
):
  folder, summary = finished
  test = data.load('digits').tests['test']
  path = tmp_path / 'digits_again.npz'
  np.savez(path, images=test.images, labels=test.labels)
  words = (f'--data={path}', f'--out={tmp_path}', '--depths=none')
  code, out, _ = command(capsys, folder, *words)
  assert code == 0
  assert 'digits_again' in out
  found = json.loads((tmp_path / 'evaluation.json').read_text())
  assert found['measures'] == {
    f'digits_again_accuracy{end}': summary[f'test_accuracy{end}']
    for end in ('', '_paper')
  }


def test_nothing_of_an_earlier_evaluation_stays(finished, capsys, tmp_path):
  folder, _ = finished
  (tmp_path / 'depth_mine.png').write_text('')
  command(capsys, folder, f'--out={tmp_path}', '--depths=5')
  assert (tmp_path / 'confusion_validation.csv').exists()
  test = data.load('digits').tests['test']
  path = tmp_path / 'other.npz'
  np.savez(path, images=test.images, labels=test.labels)
  command(
    capsys, folder, f'--data={path}', f'--out={tmp_path}', '--depths=none'
  )
  left = {path.name for path in tmp_path.iterdir()}
  assert left == {
    'evaluation.json', 'confusion_other.csv', 'confusion_other.png',
    'depth_mine.png', 'other.npz',
  }  # fmt: skip


def test_a_run_that_goes_on_says_that_its_network_is_an_earlier_one(
  finished, capsys, tmp_path, caplog
):
  shutil.copytree(finished[0], tmp_path / 'run')
  words = (f'--out={tmp_path / "out"}', '--depths=none')
  command(capsys, tmp_path / 'run', *words)
  assert not caplog.text
  (tmp_path / 'run' / 'summary.json').unlink()  # As by more rounds, stopped.
  command(capsys, tmp_path / 'run', *words)
  assert 'has trained on since it wrote this network' in caplog.text


def test_nothing_of_an_earlier_evaluation_of_several_runs_stays(
  finished, capsys, tmp_path
):
  for name in ('seed0', 'seed1'):
    (tmp_path / 'runs' / name).parent.mkdir(exist_ok=True)
    (tmp_path / 'runs' / name).symlink_to(finished[0])
  out = tmp_path / 'out'
  command(capsys, tmp_path / 'runs', f'--out={out}', '--depths=5')
  assert (out / 'depth_test.png').exists()
  command(capsys, tmp_path / 'runs', f'--out={out}', '--depths=none')
  assert not (out / 'depth_test.png').exists()


def test_without_the_training_images_the_whole_network_is_tested(
  finished, capsys, tmp_path
):
  folder, summary = finished
  moved = tmp_path / 'moved'
  moved.mkdir()
  (moved / 'model').symlink_to(folder / 'model')
  config = json.loads((folder / 'config.json').read_text())
  config['data']['name'] = str(tmp_path / 'gone')
  (moved / 'config.json').write_text(json.dumps(config))
  code, _, err = command(capsys, moved)
  assert code == 2
  assert 'no such folder' in err
  assert '--data' in err
  test = data.load('digits').tests['test']
  path = tmp_path / 'again.npz'
  np.savez(path, images=test.images, labels=test.labels)
  code, out, err = command(capsys, moved, f'--data={path}')
  assert code == 0
  assert 'only the whole network' in err
  assert f'{summary["test_accuracy"]:.2%}' in out


@pytest.mark.slow
def test_runs_of_several_seeds_have_a_mean_and_a_deviation(
  finished, capsys, tmp_path
):
  folder, summary = finished
  (tmp_path / 'seed0').symlink_to(folder)
  other = train.train(tiny_config(seed=1, num_rounds=2), tmp_path / 'seed1')
  code, out, _ = command(capsys, tmp_path, '--depths=0,5')
  assert code == 0
  found = json.loads((tmp_path / 'evaluation' / 'evaluation.json').read_text())
  accuracies = [s['test_accuracy'] for s in (summary, other)]
  spread = found['measures']['test_accuracy']
  assert spread['mean'] == pytest.approx(np.mean(accuracies))
  assert spread['deviation'] == pytest.approx(np.std(accuracies, ddof=1))
  assert f'{spread["mean"]:.2%} ± {spread["deviation"]:.2%}' in out
  for name in ('seed0', 'seed1'):
    assert (tmp_path / 'evaluation' / name / 'confusion_test.csv').is_file()
  assert (tmp_path / 'evaluation' / 'depth_test.png').is_file()


def test_where_one_of_several_runs_is_damaged_nothing_is_written(
  finished, capsys, tmp_path
):
  folder, _ = finished
  (tmp_path / 'seed0').symlink_to(folder)
  shutil.copytree(folder, tmp_path / 'seed1')
  (tmp_path / 'seed1' / 'config.json').write_text('{')
  before = sorted(tmp_path.rglob('*'))
  code, out, err = command(capsys, tmp_path)
  assert (code, out) == (2, '')
  assert str(tmp_path / 'seed1' / 'config.json') in err
  assert sorted(tmp_path.rglob('*')) == before


def test_a_mean_over_other_settings_than_seeds_is_told():
  one, other = tiny_config(seed=0), tiny_config(seed=1)
  assert evaluate_command._mixed([one, other]) == ''
  other.protocol, other.lr = 'local_sgd', 0.3
  said = evaluate_command._mixed([one, other])
  assert '(lr, protocol)' in said
  assert '\n' not in said


@pytest.mark.parametrize(
  ('words', 'says'),
  [
    (['--depths=0,6'], 'from 0 to 5'),
    (['--depths=many'], 'from 0 to 5'),
    (['--data=./nowhere'], 'no such folder'),
    (['--data=nowhere.npz'], 'no such file'),
    (['--draws=-1'], '--draws is -1'),
    (['--depth_images=0'], '--depth_images is 0'),
  ],
)
def test_a_mistake_is_one_line(words, says, finished, capsys, tmp_path):
  code, _, err = command(capsys, finished[0], f'--out={tmp_path}', *words)
  (line,) = err.splitlines()
  assert code == 2
  assert says in line


def test_a_folder_without_a_run_is_refused(capsys, tmp_path):
  for folder in (tmp_path, tmp_path / 'nowhere'):
    code, _, err = command(capsys, folder, f'--out={tmp_path}')
    assert code == 2
    (line,) = err.splitlines()
    assert 'holds no finished run' in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'text',
  [
    '{',
    '[]',
    '{"model": 3}',
    '{"evaluation": {"batch_size": 0}}',
    '{"evaluation": {"batch_size": "many"}}',
    '{"partition": [9]}',
    '\x00',
  ],
)
def test_a_damaged_config_is_named(text, finished, capsys, tmp_path):
  (tmp_path / 'model').symlink_to(finished[0] / 'model')
  (tmp_path / 'config.json').write_text(text)
  code, _, err = command(capsys, tmp_path, f'--out={tmp_path}/out')
  (line,) = err.splitlines()
  assert code == 2
  assert str(tmp_path / 'config.json') in line
  assert trained.network(tmp_path)  # Which needs no config.


def test_a_set_without_images_of_the_classes_is_refused(
  finished, capsys, tmp_path
):
  (tmp_path / 'data').mkdir()
  words = (f'--data={tmp_path}/data', f'--out={tmp_path}/out')
  code, _, err = command(capsys, finished[0], *words)
  assert (code, len(err.splitlines())) == (2, 1)
  assert 'has no image of the classes 0, 1, 2, 3, 4, ...' in err


def test_the_config_of_an_older_run_lacks_nothing(finished):
  run = trained.load(finished[0])
  assert run.config.num_workers == 4
  assert run.model.class_names == tuple(map(str, range(10)))
