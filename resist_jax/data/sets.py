"""Images and labels as uint8 arrays, and which of them a batch is made of.

Sets that fit live on the device as uint8, others stream from their files;
`batch_indices` is a pure function of (seed, round, worker, step), so a resumed
run sees the same batches.
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

LARGEST_IN_MEMORY = 8 * 2**30  # bytes; CIFAR is 0.15 GiB
MOMENTS_IMAGES = 2000  # To normalise by, where all would be too many.


@dataclasses.dataclass(frozen=True)
class Split:
  """Images `uint8[N, H, W, C]` and labels `int32[N]`, in memory or not."""

  images: np.ndarray | StreamedImages
  labels: np.ndarray | StreamedLabels

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, index: np.ndarray) -> 'Split':
    """Returns the examples at `index`; what streams stays unread."""
    return Split(
      self.images.take(index, axis=0), self.labels.take(index, axis=0)
    )

  def in_memory(self) -> 'Split':
    """Returns the same examples as arrays."""
    return Split(self.images[:], self.labels[:])


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image classification set.

  Attributes:
    name: As in the config.
    train: What is trained on.
    tests: Sets to evaluate on by name: `test`, `validation` if held out, and
      further ones that were asked for.
    num_classes: Labels are 0 to this, exclusive.
    mean: `float32[C]`, of the training images as numbers from 0 to 1.
    std: `float32[C]`, likewise.
  """

  name: str
  train: Split
  tests: dict[str, Split]
  num_classes: int
  mean: np.ndarray
  std: np.ndarray

  @property
  def streamed(self) -> bool:
    """Whether images come from files instead of memory."""
    return isinstance(self.train.images, StreamedImages)


@functools.lru_cache(maxsize=1)  # Experiments train often in one process.
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
  """Loads a set into memory, or opens it.

  Args:
    name: `digits` (scikit-learn's 1,797 handwritten digits, 8x8, a fixed fifth
      of them for testing) or the name of a TFDS image classification set.
    data_dir: Where TFDS keeps prepared sets; empty for its default.
    validation: Share of the training set to hold out, 0 to 1, exclusive.
    streaming: `always`, `never`, or `auto`: where images differ in size, are
      resized, or are too many for memory.
    image_size: Height and width in pixels of images that are resized.
    resize: Resize images of one size too, as those that differ always are.
    extra_tests: Names of TFDS sets of the same classes to evaluate on as well.

  Returns:
    The set, normalised by the mean and deviation of what is trained on.

  Raises:
    ConfigError: If there is no such set, or it is not one of images with
      labels, or it is neither prepared nor can be prepared here, or it cannot
      be had as asked for.
  """
  found = _digits() if name == 'digits' else tfds_source.find(name, data_dir)
  sources = {'train': found.source('train'), 'test': found.test_source()}
  shape: Any = found.image_shape
  differ = None in shape
  resized = resize or differ
  count = sum(map(len, sources.values()))
  size = 0 if differ else count * math.prod(shape)  # Bytes.
  fits = not resized and size <= LARGEST_IN_MEMORY
  if streaming == 'never' and not fits:
    reason = f'are {size / 2**30:.0f} GiB' if size else 'differ in size'
    raise ConfigError(
      f'the images of data set {name!r} {reason}, and only sets of one size of '
      f'up to {LARGEST_IN_MEMORY / 2**30:.0f} GiB are trained from memory: '
      'leave data.streaming at auto.'
    )
  streamed = streaming == 'always' or not fits
  if resized:
    shape = (image_size, image_size, shape[2])

  splits = {
    split: _split(f'{name}, split {split}', source, found, shape, resized)
    for split, source in sources.items()
  }
  for other in extra_tests:
    extra = _extra_test(other, data_dir, found, shape, resized)
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
  return Dataset(name, train, splits, len(found.class_names), mean, std)


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
  sources: dict[str, Any] = {
    split: [{'image': images[i], 'label': labels[i]} for i in index]
    for split, index in parts
  }
  names = tuple(map(str, range(10)))
  return tfds_source.Prepared('digits', images.shape[1:], names, sources)


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


def _split(name, source, found, shape, resized) -> Split:
  records = Records(name, source, len(found.class_names))
  numbers = np.arange(len(source), dtype=np.int32)
  images = StreamedImages(records, numbers, shape, resized)
  return Split(images, StreamedLabels(records, numbers))


def _extra_test(name, data_dir, trained, shape, resized) -> Split:
  """Opens a test set of the classes and images that are trained on."""
  found = tfds_source.find(name, data_dir)
  if not found.same_classes(trained):
    raise ConfigError(
      f'data.extra_tests names {name!r}, whose {len(found.class_names)} '
      f'classes are not the {len(trained.class_names)} of {trained.name!r}: '
      'leave it out.'
    )
  if found.image_shape != trained.image_shape and not (
    resized and found.image_shape[2] == shape[2]
  ):
    raise ConfigError(
      f'data.extra_tests names {name!r}, whose images are {found.image_shape}, '
      f'those of {trained.name!r} {trained.image_shape}: leave it out.'
    )
  return _split(name, found.test_source(), found, shape, resized)


def _moments(
  images: np.ndarray | StreamedImages,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and deviation per channel without a float copy of the set."""
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
    batch_size: B, per worker; at most what a worker sees.
    seed: Of the run.
    round_index: Rounds completed before this one.
    local_steps: T.
    num_workers: S.
    sharded: Each worker sees its own S-th of the set instead of all of it
      (the paper) in its own order.

  Returns:
    `int32[S, T, B]`. Within an epoch of a worker no example repeats; the rest
    that fills no batch is left out.
  """
  visible = num_examples // num_workers if sharded else num_examples
  per_epoch = visible // batch_size
  batches = np.empty((num_workers, local_steps, batch_size), np.int32)
  for worker in range(num_workers):
    mine = np.arange(num_examples, dtype=np.int32)
    if sharded:
      # The dealing is not an epoch of anybody: epochs count from 0.
      mine = _order(seed, num_workers, 0, num_examples)[worker::num_workers]
    for t in range(local_steps):
      epoch, i = divmod(round_index * local_steps + t, per_epoch)
      order = _order(seed, worker, epoch, visible)
      batches[worker, t] = mine[order[i * batch_size : (i + 1) * batch_size]]
  return batches


def normalise(
  images: jax.Array, mean: np.ndarray, std: np.ndarray
) -> jax.Array:
  """Maps `uint8[B, H, W, C]` to `float32`, by the training set's moments."""
  scale = (1 / (255 * std)).reshape(1, 1, 1, -1)
  offset = (mean / std).reshape(1, 1, 1, -1)
  return images.astype(jnp.float32) * scale - offset
