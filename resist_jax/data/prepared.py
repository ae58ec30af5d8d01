"""A data set that is ready to be read: its splits, and which to use."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import errno
import hashlib
import itertools
import types
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

from resist_jax.data.order import evenly_spaced
from resist_jax.errors import ConfigError, one_line

PREPARE_AGAIN = 'prepare the set again'  # TFDS then writes its files anew.
_AWAY = (errno.ESTALE, errno.ETIMEDOUT)
_LOOKED_AT = 32  # Examples of a split that show whether it has labels.
_DIGESTED = 256  # Those that show whether its images are the same.


class Source(Protocol):
  """Examples with random access, as grain and PyTorch read them."""

  def __len__(self) -> int:
    """Returns how many there are."""
    ...

  def __getitem__(self, number: Any, /) -> Any:
    """Reads one of them."""
    ...


class Part(NamedTuple):
  """Examples of a split that lie in one file, side by side.

  Attributes:
    file: Path of the file.
    first: The first of them, counted in the file.
    count: How many they are.
  """

  file: str
  first: int
  count: int

  def meets(self, other: 'Part') -> bool:
    """Returns whether both hold an example."""
    return (
      self.file == other.file
      and self.first < other.first + other.count
      and other.first < self.first + self.count
    )


@dataclasses.dataclass(frozen=True)
class Examples:
  """The examples of a split, with random access.

  Attributes:
    name: Name of the data set and split, for messages.
    source: The examples: dictionaries with the keys `label` and `image`. An
      image is the content of an image file, or `uint8[H, W, C]` if the data set
      stores pixels. A label below 0 is none.
    parts: Where they lie, in order.
    remedy: What to do about an example that cannot be read.
  """

  name: str
  source: Source
  parts: Sequence[Part]
  remedy: str = PREPARE_AGAIN

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, number):
    """Reads an example.

    Args:
      number: Its position in the split.

    Returns:
      The example; see `source`.

    Raises:
      ConfigError: If it cannot be read.
      OSError: If a network file system is away, see `may_be_back`.
    """
    try:
      return self.source[number]
    except Exception as error:  # Readers raise many types.
      line = (
        f'image {number} of {self.name} cannot be read from '
        f'{self._file(number)} ({one_line(error)})'
      )
      if may_be_back(error):
        raise OSError(error.errno, line) from error
      raise ConfigError(f'{line}: {self.remedy}.') from error

  def known_label(self, number: int) -> int:
    """See `known_label`."""
    return known_label(self.source, number)

  def _file(self, number: int) -> str:
    ends = np.cumsum([part.count for part in self.parts])
    return self.parts[int(np.searchsorted(ends, number, 'right'))].file

  def have_labels(self, remedy: str) -> bool:
    """Returns whether the examples have labels, by a sample of them.

    Args:
      remedy: What to do if only some have one.

    Raises:
      ConfigError: If some of them have labels and others have none.
    """
    sample = evenly_spaced(len(self), _LOOKED_AT)
    found = {number: self[number]['label'] for number in sample}
    without = [n for n, label in found.items() if label is None or label < 0]
    if without and len(without) < len(found):
      raise ConfigError(
        f'some images of {self.name} have labels and others have none, such '
        f'as image {without[0]}: {remedy}.'
      )
    return not without

  def digest(self) -> str:
    """Returns a digest of the stored images of some examples, evenly spaced.

    They are not decoded, so that it is the same on every machine.
    """
    found = hashlib.sha256()
    for number in evenly_spaced(len(self), _DIGESTED):
      image = self[number]['image']
      content = image
      if isinstance(image, np.ndarray):
        found.update(f'{image.shape}'.encode())
        content = image.tobytes()
      found.update(f'{len(content)}'.encode())
      found.update(content)
    return found.hexdigest()[:12]

  def overlap(self, other: 'Examples') -> bool:
    """Returns whether two splits share an example."""
    pairs = itertools.product(self.parts, other.parts)
    return any(one.meets(another) for one, another in pairs)

  def repeats(self) -> bool:
    """Returns whether an example is in it twice, as in `train+train`."""
    pairs = itertools.combinations(self.parts, 2)
    return any(one.meets(another) for one, another in pairs)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A data set on disk.

  Attributes:
    name: The name under which it was requested.
    kind: Its name in the catalog, without config and version, or that of its
      folder or file.
    image_shape: `(H, W, C)`; H and W are None if images differ in size.
    class_names: The name of each label.
    splits: Names of its splits.
    open: Returns the examples of a split, or of a part of one.
    fitted: Whether images of another size are cut and resized to that of the
      training images, where the set is an extra test.
  """

  name: str
  kind: str
  image_shape: tuple[int | None, ...]
  class_names: tuple[str, ...]
  splits: Sequence[str]
  open: Callable[[str], Examples]
  fitted: bool = False

  def train_and_test(
    self, train: str = '', test: str = ''
  ) -> tuple[Examples, Examples | None]:
    """Returns the examples to train on and those to test on.

    Args:
      train: The split to train on; empty for `train`.
      test: The split to test on; empty for the one of `find_test`.

    Returns:
      Both; None for the tests if the set has only one split, `train`.

    Raises:
      ConfigError: If there is no such split, or one has no labels, or an image
        is in both.
    """
    trained = self._labelled(train or 'train', 'data.train_split')
    if test:
      tested = self._labelled(test, 'data.test_split')
    elif set(self.splits) == {'train'}:
      return trained, None
    else:
      tested = self.find_test(self._remedy('data.test_split'))
    if trained.overlap(tested):
      raise ConfigError(
        f'{trained.name} and {tested.name} share images, and a test on images '
        'of the training says nothing: name two parts, such as train[:80%] and '
        'train[80%:], in data.train_split and data.test_split.'
      )
    return trained, tested

  def find_test(self, remedy: str) -> Examples:
    """Returns the examples of `test`, or of `validation` without a `test`.

    A split without labels counts as none: those of ImageNet's `test` are not
    published.

    Args:
      remedy: What to do if neither of these splits is there with labels.

    Raises:
      ConfigError: If neither is.
    """
    for split in ('test', 'validation'):
      if split in self.splits:
        examples = self._open(split, remedy)
        if examples.have_labels(remedy):
          return examples
    raise ConfigError(
      f'data set {self.name!r} has no split test or validation with labels, '
      f'only {", ".join(self.splits)}: {remedy}.'
    )

  def _labelled(self, split: str, field: str) -> Examples:
    remedy = self._remedy(field)
    examples = self._open(split, remedy)
    if not examples.have_labels(remedy):
      raise ConfigError(
        f'the images of {examples.name} have no labels: {remedy}.'
      )
    return examples

  def _remedy(self, field: str) -> str:
    return (
      f'set {field} to another of its splits ({", ".join(self.splits)}), or to '
      'a part of one, such as train[:80%]'
    )

  def _open(self, split: str, remedy: str) -> Examples:
    try:
      examples = self.open(split)
    except ConfigError:
      raise
    except Exception as error:  # TFDS raises many types.
      raise ConfigError(
        f'data set {self.name!r} has no split {split!r} ({one_line(error)}): '
        f'{remedy}.'
      ) from error
    if not len(examples):
      raise ConfigError(f'{examples.name} has no images: {remedy}.')
    return examples

  def same_classes(self, other: 'Prepared') -> bool:
    """Returns whether both data sets have the same classes.

    A data set may give its classes no names: TFDS then calls them by number,
    and only the number of classes is compared.
    """
    ours, theirs = self.class_names, other.class_names
    numbers = tuple(map(str, range(len(ours))))
    if ours == theirs:
      return True
    # The same names in another order are other labels, also where they are
    # numbers, such as those of folders, which text sorts as 0, 1, 10, 2.
    return (
      len(ours) == len(theirs)
      and numbers in (ours, theirs)
      and sorted(ours) != sorted(theirs)
    )


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Some examples of splits, as a source.

  Attributes:
    splits: All examples, by split.
    places: The split of each example, and its position there.
  """

  splits: Mapping[str, Source]
  places: Sequence[tuple[str, int]]

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, position):
    """Reads an example."""
    split, number = self.places[position]
    return self.splits[split][number]

  def known_label(self, position: int) -> int:
    """See `known_label`."""
    split, number = self.places[position]
    return known_label(self.splits[split], number)


def may_be_back(error: BaseException) -> TypeGuard[OSError]:
  """Returns whether a network file system is away, perhaps for a moment."""
  return isinstance(error, OSError) and error.errno in _AWAY


def known_label(source: Source, number: int) -> int:
  """Returns a label for which a source reads no file.

  Args:
    source: Examples with random access.
    number: The position of one of them.

  Returns:
    The label; -1 if only the example itself tells it.
  """
  known = getattr(source, 'known_label', None)
  return known(number) if known else -1


def used(splits: Iterable[str], wanted: Sequence[str]) -> list[str]:
  """Returns the splits that a run may read.

  Args:
    splits: Names of all of them.
    wanted: The splits, or parts of some such as `raw[:80%]`, that are asked for
      to train and to test on; '' for the usual ones.

  >>> used(['train', 'raw', 'test', 'more'], ['train+raw[:80%]', ''])
  ['train', 'raw', 'test']
  >>> used(['train', 'test', 'validation'], ['', 'validation'])
  ['train', 'validation']
  """
  train, test = wanted or ('', '')
  usual = (() if train else ('train',)) + (
    () if test else ('test', 'validation')
  )
  return [s for s in splits if s in usual or s in train or s in test]


def opener(
  name: str, splits: Mapping[str, Source], remedy: str
) -> Callable[[str], Examples]:
  """Returns what opens the splits of a set, and parts of them.

  Args:
    name: Name of the set, for messages.
    splits: The examples of each split, see `Examples.source`.
    remedy: See `Examples.remedy`.
  """

  def open_split(split: str) -> Examples:
    title = f'{name}, split {split}'
    if split in splits:
      parts = [Part(f'{name}, {split}', 0, len(splits[split]))]
      return Examples(title, splits[split], parts, remedy)
    ranges = _ranges({key: len(whole) for key, whole in splits.items()}, split)
    places = [(key, number) for key, chosen in ranges for number in chosen]
    parts = [Part(f'{name}, {k}', c.start, len(c)) for k, c in ranges]
    return Examples(title, Chosen(splits, places), parts, remedy)

  return open_split


def _ranges(sizes: Mapping[str, int], spec: str) -> list[tuple[str, range]]:
  """Returns what a text such as train[:80%] means, as TFDS reads it."""
  import tensorflow_datasets as tfds  # Slow to import, and seldom needed.

  infos = {
    split: types.SimpleNamespace(num_examples=size)
    for split, size in sizes.items()
  }
  read = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
  return [
    (part.splitname, range(sizes[part.splitname])[part.from_ : part.to])
    for part in read
  ]
