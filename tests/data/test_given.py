"""A data set that a program gives is checked, trained on, and told apart."""

import json

import jax
import numpy as np
from PIL import ExifTags, Image
import pytest
import tfds_sets
from tiny_images import NAMES, images, labels

from resist_jax import data
from resist_jax.data import folder_source
from resist_jax.errors import ConfigError
from resist_jax.run import config as config_lib
from resist_jax.run import export, setup, train

# Arrays.


def test_arrays_are_a_data_set_as_they_are():
  train, test = images(12), images(6)
  made = data.from_arrays(
    train, labels(12), test_images=test, test_labels=labels(6),
    class_names=NAMES,
  )  # fmt: skip
  assert made.train.images is train
  np.testing.assert_array_equal(made.tests['test'].images, test)
  assert made.class_names == NAMES
  np.testing.assert_allclose(made.mean, (train / 255).mean((0, 1, 2)), 1e-6)
  held = data.from_arrays(images(30, 400, 8), labels(30))
  assert held.train.images.shape == (24, 400, 8, 1)
  assert np.bincount(held.tests['test'].labels).tolist() == [2, 2, 2]


def test_other_arrays_are_refused_by_name():
  for fields, says in (
    ({'test_images': images(3)}, 'give test_images and test_labels'),
    ({'test_images': images(3) / 2, 'test_labels': labels(3)},
     'test_images are float64'),
    ({'test_images': images(3, 9, 9), 'test_labels': labels(3)},
     r'and test_images \(9, 9, 1\)'),
    ({'class_names': NAMES[:2]}, 'at least 3 class_names'),
    ({'class_names': 'abc'}, "class_names is 'abc'; it must be a list with a"),
    ({'class_names': dict(enumerate(NAMES))}, 'in the order of the labels'),
    ({'class_names': set(NAMES)}, 'in the order of the labels'),
    ({'class_names': ['a', 'b', 'a']}, "class_names hold 'a' twice"),
    ({'class_names': [['a'], ['b']]}, 'as one name: give a flat list'),
    ({'class_names': np.array([['a'], ['b']])}, 'it must be a list with a'),
    ({'class_names': np.array('a')}, 'it must be a list with a'),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=says) as caught:
      data.from_arrays(images(6), labels(6), **fields)
    assert '\n' not in str(caught.value)


def test_a_stray_label_is_no_billion_classes():
  far = labels(6)
  far[0] = 10**9
  with pytest.raises(ValueError, match='run to 1000000000, and there are 6 im'):
    data.from_arrays(images(6), far)


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'name': None}, 'name is None; it must be a string'),
    ({'validation': 1.5}, 'validation is 1.5; it must be a share'),
    (
      {'streaming': 'yes'},
      "streaming is 'yes'; use one of auto, always, never",
    ),
    ({'image_size': 0}, 'image_size is 0; it must be a whole number of pixels'),
    ({'extra_tests': 'svhn'}, r"must hold names: \['svhn'\]"),
  ],
)
def test_a_set_is_not_loaded_with_other_arguments(fields, says):
  with pytest.raises(ConfigError, match=says):
    data.load(**{'name': 'digits', **fields})


@pytest.mark.parametrize('number', [2**40, 1e300])
def test_numbers_that_do_not_fit_in_32_bits_are_refused(number):
  table = {'x': np.array([number])}
  with pytest.raises(ValueError, match='does not fit in the 32 bits'):
    data.from_tables(table, {'test': table})


# Sources.


class Photos:
  """As a data set of torchvision: images of Pillow, and labels."""

  classes = ('china', 'flower')

  def __init__(self, count, seed=0):
    self.pairs = tfds_sets.photographs(count, seed)

  def __len__(self):
    return len(self.pairs)

  def __getitem__(self, number):
    image, label = self.pairs[number]
    return Image.fromarray(image), label


class Rows(Photos):
  """As a data set of dictionaries."""

  def __getitem__(self, number):
    image, label = self.pairs[number]
    content = tfds_sets.encode(image, 'PNG').read()
    return {'image': content, 'label': np.int64(label), 'more': 'words'}


def test_every_kind_of_example_has_the_same_pixels():
  fields = {'class_names': Photos.classes, 'image_size': 16}
  found = [
    data.from_source(source, Photos(4, 1), **fields)
    for source in (Photos(10), Rows(10), Photos(10).pairs)
  ]
  for made in found:
    assert made.streamed
    assert made.train.images.shape == (10, 16, 16, 3)
    np.testing.assert_array_equal(
      made.train.images[:], found[0].train.images[:]
    )
    assert made.train.labels[:].tolist() == [0, 1] * 5
    assert len(made.tests['test']) == 4
  assert data.from_source(Photos(10), image_size=8).class_names == (
    'china', 'flower',
  )  # fmt: skip


