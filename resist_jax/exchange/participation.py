"""Which workers an aggregate may trust; runs inside `shard_map`.

A worker whose update is not finite would make every mean it enters so: it is
left out of the round's, and goes on with what the others agree on. Every device
decides from the same losses, so all of them decide alike.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from resist_jax.exchange.collectives import WORKER, Good

PyTree = Any


def finite(*trees: PyTree) -> jax.Array:
  """Tells whether what a worker made is free of NaN and infinity.

  Args:
    *trees: Pytrees of arrays `[W, ...]`.

  Returns:
    `bool[W]`, of this device's workers.
  """
  rows = [
    jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    for x in jax.tree.leaves(trees)
  ]
  return jnp.stack(rows).all(axis=0)


def agree(
  losses: jax.Array,
  finite: jax.Array,
  num_workers: int,
  loss_factor: float = 0.0,
) -> Good:
  """Chooses the workers of an aggregate, by one small all-reduce of losses.

  Args:
    losses: `float32[W]`, of this device's workers.
    finite: `bool[W]`, see `finite`; it says False where the loss is not.
    num_workers: S, over the whole mesh.
    loss_factor: See `trusted`.

  Returns:
    Whom to trust.
  """
  W = len(losses)
  first = lax.axis_index(WORKER) * W
  mine = jnp.zeros(num_workers, losses.dtype)
  mine = mine.at[first + jnp.arange(W)].set(jnp.where(finite, losses, jnp.nan))
  good = trusted(lax.psum(mine, WORKER), loss_factor)
  # Without a factor a device need not wait for others to know of its own.
  here = lax.dynamic_slice(good, (first,), (W,)) if loss_factor else finite
  return Good(here, good)


def trusted(losses: jax.Array, loss_factor: float) -> jax.Array:
  """Tells which workers' updates may enter the aggregate.

  Args:
    losses: `float32[S]`, of all workers; NaN for one that is not finite.
    loss_factor: How many times the median of the finite losses a worker's may
      be; 0: anything finite will do.

  Returns:
    `bool[S]`.

  >>> trusted(jnp.array([1.0, 2.0, 9.0, jnp.nan]), 3.0).tolist()
  [True, True, False, False]
  """
  good = jnp.isfinite(losses)
  if loss_factor:
    good &= losses <= loss_factor * jnp.nanmedian(losses)
  return good
