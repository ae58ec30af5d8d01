"""Accelerators to compile for: their names, figures and compilers.

The figures are those that the makers publish: dense bfloat16 products, memory,
and what one link of a device carries in one direction.
"""

from collections.abc import Sequence
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
import numpy as np

from resist_jax.errors import ConfigError
from resist_jax.exchange import DATA, WORKER


class Chip(NamedTuple):
  """What a device can do.

  Attributes:
    flops: Floating-point operations a second, in bfloat16.
    memory: Bytes.
    bandwidth: Bytes a second between the device and its memory.
    link: Bytes a second that a device sends through one of its links.
    topology: How the compiler names a topology, `{}` being its shape.
    clock: Cycles a second of a TPU's core; None where it is not known.
  """

  flops: float
  memory: float
  bandwidth: float
  link: float
  topology: str
  clock: float | None = None


CHIPS = {
  'v4': Chip(275e12, 32 * 2**30, 1228e9, 45e9, 'v4:{}', 1.05e9),
  'v5e': Chip(197e12, 16 * 2**30, 819e9, 45e9, 'v5e:{}', 1.5e9),
  'v5p': Chip(459e12, 95 * 2**30, 2765e9, 90e9, 'v5:{}', 1.75e9),
  'v6e': Chip(918e12, 32 * 2**30, 1640e9, 90e9, 'v6e:{}'),
  'h100': Chip(989e12, 80e9, 3352e9, 450e9, '1x1x{}'),
}
# What XLA's GPU compiler asks about a GPU that is not there. Limits of blocks
# and registers are those of CUDA's compute capability 9.
GPUS: dict[str, dict[str, Any]] = {
  'h100': {
    'gpu_device_info': {
      'threads_per_block_limit': 1024,
      'threads_per_warp': 32,
      'threads_per_core_limit': 2048,
      'shared_memory_per_block': 48 * 2**10,
      'shared_memory_per_block_optin': 227 * 2**10,
      'shared_memory_per_core': 228 * 2**10,
      'registers_per_block_limit': 2**16,
      'registers_per_core_limit': 2**16,
      'block_dim_limit_x': 2**31 - 1,
      'block_dim_limit_y': 2**16 - 1,
      'block_dim_limit_z': 2**16 - 1,
      'core_count': 132,
      'fpus_per_core': 128,
      'clock_rate_ghz': 1.98,
      'memory_bandwidth': 3352320000000,
      'l2_cache_size': 50 * 2**20,
      'device_memory_size': 84929347584,
      'cuda_compute_capability': {'major': 9},
    },
    'platform_name': 'CUDA',
    'dnn_version_info': {'major': 9, 'minor': 12},
    'runtime_version': {'major': 13},
    'device_description_str': 'NVIDIA H100 80GB HBM3',
  }
}
# Compilers by platform: the package, and the extra of setup.cfg with it.
COMPILERS = {'tpu': ('libtpu', 'tpu'), 'gpu': ('jax_cuda13_plugin', 'cuda')}


