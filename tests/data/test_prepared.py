"""Sets on disk: what is there is used, and each fault in it is one line."""

import errno
import importlib.util
import io
import pathlib
import re
import struct
import zlib

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds
import tfds_sets

from resist_jax import data
from resist_jax.data import prepared, sets
from resist_jax.data import streaming as streaming_lib
from resist_jax.errors import ConfigError

pytestmark = pytest.mark.filterwarnings('ignore')  # TFDS's own, writing sets.
STREAMING = pytest.mark.parametrize('streaming', ['always', 'auto'])
NAMES = ['cat', 'dog', 'eel']


def refusal(name, folder, **fields):
  """Returns the one line that refuses a set."""
  sets.load_once.cache_clear()
  with pytest.raises(ConfigError) as caught:
    data.load(name, str(folder), **fields)
  message = str(caught.value)
  assert '\n' not in message
  return message


def write(folder, name='own', shape=(8, 8, 3), **splits):
  """Writes splits, each a list of `(content of an image file, label)`."""
  features = {
    'image': tfds.features.Image(shape=shape),
    'label': tfds.features.ClassLabel(names=NAMES),
    'file_name': tfds.features.Text(),
  }
  examples = {
    split: [
      {'image': io.BytesIO(file), 'label': label, 'file_name': f'{split}_{i}'}
      for i, (file, label) in enumerate(pairs)
    ]
    for split, pairs in splits.items()
  }
  tfds_sets.prepare(folder, name, features, examples)
  return folder


def some(labels, size=8, seed=0):
  """Returns pairs of random PNG files and these labels."""
  rng = np.random.default_rng(seed)
  shape = (len(labels), size, size, 3)
  images = rng.integers(0, 256, shape).astype(np.uint8)
  return [
    (tfds_sets.encode(image, 'PNG').read(), int(label))
    for image, label in zip(images, labels, strict=True)
  ]


def shard(folder, split='train'):
  (path,) = pathlib.Path(folder).rglob(f'*-{split}.array_record-*')
  return path


# Names, versions and configs.


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('a/b/c', 'is no name of a data set'),
    ('a set', 'is no name of a data set'),
    ('a.set', 'is no name of a data set'),
    ('../own', 'there is no such folder'),
    ('', 'is no name of a data set'),
    ('own:2.0.0', 'holds own:1.0.0: ask for that'),
    ('own/config', 'holds own:1.0.0: ask for that'),
    ('OWN', ''),
    ('cifar10:9.9.9', 'only: 3.0.2'),
    ('cifar10_1/v9', 'the catalog has cifar10_1/v4, cifar10_1/v6'),
    ('nobody:own', 'unknown data set'),
    ('cifar10', 'which holds cifar10:3.0.1 .set data.name to that.'),
  ],
)
def test_a_name_that_is_not_there_is_told_from_those_that_are(
  name, says, tmp_path_factory, monkeypatch
):
  folder = tmp_path_factory.mktemp('sets')
  write(folder, train=some([0, 1, 2]), test=some([0, 1]))
  monkeypatch.setitem(tfds_sets.VERSIONS, 'cifar10', '3.0.1')
  write(folder, 'cifar10', train=some([0, 1, 2]), test=some([0, 1]))
  if name == 'OWN':  # As TFDS itself reads it.
    assert data.load(name, str(folder)).name == 'own'
  else:
    assert re.search(says, refusal(name, folder))
  assert len(data.load('cifar10:3.0.1', str(folder)).train) == 3


def test_characters_are_never_mirrored_however_the_set_is_spelt(tmp_path):
  write(tmp_path, 'kmnist_own', train=some([0, 1]), test=some([0, 1]))
  tfds_sets.VERSIONS['kmnist'] = '1.0.0'
  write(tmp_path, 'kmnist', train=some([0, 1]), test=some([0, 1]))
  for name, flips in (('KmnistOwn', True), ('Kmnist:1.0.0', False)):
    assert data.choose('auto', data.load(name, str(tmp_path))).flip == flips


# Folders.


def test_the_folder_may_be_named_as_in_a_shell(tmp_path, monkeypatch):
  write(tmp_path / 'sets', train=some([0, 1, 2]), test=some([0, 1]))
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('WHERE', 'sets')
  monkeypatch.chdir(tmp_path)
  for folder in ('~/sets', '$HOME/sets', '~/${WHERE}', 'sets'):
    sets.load_once.cache_clear()
    assert len(data.load('own', folder).train) == 3
    monkeypatch.setenv('TFDS_DATA_DIR', folder)
    sets.load_once.cache_clear()
    assert len(data.load('own').train) == 3
  assert "'$NOT_THERE/sets', but $NOT_THERE is not set" in (
    refusal('own', '$NOT_THERE/sets')
  )
  assert 'no such user' in refusal('own', '~nobody-there/sets')
  assert 'gcsfs' in refusal('own', 'gs://bucket/sets')
  assert 'two slashes' in refusal('own', 'gs:/bucket/sets')
  assert 'does not read such URLs' in refusal('own', 'ftp://host/sets')
  missing = f'{tmp_path}/nowhere'
  assert f'there is no folder {missing}' in refusal('own', missing)
  assert f'{missing}, which does not exist' in refusal('cifar10', missing)
  assert [path.name for path in tmp_path.iterdir()] == ['sets']


