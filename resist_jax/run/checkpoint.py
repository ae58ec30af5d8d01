"""Checkpoints of a run's state, written by orbax, with a digest of each.

A checkpoint holds the blocks of each worker as they lie on the devices, and the
slots that say which blocks they are, so a run can resume from it with any
number of workers and devices. Each process writes what its own devices hold. A
digest of the files is written last: a checkpoint without a digest, or with
another one, is damaged, and the newest intact checkpoint is restored instead.
Process 0 writes and compares the digests, and all processes restore the
checkpoint that it selects.
"""

from collections.abc import Mapping
import pathlib
import shutil
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np
from orbax.checkpoint import v1 as ocp

from resist_jax.rounds import State, storage
from resist_jax.run.workdir import replace_text

KEEP = 3  # The newest and two older ones, in case newer ones are damaged.
# Seconds that orbax waits. It uses the wall clock, which may jump, and
# `processes` detects a lost process sooner.
_TIMEOUT = 20 * 24 * 3600
_NONE, _DAMAGED = -1, -2  # Returned instead of a round.


class Restored(NamedTuple):
  """An intact checkpoint.

  Attributes:
    stored: Its files' content.
    progress: The counters of the run; `progress['round']` rounds are completed.
  """

  stored: storage.Stored
  progress: dict[str, Any]


class SaveError(OSError):
  """A checkpoint could not be written; earlier ones are unchanged.

  Attributes:
    retryable: Whether a restart may succeed, because the processes failed to
      synchronise and the disk is not to blame. JAX's barriers fail when a
      process is lost or the wall clock jumps.
  """

  def __init__(self, step: int, error: Exception, folder: pathlib.Path):
    """Composes the message.

    Args:
      step: The round of the checkpoint.
      error: What was raised while the checkpoint was written.
      folder: The workdir of the run.
    """
    lost = isinstance(error, TimeoutError | jax.errors.JaxRuntimeError)
    self.retryable = lost and jax.process_count() > 1
    advice = (
      'the processes could not synchronise, because one is lost or the clock '
      'of one jumped'
      if self.retryable
      else f'make room in {folder}, or make it writable'
    )
    super().__init__(
      f'the checkpoint of round {step} cannot be written '
      f'({_one_line(error)}): {advice}; the same command goes on from the '
      'checkpoint before.'
    )


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, workdir: pathlib.Path, mesh: Mesh):
    """Opens the folder, and deletes checkpoints that were not completed.

    Args:
      workdir: Workdir of the run, on a file system that all processes share.
      mesh: The mesh whose devices hold the workers' parts of a restored state.
    """
    self._mesh = mesh
    self._folder = workdir.absolute() / 'checkpoints'  # orbax requires it.
    self._digests = workdir.absolute() / 'digests'
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      for path in self._folder.iterdir():
        if not path.name.isdecimal():
          shutil.rmtree(path, ignore_errors=True)

  def save(self, state: State, progress: Mapping[str, Any]) -> None:
    """Saves the state between two rounds; completely or not at all.

    Args:
      state: The state of the round.
      progress: JSON values; `progress['round']` names the checkpoint.

    Raises:
      SaveError: If it cannot be written.
    """
    step = progress['round']
    try:
      # Not through orbax's checkpoint manager, in which a process that fails
      # and the others wait for each other. `overwrite`, because a damaged
      # checkpoint of this round may exist.
      context = ocp.Context()
      context.asynchronous.timeout_secs = _TIMEOUT
      with context:
        storage.write(self._path(step), state, progress)
      if jax.process_index() == 0:
        self._write_digest(step)
        self._delete_old(step)
    except Exception as error:  # orbax and its codecs raise many types.
      raise SaveError(step, error, self._folder.parent) from error

  def restore(self) -> Restored | None:
    """Reads the newest intact checkpoint, and logs a warning of damaged ones.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: If there are checkpoints and all of them are damaged.
    """
    step = np.int32(self._newest() if jax.process_index() == 0 else 0)
    if jax.process_count() > 1:
      step = multihost_utils.broadcast_one_to_all(step)
    if step == _NONE:
      return None
    if step == _DAMAGED:
      raise ValueError(
        f'all {len(self._steps())} checkpoints in {self._folder} are damaged: '
        'move that folder away to start from round 0.'
      )
    return self._read(int(step))

  def _newest(self) -> int:
    """Returns the round of the newest intact one, `_NONE` or `_DAMAGED`."""
    steps = self._steps()
    if not steps:
      return _NONE
    while steps:
      step = steps.pop()
      try:
        if self._digest_path(step).read_text() == self._digest(step):
          return step
        problem = 'its files do not have the digest saved with them'
      except Exception as error:
        problem = _one_line(error)
      logging.warning(
        'the checkpoint of round %d is damaged (%s); %s',
        step,
        problem,
        f'falling back to round {steps[-1]}' if steps else 'there is no other',
      )
    return _DAMAGED

  def _steps(self) -> list[int]:
    """Returns the rounds that have a checkpoint, intact or damaged."""
    names = [path.name for path in self._folder.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())

  def _path(self, step: int) -> pathlib.Path:
    return self._folder / str(step)

  def _digest_path(self, step: int) -> pathlib.Path:
    return self._digests / f'{step}.sha256'

  def _digest(self, step: int) -> str:
    return storage.digest_of_files(self._path(step))

  def _write_digest(self, step: int) -> None:
    self._digests.mkdir(exist_ok=True)
    replace_text(self._digest_path(step), self._digest(step))

  def _delete_old(self, newest: int) -> None:
    """Deletes all checkpoints but `newest` and the `KEEP - 1` before it.

    Later ones are damaged, or the run would have resumed from them.
    """
    keep = [step for step in self._steps() if step <= newest][-KEEP:]
    for step in set(self._steps()) - set(keep):
      shutil.rmtree(self._folder / str(step))
    for path in self._digests.iterdir():
      if path.name not in {self._digest_path(step).name for step in keep}:
        path.unlink()

  def _read(self, step: int) -> Restored:
    stored = storage.read(self._path(step), self._mesh)
    return Restored(stored, stored.record)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:100]
