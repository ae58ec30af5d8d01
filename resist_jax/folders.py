"""Folders and files: as people name them, and replaced whole or not at all.

People name them with ~ and $HOME, and never as a URL.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import ctypes
import errno
import os
import pathlib
import re
import shutil
import tempfile

from resist_jax.errors import ConfigError

_VARIABLE = re.compile(r'\$(\w+|\{[^}]*\})', re.ASCII)  # As `expandvars` does.
# A `Path` drops the second slash, and one at the end. A letter is no scheme.
_URL = re.compile(r'[a-z][a-z0-9+.-]+:(/|$)', re.IGNORECASE)
# Linux constants: paths start in the working directory; swap two paths.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def resolve(
  name: str | os.PathLike[str], what: str, is_text: bool = True
) -> pathlib.Path:
  """Returns the local folder or file that somebody means.

  Args:
    name: A path that may begin with `~` and hold `$VAR` or `${VAR}`. One that
      exists as it is written needs no such variable.
    what: What the error message calls the folder.
    is_text: Whether the path must be UTF-8, as that of what a run writes.

  Returns:
    The path without these; the folder need not exist.

  Raises:
    ConfigError: If no local folder has that name.

  >>> resolve('~/runs', 'workdir') == pathlib.Path.home() / 'runs'
  True
  """
  try:
    given = os.fsdecode(name)
  except TypeError as error:
    raise ConfigError(
      f'{what} is {name!r}, which is no path: name a local one.'
    ) from error
  unset = unset_variable(given)
  literal = bool(unset) and os.path.lexists(given)  # Such as a folder `a$b`.
  if unset and not literal:
    raise ConfigError(
      f'{what} is {given!r}, but {unset} is not set: set it, or write the '
      'folder out.'
    )
  path = given
  if not literal:
    path = os.path.expanduser(os.path.expandvars(given))
  if not path.strip():
    raise ConfigError(f'{what} is {given!r}: name a local path.')
  folder = pathlib.Path(path)
  problem = _problem(str(folder), is_text)
  if problem:
    raise ConfigError(f'{what} is {given!r}, {problem}')
  return folder


def unset_variable(path: str) -> str:
  """Returns the first `$VAR` or `${VAR}` of a path that is not set, else ''."""
  names = _VARIABLE.findall(path)
  unset = [name for name in names if not os.environ.get(name.strip('{}'))]
  return f'${unset[0]}' if unset else ''


def argument(
  text: str, check: Callable[[pathlib.Path, str], None] | None = None
) -> pathlib.Path:
  """Returns the path that an argument of a command names; see `resolve`.

  Args:
    text: The argument.
    check: Gets the path, and what messages call it; None for no check.

  Raises:
    ArgumentTypeError: If it names none; the message says why.
  """
  try:
    path = resolve(text, 'it')
    if check:
      check(path, 'the path')
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from error
  return path


def output_file(text: str) -> pathlib.Path:
  """Returns the file that a command will write; see `argument`.

  Args:
    text: The argument.

  Raises:
    ArgumentTypeError: If no such file can be written; the message says why.
  """
  return argument(text, check_file)


def output_folder(text: str) -> pathlib.Path:
  """Returns the folder that a command will write to; see `argument`.

  Args:
    text: The argument.

  Raises:
    ArgumentTypeError: If nothing can be written there; the message says why.
  """
  return argument(text, check_writable)


def _problem(path: str, is_text: bool) -> str:
  """Says why a path cannot be a local folder, and what to do; '' if it can."""
  if _URL.match(path):
    return (
      'a URL, but only local files can be appended to and locked: mount it '
      'and name the mounted folder, or name another.'
    )
  if path.startswith('~'):
    return 'but there is no such home: write the folder out.'
  try:
    path.encode('utf-8')
  except UnicodeEncodeError:
    if is_text:
      return 'which is not UTF-8: rename the folder, or name another.'
  if '\0' in path:
    return 'which holds a zero byte: name another.'
  try:
    os.lstat(path)
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      return 'which is too long for a path: choose a shorter one.'
  return ''


def check_writable(folder: pathlib.Path, what: str) -> None:
  """Checks that a folder can be created and written to; creates nothing.

  Args:
    folder: The folder, which need not exist.
    what: What the error message calls the folder.

  Raises:
    ConfigError: If it cannot.
  """
  existing = folder
  while not os.path.exists(existing) and existing != existing.parent:
    existing = existing.parent
  if not existing.is_dir():
    raise ConfigError(
      f'{what} {folder} cannot be created: {existing} is not a folder; choose '
      'another.'
    )
  try:
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise ConfigError(
      f'{what} {folder} cannot be written ({error.strerror}): choose another.'
    ) from error


def check_file(path: pathlib.Path, what: str) -> None:
  """Checks that a file can be created or replaced; creates nothing.

  Args:
    path: The file, whose folder need not exist.
    what: What the error message calls it.

  Raises:
    ConfigError: If it cannot.
  """
  if path.is_dir():
    raise ConfigError(f'{what} is {path}, which is a folder: name a file.')
  if path.exists() and not path.is_file():  # Such as /dev/stdout.
    return
  check_writable(path.parent, what)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Replaces a file or a folder, whatever stops the process meanwhile.

  At any time the path leads to what was there before, or to all of the new.

  Args:
    path: What to replace; it need not exist. A link stays one: what it leads to
      is replaced. A file keeps its permissions. A device such as `/dev/stdout`
      is written to.

  Yields:
    The path to write a file or a folder to, which does not exist.
  """
  if path.exists() and not (path.is_file() or path.is_dir()):
    yield path
    return
  place = pathlib.Path(os.path.realpath(path))
  part = place.with_name(f'.{place.name}.part')
  _remove(part)  # A process that was killed may have left it.
  try:
    yield part
    if place.is_file() and part.is_file():
      shutil.copymode(place, part)
    _flush_inside(part)  # A power loss must not leave the name of nothing.
    put(part, place)
    _flush_one(place.parent)
  finally:
    _remove(part)


def flush(path: pathlib.Path) -> None:
  """Writes a file, or all of a folder, to the disk, and so its name.

  Args:
    path: What must survive a power loss.
  """
  _flush_inside(path)
  _flush_one(path.parent)


def _flush_inside(path: pathlib.Path) -> None:
  for inner in path.rglob('*') if path.is_dir() else ():
    _flush_one(inner)
  _flush_one(path)


def _flush_one(path: pathlib.Path) -> None:
  with contextlib.suppress(OSError):  # Some file systems cannot.
    number = os.open(path, os.O_RDONLY)
    try:
      os.fsync(number)
    finally:
      os.close(number)


def put(part: pathlib.Path, path: pathlib.Path) -> None:
  """Puts a file or a folder in the place of another one, if there is one.

  Args:
    part: The new one, which is whole, on the same file system.
    path: The place.
  """
  if not (path.is_dir() and part.is_dir()):
    part.replace(path)
  elif _exchange(part, path):
    _remove(part)
  else:  # Between these steps there is nothing, and `old` is whole.
    old = path.with_name(f'.{path.name}.old')
    _remove(old)
    path.rename(old)
    part.rename(path)
    _remove(old)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Swaps two paths in one step; False where the system cannot."""
  try:
    rename = ctypes.CDLL(None).renameat2
  except (AttributeError, OSError, TypeError):
    return False
  paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
  return rename(*paths, _RENAME_EXCHANGE) == 0


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)
