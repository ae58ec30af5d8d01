"""Data sets of the Hugging Face Hub, read by its package `datasets`."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import io
import os
import pathlib
import re
from typing import Any

import numpy as np

from resist_jax import extras, folders
from resist_jax.data import headers
from resist_jax.data.prepared import Prepared, opener, used
from resist_jax.errors import ConfigError, one_line

PREFIX = 'huggingface:'
_NAME = re.compile(r'([^:@]+)(?::([^:@]+))?(?:@(.+))?')
_AGAIN = 'download the set again'


@dataclasses.dataclass(frozen=True)
class Rows:
  """The examples of a split, as a source.

  Attributes:
    table: Rows of the package, whose images are not decoded.
    image: Name of the column of images.
    label: Name of the column of labels.
    numbers: The label in the training of each class here.
  """

  table: Any
  image: str
  label: str
  numbers: tuple[int, ...]

  def __len__(self) -> int:
    return len(self.table)

  def __getitem__(self, number):
    """Reads an example, without decoding its image."""
    row = self.table[int(number)]
    stored, label = row[self.image], row.get(self.label)
    content = stored['bytes']
    if content is None:
      content = pathlib.Path(stored['path']).read_bytes()
    # A label that is missing is None here, and -1 elsewhere.
    return {
      'image': content,
      'label': -1 if label is None or label < 0 else self.numbers[label],
      'file_name': stored['path'] or '',
    }


def find(name: str, wanted: Sequence[str] = ()) -> Prepared:
  """Finds a data set of the Hub, or one that its package has saved.

  Args:
    name: `huggingface:NAME`, where NAME is that of the Hub, or a folder that
      `save_to_disk` wrote; then perhaps `:CONFIG`, and `@COLUMN` if several
      columns are class labels.
    wanted: Splits, or parts of some, that are asked for by name.

  Returns:
    The data set.

  Raises:
    ConfigError: If the package is missing, or there is no such set, or it does
      not hold labelled images.
  """
  match = _NAME.fullmatch(name.removeprefix(PREFIX))
  if not match:
    raise ConfigError(
      f'{name!r} is no name of a data set: give {PREFIX}NAME, '
      f'{PREFIX}NAME:CONFIG or {PREFIX}NAME@COLUMN.'
    )
  where, config, column = match.groups()
  tables = _read(name, where, config)
  some = tables.get('train') or next(iter(tables.values()))
  image, label = _columns(name, some.features, column)
  classes = tuple(some.features[label].names)
  splits = {}
  for split in used(tables, wanted):
    table, title = tables[split], f'{name}, split {split}'
    if image not in table.features:
      raise ConfigError(
        f'{title} has no column {image!r} of images: name the columns of all '
        'splits alike.'
      )
    numbers = _numbers(title, table.features, label, classes)
    encoded = table.cast_column(image, _package().Image(decode=False))
    splits[split] = Rows(encoded, image, label, numbers)
  # Images without labels are neither trained on nor tested.
  labelled = {
    split: rows
    for split, rows in splits.items()
    if label in tables[split].features
  }
  return Prepared(
    name,
    where.rstrip('/').split('/')[-1],
    headers.common_shape(_headers(name, labelled or splits)),
    classes,
    tuple(tables),
    opener(name, splits, _AGAIN),
    fitted=True,
  )


def divided(name: str) -> tuple[str, str]:
  """Returns the name of the Hub or the folder in a name, and what follows it.

  >>> divided('huggingface:./pets:small@breed')
  ('./pets', ':small@breed')
  """
  text = name.removeprefix(PREFIX)
  end = next((i for i, letter in enumerate(text) if letter in ':@'), len(text))
  return text[:end], text[end:]


def _read(name: str, where: str, config: str | None) -> Mapping[str, Any]:
  """Returns the tables of all splits."""
  try:
    datasets = _package()
  except ImportError as error:
    raise ConfigError(
      f'data set {name!r} needs the package datasets, which is not installed: '
      "pip install 'resist_jax[huggingface]', or pip install datasets."
    ) from error
  path = os.path.expanduser(os.path.expandvars(where))
  try:
    if os.path.isdir(path):
      found = datasets.load_from_disk(str(folders.resolve(where, 'a set')))
    else:
      found = datasets.load_dataset(where, config)
  except Exception as error:  # The package raises many types.
    code = f"datasets.load_dataset('{where}').save_to_disk('FOLDER')"
    raise ConfigError(
      f'data set {name!r} cannot be read ({one_line(error)}): correct its '
      f'name, or run {code} on a machine with internet access, copy FOLDER '
      f'here, and set data.name to {PREFIX}FOLDER.'
    ) from error
  return found if isinstance(found, dict) else {'train': found}


def _columns(
  name: str, features: Mapping[str, Any], column: str | None
) -> tuple[str, str]:
  """Returns the names of the columns of images and labels."""
  datasets = _package()
  images = [k for k, v in features.items() if isinstance(v, datasets.Image)]
  labels = [
    k for k, v in features.items() if isinstance(v, datasets.ClassLabel)
  ]
  for known, usual in ((images, 'image'), (labels, 'label')):
    if usual in known:
      known[:] = [usual]
  if column in features and isinstance(features[column], datasets.ClassLabel):
    labels, column = [column], None
  if len(images) == len(labels) == 1 and column is None:
    return images[0], labels[0]
  listed = ', '.join(f'{k} {type(v).__name__}' for k, v in features.items())
  remedy = (
    f'name one of {", ".join(labels)}, as in {name.partition("@")[0]}@'
    f'{labels[0]}'
    if len(images) == 1 and labels
    else 'one column of Image and one of ClassLabel are needed. Choose another '
    'set, or save this one with class_encode_column before it is divided'
  )
  raise ConfigError(f'data set {name!r} has the columns {listed}: {remedy}.')


def _numbers(
  title: str, features: Mapping[str, Any], label: str, classes: tuple[str, ...]
) -> tuple[int, ...]:
  """Returns the label in the training of each class of a split, by its name."""
  names = getattr(features.get(label), 'names', None) or classes
  unknown = [name for name in names if name not in classes]
  if unknown:
    raise ConfigError(
      f'{title} has the class {unknown[0]!r}, which the training set does not '
      'have: give all splits the same class names, such as by '
      'class_encode_column before the set is split.'
    )
  return tuple(map(classes.index, names))


def _package() -> Any:
  """Returns the package `datasets`, an extra that is slow to import."""
  return extras.package('datasets')


def _headers(name: str, splits: Mapping[str, Rows]) -> Iterator[headers.Header]:
  """Reads the forms of images in a random order, until they are enough."""
  for split, rows in splits.items():
    for number in np.random.default_rng(0).permutation(len(rows)):
      try:
        yield headers.read(io.BytesIO(rows[number]['image']))
      except Exception as error:  # Each format raises types of its own.
        raise ConfigError(
          f'image {number} of {name}, split {split} is no image that can be '
          f'read ({one_line(error)}): {_AGAIN}.'
        ) from error
