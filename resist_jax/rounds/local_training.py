"""Local training of the workers of one device; runs inside `shard_map`.

No collective touches the worker axis here, unless the protocol averages
gradients. Arrays lead with W, the workers of this device. Where a worker is a
group of devices, each device computes on its part of the batch, and the
gradients are averaged inside the group.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from resist_jax.decomposition import join, split
from resist_jax.exchange import DATA, WORKER, collectives, participation
from resist_jax.rounds.device_groups import DeviceGroup
from resist_jax.rounds.moments import Parts, put_together, set_schedule_counts
from resist_jax.rounds.protocol import Protocol

PyTree = Any
Key = jax.Array

# loss_fn(params, present, batch, key) -> (loss, {'name': scalar}), or with
# constants as a fifth argument where there are any. The chains in `params` are
# `[K, ...]`. `present` is float32[K] for each chain: 1 where a slot holds a
# block, 0 where it is empty. `batch` is what one step of one worker gets; in a
# group, it is this device's part of it, with the same key on all devices. Where
# `Protocol.give_agreed` is set, the keyword `agreed` is `params` as the round
# began.
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Local(NamedTuple):
  """What changes during local training.

  Attributes:
    params: Parameters of the sub-networks, arrays `[W, ...]`.
    opt_state: State of the optimiser, arrays `[W, ...]`.
    metrics: `float32[W]` by name, sums over the steps so far, divided by T.
    agreed: The parameters as the round began, which no step changes; None where
      the loss does not get them.
  """

  params: dict[str, PyTree]
  opt_state: PyTree
  metrics: dict[str, jax.Array]
  agreed: dict[str, PyTree] | None = None


@dataclasses.dataclass(frozen=True)
class LocalTraining:
  """Pure functions that begin local training and take one step of it.

  Attributes:
    loss_fn: See `LossFn`.
    optimizer: A complete optax transformation; `optax.apply_updates` applies
      what it returns.
    protocol: Who holds what, and when workers communicate.
    seed: Seed of all randomness in training.
    metrics: Names of the metrics that the loss function returns.
    loop: Loop over the workers of a device, or lay them out in a row.
    grouped: Whether the mesh has the axis `data`, which batches lie along.
  """

  loss_fn: LossFn
  optimizer: optax.GradientTransformation
  protocol: Protocol
  seed: int
  metrics: tuple[str, ...]
  loop: bool
  grouped: bool

  def begin(
    self,
    shared: PyTree,
    chain: Mapping[str, PyTree],
    carried: Parts | None,
    round_index: jax.Array,
  ) -> Local:
    """Returns what local training starts from.

    Args:
      shared: Pytree of arrays `[W, ...]`.
      chain: For each partitioned chain, arrays `[W, K, ...]`.
      carried: See `State.carried`, here `[W, ...]`; None restarts the moments.
      round_index: `int32[]`; schedules count the steps of earlier rounds.
    """
    params = join(shared, chain)
    opt_state = jax.vmap(self.optimizer.init)(params)
    if carried is not None:
      moments = [join(**moment) for moment in carried.moments]
      parts = Parts(moments, carried.rest)
      opt_state = put_together(self.optimizer, opt_state, parts)
    count = round_index * self.protocol.local_steps
    opt_state = set_schedule_counts(self.optimizer, opt_state, count)
    opt_state = self._with_own_keys(opt_state, _workers_here(params), count)
    zeros = jnp.zeros(_workers_here(params), jnp.float32)
    metrics = dict.fromkeys(('loss', *self.metrics), zeros)
    agreed = params if self.protocol.give_agreed else None
    return Local(params, opt_state, metrics, agreed)

  def _with_own_keys(self, opt_state, here, count):
    """Lets an optimiser draw other numbers on each worker and in each round."""

    def own(leaf):
      if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
      workers = jnp.arange(here, dtype=jnp.int32)
      workers += here * lax.axis_index(WORKER)
      if self.protocol.average_gradients:  # All have the same optimiser.
        workers = jnp.zeros_like(workers)
      keys = jax.vmap(jax.random.fold_in, (0, None))(leaf, count)
      return jax.vmap(jax.random.fold_in)(keys, workers)

    return jax.tree.map(own, opt_state)

  def step(
    self,
    local: Local,
    slots: Mapping[str, jax.Array],
    constants: PyTree,
    batch: PyTree,
    round_index: jax.Array,
    t: jax.Array,
    *,
    group: DeviceGroup | None = None,
  ) -> Local:
    """Takes one step on every worker of this device.

    Args:
      local: What training has come to.
      slots: For each partitioned chain, `int32[S, K]` of all workers.
      constants: Passed to the loss function, where there are any.
      batch: Pytree of arrays `[W, B, ...]`.
      round_index: `int32[]`, for randomness.
      t: `int32[]`, the step in the round.
      group: The devices whose workers have the same depths, where workers are
        unequal: each then computes only as many blocks as it holds.

    Returns:
      The same after the step.
    """
    protocol, here = self.protocol, _workers_here(local.params)
    device = lax.axis_index(WORKER)
    if group is not None:
      device = jnp.array(group.rows, jnp.int32)[device]
    workers = device * here + jnp.arange(here, dtype=jnp.int32)
    mine = {name: table[workers] for name, table in slots.items()}
    depths = group.depths if group else here * (None,)
    own = local.params, local.opt_state
    args = workers, local.agreed, mine, batch

    def gradients(depth, params, worker, agreed, slots, batch):
      numbers = round_index, worker, t
      networks, inputs = (params, agreed), (constants, batch)
      return self._gradients(depth, numbers, networks, slots, inputs)

    alone = not self.grouped and not protocol.average_gradients
    if alone and self.loop and _alike(depths):
      step = self._take_turns
    else:
      step = self._step_together
    (params, opt_state), measured = step(gradients, depths, own, args)
    means = jax.tree.map(
      lambda mean, x: mean + x / protocol.local_steps, local.metrics, measured
    )
    return Local(params, opt_state, means, local.agreed)

  def _take_turns(self, gradients, depths, own, args):
    """Updates a worker before the next one, so that one gradient is stored."""

    def turn(own, inputs):
      w, args = inputs
      mine = jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, w, keepdims=False), own
      )
      grads, measured = gradients(depths[0], mine[0], *args)
      own = jax.tree.map(
        lambda x, new: lax.dynamic_update_index_in_dim(x, new, w, 0),
        own,
        self._update(grads, *mine),
      )
      return own, measured

    return lax.scan(turn, own, (jnp.arange(len(depths)), args))

  def _step_together(self, gradients, depths, own, args):
    """Updates all workers at once, as averaged gradients need it."""
    params, _ = own
    grads, measured = _each_worker(
      gradients, depths, (params, *args), self.loop
    )
    if self.grouped:
      grads, measured = lax.pmean((grads, measured), DATA)
    if self.protocol.average_gradients:
      grads, measured = self._average(grads, measured)
    return jax.vmap(self._update)(grads, *own), measured

  def _update(self, grads, params, opt_state):
    """Returns the parameters of a worker and its state after a step."""
    updates, opt_state = self.optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def _gradients(self, depth, numbers, networks, slots, inputs):
    """Returns the gradient of one worker, and its loss and metrics."""
    names = self.protocol.num_blocks
    (params, agreed), (constants, batch) = networks, inputs
    whole = split(params, names)[1]
    # Where a depth is given, only so many slots can hold blocks: the first.
    slots = jax.tree.map(lambda x: x[:depth], slots)
    key = jax.random.key(self.seed)
    for number in numbers:
      key = jax.random.fold_in(key, number)
    present = {
      name: (blocks < names[name]).astype(jnp.float32)
      for name, blocks in slots.items()
    }
    extra = () if constants is None else (constants,)
    named = {}
    if agreed is not None:
      named['agreed'] = _first_slots(agreed, names, depth)

    def loss(params):
      return self.loss_fn(params, present, batch, key, *extra, **named)

    (value, measured), grads = jax.value_and_grad(loss, has_aux=True)(
      _first_slots(params, names, depth)
    )
    if depth is not None:
      shared, chain = split(grads, names)
      grads = join(shared, jax.tree.map(_fill_up, chain, whole))
    measured = {'loss': value, **measured}
    return grads, {k: jnp.asarray(v, jnp.float32) for k, v in measured.items()}

  def _average(self, grads, measured):
    """Averages gradients over all workers, the healthy ones where asked."""
    protocol, healthy = self.protocol, None
    if protocol.exclude_faulty:
      finite = participation.finite(grads, measured['loss'])
      healthy, _ = participation.agree(
        measured['loss'], finite, protocol.num_workers
      )
      # A NaN marks the worker in the mean over the steps.
      loss = jnp.where(finite, measured['loss'], jnp.nan)
      measured = {**measured, 'loss': loss}
    mean = collectives.mean_over_workers(
      collectives.widen(grads),
      protocol.num_workers,
      protocol.exchange.format.values,
      healthy,
    )
    return collectives.narrow(mean, grads), measured


def _workers_here(tree: PyTree) -> int:
  return jax.tree.leaves(tree)[0].shape[0]


def _first_slots(params, names, depth: int | None):
  """Returns a sub-network without the slots after the first `depth`."""
  shared, chain = split(params, names)
  return join(shared, jax.tree.map(lambda x: x[:depth], chain))


def _fill_up(x, like):
  """Appends zeros to make an array as long as another one."""
  zeros = jnp.zeros((len(like) - len(x), *x.shape[1:]), x.dtype)
  return jnp.concatenate([x, zeros])


def _alike(depths) -> bool:
  """Returns whether one program serves several workers."""
  return len(depths) > 1 and len(set(depths)) == 1


def _each_worker(function, depths, args, loop: bool):
  """Maps a function over the workers of this device, one after another."""
  if loop and _alike(depths):
    return lax.map(lambda xs: function(depths[0], *xs), args)
  turns = [
    function(depth, *jax.tree.map(lambda x, w=w: x[w], args))
    for w, depth in enumerate(depths)
  ]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *turns)
