"""One run at a time in a workdir."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import socket
import time
from typing import TextIO

from absl import logging
import jax

from resist_jax.errors import ConfigError
from resist_jax.run.meeting import MeetingError
from resist_jax.run.workdir import is_at

# Seconds that a run of several processes waits for the process 0 before it. An
# NFS server keeps the lock of a lost host for a minute or two.
_PATIENCE = 300.0


@contextlib.contextmanager
def locked(
  workdir: pathlib.Path, patience: float | None = None
) -> Iterator[None]:
  """Keeps other runs out of a workdir.

  The lock is the kernel's: it ends with the process, however that ends.

  Args:
    workdir: The folder, which is created if it does not exist.
    patience: Seconds to wait for the end of another run. None for some minutes
      in a run of several processes, which is started again when a host is
      lost, and for 0 in others.

  Yields:
    Nothing; the lock is held meanwhile.

  Raises:
    ConfigError: If another run holds the lock, and nothing was waited for.
    MeetingError: If another run still holds the lock after the wait.
  """
  if patience is None:
    # Under torchrun, one process may be what is left of several.
    several = (
      jax.distributed.is_initialized() or 'TORCHELASTIC_RUN_ID' in os.environ
    )
    patience = _PATIENCE if several else 0.0
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'lock'
  with _taken(path, patience) as file:
    file.truncate(0)  # What a run that was killed has left.
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    try:
      yield
    finally:
      # The workdir may be gone, or have become that of another run.
      if is_at(path, file):
        path.unlink(missing_ok=True)


def _taken(path: pathlib.Path, patience: float) -> TextIO:
  """Opens and locks a file, as soon as nobody else has locked it."""
  deadline = time.monotonic() + patience
  told = ''
  while True:
    file = path.open('a+', encoding='utf-8', errors='replace')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
      file.seek(0)
      holder = ' '.join(file.read(200).split()) or 'another run'
      file.close()
      used = f'workdir {path.parent} is in use by {holder}'
      if time.monotonic() >= deadline:
        raise _refusal(used, path, patience) from error
      if used != told:
        logging.warning('%s: waiting up to %.0f seconds', used, patience)
        told = used
      time.sleep(min(1, patience))
      continue
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


def _refusal(used: str, path: pathlib.Path, patience: float) -> Exception:
  """Returns what to raise when another run has not ended in time."""
  if not patience:
    return ConfigError(
      f'{used}: wait for its end, stop it, or choose another workdir.'
    )
  return MeetingError(
    f'{used}, which has not ended within {patience:.0f} seconds: stop it, or '
    f'delete {path} if that process is gone for good or stands still; the same '
    'command then goes on from the newest checkpoint.'
  )
