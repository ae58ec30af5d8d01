"""The end of a round inside `shard_map`: aggregate and assign anew."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from resist_jax.decomposition import Assignment, split
from resist_jax.exchange import (
  Healthy,
  Limits,
  Norms,
  collectives,
  participation,
)
from resist_jax.rounds.local_training import Local
from resist_jax.rounds.moments import Parts, take_apart
from resist_jax.rounds.protocol import Protocol

PyTree = Any


class Synchronised(NamedTuple):
  """The fields of a `State` that a program computes; see there."""

  shared: PyTree
  chain: dict[str, PyTree]
  carried: Parts | None
  error: PyTree | None
  norms: Norms | None


def synchronise(
  protocol: Protocol,
  optimizer: optax.GradientTransformation,
  local: Local,
  agreed: tuple[PyTree | None, PyTree | None],
  error: PyTree | None,
  norms: Norms | None,
  before: Mapping[str, Assignment],
  after: Mapping[str, Assignment],
) -> tuple[Synchronised, dict[str, jax.Array]]:
  """Aggregates, and hands out the blocks of the next round.

  Args:
    protocol: Who holds what.
    optimizer: Made the state in `local`.
    local: What local training ends with.
    agreed: The shared part and the blocks before it, see `Protocol.kept`.
    error: What rounding removed from changes so far.
    norms: Norms of the updates of recent rounds; None if nobody judges them.
    before: The assignment of each chain in the round.
    after: The assignment of each chain in the next round.

  Returns:
    What the state of the next round holds, and metrics `[W]` by name.
  """
  S = protocol.num_workers
  agreed_shared, agreed_chain = collectives.widen(agreed)
  judged, norms, metrics = _judge(protocol, local, agreed, norms)
  # With averaged gradients, all workers hold the same.
  healthy = None if protocol.average_gradients else judged

  shared, chain = split(collectives.widen(local.params), protocol.num_blocks)
  if protocol.sends_changes:
    encoding = protocol.exchange.format.changes
    shared, error = collectives.add_mean_change(
      agreed_shared, shared, error, S, encoding, healthy
    )
  elif not protocol.average_gradients:  # With these, all are equal already.
    shared = collectives.mean_over_workers(shared, S, healthy=healthy)
  moves = before, after, healthy
  chain = _exchange_chains(protocol, chain, *moves, agreed_chain)

  carried = None
  if protocol.carry:
    carried = _exchange_moments(protocol, optimizer, local.opt_state, *moves)
  shared, chain = collectives.narrow(
    (shared, chain), split(local.params, protocol.num_blocks)
  )
  return Synchronised(shared, chain, carried, error, norms), metrics


def _judge(
  protocol: Protocol, local: Local, agreed: PyTree, recent: Norms | None
) -> tuple[Healthy | None, Norms | None, dict[str, jax.Array]]:
  """Returns the healthy workers, recent norms with this round, and metrics."""
  losses = local.metrics['loss']
  finite = participation.finite(local.params, losses)
  metrics = {**local.metrics, 'finite': finite, 'healthy': finite}
  norms = None
  if protocol.judges_updates:
    after = split(local.params, protocol.num_blocks)
    norms = participation.update_norms(agreed, after)
    metrics['update_norm'] = norms
  elif protocol.average_gradients or not protocol.exclude_faulty:
    return None, recent, metrics
  limits = Limits(protocol.loss_factor, protocol.update_factor)
  healthy, recent = participation.agree(
    losses, finite, protocol.num_workers, limits, norms, recent
  )
  return healthy, recent, {**metrics, 'healthy': healthy.here}


def _exchange_moments(
  protocol: Protocol,
  optimizer: optax.GradientTransformation,
  opt_state: PyTree,
  before: Mapping[str, Assignment],
  after: Mapping[str, Assignment],
  healthy: Healthy | None,
) -> Parts:
  """Averages and hands over moments as the parameters that they belong to."""
  moments, rest = take_apart(optimizer, opt_state)
  halves = [split(moment, protocol.num_blocks) for moment in moments]
  shared = [collectives.widen(half[0]) for half in halves]
  if not protocol.average_gradients:
    encoding = protocol.exchange.format.values
    shared = collectives.mean_over_workers(
      shared, protocol.num_workers, encoding, healthy
    )
  exchanged = []
  for new, (old, chain) in zip(shared, halves, strict=True):
    # The moments of a block without a healthy holder restart from zero.
    moved = _exchange_chains(
      protocol, collectives.widen(chain), before, after, healthy, None
    )
    pair = collectives.narrow((new, moved), (old, chain))
    exchanged.append(dict(zip(('shared', 'chain'), pair, strict=True)))
  return Parts(exchanged, rest)


def _exchange_chains(protocol, chains, before, after, healthy, agreed):
  """Exchanges every chain; `agreed` are their blocks before, or None."""
  agreed = agreed or dict.fromkeys(chains)
  exchanged = {}
  for name, blocks in chains.items():
    with jax.named_scope(name):
      exchanged[name] = protocol.exchange.exchange(
        protocol.division(name),
        blocks,
        before[name],
        after[name],
        healthy,
        agreed[name],
      )
  return exchanged
