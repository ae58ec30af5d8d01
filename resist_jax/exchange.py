"""The end of a round inside `shard_map`: average, then hand out new blocks.

A device of the mesh looks after W = S / D workers, so every array here leads
with W. The functions name the mesh axis once, `WORKER`.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from resist_jax import decomposition

PyTree = Any

WORKER = 'worker'


def mean_over_workers(tree: PyTree, num_workers: int) -> PyTree:
  """Averages over all workers and gives each of them the result.

  Args:
    tree: Pytree of arrays `[W, ...]`.
    num_workers: S, over the whole mesh.

  Returns:
    Pytree of arrays `[W, ...]`, equal along W and on all devices.
  """

  def mean(x):
    total = lax.psum(x.sum(axis=0), WORKER)
    return jnp.broadcast_to(total[None] / num_workers, x.shape)

  return jax.tree.map(mean, tree)


def masked_psum(
  chain: PyTree, slots: jax.Array, next_slots: jax.Array, num_blocks: int
) -> PyTree:
  """Aggregates a chain and deals it again, for any slots before and after.

  Each device scatters its workers' blocks into zeros `[L, ...]`; one psum of
  these over one psum of the holders gives the mean over holders everywhere,
  and each worker takes its next blocks. It equals `take(aggregate(...),
  next_slots)` on every worker, moves a whole chain per device, and makes a
  temporary of that size.

  Args:
    chain: Pytree of arrays `[W, K, ...]`, the blocks of this device's workers.
    slots: `int32[W, K]`, which blocks they are.
    next_slots: `int32[W, K]`, which blocks the workers get.
    num_blocks: L, the length of the chain. Every block must have a holder.

  Returns:
    Pytree of arrays `[W, K, ...]`, the blocks of the next round.
  """
  holders = lax.psum(decomposition.block_count(slots, num_blocks), WORKER)

  def exchange(blocks):
    total = lax.psum(decomposition.block_sum(blocks, slots, num_blocks), WORKER)
    shape = (num_blocks,) + (1,) * (total.ndim - 1)
    mean = total / holders.reshape(shape).astype(total.dtype)
    return jax.vmap(decomposition.take, in_axes=(None, 0))(mean, next_slots)

  return jax.tree.map(exchange, chain)
