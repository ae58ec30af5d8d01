"""Local training of the workers of one device; runs inside `shard_map`.

No collective touches the worker axis here, unless the protocol averages
gradients. Arrays lead with W, the workers of this device. Where these have a
group of devices, each device computes on its part of a batch, and what follows
from the mean of their gradients is equal on all of them.
"""

from collections.abc import Callable, Mapping
from collections.abc import Callable as Schedule
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from resist_jax import decomposition
from resist_jax.exchange import collectives, participation
from resist_jax.exchange.collectives import DATA, WORKER
from resist_jax.rounds.state import Protocol

PyTree = Any
Key = jax.Array


class Local(NamedTuple):
  """What workers change during local training.

  Attributes:
    params: `{'shared': ..., 'chain': ...}`, arrays `[W, ...]`.
    opt_state: The optimiser's, arrays `[W, ...]`.
    metrics: `float32[W]` by name, means over the steps so far.
  """

  params: PyTree
  opt_state: PyTree
  metrics: dict[str, jax.Array]


# loss_fn(params, present, constants, batch, key) -> (loss, {'name': scalar}).
# `present` is float32[K] per chain: 1 where a slot holds a block, 0 where it is
# empty. `constants` never changes; `batch` is what one step of one worker gets:
# in a group, this device's part of it, with the same key on all of them.
LossFn = Callable[
  [PyTree, Mapping[str, jax.Array], PyTree, PyTree, Key],
  tuple[jax.Array, dict[str, jax.Array]],
]


def make_local_training(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  protocol: Protocol,
  seed: int,
  loop: bool,
  metrics: tuple[str, ...],
  grouped: bool = False,
) -> tuple[Callable[..., Local], Callable[..., Local]]:
  """Makes the functions that begin local training and take one step of it.

  Args:
    loss_fn: See `LossFn`.
    optimizer: A gradient transformation without its learning rate.
    schedule: Learning rate at a step of the whole run.
    protocol: Who holds what, and when workers talk.
    seed: Seed of all randomness in training.
    loop: Loop over the workers of a device, or lay them out in a row.
    metrics: Names of the metrics that the loss function returns.
    grouped: Whether the mesh has the axis `data`, over which batches lie.

  Returns:
    `begin(shared, chain, velocity) -> Local` and `step(local, slots, constants,
    batch, round_index, t, team=None) -> Local`, whose `team` is that of this
    device where workers are unequal: then each computes its own blocks alone.
  """

  def begin(shared, chain, velocity):
    params = {'shared': shared, 'chain': chain}
    opt_state = jax.vmap(optimizer.init)(params)
    if velocity is not None:
      opt_state = optax.tree.set(opt_state, trace=velocity)
    zeros = jnp.zeros(_workers_here(params), jnp.float32)
    return Local(params, opt_state, dict.fromkeys(('loss', *metrics), zeros))

  def gradients(depth, worker, params, slots, constants, batch, round_index, t):
    chains = params['chain']
    if depth is not None:  # Blocks come first, empty slots last.
      slots, chain = jax.tree.map(lambda x: x[:depth], (slots, chains))
      params = {**params, 'chain': chain}
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

    (value, measured), grads = jax.value_and_grad(loss, has_aux=True)(params)
    if depth is not None:
      grads['chain'] = jax.tree.map(_fill_up, grads['chain'], chains)
    return grads, {'loss': value, **measured}

  def step(local, slots, constants, batch, round_index, t, team=None):
    here = _workers_here(local.params)
    device = lax.axis_index(WORKER)
    if team is not None:
      device = jnp.array(team.rows, jnp.int32)[device]
    workers = device * here + jnp.arange(here, dtype=jnp.int32)
    params = local.params
    if grouped:
      # Else the gradient would be the sum over the group, unseen.
      params = lax.pcast(params, DATA, to='varying')
    grads, measured = _each_worker(
      lambda depth, worker, params, slots, batch: gradients(
        depth, worker, params, slots, constants, batch, round_index, t
      ),
      team.depths if team else here * (None,),
      (workers, params, slots, batch),
      loop,
    )
    if grouped:
      grads, measured = lax.pmean((grads, measured), DATA)
    if protocol.average_gradients:
      good = None
      if protocol.leave_out:
        finite = participation.finite(grads, measured['loss'])
        good = participation.agree(
          measured['loss'], finite, protocol.num_workers
        )
        # Marks the worker in the mean over the steps.
        measured['loss'] = jnp.where(finite, measured['loss'], jnp.nan)
      grads = collectives.mean_over_workers(
        grads, protocol.num_workers, protocol.format.values, good
      )
    updates, opt_state = jax.vmap(optimizer.update)(
      grads, local.opt_state, local.params
    )
    rate = schedule(round_index * protocol.local_steps + t)
    params = jax.tree.map(
      lambda p, u: p - rate.astype(p.dtype) * u, local.params, updates
    )
    means = jax.tree.map(
      lambda mean, x: mean + x / protocol.local_steps, local.metrics, measured
    )
    return Local(params, opt_state, means)

  return begin, step


def _workers_here(tree: PyTree) -> int:
  return jax.tree.leaves(tree)[0].shape[0]


def _fill_up(x, like):
  """Appends zeros to make an array as long as another one."""
  zeros = jnp.zeros((len(like) - len(x), *x.shape[1:]), x.dtype)
  return jnp.concatenate([x, zeros])


def _each_worker(function, depths, args, loop: bool):
  """Maps a function over the workers of this device, one after another."""
  if loop and len(depths) > 1 and len(set(depths)) == 1:
    return lax.map(lambda xs: function(depths[0], *xs), args)
  turns = [
    function(depth, *jax.tree.map(lambda x, w=w: x[w], args))
    for w, depth in enumerate(depths)
  ]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *turns)
