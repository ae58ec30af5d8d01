"""The exchange by a masked sum over all workers, for any slots."""

from functools import partial
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from resist_jax import decomposition
from resist_jax.decomposition import Assignment, Division
from resist_jax.exchange import compression
from resist_jax.exchange.collectives import (
  WORKER,
  Healthy,
  all_reduce_bytes,
  flatten,
  leading,
  narrow,
  sum_over_workers,
  widen,
  zero_unhealthy,
)
from resist_jax.exchange.interface import Exchange, Load

PyTree = Any


def masked_psum(wire_format: str = 'float32') -> Exchange:
  """Returns the exchange in which all workers sum all blocks.

  Each device scatters its workers' blocks into zeros `[L, ...]`. One psum of
  these, divided by one psum of the number of holders, gives every device the
  mean of each block, and each worker takes its next blocks. Any slots will do,
  also more workers than blocks; but it moves a whole chain per device and makes
  a temporary of that size.

  Args:
    wire_format: float32 (exact), bfloat16 or int8; see `hand_over`.

  Returns:
    The exchange.

  Raises:
    ValueError: If there is no such format.
  """
  form = compression.wire_format(wire_format)
  return Exchange(
    form,
    check,
    assign,
    partial(exchange, encoding=form.values),
    partial(wire_bytes, encoding=form.values),
    moments=masked_psum(form.moments) if form.moments else None,
  )


def check(
  division: Division,
  before: Assignment | None = None,
  after: Assignment | None = None,
) -> None:
  """See `Exchange.check`: any assignment can follow any other."""
  decomposition.slots_per_worker(*division)
  L, S = division.num_blocks, division.num_workers
  for assignment in (before, after):
    if assignment is None:
      continue
    slots = assignment.slots
    if not isinstance(slots, np.ndarray | jax.Array):
      kind = type(slots).__name__
      raise ValueError(
        f'slots are a {kind}; they must be an array int32[S, K].'
      )
    slots = np.asarray(slots)
    if slots.ndim != 2 or len(slots) != S or slots.dtype.kind not in 'iu':
      raise ValueError(
        f'slots are {slots.dtype}{list(slots.shape)}; they must be '
        f'int32[{S}, K].'
      )
    _check_rows(slots, L)
    lost = set(range(L)) - set(slots.ravel().tolist())
    if lost:
      raise ValueError(
        f'no worker holds block {min(lost)} of {L}: slots must hold each block.'
      )


def _check_rows(slots: np.ndarray, length: int) -> None:
  """Checks that each worker's blocks ascend, and that none comes twice."""
  empty = slots == length
  ascend = (np.diff(slots.astype(np.int64), axis=1) > 0) | empty[:, 1:]
  for s, row in enumerate(slots.tolist()):
    if min(row, default=0) < 0 or max(row, default=0) > length:
      problem = 'holds another number'
    elif not ascend[s].all():
      problem = 'does not ascend, or holds a block twice'
    else:
      continue
    raise ValueError(
      f'the slots of worker {s} are {row}, which {problem}: name blocks from 0 '
      f'to {length - 1} in ascending order, then {length} for each empty slot.'
    )


@partial(jax.jit, static_argnums=1)
def _sample(key, division):
  return decomposition.sample_slots(key, *division)


def assign(
  division: Division,
  seed: list[int],
  round_index: int,
  before: Assignment | None,
) -> Assignment:
  """See `Exchange.assign`: each round is assigned afresh."""
  del before
  first, *rest = seed
  key = jax.random.key(first)
  for number in (*rest[:1], round_index, *rest[1:]):
    key = jax.random.fold_in(key, number)
  return Assignment(np.asarray(_sample(key, division)))


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
  """See `Exchange.exchange`; a rounded format needs some temporaries more."""
  given, blocks, agreed = blocks, widen(blocks), widen(agreed)
  L, S = division.num_blocks, division.num_workers
  W = len(jax.tree.leaves(blocks)[0])
  first = lax.axis_index(WORKER) * W
  slots, next_slots = (
    lax.dynamic_slice_in_dim(x.slots, first, W) for x in (before, after)
  )
  if healthy is None:
    holders = lax.psum(decomposition.block_count(slots, L), WORKER)
  else:
    blocks, holders = _healthy_holders(blocks, agreed, slots, L, healthy)

  def divide(total):
    return total / leading(holders, total).astype(total.dtype)

  def take_next(mean):
    return jax.vmap(decomposition.take, in_axes=(None, 0))(mean, next_slots)

  if encoding == 'float32':

    def exchange_leaf(x):
      mine = decomposition.block_sum(x, slots, L)
      return take_next(divide(lax.psum(mine, WORKER)))

    return narrow(jax.tree.map(exchange_leaf, blocks), given)

  def scatter(x, slots_s):
    return divide(decomposition.block_sum(x[None], slots_s[None], L))

  each = jax.tree.map(lambda x: jax.vmap(scatter)(x, slots), blocks)
  flat, unflatten = flatten(each)
  total, _ = sum_over_workers(flat, S, encoding)
  whole = unflatten(total[None])
  return narrow(jax.tree.map(lambda x: take_next(x[0]), whole), given)


def _healthy_holders(blocks, agreed, slots, num_blocks, healthy):
  """Replaces blocks that do not count; also returns how many do, by block."""
  mine = healthy.here[:, None]
  # An empty slot holds L; here those of excluded workers do, too.
  counted = jnp.stack(
    [
      decomposition.block_count(table, num_blocks)
      for table in (jnp.where(mine, slots, num_blocks), slots)
    ]
  )
  trusted, held = lax.psum(counted, WORKER)
  blocks = zero_unhealthy(blocks, healthy)
  if agreed is not None:
    # All holders have the same agreed value of a block, so their mean is it.
    lost = jnp.take(trusted == 0, slots, mode='fill', fill_value=False)

    def restore(x, old):
      return jnp.where(leading(lost, x), old, x)

    blocks = jax.tree.map(restore, blocks, agreed)
  return blocks, jnp.where(trusted > 0, trusted, held)


def wire_bytes(
  load: Load,
  num_devices: int,
  before: Assignment | None = None,
  after: Assignment | None = None,
  *,
  encoding: str,
) -> float:
  """See `Exchange.bytes`: the same for all assignments."""
  del before, after
  L, S = load.division.num_blocks, load.division.num_workers
  # The holders of each block are counted, and the healthy ones apart.
  counts = all_reduce_bytes((1 + load.excludes) * L, S, num_devices)
  return counts + sum(
    all_reduce_bytes(L * size, S, num_devices, encoding)
    for size in load.block_sizes
  )
