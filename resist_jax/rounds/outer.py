"""An optimiser of the global network, which takes the change of a round.

The negative mean change of a round is a gradient (Reddi et al. 2021, section
2), so an optimiser can amplify or smooth it. Local SGD with momentum in this
place is known as DiLoCo. Here each holder of a block applies it to the blocks
that it holds: all of them know the block as it was and the state of the
optimiser for it, and compute the same. The state then moves on with the block.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resist_jax.decomposition import join
from resist_jax.errors import one_line
from resist_jax.rounds.moments import (
  Parts,
  add_to_schedule_counts,
  floats_of,
  put_together,
  take_apart,
)

PyTree = Any


def step(
  outer: optax.GradientTransformation,
  before: tuple[PyTree, PyTree],
  after: tuple[PyTree, PyTree],
  parts: Parts,
  rounds: jax.Array,
) -> tuple[PyTree, Parts]:
  """Takes one step with the change of a round.

  Args:
    outer: The optimiser, learning rate included.
    before: The shared part and the chains before local training, `[W, ...]`.
    after: Their means over the workers after it.
    parts: The state of the optimiser, see `State.outer`, here `[W, ...]`.
    rounds: How many rounds were trained as one, `int32[]`; schedules of the
      optimiser count them all.

  Returns:
    All parameters after the step, and the state of the optimiser, whose moments
    have the structure of the parameters.
  """
  moments = [join(**moment) for moment in parts.moments]

  def one_worker(before, after, parts):
    state = put_together(outer, outer.init(before), parts)
    change = jax.tree.map(jnp.subtract, before, after)
    updates, state = outer.update(change, state, before)
    state = add_to_schedule_counts(outer, state, rounds - 1)
    return optax.apply_updates(before, updates), take_apart(outer, state)

  return jax.vmap(one_worker)(
    join(*before), join(*after), Parts(moments, parts.rest)
  )


def check(outer: Any) -> None:
  """Checks that an optimiser treats each number of the parameters alone.

  Each worker knows the blocks that it holds only, so an optimiser that looks at
  a norm, for example, would do something else on each of them.

  Args:
    outer: A candidate.

  Raises:
    ValueError: If it is no optimiser, or couples numbers.
  """
  remedy = 'such as optax.sgd(0.7, momentum=0.9, nesterov=True)'
  if not all(callable(getattr(outer, n, None)) for n in ('init', 'update')):
    raise ValueError(
      f'outer is {outer!r}; it must be an optax optimiser, {remedy}.'
    )
  try:
    # The norm of the second one exceeds any threshold that somebody clips at.
    cases = [(1.0, 1.0), (1e18, 1.0), (0.0, 1e18)]
    with jax.debug_nans(False):  # A schedule may end in NaN, at its end.
      found, *others = [_probe(outer, *case) for case in cases]
  except Exception as error:  # It is anybody's program.
    raise ValueError(
      f'outer cannot be used ({one_line(error)}): it gets changes and '
      'parameters, of any structure, and nothing else; use an optimiser that '
      f'needs no more, {remedy}.'
    ) from error
  if not all(np.allclose(found, x, atol=0, equal_nan=True) for x in others):
    raise ValueError(
      'outer treats the parameters together, as by their norm, but a worker '
      'holds only some of them: use an optimiser that treats each number '
      'alone, such as optax.sgd with momentum, or optax.adam.'
    )


def _probe(
  outer: optax.GradientTransformation, gradient: float, parameter: float
) -> np.ndarray:
  """Returns how an optimiser moves some numbers, and what it estimates.

  Args:
    outer: The optimiser.
    gradient: The gradient of all other numbers.
    parameter: Their value before the first step.
  """

  def params_of(first: float, second: float, rest: float) -> PyTree:
    rows = np.array([[first, second], [rest, rest]], np.float32)
    leaves = {'a': rows, 'b': rows[:, 0], 'c': rows[1, 0]}
    return jax.tree.map(jnp.asarray, leaves)

  params = params_of(1.0, -2.0, parameter)
  state, update = outer.init(params), jax.jit(outer.update)
  found = []
  # Schedules may warm up from 0, and fall to 0 at the end.
  for skipped in (1, 10, 100, 1000, 10_000, 0):
    change = params_of(0.3, 0.5 / (1 + skipped), gradient)
    updates, state = update(change, state, params)
    params = optax.apply_updates(params, updates)
    found += [*updates['a'][0], updates['b'][0]]
    # An estimate from all gradients may show in the updates much later.
    found += floats_of(take_apart(outer, state).rest)
    state = add_to_schedule_counts(outer, state, jnp.int32(skipped))
  return np.concatenate([np.ravel(x) for x in found])
