"""Devices in teams: those whose workers run equally many blocks.

Where workers are unequal, a program for all of them would give each the slots
of the largest, and an empty slot would cost as much as a block. Local training
talks to nobody, so each team has a program of its own instead, on its own part
of the mesh. (On CPU, convolutions in a branch that a device takes at run time
are up to three times slower than the same ones outside.)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from resist_jax.decomposition.assignments import Assignment
from resist_jax.exchange.collectives import WORKER
from resist_jax.rounds.state import Protocol

PyTree = Any


class Team(NamedTuple):
  """Devices whose workers have the same depths.

  Attributes:
    mesh: Of these devices.
    rows: Their places along the worker axis of the whole mesh.
    depths: Blocks of each of the W workers of a device.
  """

  mesh: Mesh
  rows: tuple[int, ...]
  depths: tuple[int, ...]


def make_teams(protocol: Protocol, mesh: Mesh) -> dict[str, Team | None]:
  """Groups the devices of a mesh.

  Args:
    protocol: Who holds what.
    mesh: D devices on the axis `worker`.

  Returns:
    The teams that have devices in this process, by the name of their program;
    where all workers are equal, one program for the whole mesh: None.
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
  teams: dict[str, Team | None] = {}
  for i, (of_device, found) in enumerate(rows.items()):
    devices = Mesh(mesh.devices.take(found, axis), mesh.axis_names)
    if devices.local_devices:
      teams[f'step_{i}'] = Team(devices, tuple(found), of_device)
  return teams


def check(protocol: Protocol, deals: Mapping[str, Assignment]) -> None:
  """Finds out whether slots are what the workers' programs were made for.

  Args:
    protocol: Who holds what.
    deals: Of each partitioned chain.

  Raises:
    ValueError: If a worker has another number of blocks than its depth.
  """
  if not protocol.depths:
    return
  for name, length in protocol.num_blocks.items():
    counts = tuple((deals[name].slots < length).sum(axis=1).tolist())
    if counts != tuple(protocol.depths):
      raise ValueError(
        f'the slots of {name} hold {counts} blocks, but depths is '
        f'{protocol.depths}: deal them with these depths.'
      )


def part(tree: PyTree, team: Team | None) -> PyTree:
  """Returns what lies on the devices of a team; nothing moves.

  Args:
    tree: Pytree of arrays over the whole mesh, or of their shapes; what lies
      elsewhere stays as it is.
    team: Whose part; None for all.

  Returns:
    Pytree of arrays over the team's mesh, which share their memory.
  """
  if team is None:
    return tree

  def one(x):
    if not isinstance(getattr(x, 'sharding', None), NamedSharding):
      return x
    sharding = NamedSharding(team.mesh, x.sharding.spec)
    shape = x.shape
    if x.sharding.spec and x.sharding.spec[0] == WORKER:
      workers = shape[0] // x.sharding.mesh.shape[WORKER] * len(team.rows)
      shape = (workers, *shape[1:])
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
    return _from_shards([x], shape, sharding)

  return jax.tree.map(one, tree)


def whole(parts: Mapping[str, PyTree], like: PyTree) -> PyTree:
  """Undoes `part`, for all teams together.

  Args:
    parts: Of each team, by name.
    like: What `part` was given; its arrays may be deleted by now.

  Returns:
    Pytree of such arrays.
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
