"""A run goes on, and is judged, with the data that it began with."""

import json

import numpy as np
from PIL import Image
import pytest
from test_train import least_config
from tiny_images import NAMES, images

from resist_jax.errors import ConfigError
from resist_jax.run import evaluate_command, train


def put(path, count=30, names=NAMES, order=1):
  """Writes a set whose labels run through the classes."""
  some = np.arange(count + 6) % len(names)
  np.savez(
    path, images=images(count), labels=some[:count][::order],
    test_images=images(6), test_labels=some[-6:], class_names=names,
  )  # fmt: skip


def config(path, num_rounds):
  return least_config(
    **{'data.name': str(path), 'num_rounds': num_rounds, 'batch_size': 4}
  )


OTHERS = {
  'more examples': ({'count': 33}, 'split train: 30 examples then, 33 now'),
  'another order': ({'order': -1}, 'split train: other examples, or another'),
  'a class more': (
    {'names': ('ape', *NAMES)},
    'classes: ant then, ape now',
  ),
}


def test_a_run_goes_on_with_the_same_data_only(tmp_path):
  """In one process, which reads the file once more for each run."""
  path, run = tmp_path / 'own.npz', tmp_path / 'run'
  put(path)
  train.train(config(path, 1), run)
  written, content = (run / 'data.json').read_text(), path.read_bytes()
  for fields, says in OTHERS.values():
    put(path, **fields)
    with pytest.raises(ConfigError, match=says) as caught:
      train.train(config(path, 2), run)
    assert '\n' not in str(caught.value)
  assert (run / 'data.json').read_text() == written
  path.write_bytes(content)
  assert train.train(config(path, 2), run)['rounds'] == 2
  (run / 'data.json').write_text('{"split train": 3')  # Damaged, as none is.
  assert train.train(config(path, 3), run)['rounds'] == 3
  assert json.loads((run / 'data.json').read_text()) == json.loads(written)


