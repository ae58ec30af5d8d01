"""Image files in folders: `train/CLASS/*` and `test/CLASS/*`, or `CLASS/*`.

TFDS has a reader of such folders, but it needs TensorFlow, knows three endings,
and takes every other file for an image of none.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
from typing import NoReturn

import numpy as np

from resist_jax import folders
from resist_jax.data import headers
from resist_jax.data.prepared import (
  Examples,
  Part,
  Prepared,
  may_be_back,
  opener,
  used,
)
from resist_jax.data.streaming import THREADS, Records, StreamedImages
from resist_jax.errors import ConfigError, one_line

# Other names of the same split.
_SPLITS = {'val': 'validation', 'valid': 'validation', 'dev': 'validation'}
_SPLITS |= {'training': 'train', 'testing': 'test'}
_USUAL = ('train', 'test', 'validation')  # Whatever is in them.
# A word that names a split, alone or within a name such as `seg_train`.
_LIKE_SPLITS = re.compile(
  r'(?:^|[\W_])(train|training|test|testing|val|valid|validation|dev|pred)'
  r'\d*(?:[\W_]|$)',
  re.IGNORECASE,
)
# What desktops, archives, file servers and file systems leave beside files.
_LITTER = (
  'thumbs.db', 'desktop.ini', '__macosx', '@eadir', '#recycle', 'lost+found',
  '$recycle.bin', 'system volume information',
)  # fmt: skip
# The data of a run whose rounds have begun must stay as they were.
_OTHER = 'mend it, remove it, or name another'
_AGAIN = 'run the same command again, in another workdir if it had begun'


@dataclasses.dataclass(frozen=True)
class Files:
  """The image files of a split; a file is read when it is indexed.

  Attributes:
    root: The folder that they lie in.
    paths: Their paths below it.
    labels: Their labels; -1 for none.
    entered: Each folder that holds them, by where it really is.
  """

  root: pathlib.Path
  paths: Sequence[str]
  labels: Sequence[int]
  entered: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, number):
    """Reads a file, without decoding it."""
    path = self.paths[number]
    content = (self.root / path).read_bytes()
    return {
      'image': content,
      'label': self.labels[number],
      'file_name': str(self.root / path),
    }

  def known_label(self, number: int) -> int:
    """Returns a label without reading the file."""
    return self.labels[number]


def find(
  name: str, class_names: Sequence[str] = (), wanted: Sequence[str] = ()
) -> Prepared:
  """Finds the images of a folder.

  Args:
    name: Path of the folder, in which `~` and `$NAME` are filled in. If it has
      a folder `train` or `Training` of folders, its folders are splits, of
      which `val` is another name for `validation`; otherwise its folders are
      the classes of the only split, `train`. Classes are sorted by name.
    class_names: The classes of the set that this one is a test for; not all of
      them need be here. Empty for a set to train on.
    wanted: Splits, or parts of some, that are asked for by name.

  Returns:
    The data set. Its images have one channel if all of them are grey, three
    otherwise.

  Raises:
    ConfigError: If there is no such folder, or no classes are in it, or a file
      in it is no image.
  """
  root = folders.resolve(name, 'a data set')
  try:
    there = root.is_dir()
  except OSError as error:
    _refuse(error)
  if not there:
    raise ConfigError(
      f'the data set is {name!r}, but there is no such folder: name one of '
      'images, a file *.npz, or a set of the TFDS catalog.'
    )
  places = _splits(root, asked=any(wanted[1:]))
  names = tuple(class_names) or _classes(name, places['train'])
  read = _read(places, wanted)
  splits = {
    split: _files(name, split, place, names, split in read)
    for split, place in places.items()
  }
  # Images without labels are neither trained on nor tested.
  labelled = [s for s in read if max(splits[s].labels, default=0) >= 0] or read
  _check_apart({split: splits[split] for split in labelled}, *wanted)
  forms = [form for split in labelled for form in _headers(splits[split])]
  return Prepared(
    name,
    root.resolve().name,
    headers.common_shape(forms),
    names,
    tuple(splits),
    opener(name, splits, _AGAIN),
    fitted=True,
  )


def _read(
  places: Mapping[str, pathlib.Path], wanted: Sequence[str]
) -> list[str]:
  """Returns the splits that are read: `validation` only for want of a test."""
  read = used(places, wanted)
  asked = ''.join(wanted)
  if 'test' in read and any(map(any, map(_below, _folders_in(places['test'])))):
    return [s for s in read if s != 'validation' or s in asked]
  return read


def _check_apart(
  splits: Mapping[str, Files], train: str = '', test: str = ''
) -> None:
  """Refuses a folder that is trained on under one name, and tested on as well.

  Args:
    splits: What is read.
    train: What is asked for to train on; empty for `train`.
    test: The same to test on.
  """
  trained = [split for split in splits if split in (train or 'train')]
  others = [split for split in splits if split not in trained]
  tested = [split for split in others if split in test] if test else others[:1]
  for one, other in itertools.product(trained, tested):
    _check_once(splits[one].entered, splits[other].entered)


def _check_once(
  ours: Mapping[str, pathlib.Path], theirs: Mapping[str, pathlib.Path]
) -> None:
  """Refuses a folder that links make two of, with other labels or uses."""
  for place in sorted(ours.keys() & theirs.keys()):
    raise ConfigError(
      f'{ours[place]} and {theirs[place]} are one folder, {place}: remove the '
      'link that makes two of it.'
    )


def _folders_in(place: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders in a folder, sorted by name, without hidden ones."""
  try:
    inside = sorted(place.iterdir())
    found = [path for path in inside if _shown(path, True)]
    lost = [path for path in inside if path.is_symlink() and not path.exists()]
  except OSError as error:
    _refuse(error)
  for path in lost:
    if _shown(path, False):
      raise ConfigError(
        f'{path} is a link to {os.readlink(path)}, which is not there: bring '
        'that back, or remove the link.'
      )
  return found


