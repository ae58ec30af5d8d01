"""Image classification data sets, and the choice of examples for each batch.

A data set that fits in memory is kept on the devices as uint8; a larger one
streams from its files. `batch_indices` is a pure function of (seed, round,
worker, step), so a resumed run trains on the same batches.
"""

from collections.abc import Sequence
import dataclasses
import functools
import importlib.util
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.data import tfds_source
from resist_jax.data.streaming import Records, StreamedImages, StreamedLabels
from resist_jax.errors import ConfigError

MAX_BYTES_IN_MEMORY = 8 * 2**30  # CIFAR takes 0.15 GiB.
MOMENTS_IMAGES = 2000  # Sampled for mean and deviation if the set streams.


@dataclasses.dataclass(frozen=True)
class Split:
  """A part of a data set, in memory or streamed from files.

  Attributes:
    images: `uint8[N, H, W, C]`.
    labels: `int32[N]`.
  """

  images: np.ndarray | StreamedImages
  labels: np.ndarray | StreamedLabels

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, index: np.ndarray) -> 'Split':
    """Returns the examples at `index`; streamed ones are not read yet."""
    return Split(
      self.images.take(index, axis=0), self.labels.take(index, axis=0)
    )

  def in_memory(self) -> 'Split':
    """Returns the same examples as NumPy arrays."""
    return Split(self.images[:], self.labels[:])


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image classification data set.

  Attributes:
    name: Its name in the config.
    train: The training split.
    tests: Splits to evaluate on, by name: `test`, `validation` if a part of
      the training set is held out, and the requested extra test sets.
    num_classes: Number of classes; labels run from 0 to `num_classes - 1`.
    mean: Mean of each channel over the training images, scaled to [0, 1],
      `float32[C]`.
    std: Standard deviation of each channel, in the same scale, `float32[C]`.
  """

  name: str
  train: Split
  tests: dict[str, Split]
  num_classes: int
  mean: np.ndarray
  std: np.ndarray

  @property
  def streamed(self) -> bool:
    """Whether images are read from files instead of memory."""
    return isinstance(self.train.images, StreamedImages)


@functools.lru_cache(maxsize=1)  # Experiments train many times in one process.
def load(
  name: str,
  data_dir: str = '',
  validation: float = 0.0,
  *,
  streaming: str = 'auto',
  image_size: int = 224,
  resize: bool = False,
  extra_tests: Sequence[str] = (),
) -> Dataset:
  """Loads a data set into memory, or opens its files for streaming.

  Args:
    name: `digits` (scikit-learn's 1,797 handwritten digits, 8x8, of which a
      fixed fifth is the test split) or the name of a TFDS image classification
      data set.
    data_dir: The folder of prepared TFDS data sets; empty for TFDS's default.
    validation: Share of the training set to hold out, at least 0 and below 1.
    streaming: `always`, `never`, or `auto`, which streams images that differ in
      size, are resized, or do not fit in memory.
    image_size: Height and width of resized images, in pixels.
    resize: Whether to resize images that all have one size; images that differ
      in size are always resized.
    extra_tests: Names of TFDS data sets with the same classes, to evaluate on
      as well.

  Returns:
    The data set, with the mean and deviation of its training images.

  Raises:
    ConfigError: If the data set is unknown, does not hold labelled images, or
      is not prepared and cannot be prepared here, or if it does not fit the
      other arguments.
  """
  source = _digits() if name == 'digits' else tfds_source.find(name, data_dir)
  examples = {'train': source.split('train'), 'test': source.test_split()}
  shape: Any = source.image_shape
  sizes_differ = None in shape
  resized = resize or sizes_differ
  count = sum(map(len, examples.values()))
  num_bytes = 0 if sizes_differ else count * math.prod(shape)
  fits = not resized and num_bytes <= MAX_BYTES_IN_MEMORY
  if streaming == 'never' and not fits:
    reason = 'are resized'
    if sizes_differ:
      reason = 'differ in size'
    elif not resize:
      reason = f'take {num_bytes / 2**30:.0f} GiB'
    raise ConfigError(
      f'the images of data set {name!r} {reason}, and only images of one size '
      f'that take at most {MAX_BYTES_IN_MEMORY / 2**30:.0f} GiB are kept in '
      'memory: set data.streaming to auto.'
    )
  streamed = streaming == 'always' or not fits
  if resized:
    shape = (image_size, image_size, shape[2])

  splits = {
    split: _split(f'{name}, split {split}', records, source, shape, resized)
    for split, records in examples.items()
  }
  for other in extra_tests:
    extra = _extra_test(other, data_dir, source, shape, resized)
    splits[re.sub('[^a-z0-9]+', '_', other.lower())] = extra
  if not streamed:
    splits = {name: split.in_memory() for name, split in splits.items()}
  train = splits.pop('train')
  if validation:
    order = np.random.default_rng(0).permutation(len(train))
    held_out = max(1, round(validation * len(train)))
    splits['validation'] = train.take(np.sort(order[:held_out]))
    train = train.take(np.sort(order[held_out:]))
  for split in (train, *splits.values()):
    if not len(split):
      raise ConfigError(f'data set {name!r} has an empty split.')
  sample = train.images
  if not fits:
    order = np.random.default_rng(0).permutation(len(train))
    sample = sample.take(np.sort(order[:MOMENTS_IMAGES]), axis=0)
  mean, std = _moments(sample)
  return Dataset(name, train, splits, len(source.class_names), mean, std)


def _digits() -> tfds_source.Prepared:
  """Reads scikit-learn's digits without importing it, which takes seconds."""
  package = importlib.util.find_spec('sklearn')
  if package is None or package.origin is None:
    raise ConfigError(
      "data set 'digits' comes with scikit-learn, which is not installed: pip "
      'install scikit-learn.'
    )
  path = pathlib.Path(package.origin).parent / 'datasets/data/digits.csv.gz'
  table = np.loadtxt(path, delimiter=',')
  images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)
  images, labels = images.reshape(-1, 8, 8, 1), table[:, -1].astype(np.int64)
  parts = zip(('train', 'test'), _stratified(labels, 360), strict=True)
  splits: dict[str, Any] = {
    split: [{'image': images[i], 'label': labels[i]} for i in index]
    for split, index in parts
  }
  names = tuple(map(str, range(10)))
  return tfds_source.Prepared('digits', images.shape[1:], names, splits)