def test_the_file_may_be_moved_with_the_run(tmp_path):
  put(tmp_path / 'own.npz')
  train.train(config(tmp_path / 'own.npz', 1), tmp_path / 'run')
  there = tmp_path / 'there'
  there.mkdir()
  for name in ('run', 'own.npz'):
    (tmp_path / name).rename(there / name)
  made = config(there / 'own.npz', 2)
  assert train.train(made, there / 'run')['rounds'] == 2
  made.data.name = 'digits'
  with pytest.raises(ConfigError, match=r'another config .*data.name'):
    train.train(made, there / 'run')


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
  put(tmp_path / 'own.npz')
  made = config(tmp_path / 'own.npz', 1)
  made.model.module = 'own_network'
  made.model.options = {'width': 8, 'blocks': 4, 'rate': np.float32(0.1)}
  with pytest.raises(ConfigError, match=r'float32 is not .*in model.options'):
    train.train(made, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_later_test_may_begin_as_another_field_does(tmp_path):
  """The log has `images_per_second`, and no test of the set `images`."""
  put(tmp_path / 'own.npz')
  put(tmp_path / 'images.npz', count=9)
  made = config(tmp_path / 'own.npz', 1)
  train.train(made, tmp_path / 'run')
  made.data.extra_tests = (str(tmp_path / 'images.npz'),)
  assert 0 <= train.train(made, tmp_path / 'run')['images_accuracy'] <= 1


def test_an_evaluation_tells_that_the_data_have_changed(tmp_path, capsys):
  path, run = tmp_path / 'own.npz', tmp_path / 'run'
  put(path)
  summary = train.train(config(path, 1), run)
  words = [str(run), f'--out={tmp_path / "out"}', '--depths=none']

  def evaluated(*more):
    capsys.readouterr()
    code = evaluate_command.main([*words, *more])
    return code, capsys.readouterr().err

  assert evaluated() == (0, '')
  # By another name, too, the run's own set is tested as in the run.
  named = f'--data={path.parent}/../{path.parent.name}/{path.name}'
  assert evaluated(named) == (0, '')
  found = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
  assert found['measures']['test_accuracy'] == summary['test_accuracy']
  put(path, count=33)
  code, said = evaluated()
  assert code == 0
  assert '30 examples then, 33 now' in said
  put(path, names=('ape', *NAMES))
  code, said = evaluated()
  assert code == 2
  (line,) = said.splitlines()
  assert 'ant then, ape now' in line


def test_the_set_that_is_trained_on_is_no_extra_test(tmp_path):
  put(tmp_path / 'own.npz')
  made = config(tmp_path / 'own.npz', 1)
  made.data.extra_tests = (str(tmp_path / 'own.npz'),)
  with pytest.raises(ConfigError, match='the training data set'):
    train.train(made, tmp_path / 'run')


def test_other_images_with_the_same_labels_are_other_data(tmp_path):
  put(tmp_path / 'a.npz')
  with np.load(tmp_path / 'a.npz') as file:
    arrays = dict(file)
  arrays['images'] = 255 - arrays['images']
  np.savez(tmp_path / 'b.npz', **arrays)
  train.train(config(tmp_path / 'a.npz', 1), tmp_path / 'run')
  with pytest.raises(ConfigError, match=r'split train: other examples'):
    train.train(config(tmp_path / 'b.npz', 2), tmp_path / 'run')


def test_a_folder_of_a_plain_name_may_be_moved(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for i in range(30):
    path = tmp_path / 'photos' / NAMES[i % 2] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images(1)[0][..., 0]).save(path)
  train.train(config('photos', 1), tmp_path / 'run')
  moved = (tmp_path / 'photos').rename(tmp_path / 'moved')
  made = config(moved, 2)
  assert train.train(made, tmp_path / 'run')['rounds'] == 2
  for path in moved.glob('*/*.png'):
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
  with pytest.raises(ConfigError, match='split train: other examples'):
    train.train(config(moved, 3), tmp_path / 'run')


def test_a_finished_run_is_tested_again_on_another_set_of_the_same_name(
  tmp_path,
):
  put(tmp_path / 'own.npz', names=NAMES[:2])
  made, accuracies = config(tmp_path / 'own.npz', 1), []
  photos = images(9)
  for month, label in (('march', 0), ('april', 1)):
    path = tmp_path / month / 'photos.npz'
    path.parent.mkdir()
    some = {'images': photos, 'labels': np.full(9, label)}
    np.savez(path, **some, class_names=NAMES[:2])
    made.data.extra_tests = (str(path),)
    summary = train.train(made, tmp_path / 'run')
    accuracies.append(summary['photos_accuracy'])
  assert sum(accuracies) == pytest.approx(1)  # The network is the same.


@pytest.mark.parametrize('alone', [True, False])
def test_the_training_set_at_another_place_is_no_other_test(
  alone, tmp_path, capsys
):
  """Without a test of its own, images of the training would count as one."""
  arrays = {'images': images(40), 'labels': np.arange(40) % 3}
  if not alone:
    arrays |= {'test_images': images(6), 'test_labels': np.arange(6) % 3}
  np.savez(tmp_path / 'own.npz', class_names=NAMES, **arrays)
  summary = train.train(config(tmp_path / 'own.npz', 1), tmp_path / 'run')
  (tmp_path / 'own.npz').rename(tmp_path / 'moved.npz')
  words = [f'--data={tmp_path / "moved.npz"}', f'--out={tmp_path}']
  assert evaluate_command.main([str(tmp_path / 'run'), *words]) == 0
  found = json.loads((tmp_path / 'evaluation.json').read_text())
  (accuracy,) = (
    value
    for name, value in found['measures'].items()
    if name.endswith('_accuracy')
  )
  assert accuracy == pytest.approx(summary['test_accuracy'])
  assert list(found['examples'].values()) == [8 if alone else 6]
  assert 'training images cannot be read' not in capsys.readouterr().err


def test_parts_of_a_set_at_another_place_are_the_same_parts(tmp_path, capsys):
  arrays = {'images': images(40), 'labels': np.arange(40) % 3}
  np.savez(tmp_path / 'own.npz', class_names=NAMES, **arrays)
  made = config(tmp_path / 'own.npz', 1)
  made.data.train_split, made.data.test_split = 'train[:80%]', 'train[80%:]'
  summary = train.train(made, tmp_path / 'run')
  (tmp_path / 'own.npz').rename(tmp_path / 'moved.npz')
  words = [f'--data={tmp_path / "moved.npz"}', f'--out={tmp_path}']
  assert evaluate_command.main([str(tmp_path / 'run'), *words]) == 0
  found = json.loads((tmp_path / 'evaluation.json').read_text())
  assert found['examples'] == {'test': 8}
  measured = found['measures']['test_accuracy']
  assert measured == pytest.approx(summary['test_accuracy'])
