"""Collectives over the workers of a mesh; they run inside `shard_map`.

A device of the mesh hosts W = S / D workers, so every array here leads with W.
The functions name the mesh axis once, `WORKER`. Where a worker is a group of
devices, the first devices of all groups exchange with each other, the second
ones too, and so on.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from resist_jax.exchange import compression

PyTree = Any

WORKER = 'worker'
DATA = 'data'  # The axis of the devices inside one worker.

BYTES_PER_NUMBER = 4  # float32


class Healthy(NamedTuple):
  """The workers that enter an aggregate; see `participation`.

  Attributes:
    here: `bool[W]`, the workers of this device.
    everywhere: `bool[S]`, all workers, the same on all devices.
  """

  here: jax.Array
  everywhere: jax.Array


def mean_over_workers(
  tree: PyTree,
  num_workers: int,
  encoding: str = 'float32',
  healthy: Healthy | None = None,
) -> PyTree:
  """Averages over all workers and gives each of them the result.

  Args:
    tree: Pytree of arrays `[W, ...]`.
    num_workers: S, over the whole mesh.
    encoding: How the numbers travel, see `compression.encode`.
    healthy: The workers to average over; None for all. If none is healthy, the
      mean is 0.

  Returns:
    Pytree of arrays `[W, ...]`, equal along W and on all devices.
  """
  if not jax.tree.leaves(tree):  # Such as the moments of plain SGD.
    return tree
  tree = zero_unhealthy(tree, healthy)
  if encoding == 'float32':
    total = _sum_exactly(tree)
    return jax.tree.map(lambda x: _share(x, num_workers, healthy), total)
  flat, unflatten = flatten(tree)
  parts = _share(flat, num_workers, healthy)
  total, _ = sum_over_workers(parts, num_workers, encoding)
  return unflatten(jnp.broadcast_to(total, flat.shape))


def zero_unhealthy(tree: PyTree, healthy: Healthy | None) -> PyTree:
  """Replaces the arrays of excluded workers by zeros.

  A product with zero would not do: NaN times 0 is NaN.

  Args:
    tree: Pytree of arrays `[W, ...]`.
    healthy: The workers to keep; None for all.

  Returns:
    Pytree of arrays `[W, ...]`.
  """
  if healthy is None:
    return tree

  here, zero = with_zero(healthy.here)

  def keep(x):
    return jnp.where(leading(here, x), x, zero.astype(x.dtype))

  return jax.tree.map(keep, tree)


def with_zero(tree: PyTree) -> tuple[PyTree, jax.Array]:
  """Returns a tree, and a zero that XLA cannot compute before the tree.

  Otherwise XLA would fill arrays of zeros before local training, and keep them
  in memory throughout it.

  Args:
    tree: Pytree of arrays.

  Returns:
    The tree, and `float32[]`.
  """
  return lax.optimization_barrier((tree, jnp.float32(0)))


def _share(x, num_workers, healthy):
  """Divides by the number of healthy workers."""
  share_of_all = x / num_workers
  if healthy is None:
    return share_of_all
  count = healthy.everywhere.sum(dtype=x.dtype)
  # XLA turns a division by a constant into a product. With all workers healthy,
  # this branch divides in the same way, so both give the same bits.
  return jnp.where(
    healthy.everywhere.all(), share_of_all, x / jnp.maximum(count, 1)
  )


def _sum_exactly(tree):
  """Sums in one message, because every message costs a wait for all devices."""
  flat, unflatten = ravel_pytree(jax.tree.map(lambda x: x.sum(axis=0), tree))
  total = unflatten(lax.psum(flat, WORKER))
  return jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), total, tree)


def add_mean_change(
  before: PyTree,
  after: PyTree,
  error: PyTree | None,
  num_workers: int,
  encoding: str,
  healthy: Healthy | None = None,
) -> tuple[PyTree, PyTree | None]:
  """Averages over all workers by sending what changed since they last agreed.

  Args:
    before: Pytree of arrays `[W, ...]`, equal on all workers.
    after: The same after local training.
    error: What rounding removed from earlier changes, see `error_shapes`; None
      to drop what rounding removes.
    num_workers: S, over the whole mesh.
    encoding: How the numbers travel, see `compression.encode`.
    healthy: The workers to average over; None for all. The others send no
      change, only their earlier error.

  Returns:
    `(tree, error)`: the mean of `after`, equal on all workers, up to rounding;
    and what rounding removed this time.
  """
  if not jax.tree.leaves(after):  # All of the network is cut.
    return after, error
  change, unflatten = flatten(jax.tree.map(jnp.subtract, after, before))
  change = _share(zero_unhealthy(change, healthy), num_workers, healthy)
  total, error = sum_over_workers(change, num_workers, encoding, error)
  mean_change = unflatten(jnp.broadcast_to(total, change.shape))
  return jax.tree.map(jnp.add, before, mean_change), error


def error_shapes(shared_size: int, num_workers: int) -> dict[str, tuple]:
  """Returns the shapes of the error feedback, which starts as zeros.

  Args:
    shared_size: Number of parameters in the shared part.
    num_workers: S.

  Returns:
    Shapes `[S, ...]`: `sent`, the error of each worker's own change, and
    `mean`, the error of the part of the mean that it computes for all.
  """
  part = part_size(shared_size, num_workers)
  return {
    'sent': (num_workers, num_workers * part),
    'mean': (num_workers, part),
  }


def part_size(count: int, num_workers: int) -> int:
  """Returns how many numbers each worker sums for all, in a lossy sum.

  Args:
    count: Length of the vectors.
    num_workers: S.

  Returns:
    An S-th of the length, rounded up to whole groups of `compression.GROUP`.
  """
  groups = -(-count // (num_workers * compression.GROUP))
  return groups * compression.GROUP


def sum_over_workers(
  x: jax.Array, num_workers: int, encoding: str, error: PyTree | None = None
) -> tuple[jax.Array, PyTree | None]:
  """Adds up vectors in few bits: reduce-scatter, then all-gather.

  Each worker sends a part of its vector to each other worker, sums the parts it
  receives, in float32, and sends the sum to all. Workers on one device round as
  workers on several devices do, so the result does not depend on D.

  Args:
    x: `float32[W, n]`.
    num_workers: S, over the whole mesh.
    encoding: How the numbers travel, see `compression.encode`.
    error: What rounding removed from earlier sums, to be added now, or None.

  Returns:
    `(total, error)`: `float32[n]`, equal on all devices; and what rounding
    removed from this sum, or None.
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
  # Device d receives the parts of its W workers, from each worker here.
  messages = messages.reshape(W, num_workers // W, W, -1)
  received = lax.all_to_all(messages, WORKER, 1, 0, tiled=True)
  received = received.reshape(num_workers * W, -1)
  total = decode(received).reshape(num_workers, W, part).sum(axis=0)

  if error is not None:
    total = total + error['mean']
  messages = encode(total)
  if error is not None:
    error = {'sent': x - sent, 'mean': total - decode(messages)}
  gathered = lax.all_gather(messages, WORKER, axis=0, tiled=True)
  return decode(gathered).reshape(-1)[:n], error


def leading(numbers: jax.Array, x: jax.Array) -> jax.Array:
  """Shapes numbers so that they broadcast along the first axes of an array."""
  return numbers.reshape(numbers.shape + (1,) * (x.ndim - numbers.ndim))


def flatten(tree: PyTree):
  """Turns arrays `[W, ...]` into one `[W, n]`; also returns the inverse."""
  flat = jax.vmap(lambda t: ravel_pytree(t)[0])(tree)
  one = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)
  return flat, jax.vmap(ravel_pytree(one)[1])


