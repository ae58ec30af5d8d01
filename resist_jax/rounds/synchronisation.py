"""The end of a round inside `shard_map`: who counts, means, and new blocks."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from resist_jax.decomposition.assignments import Assignment
from resist_jax.exchange import collectives, participation
from resist_jax.exchange.hand_over import hand_over
from resist_jax.rounds.local_training import Local
from resist_jax.rounds.state import Protocol, State

PyTree = Any


def synchronise(
  protocol: Protocol,
  local: Local,
  base: PyTree,
  error: PyTree | None,
  before: Mapping[str, Assignment],
  after: Mapping[str, Assignment],
) -> tuple[State, dict[str, jax.Array]]:
  """Aggregates, and hands out the blocks of the next round.

  Args:
    protocol: Who holds what.
    local: What workers end local training with.
    base: The shared part and the blocks as last agreed, see `Protocol.kept`.
    error: What rounding left out so far.
    before: The deal of each chain in the round.
    after: The deals after it.

  Returns:
    The state without its slots, and metrics `[W]` by name.
  """
  S, encoding = protocol.num_workers, protocol.format.values
  base, blocks = base
  losses = local.metrics['loss']
  finite, good = participation.finite(local.params, losses), None
  if protocol.leave_out and not protocol.average_gradients:
    good = participation.agree(losses, finite, S, protocol.loss_factor)

  shared = local.params['shared']
  if protocol.sends_changes:
    shared, error = collectives.add_mean_change(
      base, shared, error, S, protocol.format.changes, good
    )
  elif not protocol.average_gradients:  # Those never left each other.
    shared = collectives.mean_over_workers(shared, S, good=good)
  chain = _exchange_chains(
    protocol, local.params['chain'], before, after, good, blocks
  )

  velocity = None
  if protocol.carry_velocity:
    velocity = dict(optax.tree.get(local.opt_state, 'trace'))
    if not protocol.average_gradients:
      velocity['shared'] = collectives.mean_over_workers(
        velocity['shared'], S, encoding, good
      )
    # A block that no good worker trained starts again from no momentum.
    velocity['chain'] = _exchange_chains(
      protocol, velocity['chain'], before, after, good, None
    )
  state = State(shared, chain, {}, velocity, error)
  here = finite if good is None else good.here
  return state, {**local.metrics, 'finite': finite, 'good': here}


def _exchange_chains(protocol, chains, before, after, good, blocks):
  """Exchanges every chain; `blocks` are theirs as last agreed, or None."""
  blocks = blocks or dict.fromkeys(chains)
  encoding = protocol.format.values
  if protocol.exchange == 'hand_over':
    return {
      name: hand_over(
        chain,
        before[name],
        after[name],
        protocol.dealer(name),
        name,
        encoding,
        good,
        blocks[name],
      )
      for name, chain in chains.items()
    }
  return {
    name: collectives.masked_psum(
      chain,
      before[name].slots,
      after[name].slots,
      protocol.num_blocks[name],
      protocol.num_workers,
      encoding,
      good,
      blocks[name],
    )
    for name, chain in chains.items()
  }
