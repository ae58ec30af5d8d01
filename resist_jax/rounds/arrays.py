"""Arrays between the host and a mesh, which may span processes.

A process can reach only its own devices. It fills them with values that every
process has; values that lie elsewhere come by a small program that all
processes run.
"""

from functools import partial
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
import numpy as np

PyTree = Any


def is_key(leaf: Any) -> bool:
  """Returns whether a leaf is a random key of JAX."""
  dtype = getattr(leaf, 'dtype', None)  # It may be a number of Python's.
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def place(tree: PyTree, sharding: Sharding) -> PyTree:
  """Copies arrays that every process has to the devices.

  `jax.device_put` would compare them between processes, over the network.

  Args:
    tree: Pytree of arrays, equal in all processes.
    sharding: How each of them is to lie on the mesh.

  Returns:
    Pytree of `jax.Array`; each process fills its own devices.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)

  def put(x):
    if isinstance(x, jax.Array) and x.sharding == sharding:
      return x
    if not is_key(x):  # NumPy has none.
      x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(put, tree)


def place_parts(tree: PyTree, sharding: Sharding, count: int) -> PyTree:
  """Copies arrays to the devices when each process has only its own rows.

  Args:
    tree: Pytree of arrays, the rows that belong to this process's devices.
    sharding: How the rows of all processes are to lie on the mesh.
    count: How many rows all processes have together.

  Returns:
    Pytree of `jax.Array` of `count` rows.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (count, *x.shape[1:])
    ),
    tree,
  )


def to_host(tree: PyTree) -> PyTree:
  """Brings whole arrays to the host of every process.

  Args:
    tree: Pytree of arrays. Where a mesh spans processes, they have 32 bits or
      are bool, and are sharded along equally many rows: they travel in one
      message, because on a slow link each message costs its delay.

  Returns:
    Pytree of NumPy arrays.
  """
  leaves, treedef = jax.tree.flatten(tree)
  far = [
    x
    for x in leaves
    if isinstance(x, jax.Array)
    and not (x.is_fully_addressable or x.is_fully_replicated)
  ]
  if not far:
    return jax.tree.map(np.asarray, jax.device_get(tree))
  sharding: Any = far[0].sharding
  everywhere = NamedSharding(sharding.mesh, PartitionSpec())
  table = np.asarray(_one_table(everywhere, leaves))
  parts = np.split(table, np.cumsum([x[0].size for x in leaves])[:-1], axis=1)
  found = [
    part.copy().view(np.uint32 if x.dtype == bool else x.dtype).reshape(x.shape)
    for part, x in zip(parts, leaves, strict=True)
  ]
  return treedef.unflatten(
    [y.astype(x.dtype) for y, x in zip(found, leaves, strict=True)]
  )


@partial(jax.jit, static_argnums=0)
def _one_table(sharding: Sharding, leaves: list[jax.Array]) -> jax.Array:
  def bits(x):
    x = x.reshape(x.shape[0], -1)
    if x.dtype == bool:
      return x.astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)

  table = jnp.concatenate([bits(x) for x in leaves], axis=1)
  return lax.with_sharding_constraint(table, sharding)


def rows(x: Any, worker: np.ndarray, slot: np.ndarray) -> np.ndarray:
  """Reads chosen blocks of workers that may belong to other processes.

  Args:
    x: `[S, K, ...]`.
    worker: `int32[n]`, the worker that holds each block.
    slot: `int32[n]`, its slot there.

  Returns:
    `[n, ...]`, on the host of every process. Each device holds at most one
    block besides its own at a time.
  """
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.asarray(x)[worker, slot]
  sharding: Any = x.sharding
  everywhere = NamedSharding(sharding.mesh, PartitionSpec())
  return np.stack(
    [
      np.asarray(_row(everywhere, x, np.int32(w), np.int32(k)))
      for w, k in zip(worker, slot, strict=True)
    ]
  )


@partial(jax.jit, static_argnames='sharding')
def _row(sharding, x, worker, slot):
  # A sum of numbers would turn -0.0 into 0.0, so the bits are summed. Not every
  # backend adds numbers of fewer than 32 bits over devices.
  width = 8 * x.dtype.itemsize
  narrow, wide = np.dtype(f'uint{width}'), np.dtype(f'uint{max(width, 32)}')
  bits = lax.bitcast_convert_type(x, narrow).astype(wide)
  own = jnp.arange(x.shape[0])[:, None] == worker
  here = own & (jnp.arange(x.shape[1])[None] == slot)
  here = here.reshape(here.shape + (1,) * (x.ndim - 2))
  found = jnp.where(here, bits, 0).sum(axis=(0, 1), dtype=wide)
  found = lax.with_sharding_constraint(found, sharding)
  return lax.bitcast_convert_type(found.astype(narrow), x.dtype)


def from_here(x: jax.Array | np.ndarray) -> np.ndarray:
  """Returns on the host what the first device of this process holds.

  Args:
    x: Replicated, or sharded along its first axis.

  Returns:
    The array, or its rows on that device.
  """
  return np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)


def first_copy(x: jax.Array | np.ndarray) -> np.ndarray:
  """Returns on the host what is equal on all workers.

  Args:
    x: `[S, ...]`, equal along S.

  Returns:
    `[...]`, read from a device of this process.
  """
  return np.asarray(from_here(x)[0])  # An array, also where it is a scalar.


def kind_of(value: Any) -> str:
  """Describes a leaf in a message, such as `float32[2, 3]`."""
  shape, dtype = (getattr(value, name, None) for name in ('shape', 'dtype'))
  if dtype is None:
    return f'of the type {type(value).__name__}'
  return f'{dtype}[{", ".join(map(str, shape or ()))}]'