# Files.


def cut_at_a_block(path):
  path.write_bytes(path.read_bytes()[:65536])


def cut(path):
  path.write_bytes(path.read_bytes()[:70000])


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 8] ^= 1  # In the middle of the images.
  path.write_bytes(content)


def fill_with_the_other(path):
  path.write_bytes(shard(path.parent, 'test').read_bytes())


@STREAMING
@pytest.mark.parametrize(
  'damage',
  [pathlib.Path.unlink, cut_at_a_block, cut, flip_a_bit, fill_with_the_other],
)
def test_a_file_that_is_missing_or_damaged_is_named(
  damage, streaming, tmp_path
):
  tfds_sets.write(tmp_path, 'own', counts=(40, 12))
  path = shard(tmp_path)
  damage(path)
  message = refusal('own', tmp_path, streaming=streaming)
  assert 'own, split train' in message
  assert str(path) in message


@pytest.mark.parametrize('name', ['own', 'cifar10'])
@pytest.mark.parametrize('file', ['dataset_info.json', 'features.json'])
@pytest.mark.parametrize(
  'content', ['', '[]', '{"', '{}', '\xff', 'null', None]
)
def test_a_damaged_description_is_one_line(file, content, name, tmp_path):
  pairs = some([0, 1, 2], size=32)
  write(tmp_path, name, (32, 32, 3), train=pairs, test=pairs)
  (path,) = tmp_path.rglob(file)
  path.unlink()
  if content is not None:
    path.write_text(content, 'latin1')
  if (name, file) == ('cifar10', 'features.json'):
    # The catalog itself describes its sets.
    assert len(data.load(name, str(tmp_path)).train) == 3
  else:
    assert name in refusal(name, tmp_path)


# Labels.


@STREAMING
@pytest.mark.parametrize(
  ('labels', 'says'),
  [
    ([-1] * 40, 'have no labels: set data.train_split to another'),
    ([-1] + [0] * 39, 'others have none, such as image'),
    ([0] * 39 + [-1], 'others have none, such as image'),
    ([0] * 20 + [-1] * 20, 'others have none, such as image'),
  ],
)
def test_labels_of_a_split_are_not_judged_by_the_first(
  labels, says, streaming, tmp_path
):
  write(tmp_path, train=some(labels), test=some([0, 1]))
  message = refusal('own', tmp_path, streaming=streaming)
  assert 'own, split train' in message
  assert says in message


def test_a_label_that_the_sample_missed_is_found_when_it_is_read():
  source = [{'image': b'', 'label': label} for label in (0, -1, 2, None)]
  records = streaming_lib.Records('own, split train', source, 3)
  assert records.label(0) == 0
  for number, says in ((1, 'has no label'), (3, 'in the place of a label')):
    with pytest.raises(ConfigError, match=f'image {number} of own.*{says}'):
      records.label(number)


def test_tests_without_labels_give_way_to_the_validation_set(tmp_path):
  write(
    tmp_path,
    train=some([0, 1, 2]),
    test=some([-1] * 5),
    validation=some([0, 1]),
  )
  assert len(data.load('own', str(tmp_path)).tests['test']) == 2
  message = refusal('own', tmp_path, test_split='test')
  assert 'split test have no labels: set data.test_split' in message
  write(tmp_path, 'mixed', train=some([0]), test=some([-1, 0, 1]))
  assert 'others have none' in refusal('mixed', tmp_path)


def test_a_list_of_labels_is_no_label(tmp_path):
  features = {
    'image': tfds.features.Image(shape=(8, 8, 3)),
    'label': tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
  }
  (file, _), *_ = some([0])
  examples = [{'image': io.BytesIO(file), 'label': [0, 1]}]
  tfds_sets.prepare(tmp_path, 'own', features, {'train': examples})
  assert 'label Sequence' in refusal('own', tmp_path)


