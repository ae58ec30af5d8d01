"""A round on a device mesh: T local steps on every worker, then the exchange.

This is the one file that says `shard_map`. The mesh has D devices on the axis
`worker`; S workers live on them, W = S / D on each, and take turns there.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from resist_jax import exchange
from resist_jax.local_training import LossFn, make_local_training
from resist_jax.optimizer import Schedule
from resist_jax.state import REPLICATED, SHARDED, Protocol, State

PyTree = Any


class Round:
  """A compiled round; built once, it serves every decomposition.

  Attributes:
    compiled: The programs by name: `round` where one program loops over the
      steps, else `begin`, `step` and `finish`.
  """

  def __init__(self, protocol, begin, step, finish, mesh, on_device):
    self._protocol = protocol
    self._sharding = NamedSharding(mesh, SHARDED)
    self.compiled: dict[str, Any]
    if on_device:
      whole = partial(_scan_round, begin, step, finish)
      self.compiled = {'round': jax.jit(whole, donate_argnums=0)}
    else:
      self.compiled = {
        'begin': jax.jit(begin, donate_argnums=(0, 1, 2)),
        'step': jax.jit(step, donate_argnums=0),
        'finish': jax.jit(finish, donate_argnums=0),
      }

  def compile(self, state: State, constants: PyTree, batches: PyTree) -> None:
    """Compiles ahead of the first call, so that no round pays for it.

    Args:
      state: As in a call; only its shapes are used.
      constants: Likewise.
      batches: Likewise.
    """
    index, slots = np.int32(0), state.slots
    trained = (state.shared, state.chain, state.velocity)
    if 'round' in self.compiled:
      batches = _shapes(batches, self._sharding)
      args = {'round': (trained, slots, slots, constants, batches, index)}
    else:
      local = jax.eval_shape(self.compiled['begin'], *trained)
      local = _shapes(local, self._sharding)
      batch = jax.tree.map(lambda x: x[:, 0], batches)
      batch = _shapes(batch, self._sharding)
      args = {
        'begin': trained,
        'step': (local, slots, constants, batch, index, index),
        'finish': (local, slots, slots),
      }
    for name, values in args.items():
      self.compiled[name] = self.compiled[name].lower(*values).compile()

  def __call__(
    self,
    state: State,
    next_slots: Mapping[str, jax.Array],
    constants: PyTree,
    batches: PyTree,
    round_index: int,
  ) -> tuple[State, dict[str, jax.Array]]:
    """Trains every worker for T steps and exchanges.

    Args:
      state: Donated but for its slots; do not use it again.
      next_slots: `int32[S, K]` for each partitioned chain.
      constants: Passed to the loss as it is, e.g. data that live on devices.
      batches: Pytree of arrays `[S, T, ...]`; what step t of worker s gets.
      round_index: Decides the learning rate and the randomness.

    Returns:
      `(state, metrics)`: the next round's state, and `float32[S]` for `loss`
      and each of the loss function's own metrics, means over the steps, and
      `bool[S]` for `finite`: whether a worker's update is free of NaN and inf.
    """
    index, slots = np.int32(round_index), state.slots
    trained = (state.shared, state.chain, state.velocity)
    next_slots = jax.device_put(dict(next_slots), self._sharding)
    if 'round' in self.compiled:
      batches = jax.device_put(batches, self._sharding)
      args = (trained, slots, next_slots, constants, batches, index)
      return self.compiled['round'](*args)
    local = self.compiled['begin'](*trained)
    for t in range(self._protocol.local_steps):
      batch = jax.tree.map(lambda x, t=t: x[:, t], batches)
      batch = jax.device_put(batch, self._sharding)
      args = (local, slots, constants, batch, index, np.int32(t))
      local = self.compiled['step'](*args)
      if self._protocol.average_gradients:
        jax.block_until_ready(local)
    # XLA's CPU collectives hold a thread each, and abort the process when a
    # device comes 40 seconds late. So no step is queued behind one that waits
    # for others, and all devices have trained before the first one exchanges.
    jax.block_until_ready(local)
    return self.compiled['finish'](local, slots, next_slots)


def _shapes(tree: PyTree, sharding: NamedSharding) -> PyTree:
  """Describes arrays that are not there yet."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _scan_round(
  begin, step, finish, trained, slots, next_slots, constants, batches, i
):
  """One program for the whole round, for GPU and TPU."""
  local = begin(*trained)

  def body(local, step_input):
    batch, t = step_input
    return step(local, slots, constants, batch, i, t), None

  by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
  steps = jnp.arange(jax.tree.leaves(by_step)[0].shape[0], dtype=jnp.int32)
  local, _ = lax.scan(body, local, (by_step, steps))
  return finish(local, slots, next_slots)


def make_round(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  protocol: Protocol,
  mesh: Mesh,
  seed: int,
  on_device: bool,
  metrics: tuple[str, ...] = (),
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

  Returns:
    The round.
  """
  begin, step = make_local_training(
    loss_fn, optimizer, schedule, protocol, seed, on_device, metrics
  )
  finish = partial(_finish, protocol)
  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True, out_specs=SHARDED)
  step_specs = (SHARDED, SHARDED, REPLICATED, SHARDED, REPLICATED, REPLICATED)
  return Round(
    protocol,
    on_mesh(begin, in_specs=SHARDED),
    on_mesh(step, in_specs=step_specs),
    on_mesh(finish, in_specs=SHARDED),
    mesh,
    on_device,
  )


def _finish(protocol, local, slots, next_slots):
  """Aggregates, and hands out the blocks of the next round."""
  leaves = jax.tree.leaves((local.params, local.metrics['loss']))
  finite = jnp.stack(
    [jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in leaves]
  ).all(axis=0)

  def hand_over(tree):
    shared, chain = tree['shared'], tree['chain']
    if not protocol.average_gradients:  # Those never left each other.
      shared = exchange.mean_over_workers(shared, protocol.num_workers)
    chain = {
      name: exchange.masked_psum(
        chain[name], slots[name], next_slots[name], length
      )
      for name, length in protocol.num_blocks.items()
    }
    return {'shared': shared, 'chain': chain}

  params = hand_over(local.params)
  velocity = None
  if protocol.carry_velocity:
    velocity = hand_over(optax.tree.get(local.opt_state, 'trace'))
  state = State(params['shared'], params['chain'], next_slots, velocity)
  return state, {**local.metrics, 'finite': finite}
