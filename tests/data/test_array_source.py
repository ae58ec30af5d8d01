"""Arrays of the user's are trained on as they are, or refused in one line."""

import numpy as np
import pytest
from tiny_images import NAMES, images, labels

from resist_jax import data
from resist_jax.data import sets
from resist_jax.errors import ConfigError


def write(folder, **arrays):
  path = folder / 'own.npz'
  np.savez(path, **arrays)
  return str(path)


def load(path, **fields):
  sets.load_once.cache_clear()
  return data.load(path, **fields)


def test_a_file_of_arrays_is_read_to_the_last_pixel(tmp_path):
  train, test = images(12), images(6)
  path = write(
    tmp_path, images=train, labels=labels(12), test_images=test,
    test_labels=labels(6)[:, None], class_names=NAMES,
  )  # fmt: skip
  dataset = load(path)
  np.testing.assert_array_equal(dataset.train.images, train)
  np.testing.assert_array_equal(dataset.tests['test'].images, test)
  np.testing.assert_array_equal(dataset.tests['test'].labels, labels(6))
  assert (dataset.class_names, dataset.name) == (NAMES, 'own')
  cut = load(path, train_split='train[:6]', validation=0.5)
  np.testing.assert_array_equal(
    np.sort(np.append(cut.train.labels, cut.tests['validation'].labels)),
    np.sort(labels(6)),
  )


def test_the_names_of_other_collections_mean_the_same(tmp_path):
  path = write(
    tmp_path, train_images=images(12, 8, 8), train_labels=labels(12),
    val_images=images(3, 8, 8), val_labels=labels(3),
  )  # fmt: skip
  dataset = load(path)
  assert dataset.train.images.shape == (12, 8, 8, 1)
  assert len(dataset.tests['test']) == 3
  assert dataset.class_names == ('0', '1', '2')


def test_without_a_test_a_fifth_is_held_out(tmp_path):
  dataset = load(write(tmp_path, images=images(30), labels=labels(30)))
  assert np.bincount(dataset.train.labels).tolist() == [8] * 3
  assert np.bincount(dataset.tests['test'].labels).tolist() == [2] * 3


def test_arrays_can_be_resized(tmp_path):
  path = write(tmp_path, images=images(10, 20, 30, 3), labels=labels(10))
  assert load(path, image_size=16).train.images.shape[1:] == (16, 16, 3)
  assert load(path).train.images.shape[1:] == (20, 30, 3)


def test_another_file_is_an_extra_test(tmp_path):
  path = write(tmp_path, images=images(10), labels=labels(10))
  other = tmp_path / 'more'
  other.mkdir()
  grey = write(other, images=images(4, 9, 9), labels=labels(4))
  found = load(path, extra_tests=(grey,)).tests['own']
  assert found.images.shape == (4, 8, 8, 3)
  assert found.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
  ('arrays', 'says'),
  [
    ({'x': images(3)}, 'images and labels are missing; there are x: rename'),
    ({'images': images(3) / 255, 'labels': labels(3)},
     r'images are float64, .* \(255 \* images\)'),
    ({'images': images(3, 3, 8, 8), 'labels': labels(3)},
     r'give images.transpose\(0, 2, 3, 1\)'),
    ({'images': images(3, 8, 8, 2), 'labels': labels(3)}, 'reshape them'),
    ({'images': images(3), 'labels': labels(4)}, 'one label for each of 3'),
    ({'images': images(3), 'labels': np.eye(3)}, 'one label for each of 3'),
    ({'images': images(3), 'labels': labels(3) / 2}, 'labels are float64'),
    ({'images': images(3), 'labels': labels(3) - 1}, 'labels hold -1'),
    ({'images': images(3), 'labels': np.array(NAMES)}, 'number the classes'),
    ({'images': images(3), 'labels': labels(3), 'class_names': NAMES[:2]},
     'labels go up to 2, and there are 2 class names'),
    ({'images': images(3), 'labels': labels(3) * 0}, 'there are 1 class names'),
    ({'images': images(0), 'labels': labels(0)}, 'no images'),
    ({'images': images(3), 'labels': labels(3), 'test_images': images(3, 9, 9),
      'test_labels': labels(3)}, 'images have the shapes'),
    ({'images': np.array([None]), 'labels': labels(1)},
     'images cannot be read .* save an array of numbers'),
    ({'images': images(3), 'labels': labels(3), 'test_images': images(3)},
     'test_images come without test_labels'),
    ({'images': images(3)}, 'images come without labels'),
    ({'images': images(3), 'labels': labels(3), 'train_images': images(3),
      'train_labels': labels(3)}, 'the split train is there twice'),
    ({'images': images(3, 0, 8), 'labels': labels(3)}, 'without a pixel'),
    ({'images': images(3), 'labels': labels(3), 'class_names': ['a', 'b', 'a']},
     "class_names hold 'a' twice"),
    ({'images': images(3), 'labels': labels(3),
      'class_names': np.array(NAMES, object)}, r'class_names\.astype\(str\)'),
  ],
)  # fmt: skip
def test_other_arrays_get_a_clear_line(arrays, says, tmp_path):
  path = write(tmp_path, **arrays)
  with pytest.raises(ConfigError, match=says) as caught:
    load(path)
  assert '\n' not in str(caught.value)
  assert path in str(caught.value)