def _stratified(
  labels: np.ndarray, num_test: int
) -> tuple[np.ndarray, np.ndarray]:
  """Splits examples so that both parts hold the same shares of each class.

  Args:
    labels: `int[N]`, from 0.
    num_test: Examples to test on.

  Returns:
    `(train, test)`: indices, the same as those of scikit-learn's
    `train_test_split(..., random_state=0, stratify=labels)`.
  """
  rng = np.random.RandomState(0)

  def draw(counts: np.ndarray, total: int) -> np.ndarray:
    """Returns how many of each class to draw; largest remainders go first."""
    exact = counts / counts.sum() * total
    drawn = np.floor(exact)
    remainder = exact - drawn
    for value in np.unique(remainder)[::-1]:
      (tied,) = np.nonzero(remainder == value)
      missing = int(total - drawn.sum())
      if missing > 0:
        drawn[rng.choice(tied, min(len(tied), missing), replace=False)] += 1
    return drawn.astype(int)

  counts = np.bincount(labels)
  of_train = draw(counts, len(labels) - num_test)
  of_test = draw(counts - of_train, num_test)
  train, test = [], []
  for label, count in enumerate(counts):
    members = np.flatnonzero(labels == label)[rng.permutation(count)]
    train.extend(members[: of_train[label]])
    test.extend(members[of_train[label] :][: of_test[label]])
  return rng.permutation(train), rng.permutation(test)


def _split(name, examples, source, shape, resized) -> Split:
  records = Records(name, examples, len(source.class_names))
  numbers = np.arange(len(examples), dtype=np.int32)
  images = StreamedImages(records, numbers, shape, resized)
  return Split(images, StreamedLabels(records, numbers))


