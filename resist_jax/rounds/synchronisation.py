"""The end of a round inside `shard_map`: aggregate and assign anew."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from resist_jax.decomposition import Assignment, join, split
from resist_jax.exchange import (
  Exchange,
  Healthy,
  Limits,
  Norms,
  collectives,
  participation,
)
from resist_jax.rounds import average as average_lib
from resist_jax.rounds import outer as outer_lib
from resist_jax.rounds.local_training import Local
from resist_jax.rounds.moments import Parts, in_halves, take_apart
from resist_jax.rounds.protocol import Protocol

PyTree = Any
# The assignment of each chain before and after an exchange.
Moves = tuple[Mapping[str, Assignment], Mapping[str, Assignment]]


class ExchangeState(NamedTuple):
  """What the exchange keeps from round to round besides the network.

  Attributes:
    error: What rounding removed from changes so far.
    outer: State of the outer optimiser; None if there is none.
    average: The average over rounds; None if there is none.
    norms: Norms of the updates of recent rounds; None if nobody judges them.
  """

  error: PyTree | None
  outer: Parts | None
  average: Parts | None
  norms: Norms | None


class Synchronised(NamedTuple):
  """The fields of a `State` that a program computes; see there."""

  shared: PyTree
  chain: dict[str, PyTree]
  carried: Parts | None
  error: PyTree | None
  outer: Parts | None
  average: Parts | None
  norms: Norms | None


def synchronise(
  protocol: Protocol,
  optimizer: optax.GradientTransformation,
  local: Local,
  agreed: tuple[PyTree | None, PyTree | None],
  exchange_state: ExchangeState,
  moves: Moves,
  rounds: jax.Array,
) -> tuple[Synchronised, dict[str, jax.Array]]:
  """Aggregates, and hands out the blocks of the next round.

  Args:
    protocol: Who holds what.
    optimizer: Made the state in `local`.
    local: What local training ends with.
    agreed: The shared part and the blocks before it, see `Protocol.kept`.
    exchange_state: What the exchange of the last round left.
    moves: The assignment of each chain in this round, and in the next one.
    rounds: How many rounds were trained as one, `int32[]`. A program that the
      host calls after its own steps serves any number.

  Returns:
    What the state of the next round holds, and metrics `[W]` by name.
  """
  error, outer, average, norms = exchange_state
  agreed_shared, agreed_chain = collectives.widen(agreed)
  moments = []
  if protocol.carry and not protocol.average_gradients:
    moments = take_apart(optimizer, local.opt_state).moments
  judged, norms, metrics = _judge(protocol, local, agreed, norms, moments)
  # With averaged gradients, all workers hold the same.
  healthy = None if protocol.average_gradients else judged

  shared, chain = split(collectives.widen(local.params), protocol.num_blocks)
  shared, error = _exchange_shared(
    protocol, shared, agreed_shared, error, healthy
  )
  if outer is None:
    chain = _exchange_chains(protocol, chain, moves, healthy, agreed_chain)
  else:
    settled = _settle(protocol, chain, moves[0], healthy, agreed_chain)
    params, outer = _outer_step(
      protocol,
      (agreed_shared, agreed_chain),
      (shared, settled),
      outer,
      moves,
      healthy,
      rounds,
    )
    shared, chain = split(params, protocol.num_blocks)

  carried = None
  if protocol.carry:
    carried = _exchange_moments(
      protocol, optimizer, local, agreed, moves, healthy
    )
  shared, chain = collectives.narrow(
    (shared, chain), split(local.params, protocol.num_blocks)
  )
  if average is not None:
    average = _average(protocol, (shared, chain), average, moves, rounds)
  return (
    Synchronised(shared, chain, carried, error, outer, average, norms),
    metrics,
  )


def share(
  protocol: Protocol,
  local: Local,
  agreed: tuple[PyTree | None, PyTree | None],
  norms: Norms | None,
) -> Local:
  """Averages the shared part in the middle of a round; blocks stay.

  Args:
    protocol: Who holds what.
    local: What local training has come to.
    agreed: See `synchronise`.
    norms: See `synchronise`; this adds none.

  Returns:
    The same with the mean, which excluded workers get, too. Where nobody is
    healthy, all keep their own, and the end of the round notices.
  """
  healthy, *_ = _judge(protocol, local, collectives.widen(agreed), norms)
  own, chain = split(local.params, protocol.num_blocks)
  own = collectives.widen(own)
  mean = collectives.mean_over_workers(
    own, protocol.num_workers, healthy=healthy
  )
  mean = _if_anybody(healthy, mean, own)
  params = collectives.narrow(join(mean, chain), local.params)
  return local._replace(params=params)


def _if_anybody(healthy: Healthy | None, mean: PyTree, other: PyTree) -> PyTree:
  """Returns a mean over healthy workers, or the other tree if there is none."""
  if healthy is None:
    return mean
  some = healthy.everywhere.any()
  return jax.tree.map(lambda x, y: jnp.where(some, x, y), mean, other)


def _judge(
  protocol: Protocol,
  local: Local,
  agreed: PyTree,
  recent: Norms | None,
  moments: Sequence[PyTree] = (),
) -> tuple[Healthy | None, Norms | None, dict[str, jax.Array]]:
  """Returns the healthy workers, recent norms with this round, and metrics.

  Moments that will be averaged must be finite, too: a second moment may be
  infinite while the parameters look as ever.
  """
  losses = local.metrics['loss']
  finite = participation.finite(local.params, losses, moments)
  metrics = {**local.metrics, 'finite': finite, 'healthy': finite}
  norms = None
  if protocol.judges_updates:
    shared, chain = agreed
    after = split(local.params, protocol.num_blocks)
    norms = participation.update_norms((shared, chain), after)
    metrics['update_norm'] = norms
  elif protocol.average_gradients or not protocol.exclude_faulty:
    return None, recent, metrics
  limits = Limits(protocol.loss_factor, protocol.update_factor)
  healthy, recent = participation.agree(
    losses, finite, protocol.num_workers, limits, norms, recent
  )
  return healthy, recent, {**metrics, 'healthy': healthy.here}


def _exchange_shared(protocol, shared, agreed, error, healthy):
  """Averages the shared part; also returns what rounding removed."""
  S = protocol.num_workers
  if protocol.sends_changes:
    encoding = protocol.exchange.format.changes
    changed = collectives.add_mean_change(
      agreed, shared, error, S, encoding, healthy
    )
    return _if_anybody(healthy, changed, (agreed, error))
  if protocol.average_gradients:  # All are equal already.
    return shared, error
  mean = collectives.mean_over_workers(shared, S, healthy=healthy)
  return _if_anybody(healthy, mean, agreed), error


def _exchange_moments(
  protocol: Protocol,
  optimizer: optax.GradientTransformation,
  local: Local,
  agreed: tuple[PyTree | None, PyTree | None],
  moves: Moves,
  healthy: Healthy | None,
) -> Parts:
  """Averages and hands over moments as the parameters that they belong to."""
  moments, rest = take_apart(optimizer, local.opt_state)
  exchange = protocol.exchange.of_moments
  halves = [split(moment, protocol.num_blocks) for moment in moments]
  shared, chains = collectives.widen(
    ([half[0] for half in halves], [half[1] for half in halves])
  )
  first_shared, first_chains = None, len(halves) * [None]
  if healthy is not None:
    # The moments of what has no healthy holder restart.
    first_shared, first_chains = _first_moments(protocol, optimizer, agreed)
  if not protocol.average_gradients:
    mean = collectives.mean_over_workers(
      shared, protocol.num_workers, exchange.format.values, healthy
    )
    shared = _if_anybody(healthy, mean, first_shared)
  exchanged = []
  for new, old, chain, first in zip(
    shared, halves, chains, first_chains, strict=True
  ):
    moved = _exchange_chains(
      protocol, chain, moves, healthy, first, exchange=exchange
    )
    new, moved = collectives.narrow((new, moved), old)
    exchanged.append({'shared': new, 'chain': moved})
  return Parts(exchanged, rest)


def _first_moments(protocol, optimizer, agreed) -> tuple[list, list]:
  """Returns the moments of the parameters as last agreed, in halves."""
  shared, chain = agreed
  state = jax.vmap(optimizer.init)(join(shared, chain))
  moments = collectives.widen(take_apart(optimizer, state).moments)
  halves = [split(moment, protocol.num_blocks) for moment in moments]
  return [half[0] for half in halves], [half[1] for half in halves]


def _settle(protocol, chains, before, healthy, agreed):
  """Gives all holders of a block its mean; no block moves."""
  stay = {name: assignment.staying() for name, assignment in before.items()}
  moves = before, stay
  return _exchange_chains(
    protocol, chains, moves, healthy, agreed, scope='settle_{}'
  )


def _outer_step(
  protocol: Protocol,
  agreed: tuple[PyTree, PyTree],
  settled: tuple[PyTree, PyTree],
  parts: Parts,
  moves: Moves,
  healthy: Healthy | None,
  rounds: jax.Array,
) -> tuple[PyTree, Parts]:
  """Takes a step of the outer optimiser, and hands over what comes of it."""
  assert protocol.outer is not None
  shared, chain = agreed
  stepped = outer_lib.step(
    protocol.outer, (shared, chain), settled, parts, rounds
  )
  old = Parts([join(**moment) for moment in parts.moments], parts.rest)
  stays = join(shared, chain), old
  new, stepped = _if_anybody(healthy, stepped, stays)
  held = [split(tree, protocol.num_blocks) for tree in (new, *stepped.moments)]
  moved = [
    # All holders have the same by now, faulty ones too.
    (shared, _exchange_chains(protocol, chain, moves))
    for shared, chain in held
  ]
  moments = [{'shared': shared, 'chain': chain} for shared, chain in moved[1:]]
  like = parts.moments
  moments = [
    collectives.narrow(*pair) for pair in zip(moments, like, strict=True)
  ]
  # The optimiser took its step in float32 and may have widened what it keeps.
  rest = [
    x.astype(y.dtype) for x, y in zip(stepped.rest, parts.rest, strict=True)
  ]
  return join(*moved[0]), Parts(moments, rest)


def _average(
  protocol: Protocol,
  new: tuple[PyTree, PyTree],
  parts: Parts,
  moves: Moves,
  rounds: jax.Array,
) -> Parts:
  """Hands over the average over rounds, and adds this one to it."""
  (average,), count = parts
  # All holders of a block have the same average, faulty ones too.
  moved = _exchange_chains(protocol, average['chain'], moves)
  moved = Parts([join(average['shared'], moved)], count)
  (average,), count = average_lib.step(
    protocol.average, join(*new), moved, rounds
  )
  return Parts([in_halves(average, protocol.num_blocks)], count)


def _exchange_chains(
  protocol: Protocol,
  chains: Mapping[str, PyTree],
  moves: Moves,
  healthy: Healthy | None = None,
  agreed: Mapping[str, PyTree] | None = None,
  scope: str = '{}',
  exchange: Exchange | None = None,
) -> dict[str, PyTree]:
  """Exchanges every chain; `agreed` are their blocks before, or None."""
  exchange = exchange or protocol.exchange
  before, after = moves
  agreed = agreed or dict.fromkeys(chains)
  exchanged = dict(chains)
  for name, blocks in chains.items():
    if not jax.tree.leaves(blocks):  # Another optimiser has these parameters.
      continue
    with jax.named_scope(scope.format(name)):
      exchanged[name] = exchange.exchange(
        protocol.division(name),
        blocks,
        before[name],
        after[name],
        healthy,
        agreed[name],
      )
  return exchanged
