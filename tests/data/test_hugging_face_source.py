"""Sets that the package `datasets` has saved are read to the last pixel.

The package is an extra: without it, the line that says so is tested.
"""

import importlib.util
import os
import sys

import numpy as np
from PIL import Image
import pytest

from resist_jax import data
from resist_jax.data import sets
from resist_jax.errors import ConfigError

pytestmark = pytest.mark.filterwarnings('ignore')  # Those of `datasets`.
needed = pytest.mark.skipif(
  importlib.util.find_spec('datasets') is None,
  reason='the extra huggingface is not installed',
)
NAMES = ['cat', 'dog']
# Read when the package is imported, by which it asks no network.
os.environ.setdefault('HF_HUB_OFFLINE', '1')


def refusal(name, **fields):
  sets.load_once.cache_clear()
  with pytest.raises(ConfigError) as caught:
    data.load(name, **fields)
  message = str(caught.value)
  assert '\n' not in message
  return message


def write(folder, counts, shape=(8, 8, 3), **columns):
  """Saves splits of random images, and returns their images and labels."""
  import datasets

  rng = np.random.default_rng(0)
  made, tables = {}, {}
  for split, count in counts.items():
    images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    labels = (np.arange(count) % 2).tolist()
    made[split] = images, labels
    features = datasets.Features(
      {
        'image': datasets.Image(),
        'label': datasets.ClassLabel(names=NAMES),
        **columns,
      }
    )
    rows = {
      'image': list(map(Image.fromarray, images)),
      'label': labels,
      **dict.fromkeys(columns, labels),
    }
    tables[split] = datasets.Dataset.from_dict(rows, features)
  datasets.DatasetDict(tables).save_to_disk(str(folder))
  return made


@needed
def test_a_saved_set_is_read_to_the_last_pixel(tmp_path):
  made = write(tmp_path / 'pets', {'train': 10, 'test': 4})
  dataset = data.load(f'huggingface:{tmp_path / "pets"}')
  for split, found in (('train', dataset.train), *dataset.tests.items()):
    images, labels = made[split]
    np.testing.assert_array_equal(found.images, images)
    assert found.labels.tolist() == labels
  assert dataset.class_names == tuple(NAMES)
  assert dataset.name == 'pets'
  assert not dataset.streamed


@needed
def test_images_of_many_sizes_are_streamed(tmp_path):
  import datasets

  sizes = [(20, 30), (30, 20), (25, 25), (40, 16), (16, 16)]
  features = datasets.Features(
    {'img': datasets.Image(), 'kind': datasets.ClassLabel(names=NAMES)}
  )
  images = [Image.new('RGB', size, (9, 8, 7)) for size in sizes * 2]
  rows = {'img': images, 'kind': [0, 1] * 5}
  folder = str(tmp_path / 'pets')
  datasets.Dataset.from_dict(rows, features).save_to_disk(folder)
  dataset = data.load(f'huggingface:{folder}', image_size=16)
  assert dataset.streamed
  assert (len(dataset.train), len(dataset.tests['test'])) == (8, 2)
  assert (dataset.train.images[:3] == (9, 8, 7)).all()


@needed
def test_one_of_several_labels_is_named(tmp_path):
  import datasets

  columns = {
    'coarse': datasets.ClassLabel(names=['a', 'b', 'c']),
    'other': datasets.Value('int64'),
  }
  write(tmp_path / 'pets', {'train': 10, 'test': 4}, **columns)
  name = f'huggingface:{tmp_path / "pets"}'
  assert data.load(name).class_names == tuple(NAMES)
  assert data.load(f'{name}@coarse').class_names == ('a', 'b', 'c')
  for column in ('other', 'nothing'):
    message = refusal(f'{name}@{column}')
    assert 'coarse ClassLabel' in message
    assert f'as in {name}@label' in message


def test_a_column_may_have_any_name(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  for column in ('fine-label', 'fine label', 'a:b'):
    assert 'pip install' in refusal(f'huggingface:x@{column}')


@needed
def test_a_set_that_cannot_be_read_gets_advice(tmp_path):
  message = refusal('huggingface:nobody/nothing-there')
  assert "load_dataset('nobody/nothing-there').save_to_disk" in message
  (tmp_path / 'empty').mkdir()
  message = refusal(f'huggingface:{tmp_path / "empty"}')
  assert 'cannot be read' in message
  assert 'is no name' in refusal('huggingface:')
  import datasets

  table = datasets.Dataset.from_dict({'text': ['a', 'b']})
  table.save_to_disk(str(tmp_path / 'text'))
  message = refusal(f'huggingface:{tmp_path / "text"}')
  assert 'text Value: one column of Image' in message


def test_without_the_package_the_advice_is_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)  # As if it were not there.
  message = refusal('huggingface:mnist')
  assert "pip install 'resist_jax[huggingface]'" in message


@needed
def test_classes_of_each_split_are_told_by_their_names(tmp_path):
  """`class_encode_column` numbers each split for itself."""
  import datasets

  def table(names, labels):
    features = datasets.Features(
      {'image': datasets.Image(), 'label': datasets.ClassLabel(names=names)}
    )
    images = [Image.new('L', (8, 8)) for _ in labels]
    return datasets.Dataset.from_dict(
      {'image': images, 'label': labels}, features
    )

  def saved(name, **tables):
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / name))
    return f'huggingface:{tmp_path / name}'

  train = table(['ant', 'bee', 'cat'], [0, 1, 2, 0])
  name = saved('one', test=table(['ant', 'cat'], [0, 1, 1]), train=train)
  assert data.load(name).tests['test'].labels.tolist() == [0, 2, 2]
  other = saved('two', test=table(['ant', 'dog'], [0, 1]), train=train)
  assert "has the class 'dog'" in refusal(other)
  unlabelled = table(['ant', 'bee', 'cat'], [0, 0]).remove_columns('label')
  name = saved('three', test=unlabelled, validation=train, train=train)
  assert len(data.load(name).tests['test']) == 4


@needed
def test_a_saved_set_is_a_folder_of_ones_own(tmp_path, monkeypatch):
  name = f'huggingface:{tmp_path / "pets"}'
  write(tmp_path / 'pets', {'train': 10})
  assert data.is_own(name)
  assert not data.is_own('huggingface:pets')
  assert data.same_set(name, f'{name}/')
  assert not data.same_set(name, f'{name}@other')
  assert 'the set that is trained on' in refusal(name, extra_tests=[f'{name}/'])
  assert len(data.load(name).train) == 8
  write(tmp_path / 'pets', {'train': 20})
  assert len(data.load(name).train) == 16
