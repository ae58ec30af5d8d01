"""Images from files train as images from memory do, and ImageNet trains."""

import itertools
import json
import os
import signal
import threading
import time

import jax
import numpy as np
from PIL import Image
import pytest
import tfds_sets
from wire import train_and_compare

from resist_jax import data, report
from resist_jax.data import pipeline, streaming
from resist_jax.errors import ConfigError
from resist_jax.run import cards, metrics, restore, train
from resist_jax.run import config as config_lib
from resist_jax.run.interrupt import Interrupted
from resist_jax.run.setup import Setup, prepare

pytestmark = pytest.mark.filterwarnings('ignore')  # TFDS's own, writing sets.


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """A folder of photographs as ImageNet, and its images by file name."""
  folder = tmp_path_factory.mktemp('photos')
  images = tfds_sets.write_photographs(folder, train=40, test=4, validation=12)
  tfds_sets.write_photographs(folder, 'imagenet_v2/matched-frequency', test=6)
  return str(folder), images


def card(folder, **fields):
  config = cards.load('imagenet:smoke')
  config.data.dir = folder
  config.num_devices = 4
  config.data.extra_tests = ('imagenet_v2/matched-frequency',)
  config.model.stage_sizes = (1, 1, 5, 1)
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def finished(photos, tmp_path_factory):
  folder = tmp_path_factory.mktemp('finished')
  return folder, train_and_compare(card(photos[0]), folder)


def rows(folder):
  return report.read_rows(folder / 'metrics.jsonl')


@pytest.mark.slow
def test_the_imagenet_card_trains_on_photographs(finished, photos):
  folder, summary = finished
  log = rows(folder)
  assert [row['protocol'] for row in log] == ['local_sgd', 'resist', 'resist']
  assert log[-1]['train_loss'] < log[0]['train_loss']
  for name in ('test', 'imagenet_v2_matched_frequency'):
    assert 0 <= summary[f'{name}_accuracy'] <= 1
    assert 0 <= summary[f'{name}_accuracy_paper'] <= 1
  tests = prepare(card(photos[0])).dataset.tests
  assert {name: len(split) for name, split in tests.items()} == {
    'test': 12,  # The validation set: labels of the test set are kept back.
    'imagenet_v2_matched_frequency': 6,
  }


@pytest.mark.slow
def test_a_stopped_run_ends_bit_equal(finished, photos, tmp_path, monkeypatch):
  write = metrics.MetricsLog.write

  def write_and_signal(self, row):
    write(self, row)
    if row['round'] == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsLog, 'write', write_and_signal)
    with pytest.raises(Interrupted):
      train.train(card(photos[0]), str(tmp_path))
  assert len(rows(tmp_path)) == 2
  again = train.train(card(photos[0]), str(tmp_path))
  assert again['params_hash'] == finished[1]['params_hash']


def small_config(folder, streaming, **fields):
  config = config_lib.get_config()
  config.data.name, config.data.dir = 'cifar10', str(folder)
  config.data.streaming = streaming
  config.model.name = 'PreActResNet18'
  config.model.stage_sizes, config.model.widths = (1, 6), (8, 8)
  config.partition = (2,)
  config.num_rounds, config.local_steps, config.batch_size = 2, 3, 8
  config.num_devices = 4
  config.evaluation.statistics_images = 20
  config.log.report = config.log.tensorboard = False
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cifar')
  tfds_sets.write(folder, 'cifar10')
  return folder


def test_rounds_of_streamed_images_are_those_from_memory(cifar):
  found = []
  for choice in ('always', 'never'):
    setup = prepare(small_config(cifar, choice, local_steps=2))
    assert setup.dataset.streamed == (choice == 'always')
    phase, state = restore.start(setup, None)
    for r in range(2):
      batches = setup.pipeline.batches(r)
      state, metrics = phase.trainer.round(state, batches)
    found.append((phase.trainer.params(state), metrics['loss']))
  jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'data.validation': 0.2, 'num_workers': 2, 'num_devices': 1},
    {'protocol': 'data_parallel', 'data.sharded': True, 'batch_size': 4},
  ],
  ids=['resist', 'validation', 'data_parallel'],
)
def test_a_streamed_run_equals_one_from_memory(fields, cifar, tmp_path):
  summaries = []
  for streaming_choice in ('always', 'never'):
    config = small_config(cifar, streaming_choice, **fields)
    setup = prepare(config)
    assert setup.dataset.streamed == (streaming_choice == 'always')
    assert setup.task.augmentation.pad == 4
    folder = tmp_path / streaming_choice
    summaries.append((train.train(config, str(folder)), rows(folder)))
  (streamed, log), (resident, other_log) = summaries
  assert streamed['params_hash'] == resident['params_hash']
  assert log[-1]['train_loss'] == other_log[-1]['train_loss']
  for name in ('test_accuracy', 'test_accuracy_paper'):
    assert streamed[name] == resident[name]


