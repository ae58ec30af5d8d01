"""What workers hold between rounds, and the global network they hold together.

Both are pytrees; nothing else of a training changes from round to round.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from resist_jax.decomposition import Assignment, join, split
from resist_jax.errors import FOREIGN, one_line
from resist_jax.exchange import Norms, collectives, participation
from resist_jax.rounds import average as average_lib
from resist_jax.rounds.arrays import first_copy, from_here, is_key, place, rows
from resist_jax.rounds.mesh import REPLICATED, SHARDED
from resist_jax.rounds.moments import Parts, reformed, take_apart
from resist_jax.rounds.protocol import Protocol

PyTree = Any


class State(NamedTuple):
  """What workers hold between rounds.

  Attributes:
    shared: Parameters outside the partitioned chains, `[S, ...]`, equal on all
      workers; sharded over the axis `worker`.
    chain: For each partitioned chain, its blocks `[S, K, ...]`; sharded too.
    assignments: For each partitioned chain, which blocks these are; replicated.
    round: How many rounds are done, `int32[]` on the host.
    num_blocks: L of each partitioned chain.
    carried: The optimiser's moments, each `{'shared': ..., 'chain': ...}`, and
      the rest of its state `[S, ...]`, where it is carried from round to round;
      None where it restarts.
    error: What rounding removed from the changes sent so far, see
      `collectives.error_shapes`; None where nothing is kept.
    norms: Norms of the updates of recent rounds, replicated; None where nobody
      judges updates.
    outer: The state of the outer optimiser, as `carried`; None without one.
    average: The average over rounds, as a single moment, and how many rounds
      it has seen, `int32[S]`; None where nobody averages.
    draw: The number of the assignments, which decides them together with the
      seed. It is that of the round, or less where rounds were trained as one.
  """

  shared: PyTree
  chain: dict[str, PyTree]
  assignments: dict[str, Assignment]
  round: np.int32
  num_blocks: dict[str, int]
  carried: Parts | None = None
  error: PyTree | None = None
  norms: Norms | None = None
  outer: Parts | None = None
  average: Parts | None = None
  draw: np.int32 = np.int32(0)


class Whole(NamedTuple):
  """The global network between two rounds, on the host.

  Attributes:
    params: Parameters, with chains `[L, ...]`.
    carried: The optimiser's moments, each shaped as the parameters, and the
      rest of its state, where it is carried; None where it restarts.
    outer: The same of the outer optimiser; None without one.
    average: The average over rounds, see `average.first`; None without one.
  """

  params: dict[str, PyTree]
  carried: Parts | None = None
  outer: Parts | None = None
  average: Parts | None = None


def with_carried(
  whole: Whole, optimizer: optax.GradientTransformation, protocol: Protocol
) -> Whole:
  """Adds or drops what is kept besides parameters, as a protocol requires.

  Args:
    whole: The global network.
    optimizer: Its `init` gives the state where there is none yet.
    protocol: Whether the state is carried, and whether there are an outer
      optimiser and an average.

  Returns:
    The global network with these, or without.

  Raises:
    ValueError: If a moment does not keep the blocks of a chain apart.
  """

  def kept(optimizer, parts, field):
    if parts is None:
      return _first_parts(optimizer, whole.params, protocol, field)
    return _in_nodes_of(optimizer, whole.params, parts, field)

  carried, outer, average = None, None, None
  if protocol.carry:
    carried = kept(optimizer, whole.carried, 'carry')
  if protocol.outer is not None:
    outer = kept(protocol.outer, whole.outer, 'outer')
  if protocol.average:
    average = whole.average or average_lib.first(whole.params)
  return whole._replace(carried=carried, outer=outer, average=average)


def _in_nodes_of(optimizer, params: PyTree, parts: Parts, field: str) -> Parts:
  """Returns parts with the nodes that the state of an optimiser has."""
  state = jax.eval_shape(lambda p: _init(optimizer, p, field), params)
  first = take_apart(optimizer, state)
  return reformed(first.moments, parts)


def _first_parts(optimizer, params, protocol, field) -> Parts:
  """Returns the first state of an optimiser, in parts."""
  # On a CPU where there is one: an accelerator may not hold the whole network.
  with jax.default_device(_host_device()):
    opt_state = jax.device_get(_init(optimizer, params, field))
  parts = take_apart(optimizer, opt_state)
  if any(map(is_key, parts.rest)):
    raise ValueError(
      f'{field} is set, but its optimiser draws random numbers, and its key is '
      f'none of its moments: use another one, or do without {field}.'
    )
  exact = protocol.exchange.format.exact or protocol.average_gradients
  if not exact and any(_are_weights(m, params) for m in parts.moments):
    raise ValueError(
      f'{field} is set, and its optimiser keeps weights, whose small changes a '
      'wire format with fewer bits would round away: use wire_format float32.'
    )
  for name, length in protocol.num_blocks.items():
    for moment in parts.moments:
      try:
        chain = split(moment, [name])[1]
      except KeyError as error:  # All around the chain is masked.
        raise ValueError(
          f'{field} is set, but its optimiser keeps a moment that has no place '
          f'for chain {name!r}: give optax.multi_transform and optax.masked '
          'labels or a mask for each array.'
        ) from error
      for leaf in jax.tree.leaves(chain):
        if not leaf.ndim or len(leaf) != length:
          raise ValueError(
            f'{field} is set, but its optimiser keeps a moment of shape '
            f'{leaf.shape} for the {length} blocks of chain {name!r}: use an '
            'optimiser whose moments have the shapes of the parameters, or do '
            f'without {field}.'
          )
  return parts


def _init(optimizer, params, field):
  """Calls the `init` of an optimiser that may be anybody's program."""
  try:
    return optimizer.init(params)
  except FOREIGN as error:
    name = 'outer' if field == 'outer' else 'optimizer'
    raise ValueError(
      f'{name} cannot be used ({one_line(error)}): its init gets the '
      'parameters; use one that takes them, such as optax.adamw(1e-3).'
    ) from error


