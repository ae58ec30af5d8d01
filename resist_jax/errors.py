"""Errors that a person can mend; the message of each is one line."""

import sys


class ConfigError(ValueError):
  """A mistake in the user's input; the message is one line with the remedy."""


class NonFiniteError(ArithmeticError):
  """Training diverged: a loss, a parameter or an output is not finite."""


class WorkdirLostError(RuntimeError):
  """A run writes to files that are no longer in its workdir."""


def message(error: Exception) -> str:
  r"""Returns what an error says, as one line.

  >>> message(ValueError('a\n  b'))
  'a b'
  """
  return ' '.join(str(error).split())


def refused(error: Exception) -> int:
  """Prints what an error says, and returns the exit code for bad input."""
  print('error:', message(error), file=sys.stderr)
  return 2


def one_line(error: Exception) -> str:
  r"""Returns the type of an error and the beginning of its message.

  >>> one_line(ValueError('a\n  b'))
  'ValueError: a b'
  """
  said = message(error)[:200]
  kind = type(error).__name__
  return f'{kind}: {said}' if said else kind
