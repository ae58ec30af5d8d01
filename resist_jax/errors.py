"""Errors that a person can mend; the message of each is one line."""


class ConfigError(ValueError):
  """A mistake in the user's input; the message is one line with the remedy."""


class NonFiniteError(ArithmeticError):
  """Training diverged: a loss, a parameter or an output is not finite."""


class WorkdirLostError(RuntimeError):
  """A run writes to files that are no longer in its workdir."""


def one_line(error: Exception) -> str:
  r"""Returns the type of an error and the beginning of its message.

  >>> one_line(ValueError('a\n  b'))
  'ValueError: a b'
  """
  message = ' '.join(str(error).split())[:200]
  kind = type(error).__name__
  return f'{kind}: {message}' if message else kind
