"""Checkpoints of a run's state, by orbax, each part written by who holds it.

A checkpoint holds the blocks of each worker as they lie on the devices, and the
slots that say which blocks they are, so any number of workers and devices can
go on from it. The last thing written is a digest of its files: one without it,
or with flipped bytes, counts as damaged, and the newest whole one is restored.
Where a run has several processes, the first one writes and compares digests,
and all restore the checkpoint that it found whole.
"""

from collections.abc import Mapping
import hashlib
import pathlib
import shutil
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
import numpy as np
from orbax.checkpoint import v1 as ocp

from resist_jax.decomposition.assignments import Assignment
from resist_jax.exchange.collectives import WORKER
from resist_jax.rounds.state import SHARDED, State, first_copy
from resist_jax.run import processes
from resist_jax.run.workdir import replace_text

PyTree = Any

KEEP = 3  # A fallback for the newest, and one for the fallback.
# By the wall clock, which may jump; `processes` misses who is lost, and sooner.
_PATIENCE = 20 * 24 * 3600
_NONE, _DAMAGED = -1, -2  # Where a round was looked for.


class Restored(NamedTuple):
  """A checkpoint that was read and found whole.

  Attributes:
    state: As it was saved; its shared part is without the axis S, on the host.
    num_blocks: L of each chain that was partitioned.
    progress: What the run had counted by then; `progress['round']` rounds.
  """

  state: State
  num_blocks: dict[str, int]
  progress: dict[str, Any]


