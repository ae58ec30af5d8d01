"""States and parameters that exist as shapes only, to compile for."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from resist_jax.decomposition import Assignment, split
from resist_jax.exchange import participation
from resist_jax.rounds import Protocol, State, Whole
from resist_jax.rounds.average import first
from resist_jax.rounds.mesh import REPLICATED, SHARDED
from resist_jax.rounds.moments import take_apart
from resist_jax.rounds.state import error_shapes, map_kept

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
    chain = {
      name: rows(chain[name], lambda x, k=k: (k, *x.shape[1:]))
      for name in protocol.num_blocks
      for k in [protocol.slots_per_worker(name)]
    }
    return {'shared': rows(shared), 'chain': chain}

  def state_of(optimizer):
    return take_apart(optimizer, jax.eval_shape(optimizer.init, params))

  kept = Whole(
    dict(params),
    state_of(optimizer) if protocol.carry else None,
    state_of(protocol.outer) if protocol.outer else None,
    jax.eval_shape(first, params) if protocol.average else None,
  )
  held = hand_out(params)
  error = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in (error_shapes(held['shared'], protocol) or {}).items()
  }
  norms = None
  if protocol.judges_updates:
    norms = on_mesh(jax.eval_shape(participation.no_norms), mesh)
  sharded = {**held, 'error': error or None, **map_kept(kept, hand_out, rows)}
  return State(
    assignments=on_mesh(dict(assignments), mesh),
    round=np.int32(0),
    num_blocks=dict(protocol.num_blocks),
    norms=norms,
    **on_mesh(sharded, mesh, SHARDED),
  )
