"""Which workers an aggregate may trust; runs inside `shard_map`.

A worker whose update is not finite would make every mean it enters so: it is
left out of the round's, and goes on with what the others agree on. Every device
decides from the same losses, so all of them decide alike.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from resist_jax.exchange import WORKER

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


def all_losses(
  losses: jax.Array, finite: jax.Array, num_workers: int
) -> jax.Array:
  """Tells every device the losses of all workers, in one small all-reduce.

  Args:
    losses: `float32[W]`, of this device's workers.
    finite: `bool[W]`, see `finite`.
    num_workers: S, over the whole mesh.

  Returns:
    `float32[S]`, the same on all devices; NaN for a worker that is not finite.
  """
  here = len(losses)
  workers = lax.axis_index(WORKER) * here + jnp.arange(here)
  mine = jnp.zeros(num_workers, losses.dtype)
  mine = mine.at[workers].set(jnp.where(finite, losses, jnp.nan))
  return lax.psum(mine, WORKER)


def trusted(losses: jax.Array, loss_factor: float) -> jax.Array:
  """Chooses the workers whose updates enter the aggregate.

  Args:
    losses: `float32[S]`, see `all_losses`.
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
