"""One run at a time in a workdir."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import socket
from typing import TextIO

from absl import logging

from resist_jax.errors import ConfigError
from resist_jax.run.workdir import is_at


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a workdir; does not wait for them.

  The lock is the kernel's: it ends with the process, however that ends.

  Args:
    workdir: The folder, which is created if it does not exist.

  Yields:
    Nothing; the lock is held meanwhile.

  Raises:
    ConfigError: If another run holds the lock.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'lock'
  with _taken(path) as file:
    file.truncate(0)  # What a run that was killed has left.
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    try:
      yield
    finally:
      # The workdir may be gone, or have become that of another run.
      if is_at(path, file):
        path.unlink(missing_ok=True)


def _taken(path: pathlib.Path) -> TextIO:
  """Opens and locks a file that nobody has locked."""
  while True:
    file = path.open('a+', encoding='utf-8', errors='replace')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
      file.seek(0)
      holder = ' '.join(file.read(200).split()) or 'another run'
      file.close()
      raise ConfigError(
        f'workdir {path.parent} is in use by {holder}: wait for its end, stop '
        'it, or choose another workdir.'
      ) from error
    except OSError as error:
      logging.warning(
        'workdir %s cannot be locked (%s): let no other run use it',
        path.parent,
        error.strerror,
      )
      return file
    if is_at(path, file):
      return file
    file.close()  # Its holder removed it before this process locked it.
