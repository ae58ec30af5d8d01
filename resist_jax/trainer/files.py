"""A state in a folder: the files of its newest save, and which one that is."""

from collections.abc import Mapping
import contextlib
import hashlib
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from resist_jax import folders
from resist_jax.errors import message
from resist_jax.rounds import State, checks, nodes, storage
from resist_jax.rounds.manifest import check, manifest

PyTree = Any

_POINTER = 'state.txt'  # Names the newest whole folder, and lists its files.
_OF_ORBAX = 'orbax.checkpoint'  # A file in each folder that orbax has written.


class _Newest(NamedTuple):
  """What a pointer says.

  Attributes:
    name: The newest whole folder beside it, `round_N` or `round_N_again`.
    digest: SHA-256 of the list of the folder's files, as hexadecimal digits.
    files: The list, see `manifest`; older versions wrote none.
  """

  name: str
  digest: str
  files: dict[str, str] | None


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
  storage.check_place(folder, 'folder')
  name = f'round_{int(state.round)}'
  newest = _pointed_at(folder / _POINTER)
  if newest and newest.name == name:
    name = f'{name}_again'  # The one that is there stays whole meanwhile.
  place = folder / name
  if os.path.lexists(place) and not (place / _OF_ORBAX).exists():
    raise ValueError(
      f'folder {folder} holds {name}, which is no state: move that away, or '
      'save into another folder.'
    )
  described = nodes.described([state.shared, state.chain])
  storage.write(place, state, {'nodes': described, **record})
  if jax.process_index() == 0:
    folders.flush(place)  # Before the older one is deleted.
    _point_to(folder / _POINTER, place)
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
  newest = _pointed_at(folder / _POINTER)
  if newest is None:
    raise ValueError(
      f'folder {folder} holds no state, or its {_POINTER} is damaged: save '
      'one there first, or restore another folder.'
    )
  saved = folder / newest.name
  try:
    problem = _problem(saved, newest)
  except PermissionError as error:  # It says nothing about what a file holds.
    raise ValueError(
      f'folder {saved} cannot be read ({message(error)}): let this user read '
      'all of it.'
    ) from error
  if problem:
    raise ValueError(
      f'the state in {saved} is damaged: {problem}. Restore another folder.'
    )
  return _in_their_nodes(storage.read(saved, mesh), params)


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
        f'params has {name!r} as {ours}, but in the files it is {theirs}: give '
        'the parameters of that training.'
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


def _point_to(pointer: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes a folder the newest whole one, and deletes the others."""
  files = _lines(manifest(folder))
  with folders.replacing(pointer) as part:
    part.write_text(f'{folder.name} {_digest(files)}\n{files}')
  for other in folder.parent.glob('round_*'):
    # Saves that were stopped have left some behind, too, whole or in part.
    name = rf'round_\d+(_again)?({storage.UNFINISHED})?'
    ours = re.fullmatch(name, other.name)
    if not ours or other.name == folder.name:
      continue
    old = other
    if not ours[2]:
      if not (other / _OF_ORBAX).exists():  # Of somebody else.
        continue
      with contextlib.suppress(OSError):  # Half of it is still known as ours.
        old = other.rename(f'{other}.orbax-checkpoint-tmp')
    shutil.rmtree(old, ignore_errors=True)


def _pointed_at(pointer: pathlib.Path) -> _Newest | None:
  """Reads what `_point_to` wrote; None if it is missing or damaged."""
  if not pointer.is_file():
    return None
  content = pointer.read_bytes().decode(errors='replace')
  found = re.fullmatch(r'(\w+) ([0-9a-f]{64})\n(.*)', content, re.DOTALL)
  if not found:
    return None
  name, digest, lines = found.groups()
  if not lines:
    return _Newest(name, digest, None)
  if _digest(lines) != digest:
    return None
  pairs = [line.rsplit(' ', 1) for line in lines.split('\n')[:-1]]
  return _Newest(name, digest, dict(pairs))


def _problem(folder: pathlib.Path, newest: _Newest) -> str | None:
  """Returns what is wrong with a folder's files; None if nothing is."""
  if newest.files is not None:
    return check(folder, newest.files)
  same = _digest(_lines(manifest(folder))) == newest.digest
  return None if same else 'its files are not those that were saved'


def _lines(files: Mapping[str, str]) -> str:
  return ''.join(f'{name} {digest}\n' for name, digest in files.items())


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
