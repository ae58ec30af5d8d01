"""Images in arrays: those of a file `*.npz`, or of the caller."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
import dataclasses
import re
from typing import Any
import zipfile

import numpy as np

from resist_jax import folders
from resist_jax.data.prepared import Prepared, may_be_back, opener, used
from resist_jax.data.streaming import MODES
from resist_jax.errors import ConfigError, one_line

_OF_SPLIT = re.compile(r'((?:\w+_)?)(images|labels)')  # Names of arrays.
_SPLITS = {'': 'train', 'val_': 'validation'}  # Other names of a split.


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Examples in memory, as a source.

  Attributes:
    images: `uint8[N, H, W, C]`.
    labels: `int32[N]`.
  """

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, number):
    """Returns an example."""
    return {'image': self.images[number], 'label': self.labels[number]}


def checked(images: Any, labels: Any, what: str = '') -> Arrays:
  """Returns images and labels as a run trains on them.

  Args:
    images: `uint8[N, H, W, C]`, or without C for grey ones.
    labels: Whole numbers from 0, `[N]` or `[N, 1]`.
    what: What both are called in messages, such as `test_`.

  Raises:
    ValueError: If they are others; names which, and what to change.
  """
  pixels, numbers = np.asarray(images), np.asarray(labels)
  if pixels.dtype != np.uint8:
    raise ValueError(
      f'{what}images are {pixels.dtype}, and uint8 is needed: scale them to '
      "0 to 255, such as (255 * images).round().astype('uint8') for numbers "
      'from 0 to 1.'
    )
  if pixels.ndim == 3:
    pixels = pixels[..., None]
  if pixels.ndim != 4 or pixels.shape[-1] not in MODES:
    turned = pixels.ndim == 4 and pixels.shape[1] in MODES
    remedy = 'give images.transpose(0, 2, 3, 1)' if turned else 'reshape them'
    raise ValueError(
      f'{what}images have the shape {pixels.shape}, and [N, height, width] or '
      f'[N, height, width, channels] with 1, 3 or 4 channels is needed: '
      f'{remedy}.'
    )
  if not all(pixels.shape[1:]):
    raise ValueError(
      f'{what}images have the shape {pixels.shape}, without a pixel: make them '
      'again.'
    )
  if numbers.ndim == 2 and numbers.shape[1] == 1:
    numbers = numbers[:, 0]
  if numbers.shape != pixels.shape[:1]:
    raise ValueError(
      f'{what}labels have the shape {numbers.shape}, and one label for each '
      f'of {len(pixels)} images is needed, as a number.'
    )
  if not np.issubdtype(numbers.dtype, np.integer):
    raise ValueError(
      f'{what}labels are {numbers.dtype}, and whole numbers from 0 are needed: '
      'number the classes, and give their names as class_names.'
    )
  if numbers.size and numbers.min() < 0:
    raise ValueError(
      f'{what}labels hold {numbers.min()}, and they count from 0: leave out '
      'images without a label.'
    )
  if numbers.size and numbers.max() >= 2**31:
    raise ValueError(
      f'{what}labels hold {numbers.max()}, and they are to be less than 2**31: '
      'number the classes from 0, and leave out images without a label.'
    )
  return Arrays(pixels, numbers.astype(np.int32))


def named(
  splits: Mapping[str, Arrays], class_names: Sequence[str] | None
) -> tuple[str, ...]:
  """Returns the names of the classes: their numbers, unless they are given.

  Args:
    splits: All examples.
    class_names: What the caller calls the classes, or None.

  Raises:
    ValueError: If a label has no name, or there is only one class, or numbers
      would name many more classes than there are images.
  """
  largest = max(
    (int(part.labels.max()) for part in splits.values() if len(part)),
    default=None,
  )
  if largest is None:
    raise ValueError('there are no images.')
  if class_names is None:
    count = sum(map(len, splits.values()))
    if largest >= max(1000, 10 * count):
      raise ValueError(
        f'labels run to {largest}, and there are {count} images: number the '
        'classes from 0 without gaps, or name them in class_names.'
      )
    class_names = [str(label) for label in range(largest + 1)]
  names = names_of(class_names)
  if len(names) <= largest or len(names) < 2:
    raise ValueError(
      f'labels go up to {largest}, and there are {len(names)} class names: '
      f'give at least {max(largest + 1, 2)} class_names, or number the classes '
      'from 0.'
    )
  return names


def names_of(class_names: Sequence[Any]) -> tuple[str, ...]:
  """Returns the names of classes as text.

  Args:
    class_names: What the caller calls the classes.

  Raises:
    ValueError: If it is no list of texts, or if two classes have one name.
  """
  odd = isinstance(class_names, str | Mapping | Set)
  odd |= isinstance(class_names, np.ndarray) and class_names.ndim != 1
  if odd or not isinstance(class_names, Iterable):
    given = ' '.join(repr(class_names).split())  # Arrays have several lines.
    raise ValueError(
      f'class_names is {given}; it must be a list with a name for each '
      'class, in the order of the labels.'
    )
  names = tuple(map(_text, class_names))
  twice = [name for name, count in Counter(names).items() if count > 1]
  if twice:
    raise ValueError(
      f'class_names hold {twice[0]!r} twice: give each class a name of its own.'
    )
  return names


