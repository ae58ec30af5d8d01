"""What all numbers of a state say: whether they are finite, and their sums.

The sums are saved with the state. They show damage where no manifest does: they
add up the bits of each array as whole numbers, so one bit changes them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from resist_jax.rounds import State
from resist_jax.rounds.mesh import REPLICATED

PyTree = Any


class Examined(NamedTuple):
  """The result of `examine`.

  Attributes:
    finite: Whether all numbers outside of empty slots are finite.
    sums: Sums of the bits of each array, modulo 2**32; none of arrays of NumPy,
      which JAX might narrow.
  """

  finite: bool
  sums: list[int]


def examine(state: State, mesh: Mesh) -> Examined:
  """Reads all numbers of a state, where they lie.

  Args:
    state: A state between two rounds.
    mesh: Where the workers live. All processes get the result, because all have
      to take the same decision.
  """
  finite, sums = _examined(state, NamedSharding(mesh, REPLICATED))
  placed = all(isinstance(x, jax.Array) for x in jax.tree.leaves(_parts(state)))
  numbers = np.asarray(sums).tolist() if placed else []
  return Examined(bool(np.asarray(finite)), numbers)


def sums_on_host(state: State) -> list[int]:
  """Adds up the bits of a state that was read, as `examine` did.

  Args:
    state: State of a `storage.Stored`, on the host.
  """
  return [_sum_on_host(np.asarray(x)) for x in jax.tree.leaves(_parts(state))]


@partial(jax.jit, static_argnums=1)
def _examined(state, everywhere: NamedSharding):
  own, equal = _parts(state)
  numbers = [
    *(_sums_by_row(x).sum(dtype=jnp.uint32) for x in jax.tree.leaves(own)),
    *(_sums_by_row(x)[0] for x in jax.tree.leaves(equal)),  # One is saved.
  ]
  return lax.with_sharding_constraint(
    (_all_finite(state), jnp.stack(numbers)), everywhere
  )


def _parts(state: State) -> tuple[PyTree, PyTree]:
  """Returns what each worker has of its own, and what is equal on all."""
  kept = (state.carried, state.outer, state.average)
  kept = [parts for parts in kept if parts is not None]
  moments = [moment for parts in kept for moment in parts.moments]
  own = [state.chain, *(m['chain'] for m in moments), state.error]
  equal = [state.shared, *(m['shared'] for m in moments)]
  return own, [*equal, *(parts.rest for parts in kept)]


def _sums_by_row(x):
  if x.dtype == bool:
    words = x.astype(jnp.uint8)
  else:
    bits = 8 * min(x.dtype.itemsize, 4)
    words = lax.bitcast_convert_type(x, f'uint{bits}')
  return words.reshape(len(x), -1).sum(axis=1, dtype=jnp.uint32)


def _sum_on_host(x: np.ndarray) -> int:
  words = np.ascontiguousarray(x).reshape(-1)
  words = words.view(f'uint{8 * min(x.dtype.itemsize, 4)}')
  return int(words.sum(dtype=np.uint64)) % 2**32


def _all_finite(state: State) -> jax.Array:
  """Returns whether all numbers are finite that somebody reads."""

  def in_slots(name, x):
    empty = state.assignments[name].slots >= state.num_blocks[name]
    return jnp.where(empty.reshape(*empty.shape, *[1] * (x.ndim - 2)), 0, x)

  def read(chain):
    return {
      name: jax.tree.map(partial(in_slots, name), blocks)
      for name, blocks in chain.items()
    }

  (chain, *moments, error), equal = _parts(state)
  arrays = [read(chain), *map(read, moments), error, equal]
  return jnp.stack(
    [
      jnp.isfinite(x).all()
      for x in jax.tree.leaves(arrays)
      if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
  ).all()