def widen(tree: PyTree) -> PyTree:
  """Converts numbers of fewer than 32 bits to float32.

  Sums of bfloat16 or float16 numbers would lose what the workers learned.

  Args:
    tree: Pytree of arrays of floating-point numbers.

  Returns:
    Pytree of arrays, `float32` or wider.
  """
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype.itemsize < 4 else x, tree
  )


def narrow(tree: PyTree, like: PyTree) -> PyTree:
  """Undoes `widen`: converts numbers to the dtypes of another tree."""
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def all_reduce_bytes(
  count: int, num_workers: int, num_devices: int, encoding: str = 'float32'
) -> int:
  """Predicts the wire bytes of giving all workers the sum of their vectors.

  An exact sum goes round a ring: each device sends `2 (D - 1) / D` of the
  vector. A rounded one is a reduce-scatter and an all-gather of encoded parts,
  see `sum_over_workers`.

  Args:
    count: Length of the vectors.
    num_workers: S.
    num_devices: D.
    encoding: See `compression.encode`.

  Returns:
    Bytes that all devices together send.

  >>> all_reduce_bytes(1_000_000, num_workers=4, num_devices=4)
  24000000
  """
  S, D = num_workers, num_devices
  if encoding == 'float32':
    return 2 * (D - 1) * BYTES_PER_NUMBER * count
  message = compression.message_bytes(part_size(count, S), encoding)
  return (S * (S - S // D) + S * (D - 1)) * message
