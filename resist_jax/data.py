"""Images and labels as uint8 arrays, and which of them a batch is made of.

Sets that fit live on the device as uint8; `batch_indices` is a pure function of
(seed, round, worker, step), so a resumed run sees the same batches.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import importlib.util
import os
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets as sklearn_datasets
from sklearn import model_selection

from resist_jax.config import ConfigError

# A mirrored image of these is another character, or none at all.
CHARACTERS = frozenset(
  {
    'binary_alpha_digits',
    'digits',
    'mnist',
    'emnist',
    'kmnist',
    'svhn_cropped',
    'omniglot',
    'cmaterdb',
  }
)
LARGEST_IN_MEMORY = 8 * 2**30  # bytes; CIFAR is 0.15 GiB


@dataclasses.dataclass(frozen=True)
class Split:
  """Images `uint8[N, H, W, C]` and labels `int32[N]`."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, index: np.ndarray) -> 'Split':
    """Returns the examples at `index`."""
    return Split(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image classification set.

  Attributes:
    name: As in the config.
    train: What is trained on.
    tests: Sets to evaluate on by name: `test`, and `validation` if held out.
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


@functools.lru_cache(maxsize=1)  # Experiments train often in one process.
def load(name: str, data_dir: str = '', validation: float = 0.0) -> Dataset:
  """Loads a set into memory.

  Args:
    name: `digits` (scikit-learn's 1,797 handwritten digits, 8x8, a fixed fifth
      of them for testing) or the name of a TFDS image classification set.
    data_dir: Where TFDS keeps prepared sets; empty for its default.
    validation: Share of the training set to hold out, 0 to 1, exclusive.

  Returns:
    The set, normalised by the mean and deviation of what is trained on.

  Raises:
    ConfigError: If there is no such set, or it is not one of images of one
      size with labels, or it is neither prepared nor can be prepared here.
  """
  if name == 'digits':
    train, test, num_classes = _digits()
  else:
    train, test, num_classes = _tfds(name, data_dir)
  tests = {'test': test}
  if validation:
    order = np.random.default_rng(0).permutation(len(train))
    held_out = max(1, round(validation * len(train)))
    tests['validation'] = train.take(np.sort(order[:held_out]))
    train = train.take(np.sort(order[held_out:]))
  for split in (train, *tests.values()):
    _check_split(name, split, num_classes)
  mean, std = _moments(train.images)
  return Dataset(name, train, tests, num_classes, mean, std)


def _digits() -> tuple[Split, Split, int]:
  digits: Any = sklearn_datasets.load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int32)
  parts = model_selection.train_test_split(
    images, labels, test_size=0.2, random_state=0, stratify=labels
  )
  train_images, test_images, train_labels, test_labels = parts
  train = Split(train_images, train_labels)
  return train, Split(test_images, test_labels), 10


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TFDS warns of every folder that it looked into: only errors matter here."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


@_quiet()
def _tfds(name: str, data_dir: str) -> tuple[Split, Split, int]:
  import tensorflow_datasets as tfds  # Slow to import, and digits need it not.

  where = (
    data_dir or os.environ.get('TFDS_DATA_DIR') or tfds.core.constants.DATA_DIR
  )
  try:
    builder = tfds.builder(name, data_dir=data_dir or None)
    if not builder.is_prepared():
      builder = tfds.builder(
        name, data_dir=data_dir or None, file_format='array_record'
      )
    features = builder.info.features
  except tfds.core.DatasetNotFoundError:
    raise ConfigError(
      f'unknown data set {name!r}: use digits, or a name from the TFDS catalog '
      'such as cifar10, cifar100, svhn_cropped or fashion_mnist.'
    ) from None
  except ImportError as error:
    raise ConfigError(
      f'data set {name!r} needs a package that is missing here ({error}): '
      "pip install 'resist_jax[prepare]'."
    ) from error
  num_classes = _check_features(name, features)
  if not builder.is_prepared():
    _prepare(name, builder, where)
  splits = builder.info.splits
  test = 'test' if 'test' in splits else 'validation'
  for split in ('train', test):
    if split not in splits:
      raise ConfigError(
        f'data set {name!r} has no split {split!r}, only {", ".join(splits)}.'
      )
  size = sum(splits[split].num_examples for split in ('train', test))
  size *= int(np.prod(features['image'].shape))
  if size > LARGEST_IN_MEMORY:
    raise ConfigError(
      f'data set {name!r} is {size / 2**30:.0f} GiB as pixels; sets of up to '
      f'{LARGEST_IN_MEMORY / 2**30:.0f} GiB are trained from memory.'
    )
  return _read(builder, 'train'), _read(builder, test), num_classes