@pytest.mark.slow
def test_as_on_an_accelerator_a_streamed_run_equals_one_from_memory(
  cifar, tmp_path, monkeypatch
):
  """Compares steps from the host with one program that loops over them."""
  monkeypatch.setattr(Setup, 'on_cpu', property(lambda _: False))
  losses = []
  for choice in ('always', 'never'):
    config = small_config(cifar, choice, num_workers=2, num_devices=1)
    summary = train.train(config, str(tmp_path / choice))
    assert summary['flops_per_image']['compiled'] is None
    losses.append([row['train_loss'] for row in rows(tmp_path / choice)])
  np.testing.assert_allclose(*losses, rtol=1e-5)


class Source:
  """Photographs in memory as a set would have them, read by slow threads."""

  def __init__(self, images, delay=0.0):
    files = [tfds_sets.encode(image, 'PNG').read() for image, _ in images]
    self.examples = [
      {'image': file, 'label': label}
      for file, (_, label) in zip(files, images, strict=True)
    ]
    self.delay = delay
    self.read = []
    self.lock = threading.Lock()

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, number):
    with self.lock:
      self.read.append(number)
    time.sleep(self.delay * (number % 3))  # Later ones overtake.
    return self.examples[number]


def streamed(source, size=24):
  records = streaming.Records('photographs', source, 2)
  numbers = np.arange(len(source), dtype=np.int32)
  return streaming.StreamedImages(records, numbers, (size, size, 3), True)


def stream(images, S=2, T=3, B=4, seed=0, crops=True):
  def indices(round_index):
    return data.batch_indices(len(images), B, seed, round_index, T, S, False)

  return pipeline.Stream(images, indices, 5, seed, crops)


def test_grain_delivers_in_order_what_indexing_gives():
  source = Source(tfds_sets.photographs(16), delay=0.004)
  images = streamed(source)
  feed = stream(images, crops=False)
  for r in range(3):
    index = data.batch_indices(16, 4, 0, r, 3, 2, False)
    steps = list(feed.batches(r))
    assert len(steps) == 3
    for t, (pixels, labels) in enumerate(steps):
      assert pixels.shape == (2, 4, 24, 24, 3)
      np.testing.assert_array_equal(pixels, images[index[:, t]])
      np.testing.assert_array_equal(labels, index[:, t] % 2)


def test_a_stream_mirrors_what_is_asked_for_as_mirrored():
  images = streamed(Source(tfds_sets.photographs(8)))
  asked = np.array([[[3, ~3, 0, ~0]]])
  feed = pipeline.Stream(images, lambda _: asked, 1, 0, random_crops=False)
  ((pixels, labels),) = feed.batches(0)
  plain = images[np.array([3, 3, 0, 0])]
  np.testing.assert_array_equal(pixels[0, ::2], plain[::2])
  np.testing.assert_array_equal(pixels[0, 1::2], plain[1::2, :, ::-1])
  np.testing.assert_array_equal(labels, [[1, 1, 0, 0]])


def test_no_more_is_read_ahead_than_agreed():
  source = Source(tfds_sets.photographs(16))
  feed = stream(streamed(source))
  steps = itertools.chain.from_iterable(map(feed.batches, range(5)))
  for taken in range(1, 4):
    next(steps)
    agreed = 8 * (taken + pipeline.PREFETCHED)
    deadline = time.monotonic() + 300  # Seconds; then it hangs.
    while len(source.read) < agreed:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    time.sleep(0.2)  # Threads that read more would do it now.
    assert len(source.read) == agreed


