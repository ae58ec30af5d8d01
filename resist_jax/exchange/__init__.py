"""How parts of the network travel between workers at the end of a round.

An exchange is a value: `hand_over()` and `masked_psum()` each return an
`Exchange`, a NamedTuple of pure functions. To add another one, write a file
that returns such a value.
"""

from resist_jax.exchange.collectives import (
  BYTES_PER_NUMBER,
  DATA,
  WORKER,
  Healthy,
  all_reduce_bytes,
)
from resist_jax.exchange.compression import FORMATS, Format, wire_format
from resist_jax.exchange.hand_over import hand_over
from resist_jax.exchange.interface import Exchange, Load
from resist_jax.exchange.masked_psum import masked_psum
from resist_jax.exchange.participation import Limits, Norms

__all__ = [
  'BYTES_PER_NUMBER',
  'DATA',
  'FORMATS',
  'WORKER',
  'Exchange',
  'Format',
  'Healthy',
  'Limits',
  'Load',
  'Norms',
  'all_reduce_bytes',
  'hand_over',
  'masked_psum',
  'wire_format',
]