class Target(NamedTuple):
  """Devices to compile for.

  Attributes:
    kind: A key of `CHIPS`.
    shape: Of a slice, such as (4, 4); for GPUs, how many in a host.
    slices: How many slices, each with its own network of fast links.
  """

  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """As `parse` reads it."""
    several = f'{self.slices}*' if self.slices > 1 else ''
    return f'{several}{self.kind}:{"x".join(map(str, self.shape))}'

  @property
  def num_devices(self) -> int:
    """Number of devices."""
    return self.slices * math.prod(self.shape)

  @property
  def chip(self) -> Chip:
    """What each of them can do."""
    return CHIPS[self.kind]

  @property
  def platform(self) -> str:
    """`tpu` or `gpu`."""
    return 'gpu' if self.kind in GPUS else 'tpu'

  def why_not(self) -> str:
    """Returns why this environment cannot compile for it; empty if it can."""
    module, extra = COMPILERS[self.platform]
    if importlib.util.find_spec(module):
      return ''
    return (
      f'{self.name} needs the compiler in {module}: '
      f"pip install '.[{extra}]', in an environment of its own."
    )

  def compiler(self) -> dict[str, str]:
    """Returns the version of the compiler by the name of its package."""
    module, _ = COMPILERS[self.platform]
    name = module.replace('_', '-')
    return {name: importlib.metadata.version(name)}

  def options(self, by_library: bool = False) -> dict[str, Any]:
    """Returns options for the compiler.

    Args:
      by_library: Whether a library computes all products of matrices on a GPU.
        The compiler writes kernels for some itself, whose tiles it chooses by
        trying; where it cannot, it fails for some widths.
    """
    if self.platform != 'gpu':
      return {}
    # To choose among kernels by trying them, there would have to be a GPU.
    kernels = {'xla_gpu_enable_triton_gemm': False} if by_library else {}
    return {'xla_gpu_autotune_level': 0, **kernels}

  def devices(self) -> Sequence[Any]:
    """Returns the devices; a program can be compiled for them, but not run.

    Raises:
      ConfigError: If there is no compiler for them, or no such topology.
    """
    if self.why_not():
      raise ConfigError(self.why_not())
    # Otherwise libtpu asks the network which TPU this machine is a part of.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    topology = self.chip.topology.format('x'.join(map(str, self.shape)))
    try:
      if self.platform == 'gpu':
        found = topologies.get_topology_desc(
          platform='cuda',
          target_config=described(GPUS[self.kind]),
          topology=topology,
        )
      else:
        several = {'num_slices': self.slices} if self.slices > 1 else {}
        found = topologies.get_topology_desc(
          platform='tpu', topology_name=topology, **several
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
      reason = str(error).splitlines()[0]
      raise ConfigError(
        f'--target={self.name} is not a topology that the compiler knows: '
        f'{reason}'
      ) from error
    return found.devices

  def mesh(self, num_devices: int, devices_per_worker: int = 1) -> Mesh:
    """Lays the first devices out for a round.

    Args:
      num_devices: D * G.
      devices_per_worker: G.

    Returns:
      See `rounds.make_mesh`, which lays out devices that exist.
    """
    devices = np.array(self.devices()[:num_devices])
    shape, axes = (-1,), (WORKER,)
    if devices_per_worker > 1:
      shape, axes = (-1, devices_per_worker), (WORKER, DATA)
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return Mesh(devices.reshape(shape), axes, axis_types=auto)


def parse(text: str) -> Target:
  """Reads the name of a target.

  Args:
    text: Such as `v5e:4x4`, `2*v5e:4x4` for two slices, or `h100:8`.

  Returns:
    The target.

  Raises:
    ConfigError: If it is not such a name.

  >>> parse('2*v5p:2x2x1').num_devices
  8
  """
  found = re.fullmatch(r'(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)', text)
  if not found or found[2] not in CHIPS:
    raise ConfigError(
      f'--target is {text!r}; write a chip and its topology, such as '
      f'--target=v5e:4x4 or 2*v5e:4x4. The chips are {", ".join(CHIPS)}.'
    )
  several, kind, shape = found.groups()
  return Target(kind, tuple(map(int, shape.split('x'))), int(several or 1))


def described(fields: dict[str, Any]) -> str:
  """Writes fields in the text format of protocol buffers.

  Args:
    fields: Numbers, words, and fields of messages, by name.

  Returns:
    One line.

  >>> described({'major': 9, 'of': {'name': 'H100'}})
  'major: 9 of { name: "H100" }'
  """
  parts = []
  for name, value in fields.items():
    if isinstance(value, dict):
      parts.append(f'{name} {{ {described(value)} }}')
    else:
      text = f'"{value}"' if isinstance(value, str) else value
      parts.append(f'{name}: {text}')
  return ' '.join(parts)