def test_pixels_are_a_function_of_round_worker_step_and_place():
  images = streamed(Source(tfds_sets.photographs(16)))
  feed = stream(images)
  in_order = [list(feed.batches(r)) for r in range(3)]
  again = list(stream(images).batches(2))  # As a resumed run does.
  for got, want in zip(again, in_order[2], strict=True):
    np.testing.assert_array_equal(got[0], want[0])
  # Of more workers and steps, the first are the same.
  wider = list(stream(images, S=4, T=4).batches(0))
  for got, want in zip(wider[:3], in_order[0], strict=True):
    np.testing.assert_array_equal(got[0][:2], want[0])
  other = list(stream(images, seed=1).batches(0))
  assert (other[0][0] != in_order[0][0][0]).any()


def test_the_same_image_is_cropped_anew_each_time():
  images = streamed(Source(tfds_sets.photographs(8)[:1] * 8))
  pixels = np.concatenate([x for x, _ in stream(images).batches(0)], axis=1)
  assert len(np.unique(pixels.reshape(24, -1), axis=0)) == 24


def test_random_crops_have_the_area_and_shape_they_should():
  rng = np.random.default_rng(0)
  boxes = np.array([streaming.random_box(rng, 500, 375) for _ in range(2000)])
  left, top, right, bottom = boxes.T
  assert (boxes == boxes.round()).all()
  assert left.min() == 0
  assert top.min() == 0
  assert right.max() == 500
  assert bottom.max() == 375
  width, height = right - left, bottom - top
  area, ratio = width * height / (500 * 375), width / height
  assert 0.079 < area.min() < 0.1
  assert 0.95 < area.max() <= 1
  assert 0.74 < ratio.min() < 0.77
  assert 1.3 < ratio.max() < 1.35
  for size in ((1000, 10), (10, 1000), (1, 1)):
    left, top, right, bottom = streaming.random_box(rng, *size)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize('size', [(256, 320), (300, 256), (256, 256)])
def test_tests_see_the_centre_of_a_shorter_side_of_256(size):
  """Where nothing is to be resized, cropping alone must give every pixel."""
  photo = tfds_sets.photos_of_sklearn()[0]
  photo = np.ascontiguousarray(photo[: size[0], : size[1]])
  images = streamed(Source([(photo, 0)]), size=224)
  top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
  want = photo[top : top + 224, left : left + 224]
  np.testing.assert_array_equal(images[np.array([0])][0], want)


def test_resizing_and_cropping_in_one_is_both_in_turn():
  photo = tfds_sets.photos_of_sklearn()[1]
  got = streamed(Source([(photo, 0)]), size=56)[np.array([0])][0]
  height, width = photo.shape[:2]
  small = Image.fromarray(photo).resize(
    (round(width * 64 / height), 64), Image.Resampling.BILINEAR
  )
  left = (small.width - 56) // 2
  want = np.asarray(small)[4:60, left : left + 56]
  assert np.abs(got.astype(int) - want).mean() < 1


def test_indexing_is_that_of_an_array():
  parts = tfds_sets.photographs(9)
  source = Source(parts)
  images = streamed(source)
  labels = streaming.StreamedLabels(images.records, images.numbers)
  split = data.Split(images, labels).take(np.array([8, 2, 5]))
  assert source.read == []  # Taking reads nothing.
  index = np.array([[1, -1], [0, 2]], np.int32)
  got = split.images[index]
  assert got.shape == (2, 2, 24, 24, 3)
  assert not got[0, 1].any()
  np.testing.assert_array_equal(got[1], images[np.array([8, 5])])
  np.testing.assert_array_equal(split.labels[index[1]], [0, 1])
  assert len(source.read) == 5  # Labels came with the images.
  whole = split.in_memory()
  assert whole.images.shape == split.images.shape
  mask = np.array([False, True, True])
  for one in (split, whole):
    np.testing.assert_array_equal(one.images[mask], whole.images[1:])
    np.testing.assert_array_equal(one.images[0], whole.images[0])
    np.testing.assert_array_equal(one.take(mask).images[:], whole.images[1:])
  np.testing.assert_array_equal(whole.labels, [0, 0, 1])


