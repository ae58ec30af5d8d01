"""A compiled round: T local steps on every worker, then the exchange."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from functools import partial
import time
from typing import Any, NamedTuple
import warnings

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from resist_jax.decomposition import Assignment
from resist_jax.rounds import checks, device_groups
from resist_jax.rounds.arrays import place, place_parts
from resist_jax.rounds.device_groups import DeviceGroup
from resist_jax.rounds.local_training import LocalTraining, LossFn
from resist_jax.rounds.mesh import (
  REPLICATED,
  SHARDED,
  batch_specs,
  compiler_options,
  loads_may_hang,
  mesh_sizes,
)
from resist_jax.rounds.protocol import Protocol
from resist_jax.rounds.state import (
  State,
  assignments_on_host,
  place_assignments,
)
from resist_jax.rounds.synchronisation import (
  ExchangeState,
  Synchronised,
  share,
  synchronise,
)

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Round:
  """The programs of a round; built once, they serve every decomposition.

  Attributes:
    protocol: Who holds what.
    mesh: Where the workers live.
    seed: Seed of assignments and training.
    programs: By name: `round` where one program loops over the steps; else
      `begin`, `step` and `finish`, and `share` where the shared part is
      exchanged in between. Where workers are unequal, a `step_0`, `step_1`, ...
      for each group of devices replaces `step`.
    groups: The group of devices of each `step` program; None for all devices.
    loops: Whether programs loop, over steps, workers or blocks.
    streamed: Whether batches come step by step.
    metrics: Names of the metrics of the loss function.
    compiled_for: Shapes and dtypes of what the programs were compiled for, see
      `form_of_step`; None if they are compiled in the first call.
    slots: For each partitioned chain, the shape `(S, K)` that the programs were
      compiled for; empty if they are compiled in the first call.
  """

  protocol: Protocol
  mesh: Mesh
  seed: int
  programs: Mapping[str, Any]
  groups: Mapping[str, DeviceGroup | None]
  loops: bool
  streamed: bool
  metrics: tuple[str, ...] = ()
  compiled_for: PyTree = None
  slots: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

  @property
  def group_size(self) -> int:
    """G, the number of devices of a worker."""
    return mesh_sizes(self.mesh)[1]

  @property
  def in_turn(self) -> bool:
    """Whether a device updates each worker before the next one trains.

    Workers of unequal depths may share a program or not; for them, this is
    False.
    """
    together = self.protocol.average_gradients or self.protocol.depths
    return self.loops and self.group_size == 1 and not together

  def compile(
    self, state: State, constants: PyTree, batches: PyTree
  ) -> 'Round':
    """Compiles ahead of the first call, so that no round includes it.

    Args:
      state: As in a call; only shapes are used, as of all arguments.
      constants: As in a call.
      batches: As in a call.

    Returns:
      The round with compiled programs.
    """
    args = self.arguments(state, constants, batches)
    compiled = {
      name: self.programs[name].lower(*values).compile()
      for name, values in args.items()
    }
    first = next(iter(batches)) if self.streamed else batches
    form = form_of_step(first, self.streamed)
    slots = {name: a.slots.shape for name, a in state.assignments.items()}
    return dataclasses.replace(
      self, programs=compiled, compiled_for=form, slots=slots
    )

  def arguments(
    self, state: State, constants: PyTree, batches: PyTree
  ) -> dict[str, tuple]:
    """Returns what each program is called with, or its shape.

    Args:
      state: As in a call, or shapes with shardings, as of all arguments. Then
        nothing has to lie on a device, and the mesh may consist of devices that
        this machine does not have.
      constants: As in a call.
      batches: As in a call.

    Returns:
      For each of `programs`, its arguments.
    """
    index = np.int32(0)
    held = (state.shared, state.chain, state.carried)
    moves = (state.assignments, state.assignments)
    if 'round' in self.programs:
      batches = _shapes(batches, self._batch_sharding)
      inputs = (held, _exchange_state(state), moves, constants, batches, index)
      return {'round': inputs}
    local = jax.eval_shape(self.programs['begin'], *held, index)
    local = _shapes(local, NamedSharding(self.mesh, SHARDED))
    batch = _shapes(self._first_step(batches), self._batch_sharding)
    agreed = self.protocol.kept(state.shared, state.chain)
    inputs = local, _slots(state.assignments), constants, batch
    sharing = {'share': (local, agreed, state.norms)}
    return {
      'begin': (*held, index),
      **(sharing if 'share' in self.programs else {}),
      **{
        name: (*device_groups.part(inputs, group), index, index)
        for name, group in self.groups.items()
      },
      'finish': (local, agreed, _exchange_state(state), moves, index),
    }

  def at_once(self, count: int) -> 'Round | None':
    """Returns so many of these rounds as one, without another compilation.

    Args:
      count: See `Protocol.rounds_at_once`.

    Returns:
      The round; None where the compiled program fixes the number of steps.
    """
    if 'round' in self.programs:
      return None
    return dataclasses.replace(self, protocol=self.protocol.lasting(count))

  def __call__(
    self,
    state: State,
    constants: PyTree,
    batches: PyTree,
    assignments: Mapping[str, Assignment] | None = None,
  ) -> tuple[State, dict[str, Any]]:
    """Trains every worker for T steps, or more rounds at once, and exchanges.

    Args:
      state: Its arrays are donated; do not use it again.
      constants: Passed to the loss as they are, such as data that live on the
        devices; None for none.
      batches: Pytree of arrays `[S, T, ...]`: what step t of worker s gets.
        Streamed: an iterable of T pytrees `[S, ...]`; in several processes,
        with the rows of this process's workers. In groups, the next axis is B,
        and each device gets its part of it.
      assignments: The next assignment of each partitioned chain, on the host;
        None lets the exchange assign the blocks.

    Returns:
      `(state, metrics)`: the next round's state, and `float32[S]` for `loss`
      and each metric of the loss function, means over the steps; `bool[S]` for
      `finite`, whether a worker's update is free of NaN and infinity, and for
      `healthy`, whether the aggregate includes it; where updates are judged,
      `float32[S]` for `update_norm`. Where steps are dispatched
      from the host, `seconds_local` is what local training took in this
      process, in seconds.

    Raises:
      ValueError: If the exchange cannot reach `assignments`, or if batches have
        other sizes.
    """
    if not self.streamed:
      S, T = self.protocol.num_workers, self.protocol.steps
      checks.check_batch(batches, S, T, self.group_size)
    after = place_assignments(
      self._next_assignments(state, assignments), self.mesh
    )
    index = np.int32(state.round)
    moves = (state.assignments, after)
    if 'round' in self.programs:
      batches = place(batches, self._batch_sharding)
      new, metrics = self.programs['round'](
        (state.shared, state.chain, state.carried),
        _exchange_state(state),
        moves,
        constants,
        batches,
        index,
      )
    else:
      agreed = self.protocol.kept(state.shared, state.chain)
      local, seconds = self._train(state, agreed, constants, batches, index)
      new, metrics = self.programs['finish'](
        local,
        agreed,
        _exchange_state(state),
        moves,
        np.int32(self.protocol.rounds_at_once),
      )
      for leaf in jax.tree.leaves(agreed):
        if isinstance(leaf, jax.Array):
          leaf.delete()  # No output could take its place.
      metrics = {**metrics, 'seconds_local': seconds}
    count = self.protocol.rounds_at_once
    state = state._replace(
      **new._asdict(),
      assignments=after,
      round=np.int32(index + count),
      draw=np.int32(state.draw + 1),
    )
    if count > 1:  # Each step has counted as one of `local_steps`.
      summed = ('loss', *self.metrics)
      metrics |= {name: metrics[name] / count for name in summed}
    return state, metrics

  def _next_assignments(self, state, given) -> Mapping[str, Assignment]:
    before = assignments_on_host(state)
    if given is None:
      return self.protocol.assign(self.seed, int(state.draw) + 1, before)
    self.protocol.check_moves(before, given)
    return given

  def _train(self, state, agreed, constants, batches, index):
    """Takes all local steps; returns what they end with, and the seconds."""
    held = (state.shared, state.chain, state.carried)
    jax.block_until_ready(held)  # The last exchange is not counted as training.
    began = time.perf_counter()
    local = self.programs['begin'](*held, index)
    waits = self.protocol.average_gradients or self.group_size > 1
    parts, fixed = (
      {
        name: device_groups.part(tree, group)
        for name, group in self.groups.items()
      }
      for tree in (local, (_slots(state.assignments), constants))
    )
    steps = range(self.protocol.steps)
    for t, batch in zip(steps, self._by_step(batches), strict=True):
      batch = self._place(batch)
      if self.streamed or waits:
        # One batch is trained on while the next arrives; no third one waits.
        jax.block_until_ready(parts)
      for name, group in self.groups.items():
        args = (*fixed[name], device_groups.part(batch, group))
        parts[name] = self.programs[name](
          parts[name], *args, index, np.int32(t)
        )
      if self.protocol.shares_after(t):
        began += self._share(parts, local, agreed, state.norms)
    local = device_groups.whole(parts, like=local)
    # XLA's CPU collectives hold a thread each, and abort the process when a
    # device comes 40 seconds late. So no step is queued behind one that waits
    # for others, and all devices have trained before the first one exchanges.
    jax.block_until_ready(local)
    return local, time.perf_counter() - began

  def _share(self, parts, like, agreed, norms) -> float:
    """Exchanges the shared part of all groups; returns what that took."""
    jax.block_until_ready(parts)  # See the end of `_train`.
    began = time.perf_counter()
    local = device_groups.whole(parts, like)
    local = self.programs['share'](local, agreed, norms)
    jax.block_until_ready(local)
    for name, group in self.groups.items():
      parts[name] = device_groups.part(local, group)
    return time.perf_counter() - began

  def _by_step(self, batches: PyTree) -> Iterator[PyTree]:
    """Iterates over what all workers get at each step."""
    if self.streamed:
      return iter(batches)
    steps = range(self.protocol.steps)
    return (jax.tree.map(lambda x, t=t: x[:, t], batches) for t in steps)

  def _first_step(self, batches: PyTree) -> PyTree:
    """Returns the shapes of what all workers get at a step."""
    if self.streamed:  # Only the rows of this process's workers.
      rows = self.protocol.num_workers
      return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
        next(iter(batches)),
      )
    return jax.eval_shape(lambda tree: next(self._by_step(tree)), batches)

  def _place(self, batch: PyTree) -> PyTree:
    if self.streamed:  # Only the rows of this process's workers.
      workers = self.protocol.num_workers
      return place_parts(batch, self._batch_sharding, workers)
    return place(batch, self._batch_sharding)

  @property
  def _batch_sharding(self) -> NamedSharding:
    by_round, by_step = batch_specs(self.mesh)
    spec = by_round if 'round' in self.programs else by_step
    return NamedSharding(self.mesh, spec)


def _exchange_state(state: State) -> ExchangeState:
  return ExchangeState(state.error, state.outer, state.average, state.norms)


def _slots(assignments: Mapping[str, Assignment]) -> dict[str, jax.Array]:
  return {name: assignment.slots for name, assignment in assignments.items()}


def _shapes(tree: PyTree, sharding: NamedSharding) -> PyTree:
  """Describes arrays that do not exist yet."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def make_round(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  protocol: Protocol,
  mesh: Mesh,
  *,
  seed: int,
  metrics: tuple[str, ...] = (),
  on_device: bool | None = None,
  streamed: bool = False,
) -> Round:
  """Builds the round of Algorithm 1.

  Args:
    loss_fn: See `LossFn`. Its parameters are those of a sub-network: chains
      `[K, ...]`, everything else whole.
    optimizer: A complete optax transformation, learning rate included.
    protocol: Who holds what, and when workers communicate.
    mesh: D devices, or groups, on the axis `worker`; S is a multiple of D.
    seed: Seed of assignments and training.
    metrics: Names of the metrics that the loss function returns.
    on_device: True for one program that loops over steps and workers; False for
      steps dispatched from the host, with the loop over workers unrolled. None
      chooses by the mesh: True on accelerators, False on CPU, whose backend
      runs convolutions inside loops 10 to 40 times slower.
    streamed: Batches come step by step from the host, which dispatches each
      step; `on_device` still loops over workers.

  Returns:
    The round.
  """
  if loads_may_hang(mesh):
    warnings.warn(
      'a round that JAX loads from its compilation cache may hang on CPU '
      "devices: call jax.config.update('jax_enable_compilation_cache', False) "
      'before JAX compiles anything.',
      RuntimeWarning,
      stacklevel=2,
    )
  if on_device is None:
    on_device = mesh.devices.flat[0].platform != 'cpu'
  grouped = mesh_sizes(mesh)[1] > 1
  training = LocalTraining(
    loss_fn, optimizer, protocol, seed, metrics, on_device, grouped
  )
  groups = device_groups.make_device_groups(protocol, mesh)
  functions = _on_mesh(training, groups, mesh)
  if on_device and not streamed and 'step' in groups:
    whole = partial(_scan_round, protocol, functions)
    programs = {'round': jax.jit(whole, donate_argnums=(0, 1))}
  else:
    programs = _host_programs(protocol, functions, groups, mesh)
  return Round(
    protocol, mesh, seed, programs, groups, on_device, streamed, metrics
  )


