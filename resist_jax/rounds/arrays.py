"""Host arrays onto a mesh, and back, where the mesh may span processes.

A process reaches its own devices only. What it places there, all processes
know; what lies elsewhere, it asks for in a small program that all of them run.
"""

from functools import partial
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
import numpy as np

PyTree = Any


def place(tree: PyTree, sharding: Sharding) -> PyTree:
  """Puts arrays that every process has on the devices.

  `jax.device_put` would compare them between processes, over the network.

  Args:
    tree: Pytree of arrays, equal in all processes.
    sharding: How each of them shall lie.

  Returns:
    Pytree of `jax.Array`; each process fills its own devices.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(put, tree)


def place_parts(tree: PyTree, sharding: Sharding, count: int) -> PyTree:
  """Puts arrays on the devices of which each process has its own part.

  Args:
    tree: Pytree of arrays, the rows that belong to this process's devices.
    sharding: How the rows of all processes shall lie.
    count: How many rows there are.

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
    tree: Pytree of arrays. Where a mesh spans processes, of 32 bits or bool,
      and sharded by rows, equally many: they travel together, for on a slow
      link each message costs its delay.

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
  """Reads chosen blocks of workers, none of which need be near.

  Args:
    x: `[S, K, ...]`.
    worker: `int32[n]`, whose blocks.
    slot: `int32[n]`, in which slots.

  Returns:
    `[n, ...]`, on the host of every process. No device holds more of them at a
    time than one besides its own.
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
  # Added up as bits: a sum of numbers would turn -0.0 into 0.0.
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  own = jnp.arange(x.shape[0])[:, None] == worker
  here = own & (jnp.arange(x.shape[1])[None] == slot)
  here = here.reshape(here.shape + (1,) * (x.ndim - 2))
  found = jnp.where(here, bits, 0).sum(axis=(0, 1), dtype=jnp.uint32)
  found = lax.with_sharding_constraint(found, sharding)
  return lax.bitcast_convert_type(found, x.dtype)
