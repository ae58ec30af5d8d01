"""What workers hold between rounds, and the global model they hold together."""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from resist_jax import decomposition
from resist_jax.decomposition.assignments import Assigner, Assignment
from resist_jax.exchange import collectives, compression
from resist_jax.exchange.collectives import DATA, WORKER
from resist_jax.rounds.arrays import rows

PyTree = Any
# The same for all partitioned chains, or by name; see `decomposition`.
MinDepth = int | None | Mapping[str, int | None]

SHARDED = PartitionSpec(WORKER)
REPLICATED = PartitionSpec()


def make_mesh(num_devices: int, devices_per_worker: int = 1) -> Mesh:
  """Returns a mesh of the first devices, as many of each process.

  Args:
    num_devices: D * G.
    devices_per_worker: G, a divisor of it.

  Returns:
    D devices on the axis `worker`; where G > 1, D groups of neighbours, on the
    same host if they can be, and G on the axis `data`.
  """
  # Explicit axes, the default of make_mesh, would insist on input specs.
  auto = jax.sharding.AxisType.Auto
  by_process = [
    [d for d in jax.devices() if d.process_index == process]
    for process in range(jax.process_count())
  ]
  each = num_devices // len(by_process)
  devices = [d for found in by_process for d in found[:each]]
  if devices_per_worker > 1:
    groups = np.array(devices).reshape(-1, devices_per_worker)
    return Mesh(groups, (WORKER, DATA), axis_types=(auto, auto))
  if len(by_process) > 1:  # make_mesh may order devices by links, across hosts.
    return Mesh(np.array(devices), (WORKER,), axis_types=(auto,))
  return jax.make_mesh((num_devices,), (WORKER,), (auto,), devices=devices)


def mesh_sizes(mesh: Mesh) -> tuple[int, int]:
  """Returns D and G: how many groups of devices, and how many in each."""
  return mesh.shape[WORKER], mesh.shape.get(DATA, 1)


def batch_specs(mesh: Mesh) -> tuple[PartitionSpec, PartitionSpec]:
  """Returns how a round's batches `[S, T, B]`, and a step's `[S, B]`, lie."""
  if DATA not in mesh.shape:
    return SHARDED, SHARDED
  return PartitionSpec(WORKER, None, DATA), PartitionSpec(WORKER, DATA)


def spread(mesh: Mesh) -> PartitionSpec:
  """Returns how rows lie of which each device, in groups too, has its own."""
  return PartitionSpec(mesh.axis_names)


def workers_here(mesh: Mesh, num_workers: int) -> range:
  """Returns the workers on this process's devices; they are neighbours."""
  groups, size = mesh_sizes(mesh)
  each = num_workers // groups
  firsts = mesh.devices.reshape(groups, size)[:, 0]
  mine = [
    d
    for d, device in enumerate(firsts)
    if device.process_index == jax.process_index()
  ]
  return range(mine[0] * each, (mine[-1] + 1) * each)


