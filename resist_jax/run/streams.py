"""Standard streams that may fail, while a run goes on.

A stream may be closed, its disk may be full, or its reader may be gone, as when
the connection to a host ends. What is lost then is text.
"""

import contextlib
import io
import os
import sys
from typing import Any, TextIO

from absl import logging


class Forgiving:
  """A text stream that ignores when it cannot be written."""

  def __init__(self, stream: TextIO):
    """Wraps a stream.

    Args:
      stream: Where text goes.
    """
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes what can be written; returns the length of the text."""
    with contextlib.suppress(OSError, ValueError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    """Flushes what can be flushed."""
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def forgive() -> None:
  """Makes the standard streams of this process forgiving, to its end.

  A closed one gets the null device. Without that, the next file that is opened
  would have its number, and libraries in C++ would write their warnings there.
  """
  for name, number in (('stdout', 1), ('stderr', 2)):
    stream = getattr(sys, name)
    if stream is None:
      null = os.open(os.devnull, os.O_WRONLY)
      if null != number:
        os.dup2(null, number)
        os.close(null)
      stream = open(number, 'w')  # noqa: SIM115 - to the end of the process.
    if isinstance(stream, io.TextIOWrapper):
      # Names of folders, which may be classes, need not be text.
      stream.reconfigure(errors='backslashreplace')
    setattr(sys, name, Forgiving(stream))
  # It would print each line twice with --alsologtostderr, for another stream.
  logging.get_absl_handler().python_handler.stream = sys.stderr