def _extra_test(name, data_dir, trained, shape, resized) -> Split:
  """Opens a test set with the classes and image shape of the training set."""
  source = tfds_source.find(name, data_dir)
  if not source.same_classes(trained):
    raise ConfigError(
      f'data.extra_tests names {name!r}, whose {len(source.class_names)} '
      f'classes are not the {len(trained.class_names)} classes of '
      f'{trained.name!r}: remove it from data.extra_tests.'
    )
  if source.image_shape != trained.image_shape and not (
    resized and source.image_shape[2] == shape[2]
  ):
    raise ConfigError(
      f'data.extra_tests names {name!r}, whose images have the shape '
      f'{source.image_shape}, but those of {trained.name!r} have '
      f'{trained.image_shape}: remove it from data.extra_tests.'
    )
  return _split(name, source.test_split(), source, shape, resized)


def _moments(
  images: np.ndarray | StreamedImages,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean and deviation of each channel, from its histogram.

  A float copy of the images would take four times their memory.
  """
  values = np.arange(256) / 255
  counts = np.zeros((images.shape[-1], 256), np.int64)
  for start in range(0, len(images), 1000):
    channels = images[start : start + 1000].reshape(-1, images.shape[-1])
    counts += [np.bincount(c, minlength=256) for c in channels.T]
  share = counts / counts.sum(axis=1, keepdims=True)
  mean = share @ values
  variance = share @ np.square(values) - np.square(mean)
  std = np.sqrt(np.maximum(variance, 1e-12))
  return mean.astype(np.float32), std.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _order(seed: int, worker: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns the order in which a worker visits its examples in an epoch."""
  rng = np.random.default_rng([seed, worker, epoch])
  return rng.permutation(num_examples).astype(np.int32)


def batch_indices(
  num_examples: int,
  batch_size: int,
  seed: int,
  round_index: int,
  local_steps: int,
  num_workers: int,
  sharded: bool = False,
) -> np.ndarray:
  """Chooses the examples of every step of every worker in a round.

  Args:
    num_examples: Size of the training set.
    batch_size: B, the batch size of a worker; at most the number of examples
      that it can see.
    seed: Seed of the run.
    round_index: Number of rounds completed before this one.
    local_steps: T, the number of steps in a round.
    num_workers: S, the number of workers.
    sharded: Whether each worker sees only its own S-th of the training set. If
      not (the paper), each sees the whole set in an order of its own.

  Returns:
    Indices of examples, `int32[S, T, B]`. No example repeats within a worker's
    epoch; examples at its end that do not fill a batch are skipped.
  """
  visible = num_examples // num_workers if sharded else num_examples
  per_epoch = visible // batch_size
  batches = np.empty((num_workers, local_steps, batch_size), np.int32)
  for worker in range(num_workers):
    examples = np.arange(num_examples, dtype=np.int32)
    if sharded:
      # Workers count from 0, so none of them draws from the same generator.
      order = _order(seed, num_workers, 0, num_examples)
      examples = order[worker::num_workers]
    for t in range(local_steps):
      epoch, i = divmod(round_index * local_steps + t, per_epoch)
      order = _order(seed, worker, epoch, visible)
      chosen = order[i * batch_size : (i + 1) * batch_size]
      batches[worker, t] = examples[chosen]
  return batches


def normalise(
  images: jax.Array, mean: np.ndarray, std: np.ndarray
) -> jax.Array:
  """Scales pixels to mean 0 and deviation 1 over the training set.

  Args:
    images: `uint8[B, H, W, C]`.
    mean: See `Dataset.mean`.
    std: See `Dataset.std`.

  Returns:
    `float32[B, H, W, C]`.
  """
  scale = (1 / (255 * std)).reshape(1, 1, 1, -1)
  offset = (mean / std).reshape(1, 1, 1, -1)
  return images.astype(jnp.float32) * scale - offset
