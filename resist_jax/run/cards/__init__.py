"""Experiment cards: each says its paper, its cost and its exact command.

A card is a Python file with a function `get_config`, which takes the words
behind the colon of `--config=NAME:WORDS` and returns a config. The files of
this package are found by name, all others by path.
"""

import ast
from collections.abc import Callable, Iterator
import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import types
from typing import Any

import ml_collections

from resist_jax import folders
from resist_jax.errors import FOREIGN, ConfigError, did_you_mean, one_line

FOLDER = pathlib.Path(__file__).parent
DEFAULT = 'digits'


def names() -> list[str]:
  """Returns the names of the cards that ship with the package."""
  stems = {path.stem for path in FOLDER.glob('*.py')}
  return sorted(stems - {'__init__'})


def about(name: str) -> str:
  """Returns the first line of a card's docstring, and the words it takes."""
  tree = ast.parse((FOLDER / f'{name}.py').read_text())
  text = ast.get_docstring(tree) or ''
  first = text.splitlines()[0]
  found = re.search(r'^Words: .*(\n +.*)*', text, re.MULTILINE)
  return f'{first} {" ".join(found[0].split())}.' if found else first


@contextlib.contextmanager
def _same_folder() -> Iterator[None]:
  """Goes back to the working directory if a card leaves it.

  Relative paths keep their meaning then.
  """
  before = _working_directory()
  try:
    yield
  finally:
    if before and _working_directory() != before:
      os.chdir(before)


def _working_directory() -> str:
  try:
    return os.getcwd()
  except OSError:  # It was removed; absolute paths still work.
    return ''


def load(card: str) -> ml_collections.ConfigDict:
  """Returns the config of a card.

  Args:
    card: `NAME`, `NAME:WORDS`, `FILE.py` or `FILE.py:WORDS`.

  Returns:
    The config, which `checks.validate` has not seen yet.

  Raises:
    ConfigError: If there is no such card, or it fails.

  >>> load('cifar10:s8').num_workers
  8
  """
  name, colon, words = card.partition(':')
  path = folders.resolve(name, '--config') if name else pathlib.Path()
  if name not in names() and not path.is_file():
    stem = name.split('/')[-1].removesuffix('.py')
    raise ConfigError(
      f'--config={card} is neither a card nor a file. '
      f'{did_you_mean(stem, names(), "--config={}")}'
      f'The cards are {", ".join(names())}.'
    )
  try:
    with _same_folder():
      if name in names():
        module = importlib.import_module(f'{__name__}.{name}')
      else:
        module = _import(path)
      config = module.get_config(*([words] if colon else []))
  except FOREIGN as error:  # A card is a program: it can raise anything.
    kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
    text = ' '.join(f'{kind}{error}'.split())
    raise ConfigError(f'--config={card} cannot be loaded: {text}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f'--config={card} returns a {type(config).__name__}, not a ConfigDict: '
      'begin with resist_jax.run.config.get_config().'
    )
  if isinstance(config, ml_collections.FrozenConfigDict):
    return config.as_configdict()  # Flags set its fields.
  return config


def function(name: str) -> Callable[..., Any]:
  """Returns a function that a config names.

  Args:
    name: `MODULE:FUNCTION` or `FILE.py:FUNCTION`.

  Raises:
    ConfigError: If there is no such function.
  """
  place, _, attribute = name.rpartition(':')
  try:
    if place.endswith('.py'):
      module = _import(folders.resolve(place, 'the file'))
    else:
      module = importlib.import_module(place)
  except FOREIGN as error:
    raise ConfigError(
      f'{place!r} of {name!r} cannot be imported ({one_line(error)}): name a '
      'module, or the path of a file *.py.'
    ) from error
  found = getattr(module, attribute, None)
  if callable(found):
    return found
  callables = [n for n, value in vars(module).items() if callable(value)]
  hint = did_you_mean(attribute, callables, f'{place}:{{}}').rstrip()
  raise ConfigError(
    f'{place} has no function {attribute!r}. {hint or "Name another."}'
  )


def _import(path: pathlib.Path) -> types.ModuleType:
  """Imports a file, whatever its name."""
  name = '_card'
  loader = importlib.machinery.SourceFileLoader(name, str(path))
  spec = importlib.util.spec_from_loader(name, loader)
  assert spec
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # Dataclasses look for their module there.
  loader.exec_module(module)
  return module
