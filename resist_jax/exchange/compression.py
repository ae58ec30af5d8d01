"""How numbers are written for the wire: exactly, or in fewer bits.

All workers agree on the shared part after every exchange, so only its changes
travel. What rounding removes from a change stays with its sender and is added
to the next change (error feedback). A block goes to a worker that has nothing
to add a change to, so it travels whole, in more bits. Moments of the optimiser
travel as floating point: Adam divides by the root of one, which must not round
to 0 beside a larger one.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

GROUP = 1024  # Numbers that share a scale of 4 bytes: 0.4 % of int8.


class Format(NamedTuple):
  """How an exchange writes numbers.

  Attributes:
    changes: Encoding of changes of the shared part.
    values: Encoding of blocks and gradients, which travel whole.
    feedback: Whether senders keep what rounding removes from a change.
    moments: The name of the format in which moments travel whole; '' for this
      one.
  """

  changes: str
  values: str
  feedback: bool = False
  moments: str = ''

  @property
  def exact(self) -> bool:
    """Whether nothing is rounded."""
    return self.changes == self.values == 'float32'


FORMATS = {
  'float32': Format('float32', 'float32'),
  'bfloat16': Format('bfloat16', 'bfloat16'),
  # Eight bits are too few for a weight: its updates are much smaller than it.
  'int8': Format('int8', 'int16', feedback=True, moments='bfloat16'),
}


def wire_format(name: str) -> Format:
  """Returns a format by its name.

  Args:
    name: A key of `FORMATS`.

  Returns:
    The format.

  Raises:
    ValueError: If there is no such format.
  """
  if not isinstance(name, str) or name not in FORMATS:
    raise ValueError(
      f'wire_format is {name!r}; use one of {", ".join(FORMATS)}.'
    )
  return FORMATS[name]


_ITEM_BYTES = {'float32': 4, 'bfloat16': 2, 'int16': 2, 'int8': 1}


def message_bytes(count: int, encoding: str) -> int:
  """Returns the size of an encoded vector.

  Args:
    count: Its length n.
    encoding: float32, bfloat16, int16 or int8.

  Returns:
    Bytes.

  >>> [message_bytes(2048, e) for e in ('float32', 'bfloat16', 'int8')]
  [8192, 4096, 2056]
  """
  if encoding in ('float32', 'bfloat16'):
    return count * _ITEM_BYTES[encoding]
  groups = -(-count // GROUP)
  return groups * (GROUP * _ITEM_BYTES[encoding] + 4)


def encode(x: jax.Array, encoding: str) -> jax.Array:
  """Writes a vector for the wire.

  Integers are fixed-point: `GROUP` neighbours share a scale, their largest
  magnitude divided by the largest integer, and each number is rounded to the
  nearest multiple of it.

  Args:
    x: `float32[n]`.
    encoding: float32, bfloat16, int16 or int8.

  Returns:
    `float32[n]`, `uint16[n]`, or integers: the numbers, then the bits of their
    scales.
  """
  if encoding == 'float32':
    return x
  if encoding == 'bfloat16':
    # Sent as bits, because some backends widen bfloat16 before sending it, and
    # rounded by an operation that no compiler may remove.
    x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  dtype = jnp.dtype(encoding)
  largest = jnp.iinfo(dtype).max
  groups = jnp.pad(x, (0, -len(x) % GROUP)).reshape(-1, GROUP)
  scale = jnp.abs(groups).max(axis=1, keepdims=True) / largest
  steps = groups / jnp.where(scale > 0, scale, 1.0)
  numbers = jnp.round(steps).astype(dtype)
  bits = lax.bitcast_convert_type(scale[:, 0], dtype)
  return jnp.concatenate([numbers.reshape(-1), bits.reshape(-1)])


def decode(message: jax.Array, count: int, encoding: str) -> jax.Array:
  """Reads a message that `encode` wrote.

  Args:
    message: As `encode` returned it.
    count: Its length n before encoding.
    encoding: As given to `encode`.

  Returns:
    `float32[n]`.

  >>> x = jnp.array([0.0, 1.0, -2.54])
  >>> decode(encode(x, 'int8'), 3, 'int8').round(2).tolist()
  [0.0, 1.0, -2.5399999618530273]
  """
  if encoding == 'float32':
    return message
  if encoding == 'bfloat16':
    bits = lax.bitcast_convert_type(message, jnp.bfloat16)
    return bits.astype(jnp.float32)
  padded = count + -count % GROUP
  bits = message[padded:].reshape(padded // GROUP, -1)
  scale = lax.bitcast_convert_type(bits, jnp.float32)
  numbers = message[:padded].reshape(-1, GROUP).astype(jnp.float32)
  return (numbers * scale[:, None]).reshape(-1)[:count]


def rounded(x: jax.Array, encoding: str) -> jax.Array:
  """Returns a vector as its receiver reads it.

  Args:
    x: `float32[n]`.
    encoding: See `encode`.

  Returns:
    `float32[n]`.
  """
  return decode(encode(x, encoding), len(x), encoding)
