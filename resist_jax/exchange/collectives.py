"""The end of a round inside `shard_map`: average, then hand out new blocks.

A device of the mesh looks after W = S / D workers, so every array here leads
with W. The functions name the mesh axis once, `WORKER`. Where a worker is a
group of devices, the first of each group exchange among themselves, and so do
the second. `hand_over.py` is the other way to hand out blocks.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from resist_jax import decomposition
from resist_jax.exchange import compression

PyTree = Any

WORKER = 'worker'
DATA = 'data'  # Inside a worker of several devices, a group.


class Good(NamedTuple):
  """The workers that an aggregate is of; see `health`.

  Attributes:
    here: `bool[W]`, those of this device.
    everywhere: `bool[S]`, all of them, the same on all devices.
  """

  here: jax.Array
  everywhere: jax.Array


def mean_over_workers(
  tree: PyTree,
  num_workers: int,
  encoding: str = 'float32',
  good: Good | None = None,
) -> PyTree:
  """Averages over all workers and gives each of them the result.

  Args:
    tree: Pytree of arrays `[W, ...]`.
    num_workers: S, over the whole mesh.
    encoding: Of what is sent, see `compression.encode`.
    good: The workers to average over; None for all. Without any, the mean is 0.

  Returns:
    Pytree of arrays `[W, ...]`, equal along W and on all devices.
  """
  tree = zero_others(tree, good)
  if encoding == 'float32':
    total = _sum_exactly(tree)
    return jax.tree.map(lambda x: _share(x, num_workers, good), total)
  flat, unflatten = _flatten(tree)
  parts = _share(flat, num_workers, good)
  total, _ = sum_over_workers(parts, num_workers, encoding)
  return unflatten(jnp.broadcast_to(total, flat.shape))


def zero_others(tree: PyTree, good: Good | None) -> PyTree:
  """Puts zeros where workers are left out; a NaN times 0 would be NaN.

  Args:
    tree: Pytree of arrays `[W, ...]`.
    good: The workers to keep; None for all.

  Returns:
    Pytree of arrays `[W, ...]`.
  """
  if good is None:
    return tree

  def keep(x):
    shape = (len(x),) + (1,) * (x.ndim - 1)
    return jnp.where(good.here.reshape(shape), x, 0)

  return jax.tree.map(keep, tree)


def _share(x, num_workers, good):
  """Divides by the number of good workers."""
  of_all = x / num_workers
  if good is None:
    return of_all
  count = good.everywhere.sum(dtype=x.dtype)
  # Compilers make a product of a division by a constant: with all workers good,
  # the same bits as without flags come of the same division.
  return jnp.where(good.everywhere.all(), of_all, x / jnp.maximum(count, 1))


def _sum_exactly(tree):
  """Sums in one message: of many small ones, each costs a wait for all."""
  flat, unflatten = ravel_pytree(jax.tree.map(lambda x: x.sum(axis=0), tree))
  total = unflatten(lax.psum(flat, WORKER))
  return jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), total, tree)


def add_mean_change(
  before: PyTree,
  after: PyTree,
  error: PyTree | None,
  num_workers: int,
  encoding: str,
  good: Good | None = None,
) -> tuple[PyTree, PyTree | None]:
  """Averages over all workers by sending changes since they last agreed.

  Args:
    before: Pytree of arrays `[W, ...]`, equal on all workers.
    after: Likewise, after local training.
    error: What earlier changes lack, see `error_shapes`; or None, to
      forget what rounding leaves out.
    num_workers: S, over the whole mesh.
    encoding: Of what is sent, see `compression.encode`.
    good: The workers to average over; None for all. The others send no change,
      but what earlier ones lack.

  Returns:
    `(tree, error)`: the mean of `after`, equal on all workers, but for
    rounding; and what the changes lacked this time.
  """
  change, unflatten = _flatten(jax.tree.map(jnp.subtract, after, before))
  change = _share(zero_others(change, good), num_workers, good)
  total, error = sum_over_workers(change, num_workers, encoding, error)
  mean_change = unflatten(jnp.broadcast_to(total, change.shape))
  return jax.tree.map(jnp.add, before, mean_change), error


def error_shapes(shared_size: int, num_workers: int) -> dict[str, tuple]:
  """Returns the shapes of error feedback, which starts as zeros.

  Args:
    shared_size: Parameters in the shared part.
    num_workers: S.

  Returns:
    `sent` of each worker's own change, and `mean` of the part of their mean
    that it computes for all: `[S, ...]` each.
  """
  part = part_size(shared_size, num_workers)
  return {
    'sent': (num_workers, num_workers * part),
    'mean': (num_workers, part),
  }


def part_size(count: int, num_workers: int) -> int:
  """Returns the numbers that each worker adds up for all, in a lossy sum.

  Args:
    count: Length of the vectors.
    num_workers: S.

  Returns:
    One part of S, rounded up to whole groups of `compression.GROUP`.
  """
  groups = -(-count // (num_workers * compression.GROUP))
  return groups * compression.GROUP


def sum_over_workers(
  x: jax.Array, num_workers: int, encoding: str, error: PyTree | None = None
) -> tuple[jax.Array, PyTree | None]:
  """Adds up vectors in few bits: reduce-scatter, then all-gather.

  Every worker sends each other one a part of its vector, adds up the parts it
  gets, in float32, and sends the sum to all. Workers that share a device
  round as others do, so the result does not depend on D.

  Args:
    x: `float32[W, n]`.
    num_workers: S, over the whole mesh.
    encoding: Of what is sent, see `compression.encode`.
    error: What earlier sums lacked, to be added now, or None.

  Returns:
    `(total, error)`: `float32[n]`, equal on all devices; and what rounding
    left out of this sum, or None.
  """
  W, n = x.shape
  part = part_size(n, num_workers)
  x = jnp.pad(x, ((0, 0), (0, num_workers * part - n)))
  encode = jax.vmap(lambda v: compression.encode(v, encoding))
  decode = jax.vmap(lambda m: compression.decode(m, part, encoding))

  if error is not None:
    x = x + error['sent']
  parts = x.reshape(W * num_workers, part)
  messages = encode(parts)
  sent = decode(messages).reshape(x.shape)
  # To device d go the parts of its W workers, from each of mine.
  messages = messages.reshape(W, num_workers // W, W, -1)
  received = lax.all_to_all(messages, WORKER, 1, 0, tiled=True)
  received = received.reshape(num_workers * W, -1)
  total = decode(received).reshape(num_workers, W, part).sum(axis=0)

  if error is not None:
    total = total + error['mean']
  messages = encode(total)
  if error is not None:
    error = {'sent': x - sent, 'mean': total - decode(messages)}
  everyones = lax.all_gather(messages, WORKER, axis=0, tiled=True)
  return decode(everyones).reshape(-1)[:n], error


def masked_psum(
  chain: PyTree,
  slots: jax.Array,
  next_slots: jax.Array,
  num_blocks: int,
  num_workers: int,
  encoding: str = 'float32',
  good: Good | None = None,
  agreed: PyTree | None = None,
) -> PyTree:
  """Aggregates a chain and deals it again, for any slots before and after.

  Each device scatters its workers' blocks into zeros `[L, ...]`; one psum of
  these over one psum of the holders gives the mean over holders everywhere,
  and each worker takes its next blocks. It equals `take(aggregate(...),
  next_slots)` on every worker, moves a whole chain per device, and makes a
  temporary of that size; rounded, a few of them for each worker.

  Args:
    chain: Pytree of arrays `[W, K, ...]`, the blocks of this device's workers.
    slots: `int32[W, K]`, which blocks they are.
    next_slots: `int32[W, K]`, which blocks the workers get.
    num_blocks: L, the length of the chain. Every block must have a holder.
    num_workers: S, over the whole mesh.
    encoding: Of what is sent, see `compression.encode`.
    good: The workers to average over; None for all.
    agreed: As `chain`, before local training: what a block is where no holder
      is good. None for zeros.

  Returns:
    Pytree of arrays `[W, K, ...]`, the blocks of the next round.
  """
  if good is None:
    holders = lax.psum(decomposition.block_count(slots, num_blocks), WORKER)
  else:
    chain, holders = _of_good_holders(chain, agreed, slots, num_blocks, good)

  def divide(total):
    shape = (num_blocks,) + (1,) * (total.ndim - 1)
    return total / holders.reshape(shape).astype(total.dtype)

  def deal(mean):
    return jax.vmap(decomposition.take, in_axes=(None, 0))(mean, next_slots)

  if encoding == 'float32':

    def exchange(blocks):
      mine = decomposition.block_sum(blocks, slots, num_blocks)
      return deal(divide(lax.psum(mine, WORKER)))

    return jax.tree.map(exchange, chain)

  def scatter(blocks, slots_s):
    return divide(
      decomposition.block_sum(blocks[None], slots_s[None], num_blocks)
    )

  each = jax.tree.map(lambda x: jax.vmap(scatter)(x, slots), chain)
  flat, unflatten = _flatten(each)
  total, _ = sum_over_workers(flat, num_workers, encoding)
  whole = unflatten(total[None])
  return jax.tree.map(lambda x: deal(x[0]), whole)


def _of_good_holders(chain, agreed, slots, num_blocks, good):
  """Puts what counts in place of blocks; also counts the holders it is from."""
  mine = good.here[:, None]
  # An empty slot holds L; so do, for once, those of workers left out.
  counted = jnp.stack(
    [
      decomposition.block_count(table, num_blocks)
      for table in (jnp.where(mine, slots, num_blocks), slots)
    ]
  )
  trusted, held = lax.psum(counted, WORKER)
  chain = zero_others(chain, good)
  if agreed is not None:
    # What no good worker holds, its holders knew alike before.
    lost = jnp.take(trusted == 0, slots, mode='fill', fill_value=False)

    def restore(x, old):
      shape = lost.shape + (1,) * (x.ndim - 2)
      return jnp.where(lost.reshape(shape), old, x)

    chain = jax.tree.map(restore, chain, agreed)
  return chain, jnp.where(trusted > 0, trusted, held)


def _flatten(tree: PyTree):
  """Lays arrays `[W, ...]` out as `[W, n]`; also returns what undoes it."""
  flat = jax.vmap(lambda t: ravel_pytree(t)[0])(tree)
  one = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)
  return flat, jax.vmap(ravel_pytree(one)[1])
