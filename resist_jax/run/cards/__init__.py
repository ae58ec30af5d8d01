"""Experiment cards: each says its paper, its cost and its exact command.

A card is a Python file with a function `get_config`, which takes the words
behind the colon of `--config=NAME:WORDS` and returns a config. The files of
this package are found by name, all others by path.
"""

import ast
import difflib
import os
import pathlib

from resist_jax.errors import ConfigError

FOLDER = pathlib.Path(__file__).parent
DEFAULT = 'digits'


def names() -> list[str]:
  """Returns the names of the cards that ship with the package."""
  stems = {path.stem for path in FOLDER.glob('*.py')}
  return sorted(stems - {'__init__'})


def about(name: str) -> str:
  """Returns the first line of a card's docstring."""
  tree = ast.parse((FOLDER / f'{name}.py').read_text())
  return (ast.get_docstring(tree) or '').split('\n')[0]


def locate(card: str) -> str:
  """Returns the path of a card, with the words behind its colon.

  Args:
    card: `NAME`, `NAME:WORDS`, `FILE.py` or `FILE.py:WORDS`.

  Returns:
    `FILE.py` or `FILE.py:WORDS`, where the file exists.

  Raises:
    ConfigError: If there is neither a card of this name nor such a file.

  >>> locate('cifar10:s8').split('/')[-1]
  'cifar10.py:s8'
  """
  name, colon, words = card.partition(':')
  if name in names():
    return f'{FOLDER / name}.py{colon}{words}'
  if os.path.isfile(name):
    return card
  stem = name.removesuffix('.py').split('/')[-1]
  nearest = difflib.get_close_matches(stem, names(), 1)
  raise ConfigError(
    f'--config={card} is neither a card nor a file. '
    + (f'Did you mean --config={nearest[0]}? ' if nearest else '')
    + f'The cards are {", ".join(names())}.'
  )