class _Functions(NamedTuple):
  """The functions that make up a round, mapped over the devices.

  A step is mapped over the devices of its group.
  """

  begin: Callable
  steps: Mapping[str, Callable]
  share: Callable
  finish: Callable


def _on_mesh(training, groups, mesh) -> _Functions:
  """Maps the functions of a round over the devices."""
  protocol = training.protocol
  on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=True)
  _, batch = batch_specs(mesh)
  held: Any = (SHARDED, SHARDED, SHARDED)
  kept: Any = (SHARDED, SHARDED, SHARDED, REPLICATED)
  begin = on_mesh(
    training.begin, in_specs=(*held, REPLICATED), out_specs=SHARDED
  )
  # A loss may begin a loop with a constant, which JAX's check would refuse. The
  # check also decides what gradients mean: without it, each device has its own.
  steps = {
    name: jax.shard_map(
      partial(training.step, group=group),
      mesh=group.mesh if group else mesh,
      check_vma=False,
      in_specs=(SHARDED, REPLICATED, REPLICATED, batch, REPLICATED, REPLICATED),
      out_specs=SHARDED,
    )
    for name, group in groups.items()
  }
  sharing = on_mesh(
    partial(share, protocol),
    in_specs=(SHARDED, SHARDED, REPLICATED),
    out_specs=SHARDED,
  )
  finish = on_mesh(
    partial(synchronise, protocol, training.optimizer),
    in_specs=(
      SHARDED, SHARDED, ExchangeState(*kept), REPLICATED, REPLICATED,
    ),
    out_specs=(Synchronised(*held, *kept), SHARDED),
  )  # fmt: skip
  return _Functions(begin, steps, sharing, finish)


