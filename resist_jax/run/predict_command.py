"""The command that asks a finished run for the likeliest classes of files."""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import csv
import io
import pathlib
import sys
from typing import IO

import numpy as np

from resist_jax import data, folders
from resist_jax.errors import ConfigError, Parser, exit_code
from resist_jax.run import trained
from resist_jax.run.export import Predictor

_USUAL = 5  # Classes that a row names.
_AT_ONCE = 64  # Files that are read and classified together.


def main(args: Sequence[str] | None = None) -> int:
  """Classifies files, and writes a row of CSV for each.

  Args:
    args: The command line; that of this process if None.

  Returns:
    The exit code, see `exit_code`.
  """
  parser = Parser(
    'python -m resist_jax.predict',
    description='Writes the likeliest classes of image files as CSV.',
  )
  parser.add_argument('run', metavar='RUN', help='workdir of a finished run')
  parser.add_argument(
    'files', metavar='FILE', nargs='+', help='an image, or a folder of images'
  )
  parser.add_argument(
    '--top', type=int, help='classes for a file (default: 5, or all if fewer)'
  )
  parser.add_argument('--out', help='file to write (default: to print)')
  options = parser.parse_args(args)
  return exit_code(lambda: _predict(options))


def _predict(options: argparse.Namespace) -> None:
  if options.out is not None:
    _check_out(folders.resolve(options.out, '--out'))
  model = trained.classifier(options.run)
  paths = data.listed_files(options.files)
  top = _top(options.top, len(model.class_names))
  found = rows(model, paths, top)
  first = next(found)  # The header follows when files can be read.
  numbers = range(1, top + 1)
  pairs = [(f'class_{i}', f'probability_{i}') for i in numbers]
  with _opened(options.out) as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['file', *(name for pair in pairs for name in pair)])
    writer.writerow(first)
    writer.writerows(found)


def _top(asked: int | None, known: int) -> int:
  """Returns how many classes a row names."""
  if asked is not None and not 1 <= asked <= known:
    raise ConfigError(
      f'--top is {asked}, but the network has {known} classes: give a number '
      f'from 1 to {known}.'
    )
  return min(asked or _USUAL, known)


def _check_out(path: pathlib.Path) -> None:
  folders.check_file(path, '--out')
  if not path.parent.is_dir():
    raise ConfigError(
      f'--out is {path}, whose folder does not exist: make it first.'
    )


@contextlib.contextmanager
def _opened(out: str | None) -> Iterator[IO[str]]:
  """Opens what prints, or a file that replaces `out` when it is whole."""
  odd = 'surrogateescape'  # Names of files may be no text.
  if out is None:
    if isinstance(sys.stdout, io.TextIOWrapper):
      sys.stdout.reconfigure(errors=odd)
    yield sys.stdout
    return
  path = folders.resolve(out, '--out')
  with (
    folders.replacing(path) as part,
    part.open('w', encoding='utf-8', errors=odd, newline='') as file,
  ):
    yield file


def rows(
  model: Predictor, paths: Sequence[str], top: int
) -> Iterator[list[str]]:
  """Yields a row for each file: its path, then names and probabilities.

  Args:
    model: The network.
    paths: Image files.
    top: Classes for each file, the likeliest first.

  Raises:
    ConfigError: If a file is not there, or no image.
  """
  for start in range(0, len(paths), _AT_ONCE):
    some = paths[start : start + _AT_ONCE]
    images = data.read_files(some, model.image_shape, model.resized)
    filled = np.zeros((min(_AT_ONCE, len(paths)), *images.shape[1:]), np.uint8)
    filled[: len(images)] = images  # So that one program is enough.
    shares = np.asarray(model(filled))[: len(images)]
    order = np.argsort(-shares, axis=-1, kind='stable')[:, :top]
    for path, classes, share in zip(some, order, shares, strict=True):
      pairs = ((model.class_names[c], f'{share[c]:.6f}') for c in classes)
      yield [path, *(text for pair in pairs for text in pair)]
