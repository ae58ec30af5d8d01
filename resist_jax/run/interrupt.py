"""SIGTERM and SIGINT, which end a run after its round and a checkpoint."""

import builtins
import contextlib
import signal
import sys
import types


class Interrupted(Exception):  # noqa: N818 - it is not an error.
  """A signal asked the run to stop, and the run has saved a checkpoint.

  Attributes:
    signum: The number of the signal; the process should exit with 128 + signum.
  """

  def __init__(self, signum: int, message: str):
    super().__init__(message)
    self.signum = signum


class Interrupt:
  """A context that records the first signal; a second one ends the process.

  In an interactive session the second one has its usual meaning instead, so
  that Ctrl-C raises KeyboardInterrupt, and all variables stay.

  Attributes:
    signum: The number of the recorded signal, or None.
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
    # Contexts are nested where an experiment starts several runs in turn: a
    # signal during one run must also reach the outer context, and vice versa.
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
    interactive = hasattr(sys, 'ps1') or hasattr(builtins, '__IPYTHON__')
    again = self._previous[signum] if interactive else signal.SIG_DFL
    signal.signal(signum, again)
    if self.signum is None:
      self.signum = signum
      with contextlib.suppress(Exception):  # Such as a write inside a write.
        print(
          '\nThe run stops after this round; the same signal again ends it at '
          'once.',
          file=sys.stderr,
          flush=True,
        )
