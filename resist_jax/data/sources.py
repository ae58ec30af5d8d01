"""Finds a data set by its name: digits, a path, or one of a catalog."""

from collections.abc import Sequence
import importlib.util
import os
import pathlib
import re
import zlib

import numpy as np

from resist_jax import folders
from resist_jax.data import (
  array_source,
  folder_source,
  hugging_face_source,
  tfds_source,
)
from resist_jax.data.array_source import Arrays
from resist_jax.data.held_out import stratified
from resist_jax.data.prepared import Prepared, opener
from resist_jax.errors import ConfigError, one_line

GIVEN = 'given:'  # How a config names a data set that a program gave.
# Beginnings of paths, on Windows too, that no name in a catalog has.
_PATH = re.compile(r'[./~$\\]|[a-zA-Z]:[/\\]')


def find(
  name: str,
  data_dir: str = '',
  class_names: Sequence[str] = (),
  wanted: Sequence[str] = (),
) -> Prepared:
  """Finds a data set.

  Args:
    name: `digits`, a folder of images, a file `*.npz`, `huggingface:NAME`, or
      a name of the TFDS catalog. Where a folder and a set of that catalog have
      the name, the set is taken.
    data_dir: The folder of prepared TFDS data sets; see `tfds_source.find`.
    class_names: The classes of the set that this one is a test for; empty for
      a set to train on.
    wanted: Splits, or parts of some, that are asked for by name.

  Returns:
    The data set.

  Raises:
    ConfigError: If there is none, or it does not hold labelled images.
  """
  if name == 'digits':
    return digits()
  if name.startswith(GIVEN):
    raise ConfigError(
      f'the data set is {name!r}, which a program gave: run that program '
      'again, or call train(config, workdir, dataset=...).'
    )
  if name.startswith(hugging_face_source.PREFIX):
    return hugging_face_source.find(name, wanted)
  if name.endswith('.npz'):
    return array_source.find(name, class_names, wanted)
  if _PATH.match(name) or _is_folder(name, data_dir):
    return folder_source.find(name, class_names, wanted)
  return tfds_source.find(name, data_dir)


def is_own(name: str) -> bool:
  """Returns whether a name is that of a person's own files.

  Args:
    name: As `load` takes it.

  Returns:
    True for the path of a folder or a file, which need not exist.
  """
  return bool(_own(name)[0])


def _own(name: str) -> tuple[str, str]:
  """Returns the path in a name, '' for none, and what the name says besides."""
  if name.startswith(hugging_face_source.PREFIX):
    where, rest = hugging_face_source.divided(name)
    given = os.path.expanduser(os.path.expandvars(where))
    if _PATH.match(where) or os.path.isdir(given):
      return where, rest
    return '', name
  own = _PATH.match(name) or name.endswith('.npz') or _is_folder(name)
  return (name, '') if own else ('', name)


def _is_folder(name: str, data_dir: str = '') -> bool:
  """Returns whether a plain name is that of a folder, and of no other set."""
  if name == 'digits' or not os.path.isdir(name):
    return False
  return not tfds_source.knows(name, data_dir)


def same_set(name: str, other: str) -> bool:
  """Returns whether two names are those of one data set.

  Args:
    name: As `load` takes it.
    other: Another one.

  Returns:
    True if they are equal, or if both are paths that lead to one place.

  >>> same_set('./photos/', '../photos'), same_set('./photos/', './photos')
  (False, True)
  """
  paths, rest = zip(_own(name), _own(other), strict=True)
  if name == other or not all(paths) or rest[0] != rest[1]:
    return name == other
  try:
    places = [folders.resolve(text, 'a data set') for text in paths]
  except ConfigError:  # Such as $NAME of another machine.
    return False
  first, second = (place.resolve() for place in places)
  return first == second


def test_key(name: str) -> str:
  """Returns what a test on a data set is called in metrics.

  Args:
    name: As `load` takes it. The last part of a path counts.

  Returns:
    Letters, digits and underscores.

  >>> test_key('imagenet_v2/top-images'), test_key('/data/My photos/')
  ('imagenet_v2_top_images', 'my_photos')
  """
  name = name.removeprefix(hugging_face_source.PREFIX)
  if _PATH.match(name) or name.endswith('.npz'):
    path = pathlib.Path(os.path.abspath(os.path.expanduser(name)))
    name = path.stem if path.suffix == '.npz' else path.name
  return re.sub(r'\W+', '_', name.lower())


def digits() -> Prepared:
  """Reads scikit-learn's digits without importing it, which takes seconds."""
  package = importlib.util.find_spec('sklearn')
  if package is None or package.origin is None:
    raise ConfigError(
      "data set 'digits' comes with scikit-learn, which is not installed: pip "
      'install scikit-learn.'
    )
  path = pathlib.Path(package.origin).parent / 'datasets/data/digits.csv.gz'
  remedy = 'pip install --force-reinstall scikit-learn'
  try:
    table = np.loadtxt(path, delimiter=',')
  except (OSError, ValueError, EOFError, zlib.error) as error:
    raise ConfigError(
      f"data set 'digits' cannot be read from {path} ({one_line(error)}): "
      f'{remedy}.'
    ) from error
  images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)
  images, labels = images.reshape(-1, 8, 8, 1), table[:, -1].astype(np.int32)
  parts = zip(('train', 'test'), stratified(labels, 360), strict=True)
  splits = {
    split: Arrays(images[index], labels[index]) for split, index in parts
  }
  names = tuple(map(str, range(10)))
  return Prepared(
    'digits', 'digits', images.shape[1:], names, tuple(splits),
    opener('digits', splits, remedy),
  )  # fmt: skip
