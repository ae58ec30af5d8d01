"""A round on a device mesh: T local steps on every worker, then the exchange.

This and `evaluate.py` say `shard_map`. The mesh has D devices on the axis
`worker`; S workers live on them, W = S / D on each, and take turns there.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from resist_jax import exchange, health
from resist_jax.dealing import Deal
from resist_jax.hand_over import hand_over
from resist_jax.local_training import LossFn, make_local_training
from resist_jax.optimizer import Schedule
from resist_jax.state import REPLICATED, SHARDED, Protocol, State

PyTree = Any


class Round:
  """A compiled round; built once, it serves every decomposition.

  Attributes:
    compiled: The programs by name: `round` where one program loops over the
      steps, else `begin`, `step` and `finish`.
    loops: Whether programs loop, over steps, workers or blocks.
  """

  def __init__(self, protocol, begin, step, finish, mesh, on_device, streamed):
    self.loops = on_device
    self._protocol = protocol
    self._streamed = streamed
    self._mesh = mesh
    self._sharding = NamedSharding(mesh, SHARDED)
    self.compiled: dict[str, Any]
    if on_device and not streamed:
      whole = partial(_scan_round, protocol, begin, step, finish)
      self.compiled = {'round': jax.jit(whole, donate_argnums=(0, 1))}
    else:
      # What the exchange needs of the parameters before them stays.
      stays = (protocol.sends_changes, protocol.keeps_blocks, False)
      spent = [i for i, kept in enumerate(stays) if not kept]
      self.compiled = {
        'begin': jax.jit(begin, donate_argnums=spent),
        'step': jax.jit(step, donate_argnums=0),
        'finish': jax.jit(finish, donate_argnums=(0, 2)),
      }

  def compile(self, state: State, constants: PyTree, batches: PyTree) -> None:
    """Compiles ahead of the first call, so that no round pays for it.

    Args:
      state: As in a call; only its shapes are used.
      constants: Likewise.
      batches: Likewise.
    """
    index = np.int32(0)
    trained = (state.shared, state.chain, state.velocity)
    deals, slots = self._on_mesh(state.slots)
    if 'round' in self.compiled:
      batches = _shapes(batches, self._sharding)
      inputs = (trained, state.error, deals, deals)
      args = {'round': (*inputs, constants, batches, index)}
    else:
      local = jax.eval_shape(self.compiled['begin'], *trained)
      local = _shapes(local, self._sharding)
      batch = _shapes(next(self._by_step(batches)), self._sharding)
      base = self._protocol.kept(state.shared, state.chain)
      args = {
        'begin': trained,
        'step': (local, slots, constants, batch, index, index),
        'finish': (local, base, state.error, deals, deals),
      }
    for name, values in args.items():
      self.compiled[name] = self.compiled[name].lower(*values).compile()

  def __call__(
    self,
    state: State,
    next_slots: Mapping[str, Deal],
    constants: PyTree,
    batches: PyTree,
    round_index: int,
  ) -> tuple[State, dict[str, jax.Array]]:
    """Trains every worker for T steps and exchanges.

    Args:
      state: Its arrays are donated; do not use it again.
      next_slots: The next deal of each partitioned chain.
      constants: Passed to the loss as it is, e.g. data that live on devices.
      batches: Pytree of arrays `[S, T, ...]`; what step t of worker s gets.
        Streamed: an iterable of T pytrees `[S, ...]`.
      round_index: Decides the learning rate and the randomness.

    Returns:
      `(state, metrics)`: the next round's state, and `float32[S]` for `loss`
      and each of the loss function's own metrics, means over the steps;
      `bool[S]` for `finite`: whether a worker's update is free of NaN and inf,
      and for `good`: whether the aggregate is of it, where it leaves any out.

    Raises:
      ValueError: If a hand-over is given slots that it cannot reach.
    """
    self._check(state.slots, next_slots)
    index = np.int32(round_index)
    trained = (state.shared, state.chain, state.velocity)
    before, slots = self._on_mesh(state.slots)
    after, _ = self._on_mesh(next_slots)
    if 'round' in self.compiled:
      batches = jax.device_put(batches, self._sharding)
      inputs = (trained, state.error, before, after)
      new, metrics = self.compiled['round'](*inputs, constants, batches, index)
      return new._replace(slots=dict(next_slots)), metrics
    local = self.compiled['begin'](*trained)
    for t, batch in enumerate(self._by_step(batches)):
      batch = jax.device_put(batch, self._sharding)
      if self._streamed or self._protocol.average_gradients:
        # The batch before is trained on while this one comes; no third waits.
        jax.block_until_ready(local)
      args = (local, slots, constants, batch, index, np.int32(t))
      local = self.compiled['step'](*args)
    # XLA's CPU collectives hold a thread each, and abort the process when a
    # device comes 40 seconds late. So no step is queued behind one that waits
    # for others, and all devices have trained before the first one exchanges.
    jax.block_until_ready(local)
    base = self._protocol.kept(state.shared, state.chain)
    new, metrics = self.compiled['finish'](
      local, base, state.error, before, after
    )
    for leaf in jax.tree.leaves(base):
      leaf.delete()  # No output could take its place.
    return new._replace(slots=dict(next_slots)), metrics

  def _by_step(self, batches: PyTree) -> Iterator[PyTree]:
    """Iterates over what all workers get at each step."""
    if self._streamed:
      return iter(batches)
    steps = range(self._protocol.local_steps)
    return (jax.tree.map(lambda x, t=t: x[:, t], batches) for t in steps)

  def _check(self, slots, next_slots) -> None:
    if self._protocol.exchange != 'hand_over':
      return
    for name in self._protocol.num_blocks:
      dealer = self._protocol.dealer(name)
      if not dealer.follows(slots[name], next_slots[name]):
        raise ValueError(
          f'hand_over did not deal the next slots of {name}: take deals one '
          'after another from dealing.Dealer(...).deals, or use the exchange '
          'masked_psum.'
        )

  def _on_mesh(self, deals):
    """Puts deals, and slots alone, where the programs want them."""
    deals = {
      name: jax.device_put(
        deal._replace(own=None),
        jax.tree.map(
          lambda spec: NamedSharding(self._mesh, spec),
          deal_specs(deal.own is not None),
        ),
      )
      for name, deal in deals.items()
    }
    return deals, {name: deal.slots for name, deal in deals.items()}


def deal_specs(dealt: bool) -> Deal:
  """Returns how the arrays of a deal lie on the mesh."""
  if not dealt:
    return Deal(SHARDED)
  return Deal(SHARDED, None, SHARDED, SHARDED, REPLICATED, REPLICATED)


def _shapes(tree: PyTree, sharding: NamedSharding) -> PyTree:
  """Describes arrays that are not there yet."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _scan_round(
  protocol, begin, step, finish, trained, error, before, after, constants,
  batches, i,
):  # fmt: skip
  """One program for the whole round, for GPU and TPU."""
  base = protocol.kept(*trained[:2])
  slots = {name: deal.slots for name, deal in before.items()}
  local = begin(*trained)

  def body(local, step_input):
    batch, t = step_input
    return step(local, slots, constants, batch, i, t), None

  by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
  steps = jnp.arange(jax.tree.leaves(by_step)[0].shape[0], dtype=jnp.int32)
  local, _ = lax.scan(body, local, (by_step, steps))
  return finish(local, base, error, before, after)


