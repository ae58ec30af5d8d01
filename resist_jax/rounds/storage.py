"""A state in files, each part written by the process that holds it.

The files hold the blocks of each worker as they lie on the devices, and the
slots that say which blocks they are, so any number of workers and devices can
continue from them.
"""

from collections.abc import Mapping
import hashlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from resist_jax.decomposition import Assignment, split
from resist_jax.errors import ConfigError
from resist_jax.exchange import WORKER, Norms
from resist_jax.rounds.arrays import first_copy, from_here
from resist_jax.rounds.mesh import SHARDED
from resist_jax.rounds.moments import Parts
from resist_jax.rounds.nodes import (
  dtypes_by_name,
  first_difference,
  shapes_by_name,
  with_nodes_of,
)
from resist_jax.rounds.protocol import Protocol, hold_the_same
from resist_jax.rounds.state import (
  State,
  Whole,
  assemble,
  assignments_on_host,
  map_kept,
  place_assignments,
  place_norms,
  replicate,
)

PyTree = Any

# The end of the name, as a pattern, of a folder that orbax has not finished.
UNFINISHED = r'\.orbax-checkpoint-tmp(?:-[0-9]+)?'


class Stored(NamedTuple):
  """What the files of a state hold.

  Attributes:
    state: As it was saved, but what is equal on all workers is without the axis
      S and on the host. Assignments hold slots only.
    record: JSON values that were saved with it.
  """

  state: State
  record: dict[str, Any]


def check_place(folder: pathlib.Path, what: str) -> None:
  """Refuses a path below which orbax would not find what it has written.

  Args:
    folder: The folder.
    what: What the error message calls it.

  Raises:
    ConfigError: If orbax would take the path for a pattern or a URL.
  """
  path = str(folder.absolute())
  if re.search(r'[*?]|\[.+\]', path):
    problem = 'reads *, ? and [] in a path as patterns'
  elif re.match(r'/(gs|s3|az|hf)(/|$)', path):
    problem = f'takes /{folder.absolute().parts[1]} for the store of a cloud'
  else:
    return
  raise ConfigError(
    f'{what} is {path}, but orbax, which saves there, {problem}: choose '
    'another path.'
  )


def write(
  folder: pathlib.Path, state: State, record: Mapping[str, Any]
) -> None:
  """Writes a state; the folder is whole or not there at all.

  Args:
    folder: Absolute path; one that exists is replaced.
    state: A state between two rounds.
    record: JSON values to save with it.
  """
  begin(folder, state, record).result()


def begin(
  folder: pathlib.Path,
  state: State,
  record: Mapping[str, Any],
  timeout: int | None = None,
) -> Any:
  """Begins to write a state, which goes on while the next round runs.

  Args:
    folder: See `write`.
    state: A state between two rounds; the caller may give it to a round at
      once, because its numbers are copied to the host first.
    record: JSON values to save with it.
    timeout: Seconds that orbax waits; None for its own choice.

  Returns:
    An object whose `result()` waits until the folder is whole, and raises what
    went wrong.
  """
  from orbax.checkpoint import v1 as ocp  # Slow to import.

  arrays: Any = {'params': _parts(state.shared, state.chain)}
  if state.carried is not None:
    arrays |= _optimiser_parts(state.carried)
  if state.outer is not None:
    arrays['outer'] = _optimiser_parts(state.outer)
  if state.average is not None:
    arrays['average'] = _optimiser_parts(state.average)
  if state.error is not None:
    arrays['error'] = {'workers': state.error}
  assignments = assignments_on_host(state)
  description: Any = {
    'round': int(state.round),
    'draw': int(state.draw),
    'num_blocks': {k: int(n) for k, n in state.num_blocks.items()},
    'slots': {name: a.slots.tolist() for name, a in assignments.items()},
    'carried': state.carried is not None,
    'outer': state.outer is not None,
    'average': state.average is not None,
    'norms': state.norms and [from_here(x).tolist() for x in state.norms],
    'record': dict(record),
  }
  description['digest'] = _digest_of_description(description)
  context = _context()
  if timeout is not None:
    context.asynchronous.timeout_secs = timeout
  with context:
    return ocp.save_async(
      str(folder), arrays, overwrite=True, custom_metadata=description
    )