def test_arrays_that_mean_nothing_here_may_be_anything(tmp_path):
  names = np.array([f'{i}.png' for i in range(10)], object)
  path = write(tmp_path, images=images(10), labels=labels(10), files=names)
  assert len(load(path).train) == 8


def test_a_file_that_is_damaged_or_not_there_gets_a_clear_line(tmp_path):
  path = write(tmp_path, images=images(30), labels=labels(30))
  (tmp_path / 'folder.npz').mkdir()
  with open(path, 'r+b') as file:
    file.truncate(1000)
  text = tmp_path / 'text.npz'
  text.write_text('no archive')
  for name, says in (
    (path, 'own.npz is not an npz file, or is truncated'),
    (str(text), 'text.npz is not an npz file'),
    ('nowhere.npz', 'no such file'),
    (str(tmp_path / 'folder.npz'), 'no such file'),
  ):
    with pytest.raises(ConfigError, match=says) as caught:
      load(name)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('dtype', [np.uint32, np.int64])
def test_labels_that_do_not_fit_are_refused(dtype):
  numbers = np.array([0, 1, 2**32 - 1], dtype)
  with pytest.raises(ValueError, match='labels hold 4294967295'):
    data.from_arrays(images(3), numbers)


def test_a_fourth_channel_darkens_no_colours(tmp_path):
  pixels = np.full((10, 16, 16, 4), (200, 150, 100, 0), np.uint8)
  path = write(tmp_path, images=pixels, labels=np.arange(10) % 2)
  small = load(path, image_size=8).train.images[:]
  assert (small == (200, 150, 100, 0)).all()


def test_names_may_be_bytes():
  made = data.from_arrays(images(6), labels(6), class_names=[b'a', b'b', b'c'])
  assert made.class_names == ('a', 'b', 'c')


def test_a_set_that_is_loaded_again_is_what_it_was():
  """Runs of one process share it, so nobody may write to it."""
  found = data.load('digits')
  with pytest.raises(ValueError, match='read-only'):
    found.train.images[:] = 0


def test_classes_of_a_test_are_matched_by_their_names(tmp_path):
  some = images(6)
  for own in (NAMES[::-1], NAMES[1:]):
    path, numbers = tmp_path / 'test.npz', labels(6) % len(own)
    np.savez(path, images=some, labels=numbers, class_names=own)
    found = data.load_test(str(path), NAMES, some.shape[1:], False).in_memory()
    assert [NAMES[i] for i in found.labels] == [own[i] for i in numbers]
  np.savez(path, images=some, labels=labels(6), class_names=['eel', *NAMES[:2]])
  with pytest.raises(ConfigError, match='are not the 3 classes'):
    data.load_test(str(path), NAMES, some.shape[1:], False)
