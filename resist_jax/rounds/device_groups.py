"""Groups of devices whose workers run equally many blocks.

Where workers are unequal, one program for all of them would give each worker
the slots of the largest, and an empty slot would cost as much as a block. Local
training needs no communication, so each group has a program of its own, on its
own part of the mesh. (On CPU, convolutions in a branch chosen at run time are
up to three times slower than outside of one.)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from resist_jax.exchange import WORKER
from resist_jax.rounds.protocol import Protocol

PyTree = Any


class DeviceGroup(NamedTuple):
  """Devices whose workers have the same depths.

  Attributes:
    mesh: Mesh of these devices.
    rows: Their positions along the worker axis of the whole mesh.
    depths: How many blocks each of the W workers of a device holds.
  """

  mesh: Mesh
  rows: tuple[int, ...]
  depths: tuple[int, ...]


def make_device_groups(
  protocol: Protocol, mesh: Mesh
) -> dict[str, DeviceGroup | None]:
  """Groups the devices of a mesh.

  Args:
    protocol: Who holds what.
    mesh: D devices on the axis `worker`.

  Returns:
    The groups with devices in this process, by the name of their program. Where
    all workers are equal, one program serves the whole mesh: None.

  Raises:
    ValueError: If unequal workers average gradients.
  """
  depths = protocol.depths
  if not protocol.num_blocks or len(set(depths)) < 2:
    return {'step': None}
  if protocol.average_gradients:
    raise ValueError('workers of unequal depths cannot average gradients.')
  here = protocol.num_workers // mesh.shape[WORKER]
  rows: dict[tuple[int, ...], list[int]] = {}
  for row in range(mesh.shape[WORKER]):
    of_device = tuple(depths[row * here : (row + 1) * here])
    rows.setdefault(of_device, []).append(row)
  axis = mesh.axis_names.index(WORKER)
  groups: dict[str, DeviceGroup | None] = {}
  for i, (of_device, found) in enumerate(rows.items()):
    devices = Mesh(mesh.devices.take(found, axis), mesh.axis_names)
    if devices.local_devices:
      groups[f'step_{i}'] = DeviceGroup(devices, tuple(found), of_device)
  return groups


def part(tree: PyTree, group: DeviceGroup | None) -> PyTree:
  """Returns the part of arrays that lies on a group's devices; nothing moves.

  Args:
    tree: Pytree of arrays over the whole mesh, or of their shapes; other leaves
      stay as they are.
    group: The group; None for the whole mesh.

  Returns:
    Pytree of arrays over the group's mesh, which share their memory.
  """
  if group is None:
    return tree

  def one(x):
    if not isinstance(getattr(x, 'sharding', None), NamedSharding):
      return x
    sharding = NamedSharding(group.mesh, x.sharding.spec)
    shape = x.shape
    if x.sharding.spec and x.sharding.spec[0] == WORKER:
      workers = shape[0] // x.sharding.mesh.shape[WORKER] * len(group.rows)
      shape = (workers, *shape[1:])
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
    return _from_shards([x], shape, sharding)

  return jax.tree.map(one, tree)


def whole(parts: Mapping[str, PyTree], like: PyTree) -> PyTree:
  """Undoes `part`, for all groups together.

  Args:
    parts: The part of each group, by name.
    like: The tree that `part` was given; its arrays may be deleted by now.

  Returns:
    Pytree of arrays over the whole mesh.
  """
  if 'step' in parts:  # One program for all.
    return parts['step']
  return jax.tree.map(
    lambda x, *shards: _from_shards(shards, x.shape, x.sharding),
    like,
    *parts.values(),
  )


def _from_shards(arrays, shape, sharding) -> jax.Array:
  shards = {s.device: s.data for x in arrays for s in x.addressable_shards}
  here = [shards[d] for d in sharding.addressable_devices if d in shards]
  return jax.make_array_from_single_device_arrays(
    shape, sharding, here, dtype=arrays[0].dtype
  )
