"""Bytes, memory and FLOPs: predicted, and read from compiled programs."""

from resist_jax.accounting.hlo import Collective, collectives
from resist_jax.accounting.memory_and_flops import (
  compiled_flops,
  compiled_memory,
  memory_parts,
  predicted_memory,
)
from resist_jax.accounting.sizes import (
  Sizes,
  expected_share,
  measure,
  measure_moments,
  measure_state,
  num_moments,
  params_per_worker,
)
from resist_jax.accounting.traffic import (
  Moves,
  branches,
  compiled_wire_bytes,
  paper_bytes,
  predicted_group_bytes,
  round_trip_bytes,
  wire_bytes,
)
from resist_jax.exchange import BYTES_PER_NUMBER

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
  'measure_moments',
  'measure_state',
  'memory_parts',
  'num_moments',
  'paper_bytes',
  'params_per_worker',
  'predicted_group_bytes',
  'predicted_memory',
  'round_trip_bytes',
  'wire_bytes',
]
