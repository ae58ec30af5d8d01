"""Mistakes in an optimiser, each told in one line.

They are found from shapes, before a round is compiled. Only an optimiser that
is carried and keeps other numbers than moments also takes three steps, on tiny
arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from resist_jax.errors import FOREIGN, one_line
from resist_jax.rounds.arrays import is_key, kind_of
from resist_jax.rounds.mesh import shapes_on
from resist_jax.rounds.moments import (
  put_together,
  take_apart,
)

PyTree = Any


def check_optimizer(
  optimizer: optax.GradientTransformation,
  params: PyTree,
  carry: bool,
  mesh: Mesh,
  field: str = 'carry',
  averaged: bool = True,
) -> None:
  """Calls an optimiser on shapes, as a local step will.

  Args:
    optimizer: The optimiser of local training.
    params: Shapes of one worker's parameters.
    carry: Whether its state lasts from round to round.
    mesh: Where the workers live; the optimiser may name its axes.
    field: What lets it last, in messages.
    averaged: Whether all workers get the same gradients.

  Raises:
    ValueError: If it fails, if its state changes its form, if it needs a state
      that restarts, or if workers could not agree on a state that lasts.
  """

  def step(params):
    state = optimizer.init(params)
    return state, optimizer.update(params, state, params)[1]

  try:
    state, after = shapes_on(mesh, step, params)
  except FOREIGN as error:
    raise ValueError(
      f'optimizer cannot be used ({one_line(error)}): it gets gradients, its '
      'state and parameters, and nothing else; use one that needs no more, '
      'such as optax.adamw(1e-3). Masks and labels must be functions, or have '
      'plain dictionaries where params has a FrozenDict or an nnx.State.'
    ) from error
  _check_same_form(state, after)
  agrees = averaged and carry  # On what it draws, and goes on with.
  if not agrees and any(map(_is_raw_key, jax.tree.leaves(state))):
    raise ValueError(
      'optimizer keeps a raw key, by which all workers, or all rounds, would '
      'draw the same numbers: make it by jax.random.key instead of PRNGKey.'
    )
  rest = take_apart(optimizer, state).rest if carry else []
  if any(map(is_key, rest)):
    raise ValueError(
      'optimizer draws random numbers, and its key is none of its moments: use '
      f'another one, or do without {field} and data parallel rounds, which '
      'keep its state.'
    )
  found = set(map(type, jax.tree.leaves(state, is_leaf=_is_periodic)))
  for kind in () if carry else found & _PERIODIC.keys():
    raise ValueError(
      f'optimizer counts steps of its own ({_PERIODIC[kind]}), but its state '
      f'restarts in every round: set {field}=True, or use another optimiser.'
    )
  if not averaged and rest:
    _check_agreed(optimizer, params, field)


def _is_raw_key(leaf: Any) -> bool:
  return leaf.dtype == np.uint32 and leaf.shape in ((2,), (4,))


# Optimisers that do something else at every k-th step.
_PERIODIC = {
  optax.MultiStepsState: 'optax.MultiSteps',
  optax.ApplyEvery: 'optax.apply_every',
  optax.contrib.SAMState: 'optax.contrib.sam',
}


def _is_periodic(node: Any) -> bool:
  return type(node) in _PERIODIC


def _check_same_form(before: PyTree, after: PyTree) -> None:
  """Refuses an optimiser whose state cannot go through a compiled loop."""
  one, other = (
    dict(jax.tree_util.tree_leaves_with_path(x)) for x in (before, after)
  )
  differ = [k for k in one | other if _form(one, k) != _form(other, k)]
  if differ:
    where = jax.tree_util.keystr(differ[0])
    raise ValueError(
      f'optimizer has a state whose leaf {where} is {_form(one, differ[0])} '
      f'after init and {_form(other, differ[0])} after update: let update '
      'return a state of the same form, or leave out the transformation that '
      'does not, such as optax.monitor.'
    )
  if jax.tree.structure(before) != jax.tree.structure(after):
    raise ValueError(
      'optimizer has a state with other nodes after update than after init: '
      'let both return the same ones.'
    )


def _form(leaves: Mapping[Any, Any], path: Any) -> str:
  return kind_of(leaves[path]) if path in leaves else 'missing'


def _check_agreed(
  optimizer: optax.GradientTransformation, params: PyTree, field: str
) -> None:
  """Refuses an optimiser that keeps a number which depends on gradients.

  Nobody averages such a number, so each worker would go on with its own.
  """

  def filled(value):
    # Fewer bits would hide the first, small changes of an estimate.
    return jax.tree.map(
      lambda x: jnp.full([min(n, 2) for n in x.shape], value, jnp.float32),
      params,
    )

  update = jax.jit(optimizer.update)

  def steps(state, gradient):
    """Returns the state after three steps, and the updates."""
    params, found = filled(0.5), []
    for _ in range(3):
      updates, state = update(filled(gradient), state, params)
      params = optax.apply_updates(params, updates)
      found += jax.tree.leaves(updates)
    return state, found

  try:
    begun = optimizer.init(filled(0.5))
    with jax.debug_nans(False):  # Some optimisers skip what is not finite.
      ours, *others = (
        take_apart(optimizer, steps(begun, gradient)[0])
        for gradient in (0.1, 0.9, np.nan)
      )
    # A number that is only recorded changes no update.
    found, *differ = (
      steps(put_together(optimizer, begun, ours._replace(rest=rest)), 0.5)[1]
      for rest in (ours.rest, *(other.rest for other in others))
    )
  except FOREIGN:  # Such as one that names an axis of the mesh.
    return
  pairs = [pair for other in differ for pair in zip(found, other, strict=True)]
  if not all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
    raise ValueError(
      f'{field} is set, but optimizer keeps a number that depends on all '
      'gradients, such as an estimate or a count of skipped steps, and each '
      'worker would go on with its own: leave it out, or use an optimiser '
      'without such numbers, such as optax.adamw(1e-3).'
    )
