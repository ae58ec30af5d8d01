"""Checkpoints of a run's state, by orbax, each part written by who holds it.

A checkpoint holds the blocks of each worker as they lie on the devices, and the
slots that say which blocks they are, so any number of workers and devices can
go on from it. Each carries a digest of its arrays: one with flipped bytes
counts as damaged, and the newest whole one is restored.
"""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np
from orbax.checkpoint import v1 as ocp

from resist_jax.dealing import Deal
from resist_jax.exchange import WORKER
from resist_jax.state import SHARDED, State, first_copy

PyTree = Any

KEEP = 3  # A fallback for the newest, and one for the fallback.


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


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, workdir: pathlib.Path, mesh: Mesh):
    """Opens the folder, and makes it where it does not exist.

    Args:
      workdir: Of the run.
      mesh: Whose devices read the parts of the workers that live there.
    """
    self._sharding = NamedSharding(mesh, SHARDED)
    policy: Any = ocp.training.preservation_policies.LatestN(KEEP)
    directory = str(workdir.absolute() / 'checkpoints')  # Orbax's own wish.
    self._checkpointer = ocp.training.Checkpointer(
      directory, preservation_policy=policy, cleanup_tmp_directories=True
    )

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
    record['sha256'] = _seal(arrays, record)
    # Forced: after a fallback, a damaged checkpoint of a later round is there.
    saved = self._checkpointer.save(
      progress['round'],
      arrays,
      force=True,
      overwrite=True,
      custom_metadata=record,
    )
    if not saved:
      raise OSError(
        f'the checkpoint of round {progress["round"]} was not saved.'
      )

  def restore(self) -> Restored | None:
    """Reads the newest checkpoint that is whole.

    Returns:
      It, or None where there is no checkpoint. Damaged ones are logged.

    Raises:
      ValueError: If there are checkpoints and all of them are damaged.
    """
    found = sorted(self._checkpointer.checkpoints, key=lambda c: -c.step)
    for position, checkpoint in enumerate(found):
      try:
        return self._read(checkpoint.step)
      except Exception as error:  # orbax and its codecs raise nearly anything.
        older = [c.step for c in found[position + 1 :]]
        logging.warning(
          'the checkpoint of round %d is damaged (%s); %s',
          checkpoint.step,
          ' '.join(str(error).split())[:100],
          f'falling back to round {older[0]}' if older else 'none is left',
        )
    if found:
      raise ValueError(
        f'all {len(found)} checkpoints in {self._checkpointer.directory} are '
        'damaged: move that folder away to start from round 0.'
      )
    return None

  def _read(self, step: int) -> Restored:
    saved: Any = self._checkpointer.metadata(step)
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
    arrays: Any = self._checkpointer.load(step, targets)
    if record is None or record.pop('sha256') != _seal(arrays, record):
      raise ValueError('its digest differs from the one saved with it')
    slots = {
      name: Deal(np.array(table, np.int32))
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

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self._checkpointer.close()  # Waits for what is being written.


def _seal(arrays: PyTree, record: Mapping[str, Any]) -> str:
  """Returns a digest of everything that a checkpoint says."""
  words = json.dumps(record, sort_keys=True) + digest(arrays)
  return hashlib.sha256(words.encode()).hexdigest()


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
