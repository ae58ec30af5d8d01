"""What workers hold between rounds, and the global model they hold together."""

from collections.abc import Mapping
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resist_jax import decomposition
from resist_jax.exchange import WORKER

PyTree = Any

SHARDED = PartitionSpec(WORKER)
REPLICATED = PartitionSpec()


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