class SaveError(OSError):
  """A checkpoint could not be written; earlier ones are as they were.

  Attributes:
    again: Whether another try may succeed: the disk was not the reason, the
      processes did not meet. JAX's barriers break where the wall clock jumps.
  """

  def __init__(self, step: int, error: Exception, folder: pathlib.Path):
    """Says what to do about a checkpoint that `error` broke off."""
    meeting = isinstance(error, TimeoutError | jax.errors.JaxRuntimeError)
    self.again = meeting and jax.process_count() > 1
    advice = (
      'the processes did not meet, as where one is lost or the clock jumps'
      if self.again
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
    """Opens the folder, and sweeps away what was never finished.

    Args:
      workdir: Of the run; where there are several processes, all see it.
      mesh: Whose devices read the parts of the workers that live there.
    """
    self._sharding = NamedSharding(mesh, SHARDED)
    self._folder = workdir.absolute() / 'checkpoints'  # Orbax's own wish.
    self._digests = workdir.absolute() / 'digests'
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      for path in self._folder.iterdir():
        if not path.name.isdecimal():
          shutil.rmtree(path, ignore_errors=True)

  def save(
    self,
    state: State,
    num_blocks: Mapping[str, int],
    progress: Mapping[str, Any],
  ) -> None:
    """Saves the state between two rounds; it is whole or not there at all.

    Args:
      state: What the workers hold.
      num_blocks: L of each partitioned chain.
      progress: JSON values; `progress['round']` names the checkpoint.

    Raises:
      SaveError: If it cannot be written.
    """
    arrays: Any = {'params': _parts(state.shared, state.chain)}
    if state.velocity is not None:
      arrays['velocity'] = _parts(**state.velocity)
    if state.error is not None:
      arrays['error'] = {'workers': state.error}
    record: Any = {
      'progress': dict(progress),
      'num_blocks': dict(num_blocks),
      'slots': {k: deal.slots.tolist() for k, deal in state.slots.items()},
    }
    step = progress['round']
    try:
      # Not by orbax's manager of checkpoints: where a process fails, there it
      # waits for the others, and they for it. Overwritten: after a fallback, a
      # damaged one of this round may be there.
      context = ocp.Context()
      context.asynchronous.timeout_secs = _PATIENCE
      # JAX's barriers can be left by one process only, where a clock jumps.
      with context, processes.together(f'the checkpoint of round {step}'):
        ocp.save(
          self._path(step),
          arrays,
          overwrite=True,
          custom_metadata=record,
        )
      if jax.process_index() == 0:
        self._write_digest(step)
        self._drop_all_but(step)
    except Exception as error:  # orbax and its codecs raise nearly anything.
      raise SaveError(step, error, self._folder.parent) from error

  def restore(self) -> Restored | None:
    """Reads the newest checkpoint that is whole.

    Returns:
      It, or None where there is no checkpoint. Damaged ones are logged.

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
    """Returns the newest whole one, `_NONE` or `_DAMAGED`."""
    steps = self._steps()
    if not steps:
      return _NONE
    while steps:
      step = steps.pop()
      try:
        if self._digest_path(step).read_text() == self._digest(step):
          return step
        problem = 'its digest differs from the one saved with it'
      except Exception as error:
        problem = _one_line(error)
      logging.warning(
        'the checkpoint of round %d is damaged (%s); %s',
        step,
        problem,
        f'falling back to round {steps[-1]}' if steps else 'none is left',
      )
    return _DAMAGED

  def _steps(self) -> list[int]:
    """Returns the rounds that have a checkpoint, whole or damaged."""
    names = [path.name for path in self._folder.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())

  def _path(self, step: int) -> str:
    return str(self._folder / str(step))

  def _digest_path(self, step: int) -> pathlib.Path:
    return self._digests / f'{step}.sha256'

  def _digest(self, step: int) -> str:
    """Returns a digest of the names and the bytes of a checkpoint's files."""
    sha, folder = hashlib.sha256(), self._folder / str(step)
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
      with path.open('rb') as file:
        content = hashlib.file_digest(file, 'sha256').hexdigest()
      sha.update(f'{path.relative_to(folder)} {content}\n'.encode())
    return sha.hexdigest()

  def _write_digest(self, step: int) -> None:
    self._digests.mkdir(exist_ok=True)
    replace_text(self._digest_path(step), self._digest(step))

  def _drop_all_but(self, newest: int) -> None:
    """Keeps a few checkpoints, up to the newest, and their digests.

    What is later was damaged, or it would have been gone on with.
    """
    keep = [step for step in self._steps() if step <= newest][-KEEP:]
    for step in set(self._steps()) - set(keep):
      shutil.rmtree(self._folder / str(step))
    for path in self._digests.iterdir():
      if path.name not in {self._digest_path(step).name for step in keep}:
        path.unlink()

  def _read(self, step: int) -> Restored:
    saved: Any = ocp.metadata(self._path(step))
    record = saved.custom_metadata

    def target(path, leaf):
      # Workers' parts go straight to the devices that they share out evenly.
      if path[1].key == 'workers' and (
        leaf.shape[0] % self._sharding.mesh.shape[WORKER] == 0
      ):
        return jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=self._sharding
        )
      return np.zeros(leaf.shape, leaf.dtype)

    targets = jax.tree_util.tree_map_with_path(target, saved.metadata)
    arrays: Any = ocp.load(self._path(step), targets)
    slots = {
      name: Assignment(np.array(table, np.int32))
      for name, table in record['slots'].items()
    }
    shared, chain = _from_parts(arrays['params'])
    velocity = None
    if 'velocity' in arrays:
      parts = _from_parts(arrays['velocity'])
      velocity = dict(zip(('shared', 'chain'), parts, strict=True))
    error = arrays.get('error', {}).get('workers')
    state = State(shared, chain, slots, velocity, error)
    return Restored(state, record['num_blocks'], record['progress'])


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:100]


def _parts(shared: PyTree, chain: PyTree) -> dict[str, PyTree]:
  """Returns what to save: once what all workers hold, and their own parts."""
  whole = jax.tree.map(first_copy, shared)
  return {'whole': whole, **({'workers': chain} if chain else {})}


def _from_parts(parts: PyTree) -> tuple[PyTree, PyTree]:
  return parts['whole'], parts.get('workers', {})


def digest(tree: PyTree) -> str:
  """Returns the SHA-256 of the bytes of a pytree's arrays.

  Args:
    tree: Pytree of arrays, read in the order of `jax.tree.leaves`.

  Returns:
    Hexadecimal digits; equal for equal values wherever they live.

  >>> digest({'w': np.zeros(2)}) == digest({'w': np.zeros(2)})
  True
  >>> digest({'w': np.zeros(2)}) == digest({'w': np.ones(2)})
  False
  """
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    sha.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  return sha.hexdigest()
