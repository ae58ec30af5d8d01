"""A round on a device mesh: T local steps on every worker, then the exchange.

This is the one file that says `shard_map`. The mesh has D devices on the axis
`worker`; S workers live on them, W = S / D on each, and take turns there.
"""

from collections.abc import Callable, Mapping
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from resist_jax import decomposition, exchange
from resist_jax.exchange import WORKER
from resist_jax.optimizer import Schedule

PyTree = Any
Key = jax.Array

SHARDED = PartitionSpec(WORKER)
REPLICATED = PartitionSpec()


class State(NamedTuple):
  """What workers hold between rounds; the leading axis of all arrays is S.

  Attributes:
    shared: Parameters outside the partitioned chains, `[S, ...]`, equal on all
      workers.
    chain: For each partitioned chain, its blocks `[S, K, ...]`.
    slots: For each partitioned chain, `int32[S, K]`: which blocks these are.
    velocity: The optimiser's momentum for `{'shared': ..., 'chain': ...}` when
      it is carried from round to round; None when it starts afresh.
  """

  shared: PyTree
  chain: dict[str, PyTree]
  slots: dict[str, jax.Array]
  velocity: PyTree | None = None


class Local(NamedTuple):
  """What a worker changes during local training; arrays lead with S."""

  params: PyTree
  opt_state: PyTree
  metrics: dict[str, jax.Array]


# loss_fn(params, present, constants, batch, key) -> (loss, {'name': scalar}).
# `present` is float32[K] per chain: 1 where a slot holds a block, 0 where it is
# empty. `constants` never changes; `batch` is what one step of one worker gets.
LossFn = Callable[
  [PyTree, Mapping[str, jax.Array], PyTree, PyTree, Key],
  tuple[jax.Array, dict[str, jax.Array]],
]


