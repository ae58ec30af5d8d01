"""Image classification data sets, in memory or streamed.

A data set that fits in memory is kept on the devices as uint8; a larger one
streams from its files.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from absl import logging
import numpy as np

from resist_jax.data import sources
from resist_jax.data.array_source import Arrays
from resist_jax.data.held_out import hold_out, random_parts
from resist_jax.data.order import sample
from resist_jax.data.prepared import (
  Examples,
  Prepared,
  opener,
)
from resist_jax.data.streaming import Records, StreamedImages, StreamedLabels
from resist_jax.errors import ConfigError, is_whole

STREAMING = 'auto', 'always', 'never'
MAX_BYTES_IN_MEMORY = 8 * 2**30  # CIFAR takes 0.15 GiB.
MOMENTS_IMAGES = 2000  # Sampled for mean and deviation of a large set.
_LEAST_STD = 0.5 / 255  # Half a level of 8 bits; below, a channel is constant.


@dataclasses.dataclass(frozen=True)
class Split:
  """A part of a data set, in memory or streamed from files.

  Attributes:
    images: `uint8[N, H, W, C]`.
    labels: `int32[N]`.
    content: See `Examples.digest`, for a person's own files; empty for others.
  """

  images: np.ndarray | StreamedImages
  labels: np.ndarray | StreamedLabels
  content: str = ''

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, index: np.ndarray) -> 'Split':
    """Returns some examples; streamed ones are not read yet.

    Args:
      index: Their numbers, `int[n]`, or a mask, `bool[N]`.

    Returns:
      A split of n examples.
    """
    index = np.arange(len(self))[index]
    images = self.images.take(index, axis=0)
    return Split(images, self.labels.take(index, axis=0), self.content)

  def in_memory(self) -> 'Split':
    """Returns the same examples as NumPy arrays."""
    return Split(self.images[:], self.labels[:], self.content)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An image classification data set.

  Attributes:
    name: Its name in the catalog, without config and version, or that of its
      folder or file.
    train: The training split.
    tests: Splits to evaluate on, by name: `test`, `validation` if a part of
      the training set is held out, and the requested extra test sets.
    class_names: The name of each class, in the order of the labels, which
      count from 0.
    mean: Mean of each channel over the training images, scaled to [0, 1],
      `float32[C]`.
    std: Standard deviation of each channel, in the same scale, `float32[C]`; 1
      for a channel that does not vary.
  """

  name: str
  train: Split
  tests: dict[str, Split]
  class_names: tuple[str, ...]
  mean: np.ndarray
  std: np.ndarray
  unit: ClassVar[str] = 'images'  # What records call the examples.

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.class_names)

  def describe(self) -> dict[str, Any]:
    """Returns what records say of the examples; JSON values."""
    return {
      'unit': self.unit,
      'class_names': list(self.class_names),
      'image_shape': list(self.train.images.shape[1:]),
    }

  @property
  def streamed(self) -> bool:
    """Whether images are read from files instead of memory."""
    return isinstance(self.train.images, StreamedImages)

  @property
  def resized(self) -> bool:
    """Whether images are cut and resized while they are read."""
    images = self.train.images
    return isinstance(images, StreamedImages) and images.resized


def load(
  name: str,
  data_dir: str = '',
  validation: float = 0.0,
  *,
  train_split: str = '',
  test_split: str = '',
  streaming: str = 'auto',
  image_size: int = 224,
  resize: bool = False,
  extra_tests: Sequence[str] = (),
  copies: int = 1,
) -> Dataset:
  """Loads a data set into memory, or opens its files for streaming.

  Args:
    name: `digits` (scikit-learn's 1,797 handwritten digits, 8x8, of which a
      fixed fifth is the test split), the path of a folder of images or of a
      file `*.npz`, `huggingface:NAME`, or the name of a TFDS image
      classification data set.
    data_dir: The folder of prepared TFDS data sets, in which `~` and `$NAME`
      are filled in; empty for TFDS's default.
    validation: Share of the training set to hold out, at least 0 and below 1.
    train_split: The split to train on, or a part of one such as `train[:80%]`;
      empty for `train`.
    test_split: The split to test on; empty for `test`, or `validation` without
      a `test`. If the set has only `train`, a fifth of it is held out; see
      `hold_out`.
    streaming: `always`, `never`, or `auto`, which streams images that differ in
      size, are resized, or do not fit in memory.
    image_size: Height and width of resized images, in pixels.
    resize: Whether to resize images that all have one size; images that differ
      in size are always resized.
    extra_tests: Names of data sets with the same classes, to evaluate on as
      well.
    copies: How many copies of images in memory the host would keep, its own
      one included: virtual devices of a CPU have a copy each.

  Returns:
    The data set, with the mean and deviation of its training images.

  Raises:
    ConfigError: If the data set is unknown, does not hold labelled images, is
      damaged, or is not prepared and cannot be prepared here, or if it does not
      fit the other arguments.
  """
  _check_arguments(name, validation, streaming, image_size, extra_tests)
  # The files of a person may change from one call to the next.
  changing = any(map(sources.is_own, (name, *extra_tests)))
  return (_load if changing else load_once)(
    name,
    data_dir,
    validation,
    (train_split, test_split),
    Reading(streaming, image_size, resize, copies),
    tuple(extra_tests),
  )


