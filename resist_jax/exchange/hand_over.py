"""The exchange in which a block goes straight to its next worker.

Each column of blocks (see `decomposition.assignments`) moves by one cyclic
permute that the data choose among S static ones, so one compilation serves
every assignment. No array larger than a sub-network is built on any device.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from resist_jax.decomposition import Assigner, Assignment, Division, Route
from resist_jax.exchange import compression
from resist_jax.exchange.collectives import (
  WORKER,
  Healthy,
  flatten,
  leading,
  narrow,
  widen,
  with_zero,
  zero_unhealthy,
)
from resist_jax.exchange.interface import Exchange, Load

PyTree = Any


def hand_over(wire_format: str = 'float32', spread: bool = False) -> Exchange:
  """Returns the exchange in which only blocks that change their worker move.

  Replicas return, and the owner averages them with its own copy; every column
  moves on; owners send the next replicas.

  Args:
    wire_format: float32 (exact), bfloat16 or int8; with int8, blocks that move
      take 16 bits, and moments are bfloat16.
    spread: Whether each worker gets blocks from all parts of the chain, see
      `decomposition.Assigner`, instead of any blocks (the paper).

  Returns:
    The exchange. It needs a block for every worker.

  Raises:
    ValueError: If there is no such format, or `spread` is no truth value.
  """
  if not isinstance(spread, bool):
    raise ValueError(f'spread is {spread!r}; it must be True or False.')
  form = compression.wire_format(wire_format)
  return Exchange(
    form,
    partial(check, spread=spread),
    partial(assign, spread=spread),
    partial(exchange, encoding=form.values),
    partial(wire_bytes, encoding=form.values),
    branches,
    hand_over(form.moments, spread) if form.moments else None,
  )


@lru_cache
def assigner(division: Division, spread: bool = False) -> Assigner:
  """Returns what assigns the blocks of a chain for this exchange."""
  return Assigner(*division, spread=spread)


def check(
  division: Division,
  before: Assignment | None = None,
  after: Assignment | None = None,
  *,
  spread: bool,
) -> None:
  """See `Exchange.check`."""
  assigns = assigner(division, spread)
  if before is None or after is None:
    return
  if not assigns.follows(before, after):
    raise ValueError(
      'hand_over cannot reach these slots from those of the round before: let '
      'it assign them, or use exchange=masked_psum.'
    )


def assign(
  division: Division,
  seed: list[int],
  round_index: int,
  before: Assignment | None,
  *,
  spread: bool,
) -> Assignment:
  """See `Exchange.assign`."""
  assigns = assigner(division, spread)
  if before is None or before.owned is None:
    return assigns.at(seed, round_index)
  return assigns.following(before.owned, seed, round_index)


class _Rows(NamedTuple):
  """An assignment as seen by a device.

  Attributes:
    place: `int32[W, C + R]`, see `Assignment`.
    order: `int32[W, C]`.
    shifts: `int32[C]`.
    offsets: `int32[R]`.
  """

  place: jax.Array
  order: jax.Array
  shifts: jax.Array
  offsets: jax.Array


def _rows(assignment: Assignment, first: jax.Array, count: int) -> _Rows:
  place, order = (
    lax.dynamic_slice_in_dim(x, first, count)
    for x in (assignment.place, assignment.order)
  )
  return _Rows(place, order, assignment.shifts, assignment.offsets)


def exchange(
  division: Division,
  blocks: PyTree,
  before: Assignment,
  after: Assignment,
  healthy: Healthy | None = None,
  agreed: PyTree | None = None,
  *,
  encoding: str,
) -> PyTree:
  """See `Exchange.exchange`.

  The choice of column j is made in the scope `move_j`, that of replica r in
  `return_r` and `lend_r`.
  """
  given, blocks, agreed = blocks, widen(blocks), widen(agreed)
  assigns = assigner(division)
  W, C = len(jax.tree.leaves(blocks)[0]), assigns.num_columns
  first = lax.axis_index(WORKER) * W
  old, new = (_rows(x, first, W) for x in (before, after))

  def send(block, routes, choice, scope):
    with jax.named_scope(scope):
      return _send(block, routes, choice, encoding)

  blocks = _return_replicas(blocks, old, assigns, send, healthy, agreed)
  blocks, zero = with_zero(blocks)
  moved = jax.tree.map(lambda x: jnp.full_like(x, zero), blocks)
  for j in range(C):
    leaving = jnp.take_along_axis(old.place, new.order[:, j : j + 1], 1)
    block = _pick(blocks, leaving[:, 0])
    block = send(block, assigns.column_routes(j), new.shifts[j], f'move_{j}')
    moved = _put(moved, new.place[:, j], block)
  for j in assigns.source_columns:
    # An owner keeps its block as the workers of the replicas will read it.
    block = _rounded(_pick(moved, new.place[:, j]), encoding)
    moved = _put(moved, new.place[:, j], block)
  for r in range(assigns.num_replicas):
    block = _pick(moved, new.place[:, assigns.source_column(r)])
    block = send(block, assigns.replica_routes(r), new.offsets[r], f'lend_{r}')
    moved = _put(moved, new.place[:, C + r], block)
  return narrow(moved, given)


def _return_replicas(
  blocks, rows: _Rows, assigns: Assigner, send, healthy, agreed
) -> PyTree:
  """Averages each owned block with its replicas on healthy workers.

  An owner derives which workers hold its replicas, and so which of them count.
  """
  S, C = assigns.num_workers, assigns.num_columns
  W, K = len(rows.place), assigns.num_slots
  here = lax.axis_index(WORKER) * W + jnp.arange(W)
  copies = zero_unhealthy(jnp.ones((W, K), jnp.float32), healthy)
  blocks = zero_unhealthy(blocks, healthy)
  for r, workers in enumerate(assigns.replica_workers):
    home = rows.place[:, assigns.source_column(r)]
    replica = _pick(blocks, rows.place[:, C + r])
    routes = [_reverse(route) for route in assigns.replica_routes(r)]
    replica = send(replica, routes, rows.offsets[r], f'return_{r}')
    holder = (here + rows.offsets[r]) % S
    counts = jnp.isin(holder, jnp.array(workers))
    if healthy is not None:
      counts &= healthy.everywhere[holder]
    blocks = _add(blocks, home, replica)
    copies = _add(copies, home, counts.astype(jnp.float32))

  def divide(x):
    return x / leading(jnp.maximum(copies, 1), x).astype(x.dtype)

  if assigns.num_replicas:
    blocks = jax.tree.map(divide, blocks)
  if agreed is None:
    return blocks
  return jax.tree.map(
    lambda x, old: jnp.where(leading(copies, x) > 0, x, old), blocks, agreed
  )


def _pick(blocks: PyTree, slot: jax.Array) -> PyTree:
  """Returns one block of each worker, `[W, ...]`."""
  W = slot.shape[0]
  return jax.tree.map(lambda x: x[jnp.arange(W), slot], blocks)


def _put(blocks: PyTree, slot: jax.Array, block: PyTree) -> PyTree:
  """Writes one block of each worker; a slot past the last one drops it."""
  W = slot.shape[0]
  return jax.tree.map(
    lambda x, y: x.at[jnp.arange(W), slot].set(y, mode='drop'), blocks, block
  )


def _add(blocks: PyTree, slot: jax.Array, block: PyTree) -> PyTree:
  """Adds one block of each worker to one of its slots."""
  W = slot.shape[0]
  return jax.tree.map(
    lambda x, y: x.at[jnp.arange(W), slot].add(y), blocks, block
  )


def _rounded(blocks: PyTree, encoding: str) -> PyTree:
  """Rounds one block of each worker as sending it would."""
  if encoding == 'float32':
    return blocks

  flat, unflatten = flatten(blocks)
  return unflatten(jax.vmap(lambda x: compression.rounded(x, encoding))(flat))


def _reverse(route: Route) -> Route:
  return tuple((target, source) for source, target in route)


def _send(
  blocks: PyTree,
  routes: Sequence[Route],
  choice: jax.Array,
  encoding: str,
) -> PyTree:
  """Sends one block of each worker along the chosen route.

  Args:
    blocks: Pytree of arrays `[W, ...]`.
    routes: Static; worker numbers over the whole mesh.
    choice: `int32`, which route; the same on all devices.
    encoding: See `compression.encode`; a block that stays is not rounded.

  Returns:
    Pytree of arrays `[W, ...]`: what each worker received, or zeros.
  """

  def follow(route: Route):
    def branch(blocks):
      if all(source == target for source, target in route):
        return blocks
      flat, unflatten = flatten(blocks)
      messages = jax.vmap(lambda x: compression.encode(x, encoding))(flat)
      messages = _deliver(messages, route)
      count = flat.shape[1]
      decode = partial(compression.decode, count=count, encoding=encoding)
      return unflatten(jax.vmap(decode)(messages))

    return branch

  return lax.switch(choice, [follow(route) for route in routes], blocks)


def _deliver(messages: jax.Array, route: Route) -> jax.Array:
  """Carries messages `[W, m]` between workers; zeros where none arrives."""
  W = messages.shape[0]
  device = lax.axis_index(WORKER)
  out = [jnp.zeros_like(messages[0])] * W
  for i in range(W):
    for k in range(W):
      # From worker i of one device to worker k of another.
      pairs = [
        (source // W, target // W)
        for source, target in route
        if source % W == i and target % W == k
      ]
      away = [pair for pair in pairs if pair[0] != pair[1]]
      home = [pair[0] for pair in pairs if pair[0] == pair[1]]
      if away:
        out[k] = out[k] + lax.ppermute(messages[i], WORKER, away)
      if home:
        stays = jnp.isin(device, jnp.array(home))
        out[k] = jnp.where(stays, messages[i], out[k])
  return jnp.stack(out)


def wire_bytes(
  load: Load,
  num_devices: int,
  before: Assignment | None = None,
  after: Assignment | None = None,
  *,
  encoding: str,
) -> float:
  """See `Exchange.bytes`."""
  assigns = assigner(load.division)
  sent: float = (
    expected_messages(assigns, num_devices, load.stays)
    if before is None or after is None
    else messages(assigns, before, after, num_devices)
  )
  return sent * sum(
    compression.message_bytes(size, encoding) for size in load.block_sizes
  )


def messages(
  assigns: Assigner, before: Assignment, after: Assignment, num_devices: int
) -> int:
  """Counts the blocks that devices send to other devices in a round.

  Args:
    assigns: Assigner of the chain.
    before: An assignment.
    after: The assignment after it.
    num_devices: D.

  Returns:
    Replicas that return, blocks that move on, and replicas that are sent.
  """
  per_device = assigns.num_workers // num_devices
  taken = [assigns.column_routes(j)[t] for j, t in enumerate(after.shifts)]
  for assignment in (before, after):
    taken += [
      assigns.replica_routes(r)[t] for r, t in enumerate(assignment.offsets)
    ]
  return sum(_away(route, per_device) for route in taken)


def expected_messages(
  assigns: Assigner, num_devices: int, stays: bool = False
) -> float:
  """Returns the mean of `messages` over all assignments.

  Args:
    assigns: Assigner of the chain.
    num_devices: D.
    stays: Whether each block stays, so that replicas travel only.

  Returns:
    Blocks a round.

  >>> expected_messages(Assigner(22, 4), num_devices=4)
  16.0
  """
  per_device = assigns.num_workers // num_devices

  def mean(routes: list[Route]) -> float:
    return sum(_away(route, per_device) for route in routes) / len(routes)

  columns = range(0 if stays else assigns.num_columns)
  moved = sum(mean(assigns.column_routes(j)) for j in columns)
  # Offset 0 is never drawn: it would lend a block to its owner.
  replicas = range(assigns.num_replicas)
  return moved + 2 * sum(mean(assigns.replica_routes(r)[1:]) for r in replicas)


def _away(route: Route, per_device: int) -> int:
  return sum(s // per_device != t // per_device for s, t in route)


def branches(before: Assignment, after: Assignment) -> dict[str, int]:
  """See `Exchange.branches`."""
  found = {f'move_{j}': int(t) for j, t in enumerate(after.shifts)}
  for action, assignment in (('return', before), ('lend', after)):
    for r, offset in enumerate(assignment.offsets):
      found[f'{action}_{r}'] = int(offset)
  return found
