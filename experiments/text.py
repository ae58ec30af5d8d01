"""Text as bytes: the sources of Python's standard library, a file, or a set."""

import pathlib
import sysconfig
from typing import Any

import numpy as np

from resist_jax import folders
from resist_jax.errors import ConfigError

SOURCES = 'python'
_TESTED = 10  # One in so many files, or parts of a file, is for tests.


def load(name: str, data_dir: str = '') -> tuple[np.ndarray, np.ndarray]:
  """Reads a text.

  Args:
    name: `python` for the sources of the standard library, `tfds:NAME` for the
      field `text` of a prepared TFDS set, or the path of a file.
    data_dir: Folder of prepared TFDS sets.

  Returns:
    `(train, test)`, `uint8[n]` each; nothing is in both.

  Raises:
    ConfigError: If it cannot be read, or is too short.
  """
  if name == SOURCES:
    parts = _sources()
  elif name.startswith('tfds:'):
    parts = _tfds(name.removeprefix('tfds:'), data_dir)
  else:
    parts = _file(folders.resolve(name, 'the text'))
  tested = range(0, len(parts), _TESTED)
  train = b''.join(part for i, part in enumerate(parts) if i not in tested)
  test = b''.join(parts[i] for i in tested)
  if min(len(train), len(test)) < 10_000:
    raise ConfigError(
      f'the text {name} has {len(train) + len(test)} bytes: give a text of at '
      'least 200,000.'
    )
  return np.frombuffer(train, np.uint8), np.frombuffer(test, np.uint8)


def _sources() -> list[bytes]:
  """Returns the modules of the standard library, without its packages."""
  folder = pathlib.Path(sysconfig.get_paths()['stdlib'])
  return [path.read_bytes() for path in sorted(folder.glob('*.py'))]


def _file(path: pathlib.Path) -> list[bytes]:
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ConfigError(
      f'the text {path} cannot be read ({error.strerror}): name a file, '
      f'tfds:NAME, or {SOURCES}.'
    ) from error
  size = -(-len(content) // 100) or 1
  return [content[i : i + size] for i in range(0, len(content), size)]


def _tfds(name: str, data_dir: str) -> list[bytes]:
  import tensorflow_datasets as tfds

  try:
    source: Any = tfds.data_source(
      name, split='train', data_dir=data_dir or None, download=False
    )
    return [example['text'] + b'\n' for example in source]
  except Exception as error:  # Each set and reader raises its own.
    reason = ' '.join(str(error).split())[:150]
    raise ConfigError(
      f'the text tfds:{name} cannot be read ({reason}): prepare it with TFDS '
      'in --data_dir, and name a set whose examples have a field text.'
    ) from error


def batch(
  text: np.ndarray, shape: tuple[int, ...], length: int, seed: list[int]
) -> np.ndarray:
  """Draws windows of a text.

  Args:
    text: `uint8[n]`.
    shape: How many windows, such as `(S, T, B)`.
    length: Bytes of a window, without the one after it.
    seed: Decides which.

  Returns:
    `int32[*shape, length + 1]`.
  """
  starts = np.random.default_rng(seed).integers(len(text) - length, size=shape)
  return text[starts[..., None] + np.arange(length + 1)].astype(np.int32)