def test_images_of_one_size_are_read_into_memory_once():
  count = []

  class Counted:
    def __len__(self):
      return 100

    def __getitem__(self, number):
      count.append(number)
      return np.full((8, 8), number, np.uint8), number % 3

  made = data.from_source(Counted(), class_names=NAMES)
  assert made.train.images.shape == (80, 8, 8, 1)
  before = len(count)
  assert set(np.unique(made.train.images)) <= set(range(100))
  assert len(count) == before


def test_an_image_that_lies_on_its_side_stands_up():
  upright = images(1, 8, 12, 3)[0]
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  sideways = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
  sideways.getexif().update(exif)
  source = [(sideways, 0), (upright, 1)] * 5
  made = data.from_source(source, class_names=NAMES[:2])
  for image in made.train.images:
    np.testing.assert_array_equal(image, upright)
  assert sideways.size == (8, 12)  # The caller's is as it was.


@pytest.mark.parametrize(
  ('example', 'says'),
  [
    (images(1)[0], 'is ndarray uint8'),
    (5, 'is int: give'),
    ({'img': images(1)[0], 'label': 0}, 'is dict of img, label: give'),
    ((images(1)[0], 0.5), 'is tuple of ndarray, float: give'),
    ((images(1)[0], np.eye(3)[0]), 'where label is a whole number'),
    ((images(1)[0] / 255, 0), r'is ndarray float64 \(8, 8, 3\): .*ToTensor'),
    ((images(1, 3, 8, 8)[0], 0), r'is ndarray uint8 \(3, 8, 8\)'),
    (('photo.jpg', 0), 'is str: give uint8'),
  ],
)
def test_another_example_is_described(example, says):
  with pytest.raises(ValueError, match=says) as caught:
    data.from_source([example] * 3, class_names=NAMES)
  assert '\n' not in str(caught.value)


def test_a_source_that_does_not_fit_is_refused():
  for source, fields, says in (
    (Photos(4), {}, 'images differ in size: give image_size'),
    ([], {'class_names': NAMES}, 'train has no examples'),
    ([(images(1)[0], 0)], {}, 'class_names is missing'),
    ([(images(1)[0], 7)] * 5, {'class_names': NAMES}, 'has the label 7'),
  ):
    with pytest.raises(ValueError, match=says):
      data.from_source(source, **fields)


# Runs.


def tiny_config(**fields):
  config = config_lib.get_config()
  config.model.name = 'PreActResNet18'
  config.model.stage_sizes, config.model.widths = (1, 3), (8, 8)
  config.partition, config.num_workers, config.num_devices = (2,), 2, 2
  config.num_rounds, config.local_steps, config.batch_size = 2, 2, 8
  config.eval_every, config.checkpoint_every = 2, 1
  config.evaluation.statistics_images = 20
  config.log.report = config.log.tensorboard = False
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def test_a_run_trains_on_it_and_goes_on_with_no_other(tmp_path):
  train_images, others = images(40), images(40)
  fields = {'class_names': NAMES, 'name': 'insects'}
  made = data.from_arrays(train_images, labels(40), **fields)
  summary = train.train(tiny_config(), tmp_path / 'run', dataset=made)
  assert summary['class_names'] == list(NAMES)
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  kind, name, digest = config['data']['name'].split(':')
  assert (kind, name, len(digest)) == ('given', 'insects', 12)
  assert summary['dataset'] == config['data']['name']
  assert export.load(tmp_path / 'run').class_names == NAMES

  longer = tiny_config(num_rounds=3)
  other = data.from_arrays(others, labels(40), **fields)
  with pytest.raises(ConfigError, match=r'another config .data.name') as caught:
    train.train(longer, tmp_path / 'run', dataset=other)
  assert '\n' not in str(caught.value)
  with pytest.raises(ConfigError, match='another config'):
    train.train(longer, tmp_path / 'run')
  again = data.from_arrays(train_images.copy(), labels(40), **fields)
  assert train.train(longer, tmp_path / 'run', dataset=again)['rounds'] == 3


@pytest.mark.slow
def test_a_run_streams_what_a_program_gives(tmp_path):
  made = data.from_source(Photos(40), Photos(6, 1), image_size=16)
  summary = train.train(tiny_config(), tmp_path, dataset=made)
  assert summary['image_shape'] == [16, 16, 3]
  assert setup.prepare(tiny_config(), made).task.augmentation.resized_crop


def test_what_a_given_data_set_does_not_have_is_refused(tmp_path):
  made = data.from_arrays(images(40), labels(40))
  for field, value in (
    ('data.validation', 0.1),
    ('data.extra_tests', ('mnist',)),
    ('data.train_split', 'train[:50%]'),
    ('data.augment', 'resized_crop'),
  ):
    with pytest.raises(ConfigError, match=field):
      train.train(tiny_config(**{field: value}), tmp_path, dataset=made)
  with pytest.raises(ConfigError, match='which a program gave'):
    data.load('given:insects:0123456789ab')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('wrong', [[(images(1)[0], 0)], {}, 'digits', 3])
