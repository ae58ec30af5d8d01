"""Folders of images of every kind are read as Pillow reads each file."""

import os
import re

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin
import pytest
import tfds_sets

from resist_jax import data
from resist_jax.data import folder_source, sets, sources, tfds_source
from resist_jax.data.streaming import Records
from resist_jax.errors import ConfigError

RNG = np.random.default_rng(0)


def pixels(*shape):
  return RNG.integers(0, 256, shape).astype(np.uint8)


def put(path, image, **options):
  """Writes an image file; its name says the format."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  image.save(path, **options)
  return path


def some(folder, classes=('cat', 'dog'), count=4, shape=(8, 8, 3)):
  """Writes random images of each class."""
  for name in classes:
    for i in range(count):
      put(folder / name / f'{i}.png', pixels(*shape))


def load(folder, **fields):
  sets.load_once.cache_clear()
  return data.load(str(folder), **fields)


def refusal(folder, **fields):
  with pytest.raises(ConfigError) as caught:
    load(folder, **fields)
  message = str(caught.value)
  assert '\n' not in message
  return message


def contents(split):
  split = split.in_memory()
  pairs = zip(split.images, split.labels, strict=True)
  return sorted((bytes(image), int(label)) for image, label in pairs)


# Kinds of files.

GREY, COLOUR = pixels(8, 8), pixels(8, 8, 3)
ALPHA = pixels(8, 8, 4)
PALETTE = Image.fromarray(COLOUR).quantize(16)
DEEP = (GREY.astype(np.uint16) << 8) + 77
IN_COLOUR = {
  'a.png': (COLOUR, COLOUR),
  'b.bmp': (COLOUR, COLOUR),
  'c.tiff': (COLOUR, COLOUR),
  'd.ppm': (COLOUR, COLOUR),
  'grey.png': (GREY, np.dstack([GREY] * 3)),
  'alpha.png': (ALPHA, ALPHA[..., :3]),
  'grey with alpha.png': (
    Image.fromarray(ALPHA).convert('LA'),
    np.asarray(Image.fromarray(ALPHA).convert('LA').convert('RGB')),
  ),
  'palette.gif': (PALETTE, np.asarray(PALETTE.convert('RGB'))),
  'palette.png': (PALETTE, np.asarray(PALETTE.convert('RGB'))),
  'deep.png': (DEEP, np.dstack([GREY] * 3)),
  'deep.tif': (DEEP, np.dstack([GREY] * 3)),
  'two colours.png': (
    Image.fromarray(GREY).convert('1'),
    np.asarray(Image.fromarray(GREY).convert('1').convert('RGB')),
  ),
}


def test_every_kind_of_file_has_the_pixels_that_were_written(tmp_path):
  for name, (image, _) in IN_COLOUR.items():
    put(tmp_path / 'train' / 'cat' / name, image)
  put(tmp_path / 'train' / 'dog' / 'a.WEBP', COLOUR, lossless=True)
  put(tmp_path / 'train' / 'dog' / 'deeper' / 'a.jpg', COLOUR, quality=90)
  put(tmp_path / 'test' / 'dog' / 'a.png', COLOUR)
  jpeg = Image.open(tmp_path / 'train' / 'dog' / 'deeper' / 'a.jpg')
  dataset = load(tmp_path)
  wanted = [(bytes(p.tobytes()), 0) for _, p in IN_COLOUR.values()]
  wanted += [(COLOUR.tobytes(), 1), (np.asarray(jpeg).tobytes(), 1)]
  assert contents(dataset.train) == sorted(wanted)
  assert contents(dataset.tests['test']) == [(COLOUR.tobytes(), 1)]
  assert dataset.class_names == ('cat', 'dog')
  assert dataset.name == tmp_path.name
  assert not dataset.streamed


@pytest.mark.parametrize(
  ('train', 'test'), [('Training', 'Testing'), ('Train', 'TEST')]
)
def test_splits_may_be_spelled_otherwise(tmp_path, train, test):
  some(tmp_path / train)
  some(tmp_path / test, count=2)
  dataset = load(tmp_path)
  assert dataset.class_names == ('cat', 'dog')
  assert [len(dataset.train), len(dataset.tests['test'])] == [8, 4]
  some(tmp_path / 'test', count=1)
  assert 'are both the split test' in refusal(tmp_path)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
  some(tmp_path, ('bus', 'train', 'Testing'))
  assert load(tmp_path).class_names == ('Testing', 'bus', 'train')


def test_a_folder_is_read_anew_by_every_load(tmp_path):
  some(tmp_path, count=5)
  assert data.load(str(tmp_path)).num_classes == 2
  some(tmp_path, ('cow',), count=5)
  assert data.load(str(tmp_path)).num_classes == 3


def test_an_image_of_another_size_keeps_its_shape(tmp_path):
  """A network of 8x4 pixels sees the middle that is twice as high as wide."""
  image = np.zeros((16, 32, 3), np.uint8)
  image[:, 10:22] = 255  # A filter sees two pixels around the middle.
  path = str(put(tmp_path / 'wide.png', image))
  (found,) = data.read_files([path], (8, 4, 3), False)
  assert found.min() == 255
  (found,) = data.read_files([path], (8, 16, 3), False)  # All of it.
  assert found[:, :4].max() == 0
  assert found[:, 7:9].min() == 255


def test_a_photograph_that_was_taken_sideways_stands_upright(tmp_path):
  upright = pixels(8, 12, 3)
  for orientation, stored in (
    (3, upright[::-1, ::-1]),
    (6, np.rot90(upright)),
    (8, np.rot90(upright, -1)),
  ):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for kind in ('png', 'webp', 'tiff'):
      lossless = {'lossless': True} if kind == 'webp' else {}
      put(
        tmp_path / 'cat' / f'{orientation}.{kind}',
        np.ascontiguousarray(stored), exif=exif, **lossless,
      )  # fmt: skip
  put(tmp_path / 'dog' / 'a.png', upright)
  dataset = load(tmp_path)
  assert dataset.train.images.shape[1:] == (8, 12, 3)
  splits = (dataset.train, dataset.tests['test'])
  found = [image for split in splits for image in split.images[:]]
  assert len(found) == 10
  for image in found:
    np.testing.assert_array_equal(image, upright)


def test_an_image_that_turns_when_it_is_decoded_is_named(tmp_path):
  """The header of a PNG does not tell what stands behind its pixels."""
  some(tmp_path, shape=(8, 12, 3))
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  path = put(tmp_path / 'cat' / '0.png', pixels(8, 12, 3), exif=exif)
  content = path.read_bytes()
  start = content.index(b'eXIf') - 4
  end = start + 12 + int.from_bytes(content[start : start + 4], 'big')
  chunk, last = content[start:end], content[-12:]
  path.write_bytes(content[:start] + content[end:-12] + chunk + last)
  said = refusal(tmp_path)
  assert f'({path}) has 12x8 pixels, not 8x12: mend or remove it' in said


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'webp'])
def test_malformed_exif_turns_nothing(kind, tmp_path):
  some(tmp_path, count=10, shape=(8, 12, 3))
  broken = {'exif': b'Exif\x00\x00no such header', 'dpi': (72, 72)}
  path = put(tmp_path / 'cat' / f'broken.{kind}', pixels(8, 12, 3), **broken)
  with Image.open(path) as image, pytest.raises(SyntaxError):
    image.getexif()
  for streaming in ('never', 'always'):
    dataset = load(tmp_path, streaming=streaming)
    splits = (dataset.train, dataset.tests['test'])
    assert sum(len(split.images[:]) for split in splits) == 21
  (found,) = data.read_files([str(path)], (8, 12, 3), False)
  assert found.shape == (8, 12, 3)


def test_xmp_may_say_that_an_image_lies_on_its_side(tmp_path):
  upright = pixels(8, 12, 3)
  said = PngImagePlugin.PngInfo()
  said.add_itxt('XML:com.adobe.xmp', '<rdf tiff:Orientation="6"/>')
  sideways = np.ascontiguousarray(np.rot90(upright))
  put(tmp_path / 'cat' / 'sideways.png', sideways, pnginfo=said)
  put(tmp_path / 'dog' / 'upright.png', upright)
  dataset = load(tmp_path)
  for split in (dataset.train, dataset.tests['test']):
    for image in split.images[:]:
      np.testing.assert_array_equal(image, upright)


def test_no_file_is_read_for_its_label(tmp_path, monkeypatch):
  some(tmp_path, count=10)

  def read(self, number):
    raise AssertionError('a file was read')

  monkeypatch.setattr(folder_source.Files, '__getitem__', read)
  source = folder_source.find(str(tmp_path))
  for split in ('train', 'train[:50%]'):
    records = Records('', source.open(split), 2)
    labels = [records.label(i) for i in range(len(records))]
    assert set(labels) == {0, 1}


def test_grey_images_have_one_channel(tmp_path):
  some(tmp_path, shape=(8, 8))
  assert load(tmp_path).train.images.shape[1:] == (8, 8, 1)
  put(tmp_path / 'cat' / 'in colour.png', COLOUR)
  assert load(tmp_path).train.images.shape[1:] == (8, 8, 3)


def test_images_of_many_sizes_are_resized_and_streamed(tmp_path):
  for i, (photo, label) in enumerate(tfds_sets.photographs(20)):
    put(tmp_path / 'train' / 'ab'[label] / f'{i}.jpg', photo)
  for i, (photo, label) in enumerate(tfds_sets.photographs(6, seed=1)):
    put(tmp_path / 'test' / 'ab'[label] / f'{i}.jpg', photo)
  dataset = load(tmp_path, image_size=16)
  assert dataset.streamed
  assert dataset.train.images.shape == (20, 16, 16, 3)
  assert data.choose('auto', dataset).resized_crop
  test = dataset.tests['test'].in_memory()
  assert np.bincount(test.labels).tolist() == [3, 3]
  assert (test.images.std(axis=(1, 2, 3)) > 1).all()


def test_images_of_one_size_that_are_large_are_resized(tmp_path):
  some(tmp_path, shape=(8, 8, 3))
  assert load(tmp_path, image_size=8).train.images.shape[1:] == (8, 8, 3)
  small = load(tmp_path, image_size=6)
  assert small.streamed
  assert small.train.images.shape[1:] == (6, 6, 3)


# Splits.


def test_classes_alone_are_split_by_a_fixed_fifth(tmp_path):
  some(tmp_path, ('a', 'b', 'c'), count=10)
  (tmp_path / '.cache').mkdir()
  (tmp_path / 'a' / '.DS_Store').write_bytes(b'x')
  (tmp_path / 'a' / 'Thumbs.db').write_bytes(b'x')
  (tmp_path / 'lost+found').mkdir()
  put(tmp_path / 'a' / '@eaDir' / '0.png' / 'SYNOPHOTO_THUMB_M.png', COLOUR)
  (tmp_path / 'empty').mkdir()
  dataset = load(tmp_path)
  assert dataset.class_names == ('a', 'b', 'c')
  train, test = contents(dataset.train), contents(dataset.tests['test'])
  assert [label for _, label in test].count(0) == 2
  assert (len(train), len(test)) == (24, 6)
  assert not {image for image, _ in train} & {image for image, _ in test}
  assert contents(load(tmp_path).tests['test']) == test


def test_a_part_of_a_split_has_images_of_all_classes(tmp_path):
  some(tmp_path, ('a', 'b', 'c'), count=20, shape=(8, 8))
  fields = {'train_split': 'train[:50%]', 'test_split': 'train[50%:]'}
  parts = load(tmp_path, **fields)
  for split in (parts.train, parts.tests['test']):
    assert len(split) == 30
    assert min(np.bincount(split.labels[:], minlength=3)) >= 5
  whole = contents(parts.train) + contents(parts.tests['test'])
  assert len(set(whole)) == 60
  assert 'share images' in refusal(tmp_path, test_split='train[:10%]')
  assert "no split 'tset' " in refusal(tmp_path, test_split='tset')
  assert 'train[:80%]' in refusal(tmp_path, train_split='train[:')


def test_a_test_without_labels_gives_way_to_val(tmp_path):
  some(tmp_path / 'train')
  some(tmp_path / 'val', count=1)
  put(tmp_path / 'test' / '1.png', COLOUR)
  (tmp_path / 'annotations').mkdir()
  (tmp_path / 'annotations' / 'a.json').write_text('{}')
  assert len(load(tmp_path).tests['test']) == 2
  assert 'have no labels' in refusal(tmp_path, test_split='test')


@pytest.mark.parametrize(
  'names', [('train', 'test1'), ('seg_train', 'seg_test'), ('val', 'TEST')]
)
def test_splits_are_no_classes(names, tmp_path):
  """Images without the folders of classes, such as `train/cat.1.jpg`."""
  some(tmp_path, names)
  said = refusal(tmp_path)
  assert 'look like splits: move the images to train/CLASS' in said
  some(tmp_path, ('plane',))
  assert load(tmp_path).num_classes == 3


def test_classes_may_have_the_word_of_a_split_in_common(tmp_path):
  some(tmp_path, ('steam_train', 'diesel_train'), count=5)
  assert load(tmp_path).class_names == ('diesel_train', 'steam_train')


def test_a_class_may_be_called_train(tmp_path):
  some(tmp_path, ('plane', 'train'), count=5)
  assert load(tmp_path).class_names == ('plane', 'train')


def test_no_class_is_lost_beside_one_that_is_called_train(tmp_path):
  some(tmp_path / 'train', ('steam', 'diesel'))
  some(tmp_path, ('bus', 'car'))
  said = refusal(tmp_path)
  assert f'{tmp_path}/bus beside it holds images: move all classes' in said
  parts = load(tmp_path, train_split='train[:80%]', test_split='train[80%:]')
  assert parts.class_names == ('diesel', 'steam')
  some(tmp_path / 'test', ('steam', 'diesel'))  # Then it is certainly a split.
  assert load(tmp_path).class_names == ('diesel', 'steam')


def test_what_lies_beside_the_training_is_no_class(tmp_path):
  some(tmp_path / 'train', ('steam', 'diesel'))
  put(tmp_path / 'runs/first/accuracy.png', pixels(8, 8, 3))  # A workdir.
  put(tmp_path / 'docs/logo.png', pixels(8, 8, 3))
  (tmp_path / 'docs/read.md').write_text('These are trains.')
  put(tmp_path / 'test1/0.png', pixels(8, 8, 3))
  assert load(tmp_path).class_names == ('diesel', 'steam')


def test_another_folder_is_an_extra_test(tmp_path):
  some(tmp_path / 'own', count=5)
  some(tmp_path / 'of a friend', count=2, shape=(20, 31))
  extra = str(tmp_path / 'of a friend')
  dataset = load(tmp_path / 'own', extra_tests=(extra,))
  assert set(dataset.tests) == {'test', 'of_a_friend'}
  found = dataset.tests['of_a_friend']
  assert found.images.shape == (4, 8, 8, 3)
  some(tmp_path / 'of a foe', ('cat', 'eel'))
  extra = str(tmp_path / 'of a foe')
  (tmp_path / 'of a foe' / 'augmented').mkdir()  # An empty one means nothing.
  message = refusal(tmp_path / 'own', extra_tests=(extra,))
  assert "the class 'eel', which the training set does not have" in message
  some(tmp_path / 'of one class', ('dog',), count=3)
  extra = str(tmp_path / 'of one class')
  dataset = load(tmp_path / 'own', extra_tests=(extra,))
  assert dataset.tests['of_one_class'].labels.tolist() == [1, 1, 1]


# Names.


def test_a_folder_beside_a_set_of_its_name_is_another_set(
  tmp_path, monkeypatch
):
  some(tmp_path / 'digits')
  monkeypatch.chdir(tmp_path)
  assert not data.same_set('./digits', 'digits')
  assert not data.same_set('./mnist', 'mnist')
  assert data.same_set('./digits', 'digits/')
  (tmp_path / 'mnist').mkdir()
  assert not data.same_set('./mnist', 'mnist')
  (tmp_path / 'photos').mkdir()
  assert data.same_set('./photos', 'photos')


def test_a_folder_beside_is_found_unless_a_set_has_its_name(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('SOMEWHERE', str(tmp_path))
  some(tmp_path / 'photos')
  some(tmp_path / 'mnist')
  for name in ('photos', './photos', 'photos/', '$SOMEWHERE/photos'):
    assert load(name).name == 'photos'
  assert 'mnist' in refusal('mnist', data_dir='$SOMEWHERE')
  assert load('./mnist').name == 'mnist'
  assert not tfds_source.knows('photos', '.')
  assert sources.find('./photos').splits == ('train',)


# Mistakes.


@pytest.mark.parametrize(
  ('make', 'says'),
  [
    (lambda f: f.rmdir(), 'no such folder'),
    (lambda f: None, 'at least two classes, but .* has none'),
    (lambda f: put(f / '1.png', COLOUR), 'has none: move'),
    (lambda f: some(f, ('cat',)), 'has only cat: move'),
    (lambda f: (some(f / 'train'), some(f / 'test', ('eel',))),
     "split test has the class 'eel', which the training set does not have"),
  ],
)  # fmt: skip
def test_a_wrong_folder_gets_a_clear_line(make, says, tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  make(folder)
  message = refusal(folder)
  assert re.search(says, message), message
  assert str(folder) in message


def test_a_file_that_is_no_image_is_named(tmp_path):
  some(tmp_path)
  path = tmp_path / 'cat' / 'notes.txt'
  for content in (b'', b'about cats', b'\x89PNG\r\n\x1a\n'):
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert f'{path} is no image that can be read' in message
    assert 'mend it, remove it, or name another' in message
  path.unlink()
  os.mkfifo(path)  # To read from it might never end.
  assert 'it is no file' in refusal(tmp_path)


@pytest.mark.parametrize('streaming', ['always', 'auto'])
def test_a_damaged_image_is_named(streaming, tmp_path):
  for i in range(4):
    for name in ('cat', 'dog'):
      put(tmp_path / name / f'{i}.jpg', pixels(64, 64, 3))
  path = tmp_path / 'cat' / '2.jpg'
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  message = refusal(tmp_path, streaming=streaming)
  assert str(path) in message
  assert 'mend or remove it' in message


def test_a_file_that_vanishes_is_named(tmp_path):
  some(tmp_path, count=5)
  dataset = load(tmp_path, streaming='always')
  for path in tmp_path.rglob('1.png'):
    os.remove(path)
  with pytest.raises(ConfigError, match=r'cannot be read.*1\.png.*run'):
    dataset.train.in_memory()


@pytest.mark.skipif(os.getuid() == 0, reason='root may read everything')
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
  some(tmp_path)
  os.chmod(tmp_path / 'cat', 0)
  message = refusal(tmp_path)
  os.chmod(tmp_path / 'cat', 0o700)
  assert f'{tmp_path / "cat"} cannot be read (Permission denied)' in message


def test_links_to_folders_are_followed_but_not_in_a_circle(tmp_path):
  some(tmp_path / 'near', ('cat', 'dog'))
  some(tmp_path / 'far', ('more', 'fox'), count=3)
  (tmp_path / 'near/cat/more').symlink_to(tmp_path / 'far/more')
  (tmp_path / 'near/fox').mkdir()
  (tmp_path / 'near/fox/linked').symlink_to(tmp_path / 'far/fox')
  (tmp_path / 'near/dog/up').symlink_to(tmp_path / 'near/dog')
  (tmp_path / 'far/fox/round').symlink_to(tmp_path / 'near/fox')
  source = sources.find(str(tmp_path / 'near'))
  assert source.class_names == ('cat', 'dog', 'fox')
  labels = [source.open('train')[n]['label'] for n in range(4 + 3 + 4 + 3)]
  assert np.bincount(labels).tolist() == [7, 4, 3]


@pytest.mark.parametrize('up', ['..', '../..', '../../..'])
def test_a_link_upwards_brings_no_image_of_another_class(up, tmp_path):
  for split in ('train', 'test'):
    some(tmp_path / split)
  (tmp_path / 'train/cat/up').symlink_to(up)
  # The folder that a link leads to has folders above it, too.
  some(tmp_path / 'far', ('owl', 'fox'))
  (tmp_path / 'train/dog/far').symlink_to(tmp_path / 'far/owl')
  (tmp_path / 'far/owl/up').symlink_to('..')
  assert np.bincount(load(tmp_path).train.labels).tolist() == [4, 8]


def test_a_folder_counts_once_under_two_names(tmp_path):
  some(tmp_path, ('cat/2024', 'dog'))
  (tmp_path / 'cat/latest').symlink_to('2024')
  dataset = load(tmp_path)
  found = contents(dataset.train) + contents(dataset.tests['test'])
  assert len(found) == len(set(found)) == 8


@pytest.mark.parametrize(
  ('link', 'to'),
  [
    ('train/cow', 'dog'),
    ('train/cow/more', '../dog'),
    ('test', 'train'),
    ('test/dog', '../train/dog'),
    ('test/cat/more', '../../train/cat'),
  ],
)
def test_links_share_no_folder_between_classes_or_splits(link, to, tmp_path):
  some(tmp_path / 'train')
  (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / link).symlink_to(to)
  assert 'are one folder' in refusal(tmp_path)


def test_a_test_may_be_called_validation_as_well(tmp_path):
  for split in ('train', 'validation'):
    some(tmp_path / split)
  (tmp_path / 'test').symlink_to('validation')
  assert len(load(tmp_path).tests['test']) == 8


@pytest.mark.parametrize('link', ['test', 'train/cow'])
def test_a_link_that_leads_nowhere_is_named(link, tmp_path):
  some(tmp_path / 'train')
  (tmp_path / link).symlink_to('/not/mounted')
  assert f'{tmp_path / link} is a link to /not/mounted' in refusal(tmp_path)


def test_what_is_held_out_is_in_no_other_part(tmp_path):
  some(tmp_path)
  assert 'do not overlap' in refusal(tmp_path, train_split='train+train')
  halves = load(tmp_path, train_split='train[:60%]+train[60%:]')
  assert len(halves.train) + len(halves.tests['test']) == 8
  said = refusal(
    tmp_path, train_split='train[:60%]+train[40%:]', test_split='train[60%:]'
  )
  assert 'share images' in said


@pytest.mark.parametrize('streaming', ['always', 'never'])
def test_a_class_without_an_image_to_train_on_is_named(
  streaming, tmp_path, caplog
):
  some(tmp_path / 'train')
  some(tmp_path / 'test')
  (tmp_path / 'train/owl').mkdir()
  (tmp_path / 'train/owl/notes').mkdir()
  load(tmp_path, streaming=streaming)
  assert not caplog.records  # A folder without files is no class.
  put(tmp_path / 'train/owl/0.png', pixels(8, 8, 3))
  load(tmp_path, streaming=streaming, train_split='train[:1]')
  assert "of 2 of its 3 classes, such as '" in caplog.text


def test_an_unused_validation_may_have_other_classes(tmp_path):
  for split in ('train', 'test'):
    some(tmp_path / split)
  some(tmp_path / 'val', ('owl',))
  assert len(load(tmp_path).tests['test']) == 8
  said = refusal(tmp_path, test_split='validation')
  assert "the class 'owl', which the training set does not have" in said


def test_files_are_read_by_the_names_that_they_have(tmp_path, monkeypatch):
  monkeypatch.setenv('NAME', 'alice')
  monkeypatch.chdir(tmp_path)
  theirs = put(tmp_path / '$NAME/0.png', pixels(8, 8, 3))
  put(tmp_path / 'alice/0.png', pixels(8, 8, 3))
  put(tmp_path / '~t.png', pixels(8, 8, 3))
  first, *_ = data.read_files(data.listed_files(['.']), (8, 8, 3), False)
  assert np.array_equal(first, np.asarray(Image.open(theirs)))


def test_a_split_that_nobody_asked_for_changes_nothing(tmp_path):
  for split in ('train', 'test'):
    some(tmp_path / split)
  for name in ('cat', 'dog'):
    put(tmp_path / 'raw' / name / '0.png', pixels(100, 80, 3))
  (tmp_path / 'raw/cat/1.png').write_text('no image')
  assert load(tmp_path).train.images.shape[1:] == (8, 8, 3)
  said = refusal(tmp_path, train_split='train+raw')
  assert 'raw/cat/1.png is no image' in said
  (tmp_path / 'raw/cat/1.png').unlink()
  assert load(tmp_path, train_split='train+raw').streamed


def test_numbers_as_names_are_not_their_places(tmp_path):
  """Folders are sorted as text: 0, 1, 10, 11, 2."""
  some(tmp_path / 'num', [str(n) for n in range(12)], count=2)
  images, labels = pixels(12, 8, 8, 3), np.arange(12)
  np.savez(tmp_path / 'more.npz', images=images, labels=labels)
  dataset = load(tmp_path / 'num', extra_tests=(str(tmp_path / 'more.npz'),))
  names = [dataset.class_names[n] for n in dataset.tests['more'].labels]
  assert names == [str(n) for n in range(12)]


def test_a_test_without_images_or_labels_is_named(tmp_path):
  some(tmp_path / 'train')
  (tmp_path / 'none/cat').mkdir(parents=True)
  said = refusal(tmp_path / 'train', extra_tests=(str(tmp_path / 'none'),))
  assert 'none' in said
  assert 'leave it out of data.extra_tests' in said
  put(tmp_path / 'flat/0.png', pixels(8, 8, 3))
  said = refusal(tmp_path / 'train', extra_tests=(str(tmp_path / 'flat'),))
  assert 'have no labels: move those of each class to a folder' in said


def test_an_image_of_floats_is_refused_before_anything_is_trained(tmp_path):
  some(tmp_path)
  put(tmp_path / 'cat/f.tif', np.ones((8, 8), np.float32))
  assert 'f.tif is no image that can be read' in refusal(tmp_path)


@pytest.mark.parametrize(
  ('name', 'key'),
  [('.', 'here'), ('./v1.0', 'v1_0'), ('./v1.1', 'v1_1'), ('/a/b.npz', 'b'),
   ('/data/画像', '画像'), ('../here', 'here')],
)  # fmt: skip
def test_a_test_is_called_after_the_end_of_its_path(
  name, key, tmp_path, monkeypatch
):
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  assert sources.test_key(name) == key


def test_splits_that_are_not_used_say_nothing_about_the_images(tmp_path):
  some(tmp_path / 'train', shape=(8, 8))
  some(tmp_path / 'val', count=2, shape=(8, 8))
  put(tmp_path / 'test' / '1.png', pixels(5, 7, 3))  # Without labels.
  for fields in ({}, {'test_split': 'validation'}):
    dataset = load(tmp_path, **fields)
    assert dataset.train.images.shape[1:] == (8, 8, 1)
    assert len(dataset.tests['test']) == 4
  (tmp_path / 'test' / '2.png').write_text('no image')
  load(tmp_path, test_split='validation')
