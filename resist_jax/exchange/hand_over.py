"""The exchange in which a block goes straight to its next worker.

Each column of blocks (see `dealing.py`) moves by one cyclic permute that the
data choose among S static ones, so one compilation serves every deal. Nothing
larger than a sub-network is built anywhere. It runs inside `shard_map`, on the
W = S / D workers of a device.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from resist_jax.decomposition.assignments import Assigner, Assignment, Route
from resist_jax.exchange import collectives, compression
from resist_jax.exchange.collectives import WORKER, Good

PyTree = Any


def hand_over(
  chain: PyTree,
  before: Assignment,
  after: Assignment,
  dealer: Assigner,
  name: str,
  encoding: str = 'float32',
  good: Good | None = None,
  agreed: PyTree | None = None,
) -> PyTree:
  """Aggregates a chain and deals it again, moving only what changes hands.

  Guests go home, where the owner takes the mean with its own copy; every column
  moves on; the next guests are lent. It equals `take(aggregate(...),
  next_slots)` on every worker.

  Args:
    chain: Pytree of arrays `[W, K, ...]`, the blocks of this device's workers.
    before: The deal of these, its arrays `[W, ...]` for this device's workers
      but `shifts` and `loans`, which are whole.
    after: The deal after it, likewise.
    dealer: Who dealt both.
    name: Of the chain. The choice of column j is made in the scope
      `NAME_move_j`, that of guest g in `NAME_return_g` and `NAME_lend_g`.
    encoding: Of what is sent, see `compression.encode`.
    good: The workers to average over; None for all.
    agreed: As `chain`, before local training: what a block is where no holder
      is good. None for zeros.

  Returns:
    Pytree of arrays `[W, K, ...]`, the blocks of the next round.
  """
  C = dealer.num_columns

  def send(blocks, routes, choice, scope):
    with jax.named_scope(f'{name}_{scope}'):
      return _send(blocks, routes, choice, encoding)

  chain = _return_guests(chain, before, dealer, send, good, agreed)
  handed = jax.tree.map(jnp.zeros_like, chain)
  for j in range(C):
    leaving = jnp.take_along_axis(before.place, after.order[:, j : j + 1], 1)
    block = _pick(chain, leaving[:, 0])
    block = send(block, dealer.moves(j), after.shifts[j], f'move_{j}')
    handed = _put(handed, after.place[:, j], block)
  for j in {dealer.lent_column(g) for g in range(len(dealer.borrowers))}:
    # What an owner lends, it keeps as its borrowers will read it.
    block = _rounded(_pick(handed, after.place[:, j]), encoding)
    handed = _put(handed, after.place[:, j], block)
  for g in range(len(dealer.borrowers)):
    block = _pick(handed, after.place[:, dealer.lent_column(g)])
    block = send(block, dealer.lendings(g), after.loans[g], f'lend_{g}')
    handed = _put(handed, after.place[:, C + g], block)
  return handed


def _return_guests(
  chain, deal: Assignment, dealer: Assigner, send, good, agreed
) -> PyTree:
  """Averages every own block with the copies of it that were lent.

  Of good workers: an owner knows its borrowers, and so which copies count.
  """
  S, C = dealer.num_workers, dealer.num_columns
  W = deal.slots.shape[0]
  here = lax.axis_index(WORKER) * W + jnp.arange(W)
  copies = jnp.ones(deal.slots.shape, jnp.float32)
  copies = collectives.zero_others(copies, good)
  chain = collectives.zero_others(chain, good)
  for g, borrowers in enumerate(dealer.borrowers):
    home = deal.place[:, dealer.lent_column(g)]
    guest = _pick(chain, deal.place[:, C + g])
    routes = [_reverse(route) for route in dealer.lendings(g)]
    guest = send(guest, routes, deal.loans[g], f'return_{g}')
    borrower = (here + deal.loans[g]) % S
    lent = jnp.isin(borrower, jnp.array(borrowers))
    if good is not None:
      lent &= good.everywhere[borrower]
    chain = _add(chain, home, guest)
    copies = _add(copies, home, lent.astype(jnp.float32))

  def divide(x):
    return x / _per_slot(jnp.maximum(copies, 1), x).astype(x.dtype)

  if dealer.borrowers:
    chain = jax.tree.map(divide, chain)
  if agreed is None:
    return chain
  return jax.tree.map(
    lambda x, old: jnp.where(_per_slot(copies, x) > 0, x, old), chain, agreed
  )


def _per_slot(numbers: jax.Array, x: jax.Array) -> jax.Array:
  """Shapes `[W, K]` so that it goes with `[W, K, ...]`."""
  return numbers.reshape(numbers.shape + (1,) * (x.ndim - 2))


def _pick(chain: PyTree, slot: jax.Array) -> PyTree:
  """Returns one block of each worker, `[W, ...]`."""
  W = slot.shape[0]
  return jax.tree.map(lambda x: x[jnp.arange(W), slot], chain)


def _put(chain: PyTree, slot: jax.Array, block: PyTree) -> PyTree:
  """Writes one block of each worker; one past the last slot drops it."""
  W = slot.shape[0]
  return jax.tree.map(
    lambda x, y: x.at[jnp.arange(W), slot].set(y, mode='drop'), chain, block
  )


def _add(chain: PyTree, slot: jax.Array, block: PyTree) -> PyTree:
  """Adds one block of each worker to one of its slots."""
  W = slot.shape[0]
  return jax.tree.map(
    lambda x, y: x.at[jnp.arange(W), slot].add(y), chain, block
  )


def _rounded(blocks: PyTree, encoding: str) -> PyTree:
  """Rounds one block of each worker as sending it would."""
  if encoding == 'float32':
    return blocks

  def round_one(block):
    flat, unravel = ravel_pytree(block)
    return unravel(compression.rounded(flat, encoding))

  return jax.vmap(round_one)(blocks)


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
    choice: `int32`, which route; the same everywhere.
    encoding: See `compression.encode`; a block that stays is left as it is.

  Returns:
    Pytree of arrays `[W, ...]`: what each worker received, or zeros.
  """
  one = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), blocks)
  empty, unravel = ravel_pytree(one)

  def follow(route: Route):
    def branch(blocks):
      if all(source == target for source, target in route):
        return blocks
      flat = jax.vmap(lambda t: ravel_pytree(t)[0])(blocks)
      messages = jax.vmap(lambda x: compression.encode(x, encoding))(flat)
      messages = _deliver(messages, route)
      flat = jax.vmap(lambda m: compression.decode(m, empty.size, encoding))(
        messages
      )
      return jax.vmap(unravel)(flat)

    return branch

  return lax.switch(choice, [follow(route) for route in routes], blocks)


def _deliver(messages: jax.Array, route: Route) -> jax.Array:
  """Carries messages `[W, m]` from worker to worker, zeros where none goes."""
  W = messages.shape[0]
  device = lax.axis_index(WORKER)
  out = [jnp.zeros_like(messages[0])] * W
  for i in range(W):
    for k in range(W):
      # From each device's worker i to some device's worker k.
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
