"""Image classification data sets from TFDS, read without TensorFlow."""

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
  """A data set on disk, ready to be read.

  Attributes:
    name: The name under which it was requested.
    image_shape: `(H, W, C)`; H and W are None if images differ in size.
    class_names: The name of each label.
    splits: For each split that has labels, its examples with random access:
      dictionaries with the keys `label` and `image`. An image is the content of
      an image file, or `uint8[H, W, C]` if the data set stores pixels.
  """

  name: str
  image_shape: tuple[int | None, ...]
  class_names: tuple[str, ...]
  splits: dict[str, Sequence[Any]]

  def split(self, name: str) -> Sequence[Any]:
    """Returns the examples of a split.

    Args:
      name: Name of the split.

    Returns:
      Its examples; see `splits`.

    Raises:
      ConfigError: If there is no such split with labels.
    """
    if name not in self.splits:
      raise ConfigError(
        f'data set {self.name!r} has no split {name!r} with labels, only '
        f'{", ".join(self.splits)}.'
      )
    return self.splits[name]

  def test_split(self) -> Sequence[Any]:
    """Returns the examples of `test`, or of `validation` without a `test`."""
    return self.split('test' if 'test' in self.splits else 'validation')

  def same_classes(self, other: 'Prepared') -> bool:
    """Returns whether both data sets have the same classes.

    A data set may give its classes no names: TFDS then calls them by number,
    and only the number of classes is compared.
    """
    ours, theirs = self.class_names, other.class_names
    numbers = tuple(map(str, range(len(ours))))
    return len(ours) == len(theirs) and (
      ours == theirs or numbers in (ours, theirs)
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences TFDS's warnings about every folder in which it looked."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


@_quiet()
def find(name: str, data_dir: str = '') -> Prepared:
  """Finds a prepared data set, or prepares it if TensorFlow is installed.

  Args:
    name: Name in the TFDS catalog, such as `cifar10` or `cifar10_1/v6`.
    data_dir: The folder of prepared TFDS data sets; empty for TFDS's default.

  Returns:
    The data set.

  Raises:
    ConfigError: If the data set is unknown, does not hold labelled images, or
      is not prepared and cannot be prepared here.
  """
  # Imported here because it is slow, and the digits do not need it.
  import tensorflow_datasets as tfds

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
      f'data set {name!r} needs a package that is not installed ({error}): '
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
    splits = {
      split: builder.as_data_source(split=split, decoders=decoders)
      for split in builder.info.splits
    }
  except NotImplementedError as error:
    raise ConfigError(
      f'data set {name!r} was prepared as {builder.info.file_format.value}, '
      'which cannot be read without TensorFlow: prepare it again with '
      "file_format='array_record'."
    ) from error
  # The labels of ImageNet's test split are not published: all are -1.
  return {
    name: examples
    for name, examples in splits.items()
    if not len(examples) or examples[0]['label'] >= 0
  }


def _check_features(name: str, features) -> None:
  image = 'image' in features and features['image'].shape
  classes = 'label' in features and getattr(
    features['label'], 'num_classes', None
  )
  if not image or len(image) != 3 or not classes:
    raise ConfigError(
      f'data set {name!r} is not one of images with class labels: its features '
      f'are {", ".join(features)}. Choose another.'
    )
  kind = np.dtype(features['image'].np_dtype)
  if kind != np.uint8 or image[2] not in MODES:
    raise ConfigError(
      f'the images of data set {name!r} are {kind} with {image[2]} channels, '
      'but only uint8 images with 1, 3 or 4 channels are supported.'
    )


def _prepare(name: str, builder, where: str) -> None:
  """Downloads and prepares a data set, or raises with the command to run."""
  by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  advice = (
    f'run `python -c "import tensorflow_datasets as tfds; tfds.builder('
    f"'{name}', data_dir='{where}', file_format='array_record')"
    '.download_and_prepare()"` on a machine with internet access, after pip '
    'install tensorflow, or set --config.data.dir to a folder that holds it.'
  )
  if by_hand:
    advice = (
      'its archives must be downloaded by hand, into the manual_dir '
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
  except Exception as error:  # TFDS and its downloaders raise many types.
    reason = ' '.join(str(error).split())[:120]
    raise ConfigError(
      f'data set {name!r} is not prepared in {where} and could not be prepared '
      f'({type(error).__name__}: {reason}): {advice}'
    ) from error