def _check_features(name: str, features) -> int:
  """Returns the number of classes of an image classification set."""
  image = 'image' in features and features['image'].shape
  classes = 'label' in features and getattr(
    features['label'], 'num_classes', None
  )
  if not image or len(image) != 3 or not classes:
    raise ConfigError(
      f'data set {name!r} is not one of images with class labels: its features '
      f'are {", ".join(features)}.'
    )
  if None in image:
    raise ConfigError(
      f'the images of data set {name!r} differ in size ({image}): sets of one '
      'size are trained from memory.'
    )
  return int(classes)


def _prepare(name: str, builder, where: str) -> None:
  """Downloads and prepares, where TensorFlow and a network allow it."""
  advice = (
    f'run `python -c "import tensorflow_datasets as tfds; tfds.builder('
    f"'{name}', data_dir='{where}', file_format='array_record')"
    '.download_and_prepare()"` where there is internet, after pip install '
    'tensorflow, or point --config.data.dir at a folder that holds it.'
  )
  if importlib.util.find_spec('tensorflow') is None:
    raise ConfigError(
      f'data set {name!r} is not prepared in {where}, and preparing it needs '
      f'TensorFlow, which is not installed: {advice}'
    )
  try:
    builder.download_and_prepare()
  except Exception as error:  # TFDS and its downloads raise nearly anything.
    reason = ' '.join(str(error).split())[:120]
    raise ConfigError(
      f'data set {name!r} is not prepared in {where} and could not be prepared '
      f'({type(error).__name__}: {reason}): {advice}'
    ) from error


def _read(builder, split: str) -> Split:
  try:
    source = builder.as_data_source(split=split)
  except NotImplementedError as error:
    raise ConfigError(
      f'data set {builder.name!r} was prepared as '
      f'{builder.info.file_format.value}, which cannot be read without '
      "TensorFlow: prepare it again with file_format='array_record'."
    ) from error
  examples = source.__getitems__(list(range(len(source))))
  images = np.stack([example['image'] for example in examples])
  labels = np.array([example['label'] for example in examples], np.int32)
  return Split(images, labels)


def _check_split(name: str, split: Split, num_classes: int) -> None:
  if len(split) == 0:
    raise ConfigError(f'data set {name!r} has an empty split.')
  if split.images.dtype != np.uint8:
    raise ConfigError(
      f'the images of data set {name!r} are {split.images.dtype}, not uint8.'
    )
  low, high = int(split.labels.min()), int(split.labels.max())
  if low < 0 or high >= num_classes:
    raise ConfigError(
      f'labels of data set {name!r} run from {low} to {high}, but it declares '
      f'{num_classes} classes, 0 to {num_classes - 1}: prepare it again.'
    )


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean and deviation per channel without a float copy of the set."""
  values = np.arange(256) / 255
  channels = images.reshape(-1, images.shape[-1])
  counts = [np.bincount(c, minlength=256) for c in channels.T]
  share = np.stack(counts) / len(channels)
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


def augment(
  key: jax.Array, images: jax.Array, pad: int, flip: bool
) -> jax.Array:
  """Crops each image at random after padding with black, and mirrors half.

  Args:
    key: A PRNG key.
    images: `uint8[B, H, W, C]`.
    pad: Pixels on every side; 0 leaves the crop out. CIFAR: 4.
    flip: Mirror left and right with probability 1/2.

  Returns:
    `uint8[B, H, W, C]`.
  """
  crop_key, flip_key = jax.random.split(key)
  if pad:
    sides = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * pad + 1)
    crop = jax.vmap(
      lambda image, corner: jax.lax.dynamic_slice(
        image, (corner[0], corner[1], 0), images.shape[1:]
      )
    )
    images = crop(jnp.pad(images, sides), corners)
  if flip:
    mirrored = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
  return images