def _shown(path: pathlib.Path, folder: bool) -> bool:
  hidden = path.name.startswith('.') or path.name.lower() in _LITTER
  return not hidden and path.is_dir() == folder


def _splits(root: pathlib.Path, asked: bool) -> dict[str, pathlib.Path]:
  """Returns the folder of each split; `asked` if a test is named."""
  inside = {path: _split_name(path) for path in _folders_in(root)}
  classes = {
    below.name
    for path, split in inside.items()
    if split == 'train'
    for below in _folders_in(path)
  }
  if not classes:
    like = {path.name: _LIKE_SPLITS.search(path.name) for path in inside}
    words = {match[1].lower() for match in like.values() if match}
    # Classes may have one such word in common, such as steam_train.
    if all(like.values()) and len(words) > 1:
      raise ConfigError(
        f'{root} has the folders {", ".join(like)}, which look like splits: '
        'move the images to train/CLASS/* and test/CLASS/*.'
      )
    return {'train': root}
  found: dict[str, pathlib.Path] = {}
  for path, split in inside.items():
    usual = split in _USUAL
    if not usual and not any(os.path.isdir(path / name) for name in classes):
      continue
    if split in found:
      raise ConfigError(
        f'{found[split]} and {path} are both the split {split}: move the '
        'images of one into the other, or rename it.'
      )
    found[split] = path
  if found.keys() == {'train'} and not asked:
    _check_beside(found['train'], inside)
  return found


def _check_beside(train: pathlib.Path, inside: Iterable[pathlib.Path]) -> None:
  """Refuses a class that is called as the split, and would be the only one."""
  for path in inside:
    if path == train or not _looks_like_class(path):
      continue
    raise ConfigError(
      f'{train} holds folders, so it is the split of that name, but {path} '
      'beside it holds images: move all classes to train/CLASS/*, or that '
      'folder out of the data set.'
    )


def _looks_like_class(path: pathlib.Path) -> bool:
  """Returns whether most files of a folder are images of no other purpose."""
  if _LIKE_SPLITS.search(path.name):
    return False
  try:
    files = [x for x in path.iterdir() if _shown(x, False)][:8]
    return sum(map(_is_image, files)) > len(files) / 2
  except OSError:
    return False


def _split_name(path: pathlib.Path) -> str:
  """Returns the split that a folder of this name is."""
  lower = path.name.lower()
  found = _SPLITS.get(lower, lower)
  return found if found in _USUAL else path.name


def _classes(name: str, train: pathlib.Path) -> tuple[str, ...]:
  """Returns the names of the classes: folders that hold a file."""
  names = [path.name for path in _folders_in(train) if any(_below(path))]
  if len(names) < 2:
    found = f'only {names[0]}' if names else 'none'
    raise ConfigError(
      f'the data set {name!r} needs a folder for each of at least two classes, '
      f'but {train} has {found}: move the images to train/CLASS/* and '
      'test/CLASS/*, or to CLASS/*.'
    )
  return tuple(names)


def _files(
  name: str,
  split: str,
  place: pathlib.Path,
  names: tuple[str, ...],
  used: bool,
) -> Files:
  """Lists the files of a split, those of all classes mixed.

  Other classes are an error where the split is used, and left out elsewhere.
  """
  inside, labels = _folders_in(place), {name: i for i, name in enumerate(names)}
  unknown = [
    path.name
    for path in inside
    if used and path.name not in labels and any(_below(path))
  ]
  found: dict[str, int] = {}
  entered: dict[str, pathlib.Path] = {}
  for label in inside:
    if label.name not in labels:
      continue
    here: dict[str, pathlib.Path] = {}
    for path in _below(label, here):
      found[str(path.relative_to(place))] = labels[label.name]
    if used:
      _check_once(entered, here)
    entered |= here
  if unknown:
    raise ConfigError(
      f'the data set is {name!r}, whose split {split} has the class '
      f'{unknown[0]!r}, which the training set does not have: rename '
      f'{place / unknown[0]}, or remove it.'
    )
  if not inside:  # As competitions give out their tests.
    files = _below(place, entered)
    found = {str(path.relative_to(place)): -1 for path in files}
  paths = sorted(found, key=_shuffled)
  return Files(place, paths, [found[path] for path in paths], entered)