def form_of_step(batch: PyTree, streamed: bool) -> PyTree:
  """Returns shapes and dtypes of what a worker gets at a step.

  Args:
    batch: `[S, T, ...]`, or streamed: `[S, ...]`.
    streamed: See `Round`.
  """
  axes = 1 if streamed else 2

  def form(x):
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(x.shape[axes:], dtype)

  return jax.tree.map(form, batch)


def _host_programs(protocol, functions, groups, mesh) -> dict[str, Any]:
  """Jits the programs of a round whose steps the host dispatches."""
  # The exchange needs some of the parameters as they were before training.
  stays = (protocol.keeps_shared, protocol.keeps_blocks, False)
  donated = [i for i, kept in enumerate(stays) if not kept]
  programs = {
    'begin': jax.jit(functions.begin, donate_argnums=donated),
    'finish': jax.jit(functions.finish, donate_argnums=(0, 2)),
  }
  if protocol.shared_every:
    programs['share'] = jax.jit(functions.share, donate_argnums=0)
  for name, step in functions.steps.items():
    group = groups[name]
    programs[name] = jax.jit(
      step,
      donate_argnums=0,
      compiler_options=compiler_options(mesh),
      out_shardings=group and NamedSharding(group.mesh, SHARDED),
    )
  return programs


def _scan_round(
  protocol, functions, held, exchange_state, moves, constants, batches, index
):
  """Trains and exchanges in one program, for GPU and TPU."""
  agreed = protocol.kept(*held[:2])
  slots = _slots(moves[0])
  local = functions.begin(*held, index)

  def body(local, step_input):
    batch, t = step_input
    step = functions.steps['step']
    return step(local, slots, constants, batch, index, t), None

  by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
  steps = jnp.arange(jax.tree.leaves(by_step)[0].shape[0], dtype=jnp.int32)
  inputs = by_step, steps
  if protocol.num_shared:
    every = protocol.shared_every
    spans = jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:]), inputs)
    inputs = jax.tree.map(lambda x: x[-1], spans)

    def body_and_share(local, span):
      local, _ = lax.scan(body, local, span)
      return functions.share(local, agreed, exchange_state.norms), None

    earlier = jax.tree.map(lambda x: x[:-1], spans)
    local, _ = lax.scan(body_and_share, local, earlier)
  local, _ = lax.scan(body, local, inputs)
  rounds = jnp.int32(protocol.rounds_at_once)
  return functions.finish(local, agreed, exchange_state, moves, rounds)
