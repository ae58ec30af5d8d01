"""SIGTERM and SIGINT end a run between two rounds, after a checkpoint."""

import signal
import types


class Interrupted(Exception):  # noqa: N818 - it is no error.
  """The run was asked to stop, and has saved what it had.

  Attributes:
    signum: The signal; a process that obeys it exits with 128 + signum.
  """

  def __init__(self, signum: int, message: str):
    super().__init__(message)
    self.signum = signum


class Interrupt:
  """A context in which the first signal is remembered and the second ends all.

  Attributes:
    signum: The signal that came, or None.
  """

  def __init__(self):
    self.signum: int | None = None
    self._previous = {}

  def __enter__(self) -> 'Interrupt':
    for signum in (signal.SIGTERM, signal.SIGINT):
      try:
        self._previous[signum] = signal.signal(signum, self._remember)
      except ValueError:  # Not the main thread, as in some notebooks.
        break
    # Whoever begins several runs has a context of its own around each of them.
    self.signum = next((outer.signum for outer in self._outer()), None)
    return self

  def __exit__(self, *_) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
    for outer in self._outer():
      outer.signum = outer.signum or self.signum

  def _outer(self) -> 'list[Interrupt]':
    handlers = self._previous.values()
    contexts = [getattr(handler, '__self__', None) for handler in handlers]
    return [outer for outer in contexts if isinstance(outer, Interrupt)]

  def _remember(self, signum: int, frame: types.FrameType | None) -> None:
    del frame
    self.signum = signum
    signal.signal(signum, signal.SIG_DFL)