def min_depth_of(chain: str, min_depth: MinDepth) -> int | None:
  """Returns the least number of blocks of a chain that a worker runs."""
  return min_depth[chain] if isinstance(min_depth, Mapping) else min_depth


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Who holds what, and when and how workers talk.

  ResIST, local SGD and data parallel are values of this, not trainers of their
  own: local SGD partitions no chain, so every worker holds every block; data
  parallel is local SGD that averages its gradients at every step.

  Attributes:
    num_workers: S.
    local_steps: T, steps of each worker in a round.
    num_blocks: L of each partitioned chain, by name; empty for full models.
    min_depth: Blocks of each partitioned chain that a worker runs at least.
    depths: See `decomposition.slots_per_worker`; of every partitioned chain.
    average_gradients: Average over the workers at each step.
    carry_velocity: Exchange the optimiser's momentum with the parameters and
      keep it, instead of starting from zero in every round (the paper).
    exchange: `masked_psum`, for any slots, or `hand_over`, for those of a
      `assignments.Assigner`.
    wire_format: Name of one of `compression.FORMATS`.
    leave_out: Average over workers that can be trusted only, see `health`.
    loss_factor: See `health.trusted`.
  """

  num_workers: int
  local_steps: int
  num_blocks: Mapping[str, int]
  min_depth: MinDepth = 0
  depths: tuple[int, ...] = ()
  average_gradients: bool = False
  carry_velocity: bool = False
  exchange: str = 'masked_psum'
  wire_format: str = 'float32'
  leave_out: bool = False
  loss_factor: float = 0.0

  @property
  def format(self) -> compression.Format:
    """How parameters are sent."""
    return compression.FORMATS[self.wire_format]

  @property
  def sends_changes(self) -> bool:
    """Whether the exchange needs the shared part before local training."""
    return not (self.format.exact or self.average_gradients)

  @property
  def keeps_blocks(self) -> bool:
    """Whether it needs the blocks, for those that no good worker trained."""
    return self.leave_out and bool(self.num_blocks)

  @property
  def keeps_error(self) -> bool:
    """Whether senders keep what rounding left out."""
    return self.sends_changes and self.format.feedback

  def kept(
    self, shared: PyTree, chain: PyTree
  ) -> tuple[PyTree | None, PyTree | None]:
    """Returns what the exchange needs of these, None for what it does not."""
    return (
      shared if self.sends_changes else None,
      chain if self.keeps_blocks else None,
    )

  def slots_per_worker(self, chain: str) -> int:
    """Returns K of a chain."""
    return decomposition.slots_per_worker(
      self.num_blocks[chain],
      self.num_workers,
      min_depth_of(chain, self.min_depth),
      self.depths,
    )

  def sample_slots(self, key: jax.Array, chain: str) -> jax.Array:
    """Deals a chain afresh, for a masked psum."""
    min_depth = min_depth_of(chain, self.min_depth)
    return decomposition.sample_slots(
      key, self.num_blocks[chain], self.num_workers, min_depth, self.depths
    )

  def dealer(self, chain: str) -> Assigner:
    """Returns what deals a chain for a hand-over."""
    # A dealer gives every worker a block.
    min_depth = min_depth_of(chain, self.min_depth) or 0
    sizes = self.num_blocks[chain], self.num_workers, min_depth, self.depths
    return Assigner(*sizes)


class State(NamedTuple):
  """What workers hold between rounds; the leading axis of all arrays is S.

  Attributes:
    shared: Parameters outside the partitioned chains, `[S, ...]`, equal on all
      workers.
    chain: For each partitioned chain, its blocks `[S, K, ...]`.
    slots: For each partitioned chain, which blocks these are; on the host.
    velocity: The optimiser's momentum for `{'shared': ..., 'chain': ...}` when
      it is carried from round to round; None when it starts afresh.
    error: What rounding left out of the changes sent so far, see
      `collectives.error_shapes`; None where nothing is kept.
  """

  shared: PyTree
  chain: dict[str, PyTree]
  slots: dict[str, Assignment]
  velocity: PyTree | None = None
  error: PyTree | None = None

  @property
  def parts(self) -> tuple[PyTree, dict[str, PyTree], dict[str, np.ndarray]]:
    """The parameters: shared, chains, and the slots that say which blocks."""
    slots = {name: deal.slots for name, deal in self.slots.items()}
    return self.shared, self.chain, slots


def distribute(
  params: Mapping[str, PyTree],
  slots: Mapping[str, Assignment],
  protocol: Protocol,
  mesh: Mesh,
  velocity: Mapping[str, PyTree] | None = None,
) -> State:
  """Hands the global model out to the workers; a device gets its part only.

  Args:
    params: Canonical global parameters by name, chains `[L, ...]`.
    slots: The deal of each chain to partition.
    protocol: Who holds what.
    mesh: Where the workers live.
    velocity: Momentum to carry, shaped as `params`, or None.

  Returns:
    The state before a round, sharded over the mesh.
  """
  S = protocol.num_workers

  def block_rows(x, deal):
    x = np.asarray(x)
    # An empty slot holds L, one past the end.
    padded = np.concatenate([x, np.zeros_like(x[:1])])
    shape = (deal.slots.shape[1], *x.shape[1:])
    return _place(lambda s: padded[deal.slots[s]], S, shape, mesh)

  def hand_out(tree):
    shared, chain = decomposition.split(tree, slots)
    return replicate(shared, S, mesh), {
      name: jax.tree.map(lambda x, d=deal: block_rows(x, d), chain[name])
      for name, deal in slots.items()
    }

  shared, chain = hand_out(params)
  if velocity is not None:
    velocity = dict(zip(('shared', 'chain'), hand_out(velocity), strict=True))
  error = None
  if protocol.keeps_error:
    size = sum(x[0].size for x in jax.tree.leaves(shared))
    error = {
      name: _place(lambda _, n=n: np.zeros(n, np.float32), S, (n,), mesh)
      for name, (_, n) in collectives.error_shapes(size, S).items()
    }
  return State(shared, chain, dict(slots), velocity, error)


def replicate(tree: PyTree, num_workers: int, mesh: Mesh) -> PyTree:
  """Gives every worker a copy.

  Args:
    tree: Pytree of arrays.
    num_workers: S.
    mesh: Where the workers live.

  Returns:
    Pytree of arrays `[S, ...]`, sharded over the mesh.
  """

  def copies(x):
    x = np.asarray(x)
    return _place(lambda _: x, num_workers, x.shape, mesh)

  return jax.tree.map(copies, tree)


def _place(row_of, num_workers, shape, mesh) -> jax.Array:
  """Makes an array `[S, ...]`; each device gets its workers' rows, no more."""

  def rows_of(index):
    first, stop, _ = index[0].indices(num_workers)
    return np.stack([row_of(worker) for worker in range(first, stop)])

  sharding = NamedSharding(mesh, SHARDED)
  shape = (num_workers, *shape)
  return jax.make_array_from_callback(shape, sharding, rows_of)