def _load(name, data_dir, validation, splits, reading, extra_tests) -> Dataset:
  source = sources.find(name, data_dir, wanted=splits)
  extra: dict[str, Prepared] = {}
  for other in extra_tests:
    if sources.same_set(other, name):
      raise ConfigError(
        f'data.extra_tests names {other!r}, the training data set, whose own '
        'test split is always tested: remove it.'
      )
    key = sources.test_key(other)
    if key in (*extra, 'train', 'test', 'validation'):
      raise ConfigError(
        f'data.extra_tests names {other!r}, but there is another test that is '
        f'called {key}: rename one, or remove it.'
      )
    extra[key] = sources.find(other, data_dir, source.class_names)
  found = source.train_and_test(*splits)
  return assemble(source, found, reading, validation, extra)


@functools.lru_cache(maxsize=1)
def load_once(*args) -> Dataset:
  """Loads a set; experiments train on the same one many times in a process.

  Args:
    *args: See `_load`.

  Returns:
    The set, whose arrays cannot be written, because all callers share them.
  """
  found = _load(*args)
  for split in (found.train, *found.tests.values()):
    for array in (split.images, split.labels):
      if isinstance(array, np.ndarray):
        array.flags.writeable = False
  return found


def _check_arguments(name, validation, streaming, image_size, extra_tests):
  """Raises a ConfigError; a command line has been checked before."""
  if not isinstance(name, str):
    raise ConfigError(f'name is {name!r}; it must be a string, such as digits.')
  if not (isinstance(validation, int | float) and 0 <= validation < 1):
    raise ConfigError(
      f'validation is {validation!r}; it must be a share of the training set, '
      'at least 0 and less than 1.'
    )
  check_reading(streaming, image_size)
  if isinstance(extra_tests, str):
    raise ConfigError(
      f'extra_tests is {extra_tests!r}; it must hold names: [{extra_tests!r}].'
    )


def check_reading(streaming: Any, image_size: Any) -> None:
  """Raises a ConfigError if images cannot be read so; see `load`."""
  if streaming not in STREAMING:
    raise ConfigError(
      f'streaming is {streaming!r}; use one of {", ".join(STREAMING)}.'
    )
  if not is_whole(image_size) or image_size < 1:
    raise ConfigError(
      f'image_size is {image_size!r}; it must be a whole number of pixels, at '
      'least 1.'
    )


class Reading(NamedTuple):
  """How images are read; see `load`."""

  streaming: str = 'auto'
  image_size: int = 224
  resize: bool = False
  copies: int = 1


