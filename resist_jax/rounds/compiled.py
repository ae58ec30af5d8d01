"""A round on a device mesh: T local steps on every worker, then the exchange.

This and `evaluate.py` say `shard_map`. The mesh has D devices on the axis
`worker`; S workers live on them, W = S / D on each, and take turns there. In
place of a device there may be a group of G, on the axis `data`, which share the
work of each local step.
"""

from collections.abc import Callable as Schedule
from collections.abc import Iterator, Mapping
from functools import partial
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from resist_jax.decomposition.assignments import Assignment
from resist_jax.rounds import device_groups
from resist_jax.rounds.arrays import place, place_parts
from resist_jax.rounds.local_training import LossFn, make_local_training
from resist_jax.rounds.state import (
  REPLICATED,
  SHARDED,
  Protocol,
  State,
  batch_specs,
  mesh_sizes,
)
from resist_jax.rounds.synchronisation import synchronise

PyTree = Any


class Round:
  """A compiled round; built once, it serves every decomposition.

  Attributes:
    compiled: The programs by name: `round` where one program loops over the
      steps, else `begin`, `step` and `finish`; where workers are unequal, a
      `step_0`, `step_1`, ... of each team instead of `step`.
    loops: Whether programs loop, over steps, workers or blocks.
    group_size: G, devices of a worker.
    seconds_local: What the last round's local training took in this process;
      None where one program does the whole round.
  """

  def __init__(self, protocol, begin, step, finish, mesh, on_device, streamed):
    self.loops = on_device
    self.seconds_local: float | None = None
    self._protocol = protocol
    self._streamed = streamed
    self._teams = device_groups.make_teams(protocol, mesh)
    self._mesh = mesh
    self._sharding = NamedSharding(mesh, SHARDED)
    by_round, by_step = batch_specs(mesh)
    whole_round = on_device and not streamed and 'step' in self._teams
    self._batches = NamedSharding(mesh, by_round if whole_round else by_step)
    _, self.group_size = mesh_sizes(mesh)
    self.compiled: dict[str, Any]
    if whole_round:
      whole = partial(_scan_round, protocol, begin, step(None), finish)
      self.compiled = {'round': jax.jit(whole, donate_argnums=(0, 1))}
    else:
      # What the exchange needs of the parameters before them stays.
      stays = (protocol.sends_changes, protocol.keeps_blocks, False)
      spent = [i for i, kept in enumerate(stays) if not kept]
      self.compiled = {
        'begin': jax.jit(begin, donate_argnums=spent),
        **{
          name: jax.jit(
            step(team),
            donate_argnums=0,
            out_shardings=team and NamedSharding(team.mesh, SHARDED),
          )
          for name, team in self._teams.items()
        },
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
      batches = _shapes(batches, self._batches)
      inputs = (trained, state.error, deals, deals)
      args = {'round': (*inputs, constants, batches, index)}
    else:
      local = jax.eval_shape(self.compiled['begin'], *trained)
      local = _shapes(local, self._sharding)
      batch = _shapes(next(self._by_step(batches)), self._batches)
      base = self._protocol.kept(state.shared, state.chain)
      step_inputs = local, slots, constants, batch
      args = {
        'begin': trained,
        **{
          name: (*device_groups.part(step_inputs, team), index, index)
          for name, team in self._teams.items()
        },
        'finish': (local, base, state.error, deals, deals),
      }
    for name, values in args.items():
      self.compiled[name] = self.compiled[name].lower(*values).compile()

  def __call__(
    self,
    state: State,
    next_slots: Mapping[str, Assignment],
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
        Streamed: an iterable of T pytrees `[S, ...]`. In groups, the next axis
        is B, and each device gets its part of it.
      round_index: Decides the learning rate and the randomness.

    Returns:
      `(state, metrics)`: the next round's state, and `float32[S]` for `loss`
      and each of the loss function's own metrics, means over the steps;
      `bool[S]` for `finite`: whether a worker's update is free of NaN and inf,
      and for `good`: whether the aggregate is of it, where it leaves any out.

    Raises:
      ValueError: If a hand-over is given slots that it cannot reach, or a
        worker another number of blocks than its depth.
    """
    self._check(state.slots, next_slots)
    index = np.int32(round_index)
    trained = (state.shared, state.chain, state.velocity)
    before, slots = self._on_mesh(state.slots)
    after, _ = self._on_mesh(next_slots)
    if 'round' in self.compiled:
      batches = place(batches, self._batches)
      inputs = (trained, state.error, before, after)
      new, metrics = self.compiled['round'](*inputs, constants, batches, index)
      return new._replace(slots=dict(next_slots)), metrics
    jax.block_until_ready(trained)  # Or the last exchange would count as ours.
    began = time.perf_counter()
    local = self.compiled['begin'](*trained)
    local = self._train(local, slots, constants, batches, index)
    self.seconds_local = time.perf_counter() - began
    base = self._protocol.kept(state.shared, state.chain)
    new, metrics = self.compiled['finish'](
      local, base, state.error, before, after
    )
    for leaf in jax.tree.leaves(base):
      leaf.delete()  # No output could take its place.
    return new._replace(slots=dict(next_slots)), metrics

  def _train(self, local, slots, constants, batches, index):
    """Takes all local steps, and waits for their end."""
    talks = self._protocol.average_gradients or self.group_size > 1
    parts, fixed = (
      {
        name: device_groups.part(tree, team)
        for name, team in self._teams.items()
      }
      for tree in (local, (slots, constants))
    )
    for t, batch in enumerate(self._by_step(batches)):
      batch = self._place(batch)
      if self._streamed or talks:
        # The batch before is trained on while this one comes; no third waits.
        jax.block_until_ready(parts)
      for name, team in self._teams.items():
        args = (
          *fixed[name],
          device_groups.part(batch, team),
          index,
          np.int32(t),
        )
        parts[name] = self.compiled[name](parts[name], *args)
    local = device_groups.whole(parts, like=local)
    # XLA's CPU collectives hold a thread each, and abort the process when a
    # device comes 40 seconds late. So no step is queued behind one that waits
    # for others, and all devices have trained before the first one exchanges.
    jax.block_until_ready(local)
    return local

  def _by_step(self, batches: PyTree) -> Iterator[PyTree]:
    """Iterates over what all workers get at each step."""
    if self._streamed:
      return iter(batches)
    steps = range(self._protocol.local_steps)
    return (jax.tree.map(lambda x, t=t: x[:, t], batches) for t in steps)

  def _place(self, batch: PyTree) -> PyTree:
    if self._streamed:  # Of the workers of this process alone.
      workers = self._protocol.num_workers
      return place_parts(batch, self._batches, workers)
    return place(batch, self._batches)

  def _check(self, slots, next_slots) -> None:
    for deals in (slots, next_slots):
      device_groups.check(self._protocol, deals)
    if self._protocol.exchange != 'hand_over':
      return
    for name in self._protocol.num_blocks:
      dealer = self._protocol.dealer(name)
      if not dealer.follows(slots[name], next_slots[name]):
        raise ValueError(
          f'hand_over did not deal the next slots of {name}: take them one '
          'after another from Assigner(...).deals, or use masked_psum.'
        )

  def _on_mesh(self, deals):
    """Puts deals, and slots alone, where the programs want them."""
    deals = {
      name: jax.tree.map(
        lambda x, spec: place(x, NamedSharding(self._mesh, spec)),
        deal._replace(own=None),
        deal_specs(deal.own is not None),
      )
      for name, deal in deals.items()
    }
    return deals, {name: deal.slots for name, deal in deals.items()}


def deal_specs(dealt: bool) -> Assignment:
  """Returns how the arrays of a deal lie on the mesh."""
  if not dealt:
    return Assignment(SHARDED)
  return Assignment(SHARDED, None, SHARDED, SHARDED, REPLICATED, REPLICATED)


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
    mesh: D devices, or groups, on the axis `worker`; S is a multiple of D.
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
    loss_fn,
    optimizer,
    schedule,
    protocol,
    seed,
    on_device,
    metrics,
    grouped=mesh_sizes(mesh)[1] > 1,
  )
  finish = partial(synchronise, protocol)
  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True, out_specs=SHARDED)
  _, batch = batch_specs(mesh)
  step_specs = (SHARDED, SHARDED, REPLICATED, batch, REPLICATED, REPLICATED)

  def step_of(team):
    if team is None:
      return on_mesh(step, in_specs=step_specs)
    of_team = partial(on_mesh, mesh=team.mesh)
    return of_team(partial(step, team=team), in_specs=step_specs)

  deals = deal_specs(protocol.exchange == 'hand_over')
  deals = dict.fromkeys(protocol.num_blocks, deals)
  finish_specs = (SHARDED, SHARDED, SHARDED, deals, deals)
  return Round(
    protocol,
    on_mesh(begin, in_specs=SHARDED),
    step_of,
    on_mesh(finish, in_specs=finish_specs),
    mesh,
    on_device,
    streamed,
  )
