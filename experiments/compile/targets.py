"""Devices to compile for: their names, topologies and compilers."""

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

from experiments.compile.chips import CHIPS, GPUS, Chip, gpu_description
from resist_jax.errors import ConfigError
from resist_jax.exchange import DATA, WORKER

# On a machine without a GPU, JAX drops its plugin for them if a library of CUDA
# does not tell its version. JAX reads this when it first looks for devices.
os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
# Compilers by platform: the package, and the extra of setup.cfg with it.
COMPILERS = {'tpu': ('libtpu', 'tpu'), 'gpu': ('jax_cuda13_plugin', 'cuda')}


class Target(NamedTuple):
  """Devices to compile for.

  Attributes:
    kind: A key of `chips.CHIPS`.
    shape: Chips of a slice, such as (4, 4); for GPUs, how many in a host.
    slices: How many slices or hosts, each with its own network of fast links.
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
    return self.slices * math.prod(self.shape) * self.chip.devices

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
    try:
      found = self._described()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
      reason = str(error).splitlines()[0]
      raise ConfigError(
        f'--target={self.name} is not a topology that the compiler knows: '
        f'{reason}'
      ) from error
    return found.devices

  def _described(self) -> topologies.TopologyDescription:
    """Asks the compiler of the platform for the devices."""
    if self.platform == 'gpu':
      return topologies.get_topology_desc(
        platform='cuda',
        target_config=described(gpu_description(self.kind)),
        topology=f'1x{self.slices}x{math.prod(self.shape)}',
      )
    rows, columns, *_ = *self.shape, 1  # A host has 2 x 2 chips at most.
    options: dict[str, Any] = {
      'chips_per_host_bounds': (min(2, rows), min(2, columns), 1)
    }
    if self.slices > 1:
      options['num_slices'] = self.slices
    if self.chip.config:
      options['chip_config_name'] = self.chip.config
    return topologies.get_topology_desc(
      platform='tpu',
      topology_name=f'{self.chip.generation}:{"x".join(map(str, self.shape))}',
      **options,
    )

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
    text: Such as `v5e:4x4`, `2*v5e:4x4` for two slices, or `h100:8`;
      `2*h100:8` are two hosts.

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