def assemble(
  source: Prepared,
  splits: tuple[Examples, Examples | None],
  reading: Reading,
  validation: float = 0.0,
  extra_tests: Mapping[str, Prepared] = MappingProxyType({}),
) -> Dataset:
  """Reads the splits of a data set, or opens them for streaming.

  Args:
    source: The data set.
    splits: What to train and to test on; see `Prepared.train_and_test`.
    reading: How images are read.
    validation: See `load`.
    extra_tests: Further sets to test on, by the name of the test.

  Returns:
    The data set, with the mean and deviation of its training images.

  Raises:
    ConfigError: If something in it does not fit.
  """
  train, test = splits
  if (test is None or validation) and train.repeats():
    raise ConfigError(
      f'{train.name} holds images twice, and some of them are held out for a '
      'test: name parts that do not overlap in data.train_split.'
    )
  form = _form(source, len(train) + len(test or ()), reading)
  streamed = _streams(source.name, form, reading)
  trained = _split(train, source, form, streamed)
  if test is None:
    index, others = hold_out(trained.labels[:])
    tests = {'test': trained.take(others)}
    trained = trained.take(index)
  else:
    tests = {'test': _split(test, source, form, streamed)}
  for key, extra in extra_tests.items():
    examples = _extra_test(extra, source, form)
    tests[key] = _split(examples, extra, form, streamed)
    if not len(tests[key]):
      raise ConfigError(
        f'the test {extra.name!r} has no images: leave it out of '
        'data.extra_tests.'
      )
  if validation:
    index, others = random_parts(len(trained), validation)
    tests['validation'] = trained.take(others)
    trained = trained.take(index)
    if not len(trained):
      raise ConfigError(
        f'data.validation is {validation}, which leaves no image of '
        f'{source.name!r} to train on: lower it.'
      )
  for split in (trained, *tests.values()):
    if not len(split):
      raise ConfigError(f'data set {source.name!r} has an empty split.')
  _warn_of_untrained(source, trained)
  mean, std = _moments(_sample(trained.images, form))
  return Dataset(source.kind, trained, tests, source.class_names, mean, std)


def _warn_of_untrained(source: Prepared, trained: Split) -> None:
  """Says which classes have no training image, if labels are at hand."""
  labels = trained.labels
  if isinstance(labels, StreamedLabels):
    known = labels.records.known_label
    if known(int(labels.numbers[0])) < 0:
      return
    labels = np.array([known(n) for n in labels.numbers.tolist()])
  names = source.class_names
  without = [n for i, n in enumerate(names) if i not in {*np.unique(labels)}]
  if without:
    logging.warning(
      '%s has no image to train on of %d of its %d classes, such as %r',
      source.name, len(without), len(names), without[0],
    )  # fmt: skip


def content(name: str, data_dir: str, splits: tuple[str, str]) -> str:
  """Returns a digest of the images that a run would train on.

  Args:
    name: A person's own files; see `load`.
    data_dir: See `load`.
    splits: What it would train and test on; see `load`.

  Returns:
    See `Examples.digest`; empty for a set of a catalog.

  Raises:
    ConfigError: If there is no such set, or no such split.
  """
  source = sources.find(name, data_dir, wanted=splits)
  train, _ = source.train_and_test(*splits)
  return train.digest() if source.fitted else ''


def load_test(
  name: str,
  class_names: Sequence[str],
  image_shape: tuple[int, ...],
  resized: bool,
  data_dir: str = '',
) -> Split:
  """Opens a data set to test a trained network on.

  Args:
    name: See `load`; of a folder or a file with one split, all images count.
    class_names: The classes of the network.
    image_shape: `(H, W, C)` of the images that it was trained on.
    resized: Whether these were cut and resized to that shape.
    data_dir: See `load`.

  Returns:
    The images, which are read when they are indexed.

  Raises:
    ConfigError: If there is no such set, or it does not fit the network.
  """
  names = tuple(class_names)
  trained = Prepared('the run', '', image_shape, names, (), opener('', {}, ''))
  source = sources.find(name, data_dir, names)
  form = _Form(image_shape, 'are resized' if resized else '', 0)
  split = _split(_extra_test(source, trained, form), source, form, True)
  if not len(split):
    raise ConfigError(
      f'data set {name!r} has no image of the classes {", ".join(names[:5])}'
      f'{", ..." if names[5:] else ""}: name another.'
    )
  return split


class _Form(NamedTuple):
  """What the images of a data set become.

  Attributes:
    shape: `(H, W, C)` of each.
    reason: Why they are cut and resized while they are read; '' if not.
    num_bytes: What all of them take in memory; 0 if they are resized.
  """

  shape: tuple[int, ...]
  reason: str
  num_bytes: int


def _form(source: Prepared, num_images: int, reading: Reading) -> _Form:
  """Decides what the images of a data set become."""
  shape: Any = source.image_shape
  image_size = reading.image_size
  reason = 'are resized' if reading.resize else ''
  if None in shape:
    reason = 'differ in size'
  elif source.fitted and max(shape[:2]) > image_size:
    reason = f'have more than {image_size} pixels a side'
  if reason:
    return _Form((image_size, image_size, shape[2]), reason, 0)
  return _Form(shape, '', num_images * math.prod(shape))


