"""Accelerators to compile for: what a device of each can do.

The figures are those that the makers publish, for dense products in bfloat16.
"""

from typing import Any, NamedTuple


class Chip(NamedTuple):
  """What a device can do, and how JAX counts devices.

  Attributes:
    flops: Floating-point operations a second, in bfloat16.
    bandwidth: Bytes a second between the device and its memory.
    generation: What the compiler calls a TPU; empty for a GPU.
    clock: Cycles a second of a TPU's core; None where it is not known.
    devices: How many devices JAX finds in a chip.
    config: The compiler's name for the way in which the cores of a TPU chip
      form one device; None for its default.
  """

  flops: float
  bandwidth: float
  generation: str = ''
  clock: float | None = None
  devices: int = 1
  config: str | None = None


CHIPS = {
  # JAX makes one device of the two cores of a v4 chip, and so must we.
  'v4': Chip(275e12, 1228e9, 'v4', 1.05e9, config='megacore'),
  'v5e': Chip(197e12, 819e9, 'v5e', 1.5e9),
  'v5p': Chip(459e12, 2765e9, 'v5', 1.75e9),
  'v6e': Chip(918e12, 1640e9, 'v6e'),
  # Half a chip.
  'tpu7x': Chip(1153e12, 3690e9, 'tpu7x', devices=2),
  'a100': Chip(312e12, 2039e9),
  'h100': Chip(989e12, 3352e9),
  'h200': Chip(989e12, 4800e9),
  'b200': Chip(2250e12, 7672e9),
}

# What XLA's GPU compiler asks about a GPU that is not there. Limits of blocks
# and registers are those of CUDA; what differs stands with the GPU.
_GPU = {
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
  'fpus_per_core': 128,
}
_HOPPER = {
  **_GPU,
  'core_count': 132,
  'clock_rate_ghz': 1.98,
  'l2_cache_size': 50 * 2**20,
  'cuda_compute_capability': {'major': 9},
}
# By kind: the name that its maker gives it, and what it has.
GPUS: dict[str, tuple[str, dict[str, Any]]] = {
  'a100': (
    'NVIDIA A100-SXM4-80GB',
    {
      **_GPU,
      'shared_memory_per_block_optin': 163 * 2**10,
      'shared_memory_per_core': 164 * 2**10,
      'fpus_per_core': 64,
      'core_count': 108,
      'clock_rate_ghz': 1.41,
      'memory_bandwidth': 2039040000000,
      'l2_cache_size': 40 * 2**20,
      'device_memory_size': 85100068864,
      'cuda_compute_capability': {'major': 8},
    },
  ),
  'h100': (
    'NVIDIA H100 80GB HBM3',
    {
      **_HOPPER,
      'memory_bandwidth': 3352320000000,
      'device_memory_size': 84929347584,
    },
  ),
  'h200': (
    'NVIDIA H200',
    {
      **_HOPPER,
      'memory_bandwidth': 4800000000000,
      'device_memory_size': 151397597184,
    },
  ),
  'b200': (
    'NVIDIA B200',
    {
      **_GPU,
      'core_count': 148,
      'clock_rate_ghz': 1.965,
      'memory_bandwidth': 7672320000000,
      'l2_cache_size': 132644864,
      'device_memory_size': 191514411008,
      'cuda_compute_capability': {'major': 10},
    },
  ),
}


def gpu_description(kind: str) -> dict[str, Any]:
  """Returns a GPU as the compiler wants it described.

  Args:
    kind: A key of `GPUS`.
  """
  name, device = GPUS[kind]
  return {
    'gpu_device_info': device,
    'platform_name': 'CUDA',
    'dnn_version_info': {'major': 9, 'minor': 12},
    'runtime_version': {'major': 13},
    'device_description_str': name,
  }