def make_round(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  protocol: Protocol,
  mesh: Mesh,
  seed: int,
  on_device: bool,
  metrics: tuple[str, ...] = (),
  streamed: bool = False,
) -> Round:
  """Builds the compiled round of Algorithm 1.

  Args:
    loss_fn: See `LossFn`. Its parameters are those of a sub-network: chains
      `[K, ...]`, everything else whole.
    optimizer: A gradient transformation without its learning rate.
    schedule: Learning rate at a step of the whole run.
    protocol: Who holds what, and when workers talk.
    mesh: D devices on the axis `worker`; S is a multiple of D.
    seed: Seed of all randomness inside the round.
    on_device: One program that loops over steps and workers (GPU, TPU), or
      steps dispatched from the host and workers unrolled (CPU, whose backend
      runs convolutions inside loops 10 to 40 times slower).
    metrics: Names of the metrics that the loss function returns.
    streamed: Batches come step by step from the host, which then dispatches
      each step; `on_device` still loops over workers.

  Returns:
    The round.
  """
  begin, step = make_local_training(
    loss_fn, optimizer, schedule, protocol, seed, on_device, metrics
  )
  finish = partial(_finish, protocol)
  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True, out_specs=SHARDED)
  step_specs = (SHARDED, SHARDED, REPLICATED, SHARDED, REPLICATED, REPLICATED)
  deals = deal_specs(protocol.exchange == 'hand_over')
  deals = dict.fromkeys(protocol.num_blocks, deals)
  finish_specs = (SHARDED, SHARDED, SHARDED, deals, deals)
  return Round(
    protocol,
    on_mesh(begin, in_specs=SHARDED),
    on_mesh(step, in_specs=step_specs),
    on_mesh(finish, in_specs=finish_specs),
    mesh,
    on_device,
    streamed,
  )


def _finish(protocol, local, base, error, before, after):
  """Aggregates, and hands out the blocks of the next round."""
  S, encoding = protocol.num_workers, protocol.format.values
  base, blocks = base
  losses = local.metrics['loss']
  finite, good = health.finite(local.params, losses), None
  if protocol.leave_out and not protocol.average_gradients:
    good = health.agree(losses, finite, S, protocol.loss_factor)

  shared = local.params['shared']
  if protocol.sends_changes:
    shared, error = exchange.add_mean_change(
      base, shared, error, S, protocol.format.changes, good
    )
  elif not protocol.average_gradients:  # Those never left each other.
    shared = exchange.mean_over_workers(shared, S, good=good)
  chain = _exchange_chains(
    protocol, local.params['chain'], before, after, good, blocks
  )

  velocity = None
  if protocol.carry_velocity:
    velocity = dict(optax.tree.get(local.opt_state, 'trace'))
    if not protocol.average_gradients:
      velocity['shared'] = exchange.mean_over_workers(
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
    name: exchange.masked_psum(
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