def _streams(name: str, form: _Form, reading: Reading) -> bool:
  """Decides whether images stay in their files."""
  streaming, copies = reading.streaming, reading.copies
  num_bytes = form.num_bytes * copies
  fits = not form.reason and num_bytes <= MAX_BYTES_IN_MEMORY
  if streaming != 'never' or fits:
    return streaming == 'always' or not fits
  reason = form.reason or f'take {num_bytes / 2**30:.3g} GiB of memory'
  remedy = 'set data.streaming to auto'
  if not form.reason and copies > 1:
    reason += (
      f', {form.num_bytes / 2**30:.3g} GiB in each of {copies} copies: one for '
      'each virtual device of this host, and its own'
    )
    remedy += ', or lower num_devices'
  raise ConfigError(
    f'the images of data set {name!r} {reason}. Only images of one size that '
    f'take at most {MAX_BYTES_IN_MEMORY / 2**30:.3g} GiB are kept in memory: '
    f'{remedy}.'
  )


def _split(
  examples: Examples, source: Prepared, form: _Form, streamed: bool
) -> Split:
  """Opens examples, and reads them unless they are streamed."""
  records = Records(examples.name, examples, len(source.class_names))
  numbers = np.arange(len(examples), dtype=np.int32)
  height, width, channels = form.shape
  resized = bool(form.reason) or source.image_shape[:2] != form.shape[:2]
  # Images that were not cut in training are not cut in another set either.
  kept = StreamedImages.kept if form.reason else 1.0
  shape = height, width, channels
  more = channels == 4 and source.image_shape[2] != 4
  images = StreamedImages(records, numbers, shape, resized, kept, more)
  content = examples.digest() if source.fitted else ''
  arrays = examples.source
  ready = not (resized or streamed) and isinstance(arrays, Arrays)
  if ready and arrays.images.shape[1:] == form.shape:
    return Split(arrays.images, arrays.labels, content)
  split = Split(images, StreamedLabels(records, numbers), content)
  return split if streamed else split.in_memory()


def _extra_test(source: Prepared, trained: Prepared, form: _Form) -> Examples:
  """Opens a test set with the classes and image shape of the training set."""
  remedy, name = 'test on another set', source.name
  if not source.same_classes(trained):
    raise ConfigError(
      f'the test is on {name!r}, whose {len(source.class_names)} classes are '
      f'not the {len(trained.class_names)} classes of {trained.name!r}: '
      f'{remedy}.'
    )
  any_size = form.reason or None in source.image_shape
  drops = source.image_shape[2] == 4 != form.shape[2]
  if source.image_shape != trained.image_shape and not (
    (source.fitted and not drops)
    or (any_size and source.image_shape[2] == form.shape[2])
  ):
    raise ConfigError(
      f'the test is on {name!r}, whose images have the shape '
      f'{source.image_shape}, but those of {trained.name!r} have '
      f'{trained.image_shape}: {remedy}.'
    )
  if source.fitted and set(source.splits) == {'train'}:  # All of it.
    examples = source.open('train')
    if len(examples) and not examples.have_labels(remedy):
      raise ConfigError(
        f'the images of {name!r} have no labels: move those of each class to a '
        'folder with its name.'
      )
    return examples
  return source.find_test(remedy)


def _sample(
  images: np.ndarray | StreamedImages, form: _Form
) -> np.ndarray | StreamedImages:
  """Returns the images whose mean and deviation count for the whole set.

  The choice does not depend on whether they are streamed, nor on the host, by
  which a run may go on with another number of devices.
  """
  if not form.reason and form.num_bytes <= MAX_BYTES_IN_MEMORY:
    return images
  return images.take(sample(len(images), MOMENTS_IMAGES), axis=0)


def _moments(
  images: np.ndarray | StreamedImages,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean and deviation of each channel, from its histogram.

  A float copy of the images would take four times their memory. A channel that
  does not vary, such as an opaque alpha, has the deviation 1: divided by its
  own, a single other pixel would drown all channels.
  """
  values = np.arange(256) / 255
  counts = np.zeros((images.shape[-1], 256), np.int64)
  for start in range(0, len(images), 1000):
    channels = images[start : start + 1000].reshape(-1, images.shape[-1])
    counts += [np.bincount(c, minlength=256) for c in channels.T]
  share = counts / counts.sum(axis=1, keepdims=True)
  mean = share @ values
  variance = share @ np.square(values) - np.square(mean)
  std = np.sqrt(np.maximum(variance, 0))
  std = np.where(std < _LEAST_STD, 1, std)
  return mean.astype(np.float32), std.astype(np.float32)
