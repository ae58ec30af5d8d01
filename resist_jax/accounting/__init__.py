"""Bytes, memory and FLOPs: predicted, and read from compiled programs."""

from resist_jax.accounting.hlo import Collective, collectives
from resist_jax.accounting.memory_and_flops import (
  compiled_flops,
  compiled_memory,
  compiled_wire_bytes,
  memory_parts,
  predicted_group_bytes,
  predicted_memory,
)
from resist_jax.accounting.traffic import (
  BYTES_PER_NUMBER,
  Moves,
  Sizes,
  branches,
  expected_share,
  measure,
  paper_bytes,
  params_per_worker,
  round_trip_bytes,
  wire_bytes,
)

__all__ = [
  'BYTES_PER_NUMBER',
  'Collective',
  'Moves',
  'Sizes',
  'branches',
  'collectives',
  'compiled_flops',
  'compiled_memory',
  'compiled_wire_bytes',
  'expected_share',
  'measure',
  'memory_parts',
  'paper_bytes',
  'params_per_worker',
  'predicted_group_bytes',
  'predicted_memory',
  'round_trip_bytes',
  'wire_bytes',
]