def read(folder: pathlib.Path, mesh: Mesh) -> Stored:
  """Reads a state; what workers hold goes straight to their devices.

  Args:
    folder: Absolute path.
    mesh: Where the workers live.

  Returns:
    What the files hold.
  """
  sharding = NamedSharding(mesh, SHARDED)

  def target(path, leaf):
    workers = any(getattr(key, 'key', None) == 'workers' for key in path)
    if workers and leaf.shape[0] % mesh.shape[WORKER] == 0:
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return _host_array(path, leaf)

  with _context():
    return _read(folder, target)


def read_on_host(folder: pathlib.Path) -> Stored:
  """Reads a state whole, without waiting for other processes.

  Orbax counts what it does, and processes that have counted differently would
  wait for each other forever: each must call this equally often.

  Args:
    folder: Absolute path.

  Returns:
    What the files hold.
  """
  context = _context()
  context.multiprocessing.primary_host = jax.process_index()
  context.multiprocessing.active_processes = {jax.process_index()}
  with context:
    return _read(folder, _host_array)


def _context() -> Any:
  """Returns how orbax writes and reads: without files that nobody needs.

  It would note the shardings and kinds of arrays when they were written.
  Reading asks for shardings of its own, and would stumble over such a file if
  it is damaged.
  """
  from orbax.checkpoint import v1 as ocp  # Slow to import.

  context = ocp.Context()
  context.array.saving.enable_write_sharding_file = False
  context.array.saving.array_metadata_store = None
  return context


def _host_array(path, leaf):
  del path
  return np.zeros(leaf.shape, leaf.dtype)


def _read(folder: pathlib.Path, target) -> Stored:
  """Reads a state into what `target(path, leaf)` gives for each array."""
  from orbax.checkpoint import v1 as ocp  # Slow to import.

  saved: Any = ocp.metadata(str(folder))
  description = dict(saved.custom_metadata)
  digest = description.pop('digest', None)  # Older versions saved none.
  if digest not in (None, _digest_of_description(description)):
    raise ValueError('its description does not match its digest')
  targets = jax.tree_util.tree_map_with_path(target, saved.metadata)
  arrays: Any = ocp.load(str(folder), targets)
  carried, outer, average = None, None, None
  norms = description.get('norms')
  if description['carried']:
    carried = _optimiser_from_parts(arrays)
  if description.get('outer'):
    outer = _optimiser_from_parts(arrays.get('outer', {}))
  if description.get('average'):
    average = _optimiser_from_parts(arrays['average'])
  state = State(
    **_from_parts(arrays['params']),
    assignments={
      name: Assignment(np.array(table, np.int32))
      for name, table in description['slots'].items()
    },
    round=np.int32(description['round']),
    num_blocks=description['num_blocks'],
    carried=carried,
    error=arrays.get('error', {}).get('workers'),
    norms=norms and Norms(*norms),
    outer=outer,
    average=average,
    draw=np.int32(description.get('draw', description['round'])),
  )
  return Stored(state, description['record'])


def difference(params: PyTree, state: State) -> tuple[str, Any, Any] | None:
  """Returns where parameters are others than those of a state from files.

  Args:
    params: Global parameters, or their shapes.
    state: State of a `Stored`.

  Returns:
    The name of a leaf, its shape in `params`, and that in the files, None where
    it is missing, or its dtypes, where these differ; None if there is no
    difference.
  """
  try:
    shared, chain = split(params, state.num_blocks)
  except KeyError:
    shared, chain = params, {}
  held = {
    name: (int(state.num_blocks[chain_name]), *shape)
    for chain_name, slots in state.chain.items()
    for name, shape in shapes_by_name({chain_name: slots}, 2).items()
  }
  shapes = first_difference(
    {**shapes_by_name(shared), **shapes_by_name(chain)},
    {**shapes_by_name(state.shared), **held},
  )
  return shapes or first_difference(
    {**dtypes_by_name(shared), **dtypes_by_name(chain)},
    {**dtypes_by_name(state.shared), **dtypes_by_name(state.chain)},
  )


def in_form_of(params: PyTree, stored: Stored) -> Stored:
  """Returns what files hold in the nodes that the parameters have.

  Args:
    params: Global parameters, or their shapes.
    stored: What the files hold; unchanged if it is that of another network.
  """
  try:
    return in_form_of_halves(split(params, stored.state.num_blocks), stored)
  except KeyError:
    return stored


