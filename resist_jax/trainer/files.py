"""A state in a folder: the files of its newest save, and which one that is."""

from collections.abc import Mapping
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from resist_jax import folders
from resist_jax.rounds import State, checks, nodes, storage

PyTree = Any

_POINTER = 'state.txt'  # Names the newest whole folder, and its digest.


def write(
  folder: str | os.PathLike[str], state: State, record: Mapping[str, Any]
) -> None:
  """Saves a state atomically, see `Trainer.save`.

  Args:
    folder: See there.
    state: A state between two rounds.
    record: What `read` is to return besides, as JSON.

  Raises:
    ValueError: If the folder cannot be one, or cannot be written to.
  """
  folder = folders.resolve(folder, 'folder').absolute()
  folders.check_writable(folder, 'folder')
  name = f'round_{int(state.round)}'
  if storage.pointed_at(folder / _POINTER)[0] == name:
    name = f'{name}_again'  # The one that is there stays whole meanwhile.
  described = nodes.described([state.shared, state.chain])
  storage.write(folder / name, state, {'nodes': described, **record})
  if jax.process_index() == 0:
    folders.flush(folder / name)  # Before the older one is deleted.
    storage.point_to(folder / _POINTER, folder / name)
  if jax.process_count() > 1:  # The others read the pointer next.
    multihost_utils.sync_global_devices('resist_jax: a state is saved')


def read(
  folder: str | os.PathLike[str],
  mesh: Mesh,
  params: Mapping[str, PyTree] | None,
) -> storage.Stored:
  """Reads what `write` wrote.

  Args:
    folder: As for `write`.
    mesh: Where the arrays go.
    params: See `Trainer.restore`.

  Returns:
    What the files hold, with the nodes that the parameters had.

  Raises:
    ValueError: See `Trainer.restore`.
  """
  folder = folders.resolve(folder, 'folder').absolute()
  name, digest = storage.pointed_at(folder / _POINTER)
  if not name:
    raise ValueError(
      f'folder {folder} holds no state, or its {_POINTER} is damaged: save '
      'one there first, or restore another folder.'
    )
  if not (folder / name).is_dir() or (
    storage.digest_of_files(folder / name) != digest
  ):
    raise ValueError(
      f'the state in {folder / name} is damaged: its files are not those '
      'that were saved. Restore another folder.'
    )
  return _in_their_nodes(storage.read(folder / name, mesh), params)


def _in_their_nodes(
  stored: storage.Stored, params: Mapping[str, PyTree] | None
) -> storage.Stored:
  """Returns what files hold with the nodes of the parameters, or raises."""
  if params is not None:
    checks.chain_lengths(params, list(stored.state.num_blocks))  # Or raises.
    differ = storage.difference(params, stored.state)
    if differ:
      name, ours, theirs = differ
      raise ValueError(
        f'params has {name!r} with the shape {ours}, but in the files it is '
        f'{theirs}: give the parameters of that training.'
      )
    return storage.in_form_of(params, stored)
  described = stored.record.get('nodes', 0)  # Older versions saved none.
  if described is None:
    raise ValueError(
      'params is missing: the parameters have nodes that files do not have, '
      'such as NamedTuples, so give the parameters that init took, or their '
      'shapes: restore(folder, params).'
    )
  if described:
    shared, chain = nodes.form_of(described)
    return storage.in_form_of_halves((shared, chain), stored)
  return stored