def make_mesh(num_devices: int) -> Mesh:
  """Returns a mesh of the first `num_devices` devices on the axis `worker`."""
  # Explicit axes, the default of make_mesh, would insist on input specs.
  auto = (jax.sharding.AxisType.Auto,)
  devices = jax.devices()[:num_devices]
  return jax.make_mesh((num_devices,), (WORKER,), auto, devices=devices)


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Who holds what, and when workers talk.

  ResIST, local SGD and data parallel are values of this, not trainers of their
  own: local SGD partitions no chain, so every worker holds every block; data
  parallel is local SGD that averages its gradients at every step.

  Attributes:
    num_workers: S.
    local_steps: T, steps of each worker in a round.
    num_blocks: L of each partitioned chain, by name; empty for full models.
    average_gradients: Average over the workers at each step.
    carry_velocity: Exchange the optimiser's momentum with the parameters and
      keep it, instead of starting from zero in every round (the paper).
  """

  num_workers: int
  local_steps: int
  num_blocks: Mapping[str, int]
  average_gradients: bool = False
  carry_velocity: bool = False


def distribute(
  params: Mapping[str, PyTree],
  slots: Mapping[str, jax.Array],
  num_workers: int,
  mesh: Mesh,
  velocity: Mapping[str, PyTree] | None = None,
) -> State:
  """Hands the global model out to the workers.

  Args:
    params: Canonical global parameters by name, chains `[L, ...]`.
    slots: `int32[S, K]` for each chain to partition.
    num_workers: S.
    mesh: Where the workers live.
    velocity: Momentum to carry, shaped as `params`, or None.

  Returns:
    The state before a round, sharded over the mesh.
  """

  def hand_out(tree):
    shared, chain = decomposition.split(tree, slots)
    shared = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (num_workers, *x.shape)), shared
    )
    take = jax.vmap(decomposition.take, in_axes=(None, 0))
    return shared, {name: take(chain[name], slots[name]) for name in slots}

  @partial(jax.jit, out_shardings=NamedSharding(mesh, SHARDED))
  def build(params, velocity, slots):
    shared, chain = hand_out(params)
    if velocity is not None:
      velocity = dict(zip(('shared', 'chain'), hand_out(velocity), strict=True))
    return State(shared, chain, slots, velocity)

  # Inputs may come committed to another set of devices (an earlier phase).
  inputs = (dict(params), velocity, dict(slots))
  return build(*jax.device_put(inputs, NamedSharding(mesh, REPLICATED)))


@partial(jax.jit, static_argnames='num_blocks')
def _assemble(
  shared: PyTree, chain: PyTree, slots: PyTree, num_blocks: tuple
) -> dict[str, PyTree]:
  whole = {}
  for name, length in num_blocks:
    held = decomposition.presence(slots[name], length)
    # Copies are equal between rounds: read the first holder's.
    worker = jnp.argmax(held, axis=0)
    mine = slots[name][worker] == jnp.arange(length)[:, None]
    index = (worker, jnp.argmax(mine, axis=1))
    whole[name] = jax.tree.map(lambda x, i=index: x[i], chain[name])
  return decomposition.join(jax.tree.map(lambda x: x[0], shared), whole)


def assemble(
  state: State, num_blocks: Mapping[str, int]
) -> tuple[dict[str, PyTree], dict[str, PyTree] | None]:
  """Undoes `distribute`: the canonical global model between two rounds.

  Args:
    state: The state after a round.
    num_blocks: L of each partitioned chain.

  Returns:
    `(params, velocity)`: parameters by name with chains `[L, ...]`, and the
    momentum in the same shape, or None where it is not carried.
  """
  lengths = tuple(sorted(num_blocks.items()))
  params = _assemble(state.shared, state.chain, state.slots, lengths)
  velocity = state.velocity and _assemble(
    state.velocity['shared'], state.velocity['chain'], state.slots, lengths
  )
  return params, velocity


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
    if 'round' in self.compiled:
      batches = _shapes(batches, self._sharding)
      args = {'round': (state, slots, constants, batches, index)}
    else:
      begin = (state.shared, state.chain, state.velocity)
      local = jax.eval_shape(self.compiled['begin'], *begin)
      local = _shapes(local, self._sharding)
      batch = jax.tree.map(lambda x: x[:, 0], batches)
      batch = _shapes(batch, self._sharding)
      args = {
        'begin': begin,
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
      state: Donated; do not use it again.
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
    next_slots = jax.device_put(dict(next_slots), self._sharding)
    if 'round' in self.compiled:
      batches = jax.device_put(batches, self._sharding)
      args = (state, next_slots, constants, batches, index)
      return self.compiled['round'](*args)
    local = self.compiled['begin'](state.shared, state.chain, state.velocity)
    for t in range(self._protocol.local_steps):
      batch = jax.tree.map(lambda x, t=t: x[:, t], batches)
      batch = jax.device_put(batch, self._sharding)
      args = (local, slots, constants, batch, index, np.int32(t))
      local = self.compiled['step'](*args)
    return self.compiled['finish'](local, slots, next_slots)


def _shapes(tree: PyTree, sharding: NamedSharding) -> PyTree:
  """Describes arrays that are not there yet."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _scan_round(begin, step, finish, state, next_slots, constants, batches, i):
  """One program for the whole round, for GPU and TPU."""
  local = begin(state.shared, state.chain, state.velocity)

  def body(local, step_input):
    batch, t = step_input
    return step(local, state.slots, constants, batch, i, t), None

  by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
  steps = jnp.arange(jax.tree.leaves(by_step)[0].shape[0], dtype=jnp.int32)
  local, _ = lax.scan(body, local, (by_step, steps))
  return finish(local, state.slots, next_slots)


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
  begin = partial(_begin, optimizer, ('loss', *metrics))
  step = partial(
    _local_step, loss_fn, optimizer, schedule, protocol, seed, on_device
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


def _begin(optimizer, metrics, shared, chain, velocity) -> Local:
  params = {'shared': shared, 'chain': chain}
  opt_state = jax.vmap(optimizer.init)(params)
  if velocity is not None:
    opt_state = optax.tree.set(opt_state, trace=velocity)
  zeros = jnp.zeros(_workers_here(params), jnp.float32)
  return Local(params, opt_state, dict.fromkeys(metrics, zeros))


def _local_step(
  loss_fn,
  optimizer,
  schedule,
  protocol,
  seed,
  on_device,
  local,
  slots,
  constants,
  batch,
  round_index,
  t,
) -> Local:
  """One optimiser step of every worker of this device."""

  def gradients(worker, params, slots, batch):
    key = jax.random.key(seed)
    for number in (round_index, worker, t):
      key = jax.random.fold_in(key, number)
    present = {
      name: (blocks < protocol.num_blocks[name]).astype(jnp.float32)
      for name, blocks in slots.items()
    }

    def loss(params):
      network = decomposition.join(params['shared'], params['chain'])
      return loss_fn(network, present, constants, batch, key)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, {'loss': value, **metrics}

  here = _workers_here(local.params)
  workers = lax.axis_index(WORKER) * here + jnp.arange(here, dtype=jnp.int32)
  grads, metrics = _each_worker(
    gradients, (workers, local.params, slots, batch), loop=on_device
  )
  if protocol.average_gradients:
    grads = exchange.mean_over_workers(grads, protocol.num_workers)
  updates, opt_state = jax.vmap(optimizer.update)(
    grads, local.opt_state, local.params
  )
  rate = schedule(round_index * protocol.local_steps + t)
  params = jax.tree.map(
    lambda p, u: p - rate.astype(p.dtype) * u, local.params, updates
  )
  means = jax.tree.map(
    lambda total, x: total + x / protocol.local_steps, local.metrics, metrics
  )
  return Local(params, opt_state, means)


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


def _workers_here(tree: PyTree) -> int:
  return jax.tree.leaves(tree)[0].shape[0]


def _each_worker(function, args, loop: bool):
  """Maps a function over the workers of this device, one after another."""
  here = _workers_here(args)
  if loop and here > 1:
    return lax.map(lambda xs: function(*xs), args)
  turns = [
    function(*jax.tree.map(lambda x, w=w: x[w], args)) for w in range(here)
  ]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *turns)
