"""Folders as people name them: with ~ and $HOME, and never as a URL."""

import errno
import os
import pathlib
import re

from resist_jax.errors import ConfigError

_VARIABLE = re.compile(r'\$(\w+|\{[^}]*\})', re.ASCII)  # As `expandvars` does.
# A `Path` drops the second slash, and one at the end. A letter is no scheme.
_URL = re.compile(r'[a-z][a-z0-9+.-]+:(/|$)', re.IGNORECASE)


def resolve(name: str | os.PathLike[str], what: str) -> pathlib.Path:
  """Returns the local folder that somebody means.

  Args:
    name: A path that may begin with `~` and hold `$VAR` or `${VAR}`.
    what: What the error message calls the folder.

  Returns:
    The path without these; the folder need not exist.

  Raises:
    ConfigError: If no local folder has that name.

  >>> resolve('~/runs', 'workdir') == pathlib.Path.home() / 'runs'
  True
  """
  given = os.fspath(name)
  for variable in _VARIABLE.findall(given):
    if not os.environ.get(variable.strip('{}')):
      raise ConfigError(
        f'{what} is {given!r}, but ${variable} is not set: set it, or write '
        'the folder out.'
      )
  path = os.path.expanduser(os.path.expandvars(given))
  if not path.strip():
    raise ConfigError(f'{what} is {given!r}: name a local folder.')
  folder = pathlib.Path(path)
  problem = _problem(str(folder))
  if problem:
    raise ConfigError(f'{what} is {given!r}, {problem}')
  return folder


def _problem(path: str) -> str:
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
    return 'which is not UTF-8: rename the folder, or name another.'
  if '\0' in path:
    return 'which holds a zero byte: name another.'
  try:
    os.lstat(path)
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      return 'which is too long for a path: choose a shorter one.'
  return ''