def test_moments_of_photographs_are_those_of_their_pixels(photos):
  dataset = data.load('imagenet2012', photos[0], image_size=32)
  pixels = dataset.train.images[:].reshape(-1, 3) / 255
  np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(dataset.std, pixels.std(axis=0), rtol=1e-4)


def test_a_damaged_image_gets_a_clear_line(tmp_path):
  tfds_sets.write_photographs(tmp_path, damaged=True, train=6, validation=2)
  with pytest.raises(
    ConfigError, match=r'image \d of imagenet2012, .*train_5.JPEG.* decoded'
  ) as caught:
    data.load('imagenet2012', str(tmp_path))
  assert '\n' not in str(caught.value)


def test_an_image_damaged_during_training_gets_a_clear_line():
  source = Source(tfds_sets.photographs(16))
  source.examples[3]['image'] = b'no image'
  with pytest.raises(ConfigError, match=r'^image 3 of photographs cannot be'):
    list(
      itertools.chain.from_iterable(
        map(stream(streamed(source)).batches, range(5))
      )
    )


def test_extra_tests_of_small_sets_are_read_into_memory(cifar):
  want = tfds_sets.write(cifar, 'cifar10_1/v6', counts=(1, 7))['test']
  dataset = data.load('cifar10', str(cifar), extra_tests=('cifar10_1/v6',))
  got = dataset.tests['cifar10_1_v6']
  assert isinstance(got.images, np.ndarray)
  assert sorted(map(bytes, got.images)) == sorted(map(bytes, want[0]))


@pytest.mark.slow
def test_a_finished_run_is_tested_on_sets_that_it_is_given(cifar, tmp_path):
  tfds_sets.write(cifar, 'cifar10_1/v6', counts=(1, 7))
  least = {'protocol': 'local_sgd', 'num_workers': 1, 'num_devices': 1}
  config = small_config(cifar, 'never', num_rounds=1, **least)
  config.model.stage_sizes, config.log.report = (1, 1), True
  first = train.train(config, str(tmp_path))
  log = rows(tmp_path)
  config.data.extra_tests = ('cifar10_1/v6',)
  second = train.train(config, str(tmp_path))
  assert second['params_hash'] == first['params_hash']
  assert second['test_accuracy'] == first['test_accuracy']
  assert 'cifar10_1_v6_accuracy' not in first
  for name in ('cifar10_1_v6_accuracy', 'cifar10_1_v6_accuracy_paper'):
    assert second[name] * 7 == pytest.approx(round(second[name] * 7))
  assert json.loads((tmp_path / 'summary.json').read_text()) == second
  text = (tmp_path / 'report.html').read_text()
  accuracy = f'<dd>{second["cifar10_1_v6_accuracy"]:.2%}</dd>'
  assert f'<dt>cifar10_1_v6, as deployed</dt>{accuracy}' in text
  assert rows(tmp_path) == log


def test_splits_are_those_of_the_config(cifar):
  parts = {'data.train_split': 'train[:80%]', 'data.test_split': 'train[80%:]'}
  dataset = prepare(small_config(cifar, 'auto', **parts)).dataset
  assert len(dataset.train) == 32
  assert {name: len(test) for name, test in dataset.tests.items()} == {
    'test': 8
  }
  with pytest.raises(ConfigError, match=r"no split 'tset' .*\(train, test\)"):
    prepare(small_config(cifar, 'auto', **{'data.test_split': 'tset'}))


def test_sets_that_do_not_fit_get_a_clear_line(photos, cifar):
  for folder in (photos[0], cifar):
    tfds_sets.write(folder, 'fashion_mnist', (28, 28, 1))
  for name, folder, fields, says in (
    ('imagenet2012', photos[0], {'streaming': 'never'}, 'differ in size'),
    ('imagenet2012', photos[0], {'extra_tests': ('fashion_mnist',)}, 'classes'),
    ('cifar10', cifar, {'extra_tests': ('fashion_mnist',)}, r'\(28, 28, 1\)'),
    ('cifar10', cifar, {'extra_tests': ('cifar10_1/v4',)}, 'not prepared in'),
    ('imagenet2012', photos[0], {'extra_tests': ('cifar10',)}, 'not prepared'),
  ):
    with pytest.raises(ConfigError, match=says) as caught:
      data.load(name, str(folder), **fields)
    assert '\n' not in str(caught.value)
