"""Which workers enter an aggregate; runs inside `shard_map`.

A mean over a worker whose update is not finite would not be finite either.
Such a worker is excluded from the round's aggregate and continues with what the
others agree on. Every device decides from the same losses, so all devices
decide alike.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from resist_jax.exchange.collectives import WORKER, Healthy

PyTree = Any


def finite(*trees: PyTree) -> jax.Array:
  """Returns which workers' arrays are free of NaN and infinity.

  Args:
    *trees: Pytrees of arrays `[W, ...]`.

  Returns:
    `bool[W]`, for the workers of this device.
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
) -> Healthy:
  """Chooses the workers of an aggregate, by one small all-reduce of losses.

  Args:
    losses: `float32[W]`, of the workers of this device.
    finite: `bool[W]`, see `finite`; False where the loss is not finite.
    num_workers: S, over the whole mesh.
    loss_factor: See `healthy_workers`.

  Returns:
    The healthy workers.
  """
  W = len(losses)
  first = lax.axis_index(WORKER) * W
  mine = jnp.zeros(num_workers, losses.dtype)
  mine = mine.at[first + jnp.arange(W)].set(jnp.where(finite, losses, jnp.nan))
  healthy = healthy_workers(lax.psum(mine, WORKER), loss_factor)
  # Without a factor, a device needs no message to judge its own workers.
  here = lax.dynamic_slice(healthy, (first,), (W,)) if loss_factor else finite
  return Healthy(here, healthy)


def healthy_workers(losses: jax.Array, loss_factor: float) -> jax.Array:
  """Returns which workers' updates may enter the aggregate.

  Args:
    losses: `float32[S]`, of all workers; NaN for a worker whose update is not
      finite.
    loss_factor: The largest loss that is allowed, in units of the median of the
      finite losses; 0 allows any finite loss.

  Returns:
    `bool[S]`.

  >>> healthy_workers(jnp.array([1.0, 2.0, 9.0, jnp.nan]), 3.0).tolist()
  [True, True, False, False]
  """
  healthy = jnp.isfinite(losses)
  if loss_factor:
    healthy &= losses <= loss_factor * jnp.nanmedian(losses)
  return healthy
