"""Image classification sets of the TFDS catalog, read without TensorFlow."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.util
import os
from typing import Any

from absl import logging
import numpy as np

from resist_jax.data.streaming import MODES
from resist_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A set that lies in a folder, ready to be read.

  Attributes:
    name: As it was asked for.
    image_shape: `(H, W, C)`; H and W are None where images differ in size.
    class_names: One per label.
    sources: Examples for random access by split, dictionaries of `label` and
      `image`: the bytes of a file, or pixels where the set keeps them so.
  """

  name: str
  image_shape: tuple[int | None, ...]
  class_names: tuple[str, ...]
  sources: dict[str, Sequence[Any]]

  def source(self, split: str) -> Sequence[Any]:
    """Returns the examples of a split.

    Args:
      split: Its name.

    Returns:
      See `sources`.

    Raises:
      ConfigError: If there is no such split.
    """
    if split not in self.sources:
      raise ConfigError(
        f'data set {self.name!r} has no split {split!r} with labels, only '
        f'{", ".join(self.sources)}.'
      )
    return self.sources[split]

  def test_source(self) -> Sequence[Any]:
    """Returns what to test on: the split test, or else validation."""
    return self.source('test' if 'test' in self.sources else 'validation')

  def same_classes(self, other: 'Prepared') -> bool:
    """Tells whether labels mean the same, as far as the sets say."""
    ours, theirs = self.class_names, other.class_names
    numbers = tuple(map(str, range(len(ours))))  # Where a set gives no names.
    return len(ours) == len(theirs) and (
      ours == theirs or numbers in (ours, theirs)
    )


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
def find(name: str, data_dir: str = '') -> Prepared:
  """Finds a set, and prepares it where that is possible.

  Args:
    name: In the TFDS catalog, such as `cifar10` or `cifar10_1/v6`.
    data_dir: Where TFDS keeps prepared sets; empty for its default.

  Returns:
    The set.

  Raises:
    ConfigError: If there is no such set, or it is not one of images with
      labels, or it is neither prepared nor can be prepared here.
  """
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
  _check_features(name, features)
  if not builder.is_prepared():
    _prepare(name, builder, where)
  shape, names = features['image'].shape, tuple(features['label'].names)
  return Prepared(name, shape, names, _open(name, builder))


def _open(name: str, builder) -> dict[str, Sequence[Any]]:
  """Opens the splits that have labels."""
  import tensorflow_datasets as tfds

  encoded = isinstance(builder.info.features['image'], tfds.features.Image)
  decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
  try:
    sources = {
      split: builder.as_data_source(split=split, decoders=decoders)
      for split in builder.info.splits
    }
  except NotImplementedError as error:
    raise ConfigError(
      f'data set {name!r} was prepared as {builder.info.file_format.value}, '
      'which cannot be read without TensorFlow: prepare it again with '
      "file_format='array_record'."
    ) from error
  # ImageNet keeps the labels of its test set to itself: there they are -1.
  return {
    split: source
    for split, source in sources.items()
    if not len(source) or source[0]['label'] >= 0
  }


def _check_features(name: str, features) -> None:
  image = 'image' in features and features['image'].shape
  classes = 'label' in features and getattr(
    features['label'], 'num_classes', None
  )
  if not image or len(image) != 3 or not classes:
    raise ConfigError(
      f'data set {name!r} is not one of images with class labels: its features '
      f'are {", ".join(features)}.'
    )
  kind = np.dtype(features['image'].np_dtype)
  if kind != np.uint8 or image[2] not in MODES:
    raise ConfigError(
      f'the images of data set {name!r} are {kind} of {image[2]} channels: '
      'only uint8 images of 1, 3 or 4 channels are read.'
    )


def _prepare(name: str, builder, where: str) -> None:
  """Downloads and prepares, where TensorFlow and a network allow it."""
  by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  advice = (
    f'run `python -c "import tensorflow_datasets as tfds; tfds.builder('
    f"'{name}', data_dir='{where}', file_format='array_record')"
    '.download_and_prepare()"` where there is internet, after pip install '
    'tensorflow, or point --config.data.dir at a folder that holds it.'
  )
  if by_hand:
    advice = (
      'its archives are downloaded by hand, into the manual_dir '
      f'{os.path.join(where, "downloads", "manual")}; TFDS says: '
      f'"{" ".join(by_hand.split())}" Then {advice}'
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