def _shuffled(path: str) -> bytes:
  """Orders files at random, the same on every machine.

  A part such as train[:80%] then has images of all classes.
  """
  return hashlib.sha256(os.fsencode(path)).digest()


def _below(
  place: pathlib.Path, entered: dict[str, pathlib.Path] | None = None
) -> Iterator[pathlib.Path]:
  """Yields the files in a folder and in those below it, but hidden ones.

  Args:
    place: The folder. A link to a folder is followed, unless it leads upwards
      or to a folder that was entered before.
    entered: Takes up each folder, by where it really is; None if nobody asks.
  """
  above = {os.path.realpath(parent) for parent in place.absolute().parents}
  return _walk(place, above, {} if entered is None else entered)


def _walk(
  place: pathlib.Path, above: set[str], entered: dict[str, pathlib.Path]
) -> Iterator[pathlib.Path]:
  real = os.path.realpath(place)
  if real in above or real in entered:
    return
  entered[real] = place
  above = above.union(map(str, pathlib.Path(real).parents))
  try:
    inside = [*place.iterdir()] if place.is_dir() else []
    files = [path for path in inside if _shown(path, False)]
    below = [path for path in inside if _shown(path, True)]
    # By the same name on every machine: a link comes after what it leads to.
    below.sort(key=lambda path: (path.is_symlink(), path))
  except OSError as error:
    _refuse(error)
  yield from files
  for path in below:
    yield from _walk(path, above, entered)


def listed_files(paths: Sequence[str]) -> list[str]:
  """Returns the files that paths name, with those in folders.

  Args:
    paths: Files and folders, in which `~` and `$NAME` are filled in.

  Returns:
    Paths of files; those of a folder are sorted.

  Raises:
    ConfigError: If a folder holds none.
  """
  found = []
  for path in paths:
    place = folders.resolve(path, 'a file', is_text=False)
    try:
      inside = sorted(_below(place)) if place.is_dir() else [place]
    except OSError as error:
      _refuse(error)
    if not inside:
      raise ConfigError(f'{place} holds no file: name images, or their folder.')
    found += map(str, inside)
  return found


def read_files(
  paths: Sequence[str], image_shape: tuple[int, ...], resized: bool
) -> np.ndarray:
  """Reads image files for a trained network.

  Args:
    paths: The files, as `listed_files` returns them.
    image_shape: `(H, W, C)` of the images that it was trained on.
    resized: Whether these were cut at the centre and resized to that shape; an
      image of another shape is in any case.

  Returns:
    `uint8[N, H, W, C]`.

  Raises:
    ConfigError: If a file is not there, or no image.
  """
  height, width, channels = image_shape
  files = Files(pathlib.Path(), paths, [0] * len(paths))
  parts = [Part('the disk', 0, len(paths))]
  records = Records('the files', Examples('', files, parts, _OTHER), 1)
  numbers = np.arange(len(paths), dtype=np.int32)
  images = np.zeros((len(paths), *image_shape), np.uint8)
  for i, path in enumerate(paths):
    fits = _header(pathlib.Path(path)).size == (width, height)
    shape = height, width, channels
    kept = StreamedImages.kept if resized else 1.0
    reader = StreamedImages(
      records, numbers, shape, resized or not fits, kept, channels == 4
    )
    images[i], _ = reader.example(i)
  return images


def _refuse(error: OSError) -> NoReturn:
  if may_be_back(error):
    raise error
  raise ConfigError(
    f'{error.filename} cannot be read ({error.strerror}): let this user read '
    'it, or remove it.'
  ) from error


def _headers(files: Files) -> list[headers.Header]:
  """Reads the beginning of every file, so that none is another thing."""
  with ThreadPoolExecutor(THREADS) as pool:
    return list(pool.map(_header, (files.root / path for path in files.paths)))


def _is_image(path: pathlib.Path) -> bool:
  try:
    _header(path)
  except ConfigError:
    return False
  return True


def _header(path: pathlib.Path) -> headers.Header:
  try:
    return headers.read(path)
  except Exception as error:  # Each format raises types of its own.
    if may_be_back(error):
      raise
    raise ConfigError(
      f'{path} is no image that can be read ({one_line(error)}): {_OTHER}.'
    ) from error