def _are_weights(moment: PyTree, params: PyTree) -> bool:
  """Returns whether a moment begins as the parameters, as an average does."""
  if jax.tree.structure(moment) != jax.tree.structure(params):
    return False  # Such as where some are masked.
  pairs = zip(jax.tree.leaves(moment), jax.tree.leaves(params), strict=True)
  found = [(np.asarray(x), np.asarray(y)) for x, y in pairs]
  return any(y.any() for _, y in found) and all(
    np.array_equal(x, y) for x, y in found
  )


def _host_device():
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # Where JAX_PLATFORMS names accelerators only.
    return jax.local_devices()[0]


def distribute(
  whole: Whole,
  protocol: Protocol,
  mesh: Mesh,
  assignments: Mapping[str, Assignment],
  round_index: int = 0,
) -> State:
  """Hands the global network out to the workers; a device gets its part only.

  Args:
    whole: The global network.
    protocol: Who holds what.
    mesh: Where the workers live.
    assignments: The assignment of each partitioned chain, on the host.
    round_index: How many rounds are done.

  Returns:
    The state before a round, on the mesh.

  Raises:
    ValueError: If the network lacks what the protocol keeps beside it, or if no
      worker is to hold some block.
  """
  S = protocol.num_workers
  for name in ('outer', 'average'):
    if getattr(protocol, name) and getattr(whole, name) is None:
      raise ValueError(
        f'whole.{name} is None, but the protocol has {name}: begin with '
        'with_carried(whole, optimizer, protocol).'
      )
  if protocol.outer is None:  # A protocol before this one may have kept it.
    whole = whole._replace(outer=None)
  for name, length in protocol.num_blocks.items():
    lost = set(range(length)) - set(np.ravel(assignments[name].slots).tolist())
    if lost:
      raise ValueError(
        f'no worker holds block {min(lost)} of {name}: let the slots of '
        'assignments hold each block.'
      )

  def blocks_of(x, assignment):
    x = np.asarray(x)
    # An empty slot holds L, one past the end.
    padded = np.concatenate([x, np.zeros_like(x[:1])])
    shape = (assignment.slots.shape[1], *x.shape[1:])
    return _place_rows(
      lambda s: padded[assignment.slots[s]], S, shape, x.dtype, mesh
    )

  def hand_out(tree):
    shared, chain = split(tree, assignments)
    chain = {
      name: jax.tree.map(lambda x, a=a: blocks_of(x, a), chain[name])
      for name, a in assignments.items()
    }
    return {'shared': replicate(shared, S, mesh), 'chain': chain}

  held = hand_out(whole.params)
  return State(
    **held,
    assignments=place_assignments(assignments, mesh),
    round=np.int32(round_index),
    num_blocks=dict(protocol.num_blocks),
    error=_no_error(held['shared'], protocol, mesh),
    norms=place_norms(None, protocol, mesh),
    draw=np.int32(round_index),
    **map_kept(whole, hand_out, lambda rest: replicate(rest, S, mesh)),
  )


def map_kept(
  of: State | Whole,
  of_moment: Callable[[PyTree], PyTree],
  of_rest: Callable[[list[Any]], list[Any]] = lambda rest: rest,
) -> dict[str, Any]:
  """Applies functions to all that is kept besides the parameters.

  Args:
    of: A state or a global network.
    of_moment: Gets each moment.
    of_rest: Gets all that is no moment.

  Returns:
    `carried`, `outer` and `average`, each None where there is none.
  """
  return {
    name: parts
    and Parts([of_moment(m) for m in parts.moments], of_rest(parts.rest))
    for name in ('carried', 'outer', 'average')
    for parts in [getattr(of, name)]
  }


def error_shapes(
  shared: PyTree, protocol: Protocol
) -> dict[str, tuple[int, int]] | None:
  """Returns the shapes of `State.error`.

  Args:
    shared: Parameters outside the partitioned chains, `[S, ...]`, or shapes.
    protocol: Whether there is error feedback.

  Returns:
    `(S, n)` by name; None where the protocol keeps none.
  """
  if not protocol.keeps_error:
    return None
  sizes = [math.prod(x.shape[1:]) for x in jax.tree.leaves(shared)]
  # orbax saves no arrays of size zero, so there is one where all is cut, too.
  return collectives.error_shapes(max(sum(sizes), 1), protocol.num_workers)


