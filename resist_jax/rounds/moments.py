"""An optimiser's state, taken apart by its structure.

*Moments* are the parts of the state that are shaped as the parameters, such as
momentum or Adam's mu and nu; the rest are counts and the like. optax itself
tells which are which (`optax.tree_utils.tree_map_params`), so this holds for
any optax optimiser.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from resist_jax.decomposition import join, split
from resist_jax.rounds.nodes import with_nodes_of

PyTree = Any

# Their `step` counts the steps that a function of the user decides by.
_CONDITIONAL = (
  optax.ConditionallyMaskState,
  optax.ConditionallyTransformState,
)
# Their inner optimisers count updates, not steps.
_COUNTING = optax.MultiStepsState, optax.contrib.SAMState


class _Moment:
  """Wraps a moment, so that `jax.tree` sees one leaf."""

  def __init__(self, tree: PyTree):
    self.tree = tree


class Parts(NamedTuple):
  """The state of an optimiser in parts.

  Attributes:
    moments: Pytrees like the parameters.
    rest: All other leaves.
  """

  moments: list[PyTree]
  rest: list[Any]


def _marked(optimizer: optax.GradientTransformation, state: PyTree) -> PyTree:
  initable: Any = optimizer
  try:
    return optax.tree_utils.tree_map_params(
      initable, _Moment, state, is_leaf=lambda _: True
    )
  except Exception as error:  # Any of optax's own, where it cannot tell.
    raise ValueError(
      'optimizer has a state in which optax does not find the moments of each '
      f'parameter ({type(error).__name__}): use one that keeps the structure '
      'of the parameters, which optax.flatten does not. A function that labels '
      'parameters is also called with a single leaf in their place: let it '
      'use jax.tree.map, or give optax.partition the labels themselves.'
    ) from error


def take_apart(optimizer: optax.GradientTransformation, state: PyTree) -> Parts:
  """Separates the moments of an optimiser's state from the rest.

  Args:
    optimizer: Made the state.
    state: Its state.

  Returns:
    The parts, in the order of `jax.tree.leaves`.
  """
  leaves = jax.tree.leaves(_marked(optimizer, state))
  return Parts(
    [leaf.tree for leaf in leaves if isinstance(leaf, _Moment)],
    [leaf for leaf in leaves if not isinstance(leaf, _Moment)],
  )


def fits(
  optimizer: optax.GradientTransformation,
  params: tuple[PyTree, dict[str, PyTree]],
  parts: Parts,
) -> bool:
  """Returns whether parts can be those of an optimiser.

  Args:
    optimizer: The optimiser.
    params: The shared part and the chains of a worker, or their shapes.
    parts: The parts of a state of a worker, or their shapes; each moment is in
      halves, `shared` and `chain`.
  """
  wanted, rest = first_halves(optimizer, params)

  def form(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype) for x in leaves]

  return len(rest) == len(parts.rest) and form(wanted) == form(parts.moments)


def reformed(like: list[PyTree], parts: Parts) -> Parts:
  """Returns parts with the nodes of an optimiser's state.

  Args:
    like: The moments of a state of the optimiser, or their shapes.
    parts: Parts from files; returned as they are if they do not fit.
  """
  return Parts(with_nodes_of(like, parts.moments), parts.rest)


def first_halves(
  optimizer: optax.GradientTransformation,
  params: tuple[PyTree, dict[str, PyTree]],
) -> Parts:
  """Returns the shapes of an optimiser's first state, moments in halves.

  Args:
    optimizer: The optimiser.
    params: See `fits`.
  """
  state = jax.eval_shape(optimizer.init, join(*params))
  moments, rest = take_apart(optimizer, state)
  return Parts([in_halves(moment, params[1]) for moment in moments], rest)


def counts_by_itself(
  optimizer: optax.GradientTransformation, params: PyTree
) -> bool:
  """Returns whether schedules inside an optimiser count its own updates.

  Args:
    optimizer: The optimiser.
    params: Its parameters, or their shapes.
  """
  state = jax.eval_shape(optimizer.init, params)
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _COUNTING))
  return any(isinstance(node, _COUNTING) for node in nodes)


def in_halves(moment: PyTree, chains: Collection[str]) -> dict[str, PyTree]:
  """Cuts a moment as states hold it.

  Args:
    moment: Pytree like the parameters.
    chains: Names of the partitioned chains.

  Returns:
    `shared`, and `chain` by name.
  """
  shared, chain = split(moment, chains)
  return {'shared': shared, 'chain': chain}


def put_together(
  optimizer: optax.GradientTransformation, like: PyTree, parts: Parts
) -> PyTree:
  """Undoes `take_apart`.

  Args:
    optimizer: Made the state.
    like: A state of the same structure.
    parts: The parts of the new state.

  Returns:
    The state.
  """
  leaves, structure = jax.tree.flatten(_marked(optimizer, like))
  moments, rest = iter(parts.moments), iter(parts.rest)
  return structure.unflatten(
    next(moments if isinstance(leaf, _Moment) else rest) for leaf in leaves
  )


def floats_of(rest: list[Any]) -> list[Any]:
  """Returns the floating-point numbers among the rest of a state.

  Args:
    rest: See `Parts`.
  """
  kinds = (getattr(x, 'dtype', type(x)) for x in rest)
  floating = [jnp.issubdtype(kind, jnp.floating) for kind in kinds]
  return [x for x, keep in zip(rest, floating, strict=True) if keep]


def set_schedule_counts(
  optimizer: optax.GradientTransformation, state: PyTree, count: jax.Array
) -> PyTree:
  """Sets the counts of an optimiser's schedules, and no others.

  A count beside a moment, as in Adam, corrects the bias of that moment and
  restarts with it. A `count` without a moment beside it belongs to a schedule,
  as does the `step` of `optax.conditionally_mask` and its like.

  Args:
    optimizer: Made the state.
    state: Its state.
    count: `int32[]`, steps of the whole run so far.

  Returns:
    The state.
  """
  return _map_schedule_counts(
    optimizer, state, lambda old: jnp.broadcast_to(count, old.shape)
  )


def add_to_schedule_counts(
  optimizer: optax.GradientTransformation, state: PyTree, steps: jax.Array
) -> PyTree:
  """Counts more steps in an optimiser's schedules; see `set_schedule_counts`.

  Args:
    optimizer: Made the state.
    state: Its state.
    steps: `int32[]`.

  Returns:
    The state.
  """
  return _map_schedule_counts(optimizer, state, lambda old: old + steps)


def has_schedule(
  optimizer: optax.GradientTransformation, params: PyTree
) -> bool:
  """Returns whether an optimiser counts steps for a schedule.

  Args:
    optimizer: The optimiser.
    params: What it optimises, or shapes of it.
  """
  counts = []

  def noted(count):
    counts.append(True)  # No tracer may outlive `eval_shape`.
    return count

  def init(params):
    return _map_schedule_counts(optimizer, optimizer.init(params), noted)

  jax.eval_shape(init, params)
  return bool(counts)


def _map_schedule_counts(
  optimizer: optax.GradientTransformation,
  state: PyTree,
  function: Callable[[jax.Array], jax.Array],
) -> PyTree:
  marked = _marked(optimizer, state)

  def walk(node, mark):
    # Their inner optimisers count updates, not steps, and are carried.
    if isinstance(mark, _Moment) or isinstance(node, _COUNTING):
      return node
    inner, structure = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    if jax.tree_util.treedef_is_leaf(structure):
      return node
    marks = structure.flatten_up_to(mark)
    new = structure.unflatten(map(walk, inner, marks))
    if isinstance(node, _CONDITIONAL):
      name = 'step'
    elif isinstance(node, optax.contrib.ScaleByAdemamixState):
      name = 'count_m2'  # Of its schedules; its first moment has another.
    elif any(isinstance(field, _Moment) for field in marks):
      return new
    else:
      name = 'count'
    if name not in getattr(new, '_fields', ()):
      return new
    old = jnp.asarray(getattr(new, name))
    return new._replace(**{name: function(old).astype(old.dtype)})

  return walk(state, marked)