class TwiceAtOnce(tfds.core.GeneratorBasedBuilder):
  """A set of the catalog that another process prepares at the same time."""

  VERSION = tfds.core.Version('1.0.0')
  times = 0

  def _info(self):
    features = {
      'image': tfds.features.Image(shape=(8, 8, 3)),
      'label': tfds.features.ClassLabel(names=NAMES),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    TwiceAtOnce.times += 1
    if self.times == 1:
      another = tfds.builder(
        self.name, data_dir=self._data_dir_root, file_format='array_record'
      )
      another.download_and_prepare()
    return {split: self._generate_examples() for split in ('train', 'test')}

  def _generate_examples(self):
    for i, (file, label) in enumerate(some(np.arange(9) % 3)):
      yield i, {'image': io.BytesIO(file), 'label': label}


def test_the_second_to_prepare_a_set_uses_that_of_the_first(
  tmp_path, monkeypatch
):
  """TFDS refuses to put the second one in its place."""
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *package: name == 'tensorflow' or find_spec(name, *package),
  )
  train = data.load(TwiceAtOnce.name, str(tmp_path)).train.in_memory()
  assert np.bincount(train.labels).tolist() == [3, 3, 3]
  assert TwiceAtOnce.times == 2


# Splits.


@STREAMING
def test_a_set_with_one_split_is_tested_on_a_fifth_of_it(streaming, tmp_path):
  write(tmp_path, train=some(np.arange(60) % 3))
  dataset = data.load('own', str(tmp_path), streaming=streaming)
  test = dataset.tests['test'].in_memory()
  train = dataset.train.in_memory()
  assert np.bincount(train.labels).tolist() == [16] * 3
  assert np.bincount(test.labels).tolist() == [4] * 3
  assert len({bytes(x) for x in (*train.images, *test.images)}) == 60
  assert dataset.class_names == tuple(NAMES)
  assert dataset.num_classes == 3
  sets.load_once.cache_clear()
  again = data.load('own', str(tmp_path)).tests['test']
  np.testing.assert_array_equal(again.images, test.images)


def test_one_image_cannot_be_trained_and_tested_on(tmp_path):
  write(tmp_path, train=some([0]))
  assert 'empty' in refusal('own', tmp_path)


@STREAMING
def test_splits_can_be_named_and_cut(streaming, tmp_path):
  pairs = some(np.arange(40) % 3)
  write(tmp_path, train=pairs, extra=some([0, 1], seed=1))
  fields = {'streaming': streaming}
  whole = data.load('own', str(tmp_path), test_split='extra', **fields)
  assert (len(whole.train), len(whole.tests['test'])) == (40, 2)
  parts = data.load(
    'own',
    str(tmp_path),
    train_split='train[:80%]',
    test_split='train[80%:]',
    **fields,
  )
  both = parts.train.images[:], parts.tests['test'].images[:]
  assert len(parts.train) == 32
  np.testing.assert_array_equal(np.concatenate(both), whole.train.images[:])


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({}, 'no split test or validation .* only .*: set data.test_split'),
    ({'train_split': 'trian'}, r"no split 'trian' .*set data.train_split"),
    ({'test_split': 'tset'}, r"no split 'tset' .*set data.test_split"),
    ({'test_split': 'train[80:'}, r"no split 'train\[80:'"),
    ({'train_split': 'train[:0%]'}, 'has no images: set data.train_split'),
    ({'test_split': 'train[80%:]'}, 'share images'),
    ({'test_split': 'train'}, 'share images'),
    ({'train_split': 'train+extra', 'test_split': 'extra'}, 'share images'),
  ],
)
def test_a_wrong_split_is_told_from_those_that_are_there(
  fields, says, tmp_path
):
  write(tmp_path, train=some([0, 1, 2] * 4), extra=some([0, 1]))
  message = refusal('own', tmp_path, **fields)
  assert re.search(says, message)
  if 'share' not in says:
    assert re.search('train, extra|extra, train', message)


def test_two_tests_cannot_have_one_name(tmp_path):
  for name in ('own', 'train', 'test', 'more'):
    write(tmp_path, name, train=some([0, 1, 2]), test=some([0, 1]))
  load = {'name': 'own', 'folder': tmp_path}
  assert 'is called test' in refusal(**load, extra_tests=('test',))
  assert 'is called train' in refusal(**load, extra_tests=('train',))
  twice = ('more:1.0.0', 'more/1.0.0')
  assert 'is called more_1_0_0' in refusal(**load, extra_tests=twice[:1] * 2)
  only = 'own', str(tmp_path)
  assert set(data.load(*only, extra_tests=('more',)).tests) == {'test', 'more'}


# Pixels.


def deep_png(pixels):
  """Writes `uint16[H, W, C]` as a PNG of 16 bits, which Pillow cannot."""
  height, width, channels = pixels.shape
  kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)

  def chunk(name, content):
    check = struct.pack('>I', zlib.crc32(name + content))
    return struct.pack('>I', len(content)) + name + content + check

  head = struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, 0)
  parts = (b'IHDR', head), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


