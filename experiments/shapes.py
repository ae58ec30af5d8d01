"""States and parameters that exist as shapes only, to compile for."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from resist_jax import accounting
from resist_jax.decomposition import Assignment, split
from resist_jax.exchange import collectives, participation
from resist_jax.rounds import Protocol, State
from resist_jax.rounds.average import first
from resist_jax.rounds.mesh import REPLICATED, SHARDED
from resist_jax.rounds.moments import Parts, take_apart

PyTree = Any


def on_mesh(tree: PyTree, mesh: Mesh, spec=REPLICATED) -> PyTree:
  """Describes arrays as they would lie on a mesh.

  Args:
    tree: Pytree of arrays, or of their shapes.
    mesh: Its devices need not exist.
    spec: How the arrays lie there.

  Returns:
    Pytree of shapes.
  """
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def state(
  params: Mapping[str, PyTree],
  optimizer: optax.GradientTransformation,
  protocol: Protocol,
  mesh: Mesh,
  assignments: Mapping[str, Assignment],
) -> State:
  """Describes the state before a round.

  Args:
    params: Shapes of the network's parameters.
    optimizer: Its moments are part of the state if the protocol carries them.
    protocol: Who holds what.
    mesh: Where the workers live; its devices need not exist.
    assignments: The assignment of each partitioned chain.

  Returns:
    A state of shapes.
  """
  S = protocol.num_workers

  def rows(tree, leading=lambda x: x.shape):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((S, *leading(x)), x.dtype), tree
    )

  def hand_out(tree):
    shared, chain = split(tree, protocol.num_blocks)
    return rows(shared), {
      name: rows(chain[name], lambda x, k=k: (k, *x.shape[1:]))
      for name in protocol.num_blocks
      for k in [protocol.slots_per_worker(name)]
    }

  def state_of(optimizer):
    return take_apart(optimizer, jax.eval_shape(optimizer.init, params))

  def hand_out_parts(parts):
    if parts is None:
      return None
    moments = [hand_out(moment) for moment in parts.moments]
    return Parts(
      [dict(zip(('shared', 'chain'), m, strict=True)) for m in moments],
      rows(parts.rest),
    )

  shared, chain = hand_out(params)
  carried = state_of(optimizer) if protocol.carry else None
  outer = state_of(protocol.outer) if protocol.outer else None
  average = jax.eval_shape(first, params) if protocol.average else None
  error = norms = None
  if protocol.keeps_error:
    size = accounting.measure(split(params, protocol.num_blocks)[0], []).total
    error = {
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in collectives.error_shapes(size, S).items()
    }
  if protocol.judges_updates:
    norms = on_mesh(jax.eval_shape(participation.no_norms), mesh)
  return State(
    on_mesh(shared, mesh, SHARDED),
    on_mesh(chain, mesh, SHARDED),
    on_mesh(dict(assignments), mesh),
    np.int32(0),
    dict(protocol.num_blocks),
    on_mesh(hand_out_parts(carried), mesh, SHARDED),
    on_mesh(error, mesh, SHARDED),
    norms,
    on_mesh(hand_out_parts(outer), mesh, SHARDED),
    on_mesh(hand_out_parts(average), mesh, SHARDED),
  )
