"""The mesh that workers live on, and how arrays lie on it."""

from collections.abc import Callable
from functools import cache
import os
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from resist_jax.errors import is_whole
from resist_jax.exchange import DATA, WORKER

SHARDED = PartitionSpec(WORKER)
REPLICATED = PartitionSpec()
# What XLA's CPU backend hands to a library: products of matrices. By default it
# hands over convolutions, too, and those of our networks are faster with Eigen.
_LIBRARY = 'xla_cpu_experimental_ynn_fusion_type'
_ON_CPU = {_LIBRARY: 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}
_LOADS_MAY_HANG_FROM = (0, 11)  # The version of JAX.


def make_mesh(
  num_devices: int | None = None, devices_per_worker: int = 1
) -> Mesh:
  """Returns a mesh of the first devices, equally many of each process.

  Args:
    num_devices: D * G; None for all devices.
    devices_per_worker: G, a divisor of it.

  Returns:
    D devices on the axis `worker`. Where G > 1: D groups of neighbours, on the
    same host where possible, and G devices on the axis `data`.

  Raises:
    ValueError: If there are fewer devices, or the groups do not come out even,
      or a TPU cannot run programs on so many.
  """
  # Explicit axes, the default of make_mesh, would insist on input specs.
  auto = jax.sharding.AxisType.Auto
  processes = jax.process_count()
  num_devices = jax.device_count() if num_devices is None else num_devices
  given = {'num_devices': num_devices, 'devices_per_worker': devices_per_worker}
  for name, value in given.items():
    if not is_whole(value):
      raise ValueError(f'{name} is {value!r}; it must be a whole number.')
  if not 1 <= num_devices <= jax.device_count() or num_devices % processes:
    raise ValueError(
      f'num_devices is {num_devices}; use a multiple of {processes} (the '
      f'processes), at most {jax.device_count()} (the devices).'
    )
  if devices_per_worker < 1 or num_devices // processes % devices_per_worker:
    raise ValueError(
      f'devices_per_worker is {devices_per_worker}; it must divide the '
      f'{num_devices // processes} devices of a process.'
    )
  by_process = [
    [d for d in jax.devices() if d.process_index == process]
    for process in range(processes)
  ]
  each = num_devices // processes
  fewest = min(map(len, by_process))
  if fewest < each:
    raise ValueError(
      f'num_devices is {num_devices}, {each} of each process, but one has only '
      f'{fewest}: use at most {processes * fewest}.'
    )
  devices = [d for found in by_process for d in found[:each]]
  if devices_per_worker > 1:
    groups = np.array(devices).reshape(-1, devices_per_worker)
    return Mesh(groups, (WORKER, DATA), axis_types=(auto, auto))
  if processes > 1:  # make_mesh may order devices by links, across hosts.
    return Mesh(np.array(devices), (WORKER,), axis_types=(auto,))
  try:
    return jax.make_mesh((num_devices,), (WORKER,), (auto,), devices=devices)
  except AssertionError as error:  # Chips of a TPU.
    raise ValueError(
      f'num_devices is {num_devices}, and so many chips of this TPU form no '
      'rectangle: use a power of two.'
    ) from error


def most_devices(
  num_workers: int, processes: int, each: int, platform: str
) -> int:
  """Returns how many devices workers can share evenly at most.

  Args:
    num_workers: S, a multiple of the processes.
    processes: Number of processes, each with equally many devices.
    each: How many devices, or groups, a process has.
    platform: What JAX calls the devices. Programs on a TPU need a rectangle of
      chips, so only powers of two count there.

  >>> most_devices(6, 1, 4, 'gpu'), most_devices(6, 1, 4, 'tpu')
  (3, 2)
  """
  counts = [
    count
    for count in range(1, each + 1)
    if num_workers % (processes * count) == 0
    and not (platform == 'tpu' and count & (count - 1))
  ]
  return processes * max(counts)


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """Returns how XLA should compile programs that run a network.

  Args:
    mesh: Where the workers live.

  Returns:
    The `compiler_options` of `jax.jit`: none for accelerators, none where
    XLA_FLAGS in the environment says otherwise, and none that this version of
    XLA does not have.
  """
  chosen = _LIBRARY in os.environ.get('XLA_FLAGS', '')
  if mesh.devices.flat[0].platform != 'cpu' or chosen or not _has_library():
    return {}
  return dict(_ON_CPU)


@cache
def _has_library() -> bool:
  try:
    jax.jit(lambda: 0, compiler_options=_ON_CPU).lower().compile()
  except jax.errors.JaxRuntimeError:  # The option is called experimental.
    return False
  return True


def loads_may_hang(mesh: Mesh) -> bool:
  """Returns whether programs that JAX loads from its cache may wait forever.

  From JAX 0.11 on, a CPU program that comes from the cache may begin its
  collectives in another order on each device. Then devices wait for each other,
  and XLA ends the process after 40 seconds. A program that was compiled in this
  process keeps the order.

  Args:
    mesh: Where the workers live.

  Returns:
    True on CPU devices, if JAX has a compilation cache and is that new.
  """
  names = ('jax_enable_compilation_cache', 'jax_compilation_cache_dir')
  cached = all(getattr(jax.config, name) for name in names)
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  newer = jax.__version_info__ >= _LOADS_MAY_HANG_FROM
  return cached and on_cpu and mesh.size > 1 and newer


def avoid_loads(mesh: Mesh) -> None:
  """Turns JAX's compilation cache off in this process where loads may hang.

  Args:
    mesh: Where the workers live, see `loads_may_hang`.
  """
  if loads_may_hang(mesh):
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # JAX asks only once whether to use it.


def mesh_sizes(mesh: Mesh) -> tuple[int, int]:
  """Returns how many groups of devices a mesh has, and how large they are.

  Args:
    mesh: Where the workers live, see `make_mesh`.

  Returns:
    `(D, G)`: D groups of G devices.
  """
  return mesh.shape[WORKER], mesh.shape.get(DATA, 1)


def batch_specs(mesh: Mesh) -> tuple[PartitionSpec, PartitionSpec]:
  """Returns how a round's batches `[S, T, B]`, and a step's `[S, B]`, lie."""
  if DATA not in mesh.shape:
    return SHARDED, SHARDED
  return PartitionSpec(WORKER, None, DATA), PartitionSpec(WORKER, DATA)


def spread(mesh: Mesh) -> PartitionSpec:
  """Returns how rows lie when each device, in groups too, has its own."""
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


def shapes_on(mesh: Mesh, function: Callable, *args: Any) -> Any:
  """Returns shapes of what a function returns that may name axes of a mesh."""
  on_mesh = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=REPLICATED,
    out_specs=REPLICATED,
    check_vma=False,
  )
  return jax.eval_shape(on_mesh, *args)
