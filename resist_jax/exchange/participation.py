"""Which workers enter an aggregate; runs inside `shard_map`.

A mean over a worker whose update is not finite would not be finite either, and
one update that is far larger than the others would ruin the mean. Such a worker
is excluded from the round's aggregate and continues with what the others agree
on. Every device decides from the same numbers, so all devices decide alike.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from resist_jax.exchange.collectives import WORKER, Healthy

PyTree = Any

ROUNDS = 8  # How many rounds `Norms` go back.
# No schedule raises all updates so much from one round to the next.
LARGEST_JUMP = 1000


class Norms(NamedTuple):
  """Norms of the updates of recent rounds, the newest first; 0 for no round.

  Attributes:
    median: `float32[ROUNDS]`, the (lower) median of the healthy workers.
    largest: `float32[ROUNDS]`, the largest of them.
  """

  median: jax.Array
  largest: jax.Array


class Limits(NamedTuple):
  """How far a healthy worker may be from the others.

  Attributes:
    loss: See `healthy_losses`; 0 for no limit.
    update: See `healthy_updates`; 0 for no limit.
  """

  loss: float = 0.0
  update: float = 0.0


NO_LIMITS = Limits()


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


def update_norms(before: PyTree, after: PyTree) -> jax.Array:
  """Returns how far each worker has moved its parameters.

  Args:
    before: Pytree of arrays `[W, ...]`.
    after: The same after local training.

  Returns:
    `float32[W]`, Euclidean norms; infinite from 1.8e19, where the sum of
    squares overflows.
  """

  def squares(x, y):
    change = y.astype(jnp.float32) - x.astype(jnp.float32)
    return jnp.square(change).sum(axis=tuple(range(1, x.ndim)))

  sums = jax.tree.leaves(jax.tree.map(squares, before, after))
  return jnp.sqrt(jnp.stack(sums).sum(axis=0))


def agree(
  losses: jax.Array,
  finite: jax.Array,
  num_workers: int,
  limits: Limits = NO_LIMITS,
  norms: jax.Array | None = None,
  recent: Norms | None = None,
) -> tuple[Healthy, Norms | None]:
  """Chooses the workers of an aggregate, by one small all-reduce.

  Args:
    losses: `float32[W]`, of the workers of this device.
    finite: `bool[W]`, see `finite`; False where the loss is not finite.
    num_workers: S, over the whole mesh.
    limits: How far a worker may be from the others.
    norms: `float32[W]`, see `update_norms`; None leaves updates unjudged.
    recent: Norms of the rounds before, equal on all devices.

  Returns:
    `(healthy, recent)`: the healthy workers, and `recent` with this round.
  """
  W = len(losses)
  first = lax.axis_index(WORKER) * W
  told = losses if norms is None else jnp.stack([losses, norms])
  mine = jnp.zeros((*told.shape[:-1], num_workers), losses.dtype)
  mine = mine.at[..., first + jnp.arange(W)].set(
    jnp.where(finite, told, jnp.nan)
  )
  table = lax.psum(mine, WORKER)
  healthy = healthy_losses(table if norms is None else table[0], limits.loss)
  if norms is not None and recent is not None:
    healthy &= healthy_updates(table[1], recent, limits.update)
    recent = remember(recent, jnp.where(healthy, table[1], jnp.nan))
  # Without limits, a device needs no message to judge its own workers.
  judged = limits.loss or norms is not None
  here = lax.dynamic_slice(healthy, (first,), (W,)) if judged else finite
  return Healthy(here, healthy), recent


def healthy_losses(losses: jax.Array, factor: float) -> jax.Array:
  """Returns which workers' losses allow them into the aggregate.

  Args:
    losses: `float32[S]`, of all workers; NaN for a worker whose update is not
      finite.
    factor: The largest loss that is allowed, in units of the median of the
      finite losses; 0 allows any finite loss. Below zero, the distance from the
      median counts: it may be factor - 1 times its size.

  Returns:
    `bool[S]`.

  >>> healthy_losses(jnp.array([1.0, 2.0, 9.0, jnp.nan]), 3.0).tolist()
  [True, True, False, False]
  >>> healthy_losses(jnp.array([-2.0, -1.9, -2.1, 9.0]), 3.0).tolist()
  [True, True, True, False]
  """
  healthy = jnp.isfinite(losses)
  if factor:
    median = jnp.nanmedian(losses)
    # A negative median, as of log-densities, is exceeded by a part of its size.
    above = median + (factor - 1) * jnp.abs(median)
    healthy &= losses <= jnp.where(median < 0, above, factor * median)
  return healthy


def healthy_updates(
  norms: jax.Array, recent: Norms, factor: float
) -> jax.Array:
  """Returns which workers' updates are near those of the others.

  Args:
    norms: `float32[S]`, of all workers; not finite where an update is not.
    recent: Norms of the rounds before.
    factor: The largest norm that is allowed, in units of `usual_norm`.

  Returns:
    `bool[S]`.

  >>> none = no_norms()
  >>> healthy_updates(jnp.array([1.0, 2.0, 1e9, jnp.inf]), none, 10.0).tolist()
  [True, True, False, False]
  """
  return jnp.isfinite(norms) & (norms <= factor * usual_norm(norms, recent))


def usual_norm(norms: jax.Array, recent: Norms) -> jax.Array:
  """Returns the largest norm that is usual for an update in this round.

  It is the median of this round or that of recent rounds, whichever is larger,
  times the spread that was usual in recent rounds. When a learning rate rises,
  all updates grow together, and so does the median of the round; only up to
  `LARGEST_JUMP`, so that a round in which most workers fail is noticed.

  Args:
    norms: `float32[S]`, of all workers; not finite where an update is not.
    recent: Norms of the rounds before.

  Returns:
    `float32[]`; infinite if there are no recent norms and the median of this
    round is not positive.
  """
  known = recent.median > 0
  usual = _lower_median(jnp.where(known, recent.median, jnp.nan))
  ratios = recent.largest / jnp.where(known, recent.median, 1.0)
  spread = _lower_median(jnp.where(known, ratios, jnp.nan))
  now = _lower_median(jnp.where(jnp.isfinite(norms), norms, jnp.nan))
  now = jnp.where(now > 0, now, jnp.inf)
  return jnp.where(
    known.any(), jnp.clip(now, usual, LARGEST_JUMP * usual) * spread, now
  )


def no_norms() -> Norms:
  """Returns the norms before the first round."""
  return Norms(*(jnp.zeros(ROUNDS, jnp.float32) for _ in Norms._fields))


def remember(recent: Norms, norms: jax.Array) -> Norms:
  """Adds a round to recent norms, unless nobody in it is healthy.

  Args:
    recent: Norms of the rounds before.
    norms: `float32[S]`, of all workers; NaN where a worker is not healthy.

  Returns:
    The norms with this round, without the oldest.
  """
  median = _lower_median(norms)
  new = Norms(median, jnp.nanmax(norms))
  return jax.tree.map(
    lambda old, x: jnp.where(
      median > 0, jnp.concatenate([x[None], old[:-1]]), old
    ),
    recent,
    new,
  )


def _lower_median(x: jax.Array) -> jax.Array:
  """Returns the median of what is not NaN: of two middle ones, the lower."""
  x = jnp.sort(x)  # NaN comes last.
  count = jnp.isfinite(x).sum()
  return x[jnp.maximum(count - 1, 0) // 2]
