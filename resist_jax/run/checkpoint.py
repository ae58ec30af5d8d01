"""Checkpoints of a run's state, written by orbax, with a manifest of each.

A checkpoint holds the blocks of each worker as they lie on the devices, and the
slots that say which blocks they are, so a run can resume from it with any
number of workers and devices. Each process writes what its own devices hold.

Orbax writes in the background, while the next rounds run, and gives a
checkpoint its name when all of it is written; then process 0 lists its files in
a manifest. A checkpoint that differs from its manifest is damaged, and an older
one is restored instead. One without a manifest, because the run was killed in
between or because the folder of checkpoints was copied alone, is read whole and
compared with the sums in it before it gets one. Whatever else lies in that
folder is left alone.

How many of the newest are kept is a choice, and so is whether the best one is.
A checkpoint is *known good* when a test at or after its round was finite. The
newest of these is always kept, and a run that diverges falls back on it.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np
from orbax.checkpoint import v1 as ocp

from resist_jax import folders
from resist_jax.errors import NonFiniteError, message, one_line
from resist_jax.rounds import State, storage
from resist_jax.rounds.manifest import check, is_lost, manifest
from resist_jax.run import processes, workdir
from resist_jax.run.examined import examine, sums_on_host

KEEP = 3  # The newest and two older ones, in case newer ones are damaged.
# Seconds that orbax waits. It uses the wall clock, which may jump, and
# `processes` detects a lost process sooner.
_TIMEOUT = 20 * 24 * 3600
_NONE, _DAMAGED = -1, -2  # Returned instead of a round.
_SUMS = 'sums'  # What `examined` found, beside the progress.
# What orbax calls a checkpoint that it has not finished.
_UNFINISHED = re.compile(f'[0-9]+{storage.UNFINISHED}')


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

  def __init__(self, round_index: int, error: Exception, folder: pathlib.Path):
    """Composes the message.

    Args:
      round_index: The round of the checkpoint.
      error: What was raised while the checkpoint was written.
      folder: The workdir of the run.
    """
    lost = isinstance(error, TimeoutError | jax.errors.JaxRuntimeError)
    self.retryable = lost and jax.process_count() > 1
    advice = f'make room in {folder}, or make it writable'
    if self.retryable:
      advice = (
        'the processes could not synchronise, because one is lost or the clock '
        'of one jumped'
      )
    elif isinstance(error, FileExistsError):
      advice = f'move that out of {folder}'
    super().__init__(
      f'the checkpoint of round {round_index} cannot be written '
      f'({message(error)[:100]}): {advice}; the same command goes on from the '
      'checkpoint before.'
    )


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, folder: pathlib.Path, mesh: Mesh, keep: int = KEEP):
    """Opens the folder, and deletes checkpoints that were not completed.

    Args:
      folder: Workdir of the run, on a file system that all processes share.
      mesh: The mesh whose devices hold the workers' parts of a restored state.
      keep: How many of the newest checkpoints are kept; 0 keeps all.
    """
    self._mesh, self._keep = mesh, keep
    self._workdir = folder.absolute()  # orbax requires it.
    self._folder = self._workdir / 'checkpoints'
    self._manifests = self._workdir / 'digests'
    # The newest that this run wrote or read, and the newest known good one.
    self._latest: int | None = None
    self._good: int | None = None
    self._tested = _NONE  # The round of the newest finite test.
    self._best: int | None = None  # The round that is kept as the best.
    # The save that is under way: its round, and orbax's object to wait for.
    self._saving: tuple[int, ocp.AsyncResponse[None]] | None = None
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      for path in self._folder.iterdir():
        if _UNFINISHED.fullmatch(path.name) and not path.is_symlink():
          shutil.rmtree(path, ignore_errors=True)

  def save(
    self, state: State, progress: Mapping[str, Any], best: int | None = None
  ) -> None:
    """Begins to save the state between two rounds.

    It is saved completely or not at all, while the next rounds run; the caller
    may give the state to a round at once. Before the next one is begun, this
    one is finished.

    Args:
      state: The state of the round.
      progress: JSON values; `progress['round']` names the checkpoint.
      best: The round whose checkpoint, this one or an older one, is kept as
        the best; None keeps none for that.

    Raises:
      NonFiniteError: If the state is not finite; nothing is written.
      SaveError: If it or the one before cannot be written.
    """
    round_index = progress['round']
    finite, sums = examine(state, self._mesh)
    if not finite:
      raise NonFiniteError(
        f'round {round_index}: the parameters that its aggregate gave are not '
        'finite'
      )
    self.finish()
    self._best = best  # Only now: the best one before goes when this is whole.
    with self._save_errors(round_index):
      # Not through orbax's checkpoint manager, in which a process that fails
      # and the others wait for each other.
      if jax.process_index() == 0:
        self._make_way(round_index)
      record = {**progress, _SUMS: sums}
      begun = storage.begin(self._path(round_index), state, record, _TIMEOUT)
      self._saving = round_index, begun

  def finish(self, wait: bool = True) -> None:
    """Finishes the save that was begun, if there is one.

    Args:
      wait: Whether to wait for it, rather than to leave it to a later call.

    Raises:
      SaveError: If it cannot be written.
    """
    if self._saving is None:
      return
    round_index, writing = self._saving
    with self._save_errors(round_index):
      try:
        writing.result(None if wait else 0)
      except TimeoutError:
        if wait:
          raise
        return
      if jax.process_index() == 0:
        folders.flush(self._path(round_index))  # Before older ones are deleted.
        self._write_manifest(round_index)
        self._delete_old(round_index)
    self._saving, self._latest = None, round_index
    self._note_good()

  @contextlib.contextmanager
  def _save_errors(self, round_index: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # orbax and its codecs raise many types.
      self._saving = None
      raise SaveError(round_index, error, self._workdir) from error

  def tested(self, round_index: int) -> None:
    """Records that a test was finite: what was saved before it is known good.

    Args:
      round_index: The round after which the network was tested.
    """
    self._tested = round_index
    self._note_good()

  def _note_good(self) -> None:
    """Notes the newest checkpoint as known good if a test allows it."""
    if self._latest is None or self._latest > self._tested:
      return
    self._good = self._latest
    if jax.process_index() == 0:
      path = self._manifests / 'good.json'
      workdir.write_json(path, {'round': self._good})

  def distrust(self) -> int | None:
    """Sets checkpoints aside that are newer than the newest known good one.

    Returns:
      The round of that one; None if there is none, or none is newer.
    """
    self.finish()
    if self._good is None or self._latest == self._good:
      return None
    if jax.process_index() == 0:
      for round_index in self._own():
        if round_index > self._good:
          self._set_aside(round_index)
    # A process that ends soon afterwards would end the others meanwhile.
    processes.barrier()
    return self._good

  def restore(self) -> Restored | None:
    """Reads the newest intact checkpoint, and logs a warning of damaged ones.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: If there are checkpoints and all of them are damaged, or if
        the newest intact one cannot be read after all.
    """
    try:
      round_index = self._choose()
    except PermissionError as error:
      raise ValueError(
        f'a checkpoint cannot be read ({message(error)}): let this user read '
        f"all of {self._folder}, or move what is another's away."
      ) from error
    if round_index == _NONE:
      return None
    if round_index == _DAMAGED:
      raise ValueError(
        f'all {len(self._rounds())} checkpoints in {self._folder} are damaged: '
        'choose another workdir to start from round 0.'
      )
    good = self._known_good(round_index) if jax.process_index() == 0 else _NONE
    (good,) = _from_process_0(good)
    self._latest, self._good = round_index, None if good == _NONE else good
    try:
      stored = storage.read(self._path(round_index), self._mesh)
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'the checkpoint of round {round_index} cannot be read '
        f'({one_line(error)[:100]}): move {self._path(round_index)} away to '
        'go on from the one before.'
      ) from error
    progress = {k: v for k, v in stored.record.items() if k != _SUMS}
    return Restored(stored, progress)

  def _choose(self) -> int:
    """Returns the round of the newest intact one, `_NONE` or `_DAMAGED`."""
    first = jax.process_index() == 0
    rounds = self._rounds() if first else []
    at_the_end = _DAMAGED if rounds else _NONE
    while True:
      found = self._newest(rounds, at_the_end) if first else (_NONE, False)
      round_index, listed = _from_process_0(*found)
      if round_index < 0 or listed:
        return round_index
      problem = self._read_problem(round_index)
      if not _in_any_process(bool(problem)):
        if first:
          self._write_manifest(round_index)
        return round_index
      if first:
        _warn(round_index, problem or 'another process cannot read it', rounds)

  def _newest(self, rounds: list[int], at_the_end: int) -> tuple[int, bool]:
    """Takes rounds from the end of a list, up to one that may be intact.

    Returns:
      `(round_index, listed)`: the round, or `at_the_end`; and False if the
      checkpoint has to be read, because no manifest says whether it is intact.
    """
    while rounds:
      round_index = rounds.pop()
      listed = self._listed(round_index)
      if listed is None:
        logging.warning(
          'the checkpoint of round %d has no manifest, because the run was '
          'killed or the manifests were not copied: it is used if it can be '
          'read and its checksums match',
          round_index,
        )
        return round_index, False
      problem = check(self._path(round_index), listed)
      if problem is None:
        return round_index, True
      _warn(round_index, problem, rounds)
    return at_the_end, True

  def _read_problem(self, round_index: int) -> str:
    """Reads a whole checkpoint; returns why that fails, or ''."""
    try:
      manifest(self._path(round_index))  # Orbax hides why a file is not read.
      stored = storage.read_on_host(self._path(round_index))
      found = stored.record['round']
      sums = stored.record.get(_SUMS)  # Older versions saved none.
    except Exception as error:  # orbax and its codecs raise many types.
      if not is_lost(error):
        raise
      return message(error)[:100] or type(error).__name__
    # Files may have the same arrays in another order.
    if sums and sorted(sums) != sorted(sums_on_host(stored.state)):
      return 'its numbers are not as they were written'
    return '' if found == round_index else f'it is that of round {found}'

  def _rounds(self) -> list[int]:
    """Returns the rounds that have a checkpoint, intact or damaged."""
    saved = workdir.saved_rounds(self._folder)
    listed = [r for r in self._listed_rounds() if self._path(r).is_dir()]
    return sorted({*saved, *listed})

  def _own(self) -> list[int]:
    """Returns the rounds whose checkpoint this run has certainly written."""
    saved = workdir.saved_rounds(self._folder)
    return [r for r in saved if self._listed(r)]

  def _listed_rounds(self) -> list[int]:
    paths = self._manifests.glob('[0-9]*.json')
    return [int(path.stem) for path in paths if path.stem.isdecimal()]

  def _path(self, round_index: int) -> pathlib.Path:
    return self._folder / str(round_index)

  def _manifest_path(self, round_index: int) -> pathlib.Path:
    return self._manifests / f'{round_index}.json'

  def _listed(self, round_index: int) -> dict[str, str] | None:
    """Returns the manifest of a checkpoint; None if there is none."""
    return workdir.json_object(self._manifest_path(round_index)) or None

  def _write_manifest(self, round_index: int) -> None:
    files = manifest(self._path(round_index))
    self._manifests.mkdir(exist_ok=True)
    workdir.write_json(self._manifest_path(round_index), files)

  def _known_good(self, latest: int) -> int:
    """Returns the newest known good one up to a round, or `_NONE`."""
    tested = workdir.json_object(self._manifests / 'good.json').get('round')
    if not isinstance(tested, int):
      return _NONE
    rounds = [r for r in self._own() if r <= min(tested, latest)]
    return max(rounds, default=_NONE)

  def _make_way(self, round_index: int) -> None:
    """Removes what has the name of a checkpoint that is to be written."""
    path = self._path(round_index)
    if round_index in self._own():
      shutil.rmtree(path)
    elif round_index in self._rounds():  # By orbax, and it cannot be read.
      self._set_aside(round_index)
    elif os.path.lexists(path):
      raise FileExistsError(f'checkpoints/{round_index} is something else')
    self._manifest_path(round_index).unlink(missing_ok=True)

  def _set_aside(self, round_index: int) -> None:
    """Moves a checkpoint out of the way, into the folder `set_aside`."""
    aside = self._workdir / 'set_aside'
    logging.warning(
      'the checkpoint of round %d is moved to %s', round_index, aside
    )
    aside.mkdir(exist_ok=True)
    shutil.rmtree(aside / str(round_index), ignore_errors=True)
    (aside / f'{round_index}.json').unlink(missing_ok=True)
    # `checkpoints` may be a link to another disk.
    shutil.move(self._path(round_index), aside / str(round_index))
    if self._manifest_path(round_index).exists():
      shutil.move(
        self._manifest_path(round_index), aside / f'{round_index}.json'
      )

  def _delete_old(self, newest: int) -> None:
    """Deletes what this run wrote, but for what it may have to go back to.

    That is `newest`, as many before it as are to be kept, the newest known good
    one, and the best one where that is kept. Those of later rounds are deleted,
    too: the run did not resume from them, so they are damaged.
    """
    own = self._own()
    # `[-0:]` is all of them.
    newer = [r for r in own if r <= newest][-self._keep :]
    keep = {*newer, self._good, self._best}
    for round_index in set(own) - keep:
      shutil.rmtree(self._path(round_index), ignore_errors=True)
    for round_index in self._listed_rounds():
      if not self._path(round_index).exists():
        self._manifest_path(round_index).unlink()


def _from_process_0(*numbers: int) -> list[int]:
  """Returns the numbers that process 0 has."""
  if jax.process_count() == 1:
    return list(numbers)
  array = np.array(numbers, np.int32)
  return multihost_utils.broadcast_one_to_all(array).tolist()


def _in_any_process(found: bool) -> bool:
  if jax.process_count() == 1:
    return found
  return bool(multihost_utils.process_allgather(np.array(found)).any())


def _warn(round_index: int, problem: str, others: list[int]) -> None:
  logging.warning(
    'the checkpoint of round %d is damaged (%s); %s',
    round_index,
    problem,
    f'falling back to round {others[-1]}' if others else 'there is no other',
  )