@pytest.mark.parametrize('wanted', [1, 3, 4])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_images_of_16_bits_equal_their_upper_8(channels, wanted, tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 2**16, (8, 8, channels)).astype(np.uint16)
  upper = (pixels >> 8).astype(np.uint8)
  shallow = tfds_sets.encode(upper.squeeze(), 'PNG').read()
  pairs = [(deep_png(pixels), 0), (shallow, 1)]
  write(tmp_path, shape=(8, 8, wanted), train=pairs, test=pairs)
  train = data.load('own', str(tmp_path)).train
  np.testing.assert_array_equal(*train.images)
  if channels == wanted:
    np.testing.assert_array_equal(train.images[0], upper)


def as_tiff(pixels):
  return tfds_sets.encode(pixels, 'TIFF').read()


def bomb():
  """A PNG that says it has more pixels than Pillow opens."""
  content = deep_png(np.zeros((1, 1, 1), np.uint16))
  head = content[:16] + struct.pack('>II', 40000, 40000) + content[24:29]
  return head + struct.pack('>I', zlib.crc32(head[12:29])) + content[33:]


@pytest.mark.parametrize(
  ('file', 'says'),
  [
    (as_tiff(np.ones((8, 8), np.float32)), 'pixels are of mode F'),
    (as_tiff(np.full((8, 8), 1 << 20, np.int32)), 'pixels are of mode I'),
    (bomb(), 'DecompressionBombError'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'UnidentifiedImageError'),
    (b'', 'UnidentifiedImageError'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n', 'decoded'),
  ],
)
@STREAMING
def test_an_image_that_has_no_8_bits_is_named(file, says, streaming, tmp_path):
  write(tmp_path, train=[*some([0]), (file, 1)], test=some([0, 1]))
  message = refusal('own', tmp_path, streaming=streaming)
  assert 'own, split train (train_1)' in message
  assert says in message


@pytest.mark.parametrize(
  ('kind', 'modes'),
  [
    ('PNG', '1 L LA P RGB RGBA'),
    ('GIF', '1 L P RGB'),
    ('TIFF', '1 L LA P RGB RGBA CMYK'),
    ('JPEG', 'L RGB CMYK'),
    ('WEBP', 'RGB RGBA'),
  ],
)
def test_images_of_8_bits_are_those_of_pillow(kind, modes):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (8, 8, 4)).astype(np.uint8))
  for mode in modes.split():
    file = io.BytesIO()
    image.convert('RGB').convert(mode).save(file, kind)
    for wanted in streaming_lib.MODES.values():
      with Image.open(file) as opened:
        got = streaming_lib._eight_bits(opened).convert(wanted)
      with Image.open(file) as opened:
        want = opened.convert(wanted)
      np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize('odd', [0, 1])
def test_a_channel_that_hardly_varies_keeps_its_scale(odd, tmp_path):
  """An opaque alpha; divided by its deviation, one pixel drowns the colours."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (40, 32, 32, 4)).astype(np.uint8)
  images[..., 3] = 255
  images[0, 0, 0, 3] -= odd
  pairs = [
    (tfds_sets.encode(image, 'PNG').read(), i % 3)
    for i, image in enumerate(images)
  ]
  write(tmp_path, shape=(32, 32, 4), train=pairs, test=pairs[:2])
  dataset = data.load('own', str(tmp_path))
  assert dataset.std[3] == 1
  np.testing.assert_allclose(
    dataset.std[:3], (images[..., :3] / 255).std((0, 1, 2)), rtol=1e-5
  )


# Memory.


def test_each_virtual_device_has_a_copy_of_what_is_in_memory(
  tmp_path, monkeypatch
):
  write(tmp_path, train=some([0] * 30), test=some([0, 1]))
  one = 32 * 8 * 8 * 3
  monkeypatch.setattr(sets, 'MAX_BYTES_IN_MEMORY', 5 * one)
  fits = data.load('own', str(tmp_path), copies=5)
  streamed = data.load('own', str(tmp_path), copies=6)
  assert not fits.streamed
  assert streamed.streamed
  np.testing.assert_array_equal(fits.mean, streamed.mean)
  message = refusal('own', tmp_path, copies=6, streaming='never')
  assert 'in each of 6 copies' in message
  assert 'lower num_devices' in message


def test_a_file_system_that_fails_is_no_mistake_of_the_data():
  """A network file system may be back when the run goes on."""

  class Source:
    error: Exception = OSError(errno.ESTALE, 'Stale file handle')

    def __len__(self):
      return 1

    def __getitem__(self, number):
      raise self.error

  examples = prepared.opener('x', {'train': Source()}, 'mend it')('train')
  with pytest.raises(OSError, match=r'image 0 of x.*Stale') as told:
    examples[0]
  assert told.value.errno == errno.ESTALE
  Source.error = OSError(errno.ENOENT, 'No such file')
  with pytest.raises(ConfigError, match=r'image 0 of x.*: mend it\.'):
    examples[0]