def first_copy(x: jax.Array | np.ndarray) -> np.ndarray:
  """Returns on the host what all workers hold alike.

  Args:
    x: `[S, ...]`, equal along S.

  Returns:
    `[...]`, from a device at hand.
  """
  return np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)[0]


def holders(
  slots: np.ndarray, num_blocks: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds a holder of every block.

  Args:
    slots: `int32[S, K]`.
    num_blocks: L.

  Returns:
    `(worker, slot)`, `int32[L]` each: the first worker that holds the block,
    and its slot there.

  >>> holders(np.array([[1, 2], [0, 1]]), 3)[0].tolist()
  [1, 0, 0]
  """
  found = slots[:, :, None] == np.arange(num_blocks)
  worker = found.any(axis=1).argmax(axis=0)
  slot = found[worker, :, np.arange(num_blocks)].argmax(axis=1)
  return worker.astype(np.int32), slot.astype(np.int32)


def assemble(
  state: State, num_blocks: Mapping[str, int]
) -> tuple[dict[str, PyTree], dict[str, PyTree] | None]:
  """Undoes `distribute`: the canonical global model between two rounds.

  Args:
    state: The state after a round; its arrays may live anywhere.
    num_blocks: L of each partitioned chain.

  Returns:
    `(params, velocity)`: parameters by name with chains `[L, ...]`, on the
    host, and the momentum in the same shape, or None where it is not carried.
  """
  # Copies are equal between rounds: read the first holder's.
  where = {
    name: holders(state.slots[name].slots, length)
    for name, length in num_blocks.items()
  }

  def gather(shared, chain):
    shared = jax.tree.map(first_copy, shared)
    whole = {
      name: jax.tree.map(lambda x, i=index: rows(x, *i), chain[name])
      for name, index in where.items()
    }
    return decomposition.join(shared, whole)

  velocity = state.velocity and gather(**state.velocity)
  return gather(state.shared, state.chain), velocity
