"""Local training and the exchange after it, on a device mesh.

The mesh has D devices on the axis `worker`; S workers live on them, W = S / D
on each, and take turns there. Each device may be a group of G devices, on the
axis `data`, which share the work of a local step.
"""

from resist_jax.rounds.compiled import Round, make_round
from resist_jax.rounds.local_training import LossFn
from resist_jax.rounds.mesh import (
  avoid_loads,
  loads_may_hang,
  make_mesh,
  mesh_sizes,
)
from resist_jax.rounds.protocol import MinDepth, Protocol
from resist_jax.rounds.state import (
  State,
  Whole,
  assemble,
  averaged,
  distribute,
  with_carried,
)

__all__ = [
  'LossFn',
  'MinDepth',
  'Protocol',
  'Round',
  'State',
  'Whole',
  'assemble',
  'averaged',
  'avoid_loads',
  'distribute',
  'loads_may_hang',
  'make_mesh',
  'make_round',
  'mesh_sizes',
  'with_carried',
]