def in_form_of_halves(halves: tuple[PyTree, PyTree], stored: Stored) -> Stored:
  """Returns what files hold in the nodes of the shared part and the chains.

  Args:
    halves: Both, as `decomposition.split` returns them.
    stored: See `in_form_of`.
  """

  def formed(shared, chain):
    return {
      'shared': with_nodes_of(halves[0], shared),
      'chain': with_nodes_of(halves[1], chain),
    }

  state = stored.state
  state = state._replace(
    **formed(state.shared, state.chain),
    **map_kept(state, lambda moment: formed(**moment)),
  )
  return stored._replace(state=state)


def as_state(
  stored: Stored,
  protocol: Protocol,
  mesh: Mesh,
  assignments: Mapping[str, Assignment],
) -> State | None:
  """Returns the state that workers can continue with as they are.

  Args:
    stored: What the files hold.
    protocol: Who holds what from now on.
    mesh: Where the workers live.
    assignments: What the protocol assigns in the next round, on the host.

  Returns:
    The state; None if the protocol assigns other blocks, or keeps other things
    besides the parameters.
  """
  state, S = stored.state, protocol.num_workers
  feedback = _num_rows(state.error)
  if (
    not hold_the_same(state.assignments, assignments)
    or (state.carried is not None) != protocol.carry
    or (state.outer is not None) != (protocol.outer is not None)
    or (state.average is not None) != bool(protocol.average)
    or feedback != (S if protocol.keeps_error else None)
  ):
    return None
  state = _map_equal(state, lambda x: replicate(x, S, mesh))
  return state._replace(
    assignments=place_assignments(assignments, mesh),
    norms=place_norms(state.norms, protocol, mesh),
  )


def as_whole(stored: Stored) -> Whole:
  """Returns the global network, and frees the devices of its parts.

  Args:
    stored: What the files hold; its arrays are deleted.

  Returns:
    The global network, on the host.
  """
  one_row = _map_equal(
    stored.state, lambda tree: jax.tree.map(lambda x: x[None], tree)
  )
  whole = assemble(one_row)
  state = stored.state
  kept = (state.chain, state.carried, state.outer, state.average)
  for leaf in jax.tree.leaves(kept):
    if isinstance(leaf, jax.Array):
      leaf.delete()  # The old parts would lie beside the new ones.
  return whole


def _map_equal(state: State, function) -> State:
  """Applies a function to what is equal on all workers."""

  def of_moment(moment):
    return {**moment, 'shared': function(moment['shared'])}

  return state._replace(
    shared=function(state.shared), **map_kept(state, of_moment, function)
  )


def _num_rows(tree: PyTree) -> int | None:
  leaves = jax.tree.leaves(tree)
  return leaves[0].shape[0] if leaves else None


def _digest_of_description(description: Mapping[str, Any]) -> str:
  text = json.dumps(description, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _parts(shared: PyTree, chain: PyTree) -> dict[str, PyTree]:
  """Returns what to save: once what is equal, and what each worker holds."""
  equal = jax.tree.map(first_copy, shared)
  return {'whole': equal, **({'workers': chain} if chain else {})}


def _optimiser_parts(parts: Parts) -> dict[str, PyTree]:
  """Returns what to save of an optimiser's state."""
  return {
    'moments': [_parts(**moment) for moment in parts.moments],
    'rest': jax.tree.map(first_copy, parts.rest),
  }


def _optimiser_from_parts(arrays: Mapping[str, Any]) -> Parts:
  moments = [_from_parts(parts) for parts in arrays.get('moments', ())]
  return Parts(moments, list(arrays.get('rest', ())))


def _from_parts(parts: PyTree) -> dict[str, PyTree]:
  return {'shared': parts['whole'], 'chain': parts.get('workers', {})}


def digest_of_arrays(tree: PyTree) -> str:
  """Returns a digest of the bytes of a pytree's arrays.

  Args:
    tree: Pytree of arrays, read in the order of `jax.tree.leaves`.

  Returns:
    SHA-256, as hexadecimal digits; equal for equal values wherever they lie.

  >>> digest_of_arrays([np.zeros(2)]) == digest_of_arrays([np.zeros(2)])
  True
  >>> digest_of_arrays([np.zeros(2)]) == digest_of_arrays([np.ones(2)])
  False
  """
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    sha.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  return sha.hexdigest()