def test_what_is_no_data_set_is_refused(wrong, tmp_path):
  with pytest.raises(ValueError, match=r'dataset is a .*from_source'):
    train.train(tiny_config(), tmp_path / 'run', dataset=wrong)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('wrong', [None, {}, 'digits'])
def test_what_is_no_config_is_refused(wrong, tmp_path):
  with pytest.raises(ValueError, match=r'config is a .*cards.load'):
    train.train(wrong, tmp_path / 'run')
  assert not list(tmp_path.iterdir())


class Named(list):
  """As torchvision's folders, which number the classes that are there."""

  def __init__(self, pairs, classes):
    super().__init__(pairs)
    self.classes = classes


def test_a_source_is_read_as_it_is_or_refused():
  grey = np.zeros((8, 8), np.uint8)
  colour = np.zeros((8, 8, 3), np.uint8)
  train = Named([(grey, n % 3) for n in range(63)], ['ant', 'bee', 'cat'])
  assert data.from_source(train).num_classes == 3
  test = Named([(grey, 0), (grey, 1)], ['ant', 'cat'])
  with pytest.raises(ValueError, match=r'train.classes and .* differ'):
    data.from_source(train, test)
  for size in (0, -3, (16, 16), '16', 16.0):
    with pytest.raises(ValueError, match=r'image_size is .* whole number'):
      data.from_source(train, image_size=size)
  with pytest.raises(ValueError, match="streaming is 'nope'; use one of"):
    data.from_source(train, streaming='nope')
  mixed = [(colour if n == 31 else grey, n % 3) for n in range(63)]
  with pytest.raises(ValueError, match='example 31 has colours'):
    data.from_source(mixed, class_names=['a', 'b', 'c'])


@pytest.mark.parametrize('name', ['train', 'a/b', 'a b', ''])
def test_a_test_of_tables_has_a_name_that_files_can_have(name):
  table = {'x': np.zeros((4, 2))}
  with pytest.raises(ValueError, match=r'tests has the key .* rename it'):
    data.from_tables(table, {'test': table, name: table})


# Fourth channels.


@pytest.mark.parametrize('dtype', ['>f4', '>f8', '>i4', '>i8', 'longdouble'])
def test_tables_have_numbers_that_jax_takes(dtype):
  table = {'x': np.arange(6, dtype=dtype)}
  kind = np.dtype(dtype).kind
  made = data.from_tables(table, {'test': table}).train.take(np.arange(6))
  assert jax.device_put(made['x']).dtype == f'{kind}4'
  assert made['x'].tolist() == list(range(6))


def test_a_fourth_channel_of_arrays_is_kept():
  tiles = images(10, 8, 8, 4)
  pairs = [*zip(tiles, labels(10), strict=True)]
  made = data.from_source(pairs, pairs[:4], class_names=np.array(NAMES))
  np.testing.assert_array_equal(made.train.images[:], tiles)


def test_a_fourth_channel_is_neither_dropped_nor_made_up(tmp_path):
  tiles, some = images(10, 8, 8, 4), images(10, 8, 8, 3)
  mixed = [(some[0], 0), *zip(tiles[1:], labels(9), strict=True)]
  with pytest.raises(ConfigError, match='has four channels, and 3 are used'):
    data.from_source(mixed, mixed[:4], class_names=NAMES)
  late = [*zip(tiles, labels(10), strict=True)] * 10
  late[1] = (some[1], 1)  # It is not among those that are looked at.
  with pytest.raises(ConfigError, match='arrays of four channels: give'):
    data.from_source(late, late[2:6], class_names=NAMES)
  Image.fromarray(some[0]).save(tmp_path / 'a.jpg')
  with pytest.raises(ConfigError, match='no fourth channel'):
    folder_source.read_files([str(tmp_path / 'a.jpg')], (8, 8, 4), False)
  for channels, used in ((3, 4), (4, 3)):
    path = tmp_path / f'{channels}.npz'
    np.savez(path, images=images(9, 8, 8, channels), labels=labels(9))
    with pytest.raises(ConfigError, match=r'channel|shape'):
      data.load_test(str(path), NAMES, (8, 8, used), False).in_memory()
  three, four = str(tmp_path / '3.npz'), str(tmp_path / '4.npz')
  with pytest.raises(ConfigError, match=r'shape .8, 8, 4., but those of'):
    data.load(three, streaming='always', extra_tests=(four,))


@pytest.mark.parametrize(
  ('source', 'fields', 'says'),
  [
    (iter([]), {}, 'train is a list_iterator; it must have a length'),
    ([], {'class_names': 5}, 'class_names is 5; it must be a list'),
    ([], {'class_names': ['one']}, 'class_names is missing'),
  ],
)
def test_what_is_no_source_is_refused(source, fields, says):
  with pytest.raises(ValueError, match=says):
    data.from_source(source, **{'class_names': ['a', 'b'], **fields})
