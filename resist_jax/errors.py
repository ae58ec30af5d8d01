"""Errors that a person can mend; the message of each is one line."""

import argparse
from collections.abc import Callable, Iterable, Sequence
import difflib
import numbers
import os
import signal
import sys
from typing import Any, NoReturn

# What code of somebody else's may raise: a script may end its process.
FOREIGN = (Exception, SystemExit)


class ConfigError(ValueError):
  """A mistake in the user's input; the message is one line with the remedy."""


class NonFiniteError(ArithmeticError):
  """Training diverged: a loss, a parameter or an output is not finite."""


class WorkdirLostError(RuntimeError):
  """A run writes to files that are no longer in its workdir."""


def nearest(name: str, names: Iterable[str]) -> list[str]:
  """Returns the names that somebody may have meant.

  Args:
    name: What was written.
    names: What there is.

  Returns:
    Up to three of those that contain it, else the one that is spelled most
    alike; none if none is near.

  >>> nearest('cosin', ['step', 'cosine'])
  ['cosine']
  >>> nearest('resnet50', ['PreActResNet18', 'PreActBottleneckResNet50'])
  ['PreActBottleneckResNet50']
  """
  spelled = {other.lower(): other for other in names}
  given = name.lower()
  if given in spelled:
    return [spelled[given]]
  longer = [other for other in spelled if len(given) > 2 and given in other]
  alike = difflib.get_close_matches(given, spelled, 1)
  found = sorted(longer, key=len) or alike
  return [spelled[other] for other in found[:3]]


def did_you_mean(name: str, names: Iterable[str], form: str = '{}') -> str:
  """Returns a question that names what is near, and a space; '' for nothing.

  Args:
    name: What was written.
    names: What there is.
    form: How one of them is written in the question.

  >>> did_you_mean('cosin', ['step', 'cosine'], '--schedule={}')
  'Did you mean --schedule=cosine? '
  """
  found = [form.format(other) for other in nearest(name, names)]
  return f'Did you mean {" or ".join(found)}? ' if found else ''


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
  """Raises a ConfigError if a value is none of those that there are.

  Args:
    name: What the message calls it.
    value: What was given.
    known: What there is.
  """
  if value not in known:
    raise ConfigError(
      f'{name} is {value!r}. {did_you_mean(str(value), known)}Use one of '
      f'{", ".join(known)}.'
    )


def message(error: BaseException) -> str:
  r"""Returns what an error says, as one line.

  >>> message(ValueError('a\n  b'))
  'a b'
  """
  return ' '.join(str(error).split())


def printable(text: str, length: int | None = None) -> str:
  r"""Returns text that a terminal shows as one line, whatever is in it.

  Args:
    text: Such as what another process has sent, or the name of a file.
    length: How many characters to keep; None for all.

  >>> printable('red \x1b[31m and\ntwo lines'), printable('too long', 6)
  ('red \\x1b[31m and two lines', 'too...')
  """
  shown = ''.join(
    c if c.isprintable() else ' ' if c.isspace() else ascii(c)[1:-1]
    for c in (text if length is None else text[: length + 1])
  )
  if length is None or len(shown) <= length:
    return shown
  return shown[: length - 3] + '...'


def refused(error: Exception) -> int:
  """Prints what an error says, and returns the exit code for bad input."""
  print('error:', message(error), file=sys.stderr)
  return 2


def exit_code(work: Callable[[], None]) -> int:
  """Does the work of a command, and tells in a line what ends it early.

  Args:
    work: Does it, and prints what was found.

  Returns:
    The exit code: 0, 2 if the input is bad, 1 if the memory does not suffice,
    or 130 after Ctrl-C.
  """
  try:
    work()
    sys.stdout.flush()
  except BrokenPipeError:  # As in `| head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ConfigError, OSError) as error:
    return refused(error)
  except KeyboardInterrupt:
    print('error: it was interrupted.', file=sys.stderr)
    return 128 + signal.SIGINT
  except Exception as error:
    line = out_of_memory(error, 'take a machine or a device with more.')
    if not line:
      raise
    print('error:', line, file=sys.stderr)
    return 1
  return 0


def out_of_memory(error: BaseException, remedy: str) -> str:
  """Returns what to do if the memory does not suffice.

  Args:
    error: Any error.
    remedy: What to do.

  Returns:
    A line; empty if the error is another one.
  """
  told = isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)
  if not told:
    return ''
  return f'the memory does not suffice ({one_line(error)}): {remedy}'


def one_line(error: BaseException) -> str:
  r"""Returns the type of an error and the beginning of its message.

  >>> one_line(ValueError('a\n  b'))
  'ValueError: a b'
  """
  said = message(error)[:200]
  kind = type(error).__name__
  return f'{kind}: {said}' if said else kind


class Parser(argparse.ArgumentParser):
  """Reads a command line, and tells a mistake in one line, not in two."""

  def __init__(self, prog: str | None = None, **fields: Any):
    """Makes a parser.

    Args:
      prog: How people start the program; None for the `python -m MODULE` by
        which this one was started.
      **fields: See `argparse.ArgumentParser`.
    """
    spec = getattr(sys.modules['__main__'], '__spec__', None)
    if prog is None and spec is not None:
      prog = f'python -m {spec.name.removesuffix(".__main__")}'
    super().__init__(prog, **fields)

  def error(self, message: str) -> NoReturn:
    """Ends the process with what is wrong, and code 2."""
    said = ' '.join(message.split()).rstrip('.')
    self.exit(2, f'error: {said}; --help lists all arguments.\n')


def is_whole(value: Any) -> bool:
  """Returns whether a value is a whole number; True and False are none.

  Args:
    value: Anything.

  >>> is_whole(3), is_whole(True), is_whole(3.0)
  (True, False, False)
  """
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)