def _no_error(shared, protocol, mesh) -> dict[str, jax.Array] | None:
  """Returns error feedback of zeros."""
  shapes = error_shapes(shared, protocol)
  if shapes is None:
    return None
  return {
    name: _place_rows(lambda _, n=n: np.zeros(n), S, (n,), np.float32, mesh)
    for name, (S, n) in shapes.items()
  }


def place_norms(
  norms: Norms | None, protocol: Protocol, mesh: Mesh
) -> Norms | None:
  """Copies norms of recent rounds to all devices, where a protocol has a use.

  Args:
    norms: On the host; None for those before the first round.
    protocol: Whether it judges updates.
    mesh: Where the workers live.

  Returns:
    The norms on the mesh, or None.
  """
  if not protocol.judges_updates:
    return None
  norms = norms or participation.no_norms()
  everywhere = NamedSharding(mesh, REPLICATED)
  arrays = [np.asarray(x, np.float32) for x in norms]
  return Norms(*(place(x, everywhere) for x in arrays))


def place_assignments(
  assignments: Mapping[str, Assignment], mesh: Mesh
) -> dict[str, Assignment]:
  """Copies assignments to all devices."""
  everywhere = NamedSharding(mesh, REPLICATED)
  return {
    name: jax.tree.map(lambda x: place(x, everywhere), assignment)
    for name, assignment in assignments.items()
  }


def assignments_on_host(state: State) -> dict[str, Assignment]:
  """Returns the assignments of a state as NumPy arrays.

  They come from the host, not from a program, so nothing is waited for.
  """
  return {
    name: jax.tree.map(from_here, assignment)
    for name, assignment in state.assignments.items()
  }


def replicate(tree: PyTree, num_workers: int, mesh: Mesh) -> PyTree:
  """Gives every worker a copy.

  Args:
    tree: Pytree of arrays.
    num_workers: S.
    mesh: Where the workers live.

  Returns:
    Pytree of arrays `[S, ...]`, sharded over the mesh.
  """

  def copies(x):
    x = np.asarray(x)
    return _place_rows(lambda _: x, num_workers, x.shape, x.dtype, mesh)

  return jax.tree.map(copies, tree)


def _place_rows(row_of, num_workers, shape, dtype, mesh) -> jax.Array:
  """Makes an array `[S, ...]`; each device gets only its workers' rows."""

  def rows_at(index):
    first, stop, _ = index[0].indices(num_workers)
    rows = np.stack([row_of(worker) for worker in range(first, stop)])
    return rows.astype(dtype)

  sharding = NamedSharding(mesh, SHARDED)
  shape = (num_workers, *shape)
  return jax.make_array_from_callback(shape, sharding, rows_at)


def holders(
  slots: np.ndarray, num_blocks: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds a holder of every block.

  Args:
    slots: `int32[S, K]`.
    num_blocks: L.

  Returns:
    `(worker, slot)`, `int32[L]` each: the first worker that holds the block,
    and its slot there.

  >>> holders(np.array([[1, 2], [0, 1]]), 3)[0].tolist()
  [1, 0, 0]
  """
  found = slots[:, :, None] == np.arange(num_blocks)
  worker = found.any(axis=1).argmax(axis=0)
  slot = found[worker, :, np.arange(num_blocks)].argmax(axis=1)
  return worker.astype(np.int32), slot.astype(np.int32)


def assemble(state: State) -> Whole:
  """Undoes `distribute`: the global network between two rounds.

  Args:
    state: The state after a round; its arrays may lie anywhere.

  Returns:
    The global network, on the host of every process.
  """
  # Copies are equal between rounds: read those of the first holder.
  assignments = assignments_on_host(state)
  where = {
    name: holders(assignments[name].slots, int(length))
    for name, length in state.num_blocks.items()
  }

  def gather(shared, chain):
    shared = jax.tree.map(first_copy, shared)
    whole = {
      name: jax.tree.map(lambda x, i=index: rows(x, *i), chain[name])
      for name, index in where.items()
    }
    return join(shared, whole)

  def first_copies(rest):
    return jax.tree.map(first_copy, rest)

  return Whole(
    gather(state.shared, state.chain),
    **map_kept(state, lambda moment: gather(**moment), first_copies),
  )


def averaged(state: State) -> State:
  """Returns a state whose parameters are the average over rounds.

  Args:
    state: A state between two rounds.

  Returns:
    A state to test and to assemble, which shares its arrays; the state itself
    where nobody averages.
  """
  if state.average is None:
    return state
  (average,), _ = state.average
  shared, chain = collectives.narrow(
    (average['shared'], average['chain']), (state.shared, state.chain)
  )
  return state._replace(shared=shared, chain=chain, average=None)
