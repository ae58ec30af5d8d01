"""What is cut, and who holds what: pure functions on any pytree.

A *chain* is a pytree whose every leaf stacks L identical blocks on its leading
axis. *Slots* say which blocks each of S workers runs: `int32[S, K]`, ascending,
where the value L marks an empty slot. The functions know no ResNet, no mesh and
no optimiser; those of `slots` jit and vmap.

C. Dun, C. R. Wolfe, C. M. Jermaine, A. Kyrillidis. ResIST: Layer-Wise
Decomposition of ResNets for Distributed Training. UAI 2022. Algorithm 1 is
`sample_slots` and `take` (subResNets), local training, `aggregate`.
"""

from resist_jax.decomposition.assignments import Assigner, Assignment, Route
from resist_jax.decomposition.slots import (
  Division,
  aggregate,
  block_count,
  block_sum,
  blocks_owned,
  blocks_per_worker,
  join,
  num_copies,
  presence,
  round_robin,
  sample_slots,
  slots_per_worker,
  split,
  take,
)

__all__ = [
  'Assigner',
  'Assignment',
  'Division',
  'Route',
  'aggregate',
  'block_count',
  'block_sum',
  'blocks_owned',
  'blocks_per_worker',
  'join',
  'num_copies',
  'presence',
  'round_robin',
  'sample_slots',
  'slots_per_worker',
  'split',
  'take',
]