def _text(name: Any) -> str:
  if isinstance(name, bytes):
    return name.decode()
  if isinstance(name, list | tuple | np.ndarray) and np.ndim(name):
    raise ValueError(
      f'class_names hold {name!r} as one name: give a flat list, with a name '
      'for each class.'
    )
  return str(name)


def find(
  name: str, class_names: Sequence[str] = (), wanted: Sequence[str] = ()
) -> Prepared:
  """Opens a file of arrays.

  Args:
    name: Path of a file `*.npz` of `images` and `labels`, and perhaps of
      `test_images` and `test_labels`, other splits, and `class_names`.
    class_names: The classes of the set that this one is a test for; empty for
      a set to train on.
    wanted: Splits, or parts of some, that are asked for by name. What is in
      others decides nothing.

  Returns:
    The data set.

  Raises:
    ConfigError: If there is no such file, or its arrays are others.
  """
  path = folders.resolve(name, 'a data set')
  try:
    there = path.is_file()
    # NumPy would take anything else for a pickle.
    whole = there and zipfile.is_zipfile(path)
    if there and not whole:
      path.open('rb').close()  # `is_zipfile` hides that it cannot be read.
  except OSError as error:
    if may_be_back(error):
      raise
    raise ConfigError(
      f'{path} cannot be read ({error.strerror}): let this user read it.'
    ) from error
  if not there:
    raise ConfigError(
      f'the data set is {name!r}, but there is no such file: name a file that '
      'numpy.savez wrote, or a folder of images.'
    )
  if not whole:
    raise ConfigError(
      f'{path} is not an npz file, or is truncated: write it again with '
      'numpy.savez.'
    )
  try:
    # NumPy would leave a damaged file open.
    with path.open('rb') as raw, np.load(raw, allow_pickle=False) as file:
      arrays = {key: _array(file, key) for key in file.files}
    every = _splits(arrays)
    splits = {split: every[split] for split in used(every, wanted) or every}
    own = arrays.get('class_names')
    names = named(splits, class_names or None if own is None else own)
    if class_names:
      own = map(str, range(len(names))) if own is None else names
      splits, names = _by_name(splits, tuple(own), tuple(class_names), names)
  except Exception as error:  # A damaged archive raises many types.
    reason = str(error) if type(error) is ValueError else one_line(error)
    raise ConfigError(f'in {path}, {" ".join(reason.split())}') from error
  shapes = {part.images.shape[1:] for part in splits.values()}
  if len(shapes) > 1:
    raise ConfigError(
      f'in {path}, images have the shapes {sorted(shapes)}: give all splits '
      'one shape.'
    )
  remedy = 'write the file again'
  return Prepared(
    name, path.stem, shapes.pop(), names, tuple(every),
    opener(name, splits, remedy), fitted=True,
  )  # fmt: skip


def _by_name(
  splits: Mapping[str, Arrays],
  own: tuple[str, ...],
  wanted: tuple[str, ...],
  otherwise: tuple[str, ...],
) -> tuple[dict[str, Arrays], tuple[str, ...]]:
  """Numbers the classes of a test as those of the training.

  Args:
    splits: The examples.
    own: What they call their classes; their numbers if they have no names.
      Folders that numbers name are sorted as text: 0, 1, 10, 2.
    wanted: The classes of the training.
    otherwise: Names of classes where `own` has others than these.

  Returns:
    The examples, and the names of their classes.
  """
  if not {*own} <= {*wanted}:
    return dict(splits), otherwise
  places = np.array([wanted.index(name) for name in own], np.int32)
  return {
    split: Arrays(part.images, places[part.labels])
    for split, part in splits.items()
  }, wanted


def _array(file: Mapping[str, np.ndarray], key: str) -> Any:
  try:
    return file[key]
  except ValueError as error:
    if key == 'class_names':
      raise ValueError(
        f'{key} cannot be read ({error}): save class_names.astype(str).'
      ) from error
    if not _OF_SPLIT.fullmatch(key):
      return None  # Nothing uses it.
    raise ValueError(
      f'{key} cannot be read ({error}): save an array of numbers, of images of '
      'one size.'
    ) from error


def _splits(arrays: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
  """Returns the examples of each split."""
  found = {}
  prefixes = {
    match[1]: match[2] for key in arrays if (match := _OF_SPLIT.fullmatch(key))
  }
  for prefix, kind in prefixes.items():
    for needed in (f'{prefix}images', f'{prefix}labels'):
      if needed not in arrays:
        raise ValueError(
          f'{prefix}{kind} come without {needed}: add those, or leave '
          f'{prefix}{kind} out.'
        )
    split = _SPLITS.get(prefix, prefix[:-1])
    if split in found:
      raise ValueError(f'the split {split} is there twice: leave one out.')
    found[split] = checked(
      arrays[f'{prefix}images'], arrays[f'{prefix}labels'], prefix
    )
  if 'train' not in found:
    raise ValueError(
      'the arrays images and labels are missing; there are '
      f'{", ".join(arrays) or "no arrays"}: rename them to images, labels, '
      'test_images and test_labels.'
    )
  return found
