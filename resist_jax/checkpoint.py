"""Checkpoints of the canonical global model, by orbax.

They hold neither workers nor devices, so a run goes on with any number of
either. Each carries a digest of its arrays: one with flipped bytes counts as
damaged, and the newest whole one is restored.
"""

from collections.abc import Mapping
import hashlib
import pathlib
from typing import Any, NamedTuple
import warnings

from absl import logging
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

PyTree = Any

KEEP = 3  # A fallback for the newest, and one for the fallback.


class Restored(NamedTuple):
  """A checkpoint that was read and found whole.

  Attributes:
    params: Canonical global parameters, on the host.
    velocity: Momentum of the same shape, or None.
    progress: What the run had counted by then; `progress['round']` rounds.
  """

  params: dict[str, PyTree]
  velocity: dict[str, PyTree] | None
  progress: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, workdir: pathlib.Path):
    """Opens the folder, and makes it where it does not exist.

    Args:
      workdir: Of the run.
    """
    policy: Any = ocp.training.preservation_policies.LatestN(KEEP)
    directory = str(workdir.absolute() / 'checkpoints')  # Orbax's own wish.
    self._checkpointer = ocp.training.Checkpointer(
      directory, preservation_policy=policy, cleanup_tmp_directories=True
    )

  def save(
    self,
    params: Mapping[str, PyTree],
    velocity: Mapping[str, PyTree] | None,
    progress: Mapping[str, Any],
  ) -> None:
    """Saves the state between two rounds; it is whole or not there at all.

    Args:
      params: Canonical global parameters.
      velocity: Momentum, or None.
      progress: JSON values; `progress['round']` names the checkpoint.
    """
    state = {'params': dict(params)}
    if velocity is not None:
      state['velocity'] = dict(velocity)
    state = jax.tree.map(np.asarray, state)
    record: Any = {'progress': dict(progress), 'sha256': digest(state)}
    # Forced: after a fallback, a damaged checkpoint of a later round is there.
    saved = self._checkpointer.save(
      progress['round'],
      state,
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
    record: Any = self._checkpointer.metadata(step).custom_metadata
    with warnings.catch_warnings():
      # No target shardings are given on purpose: arrays go to the host.
      warnings.filterwarnings('ignore', message='Sharding info not provided')
      state = jax.tree.map(np.asarray, self._checkpointer.load(step))
    if record is None or digest(state) != record['sha256']:
      raise ValueError('its digest differs from the one saved with it')
    return Restored(state['params'], state.get('velocity'), record['progress'])

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self._checkpointer.close()  # Waits for what is being written.


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
