"""How a run comes by its state: anew, from a checkpoint, or between phases."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from resist_jax.decomposition.assignments import Assignment
from resist_jax.models import initial_params
from resist_jax.models.resnet import rescale_branches
from resist_jax.rounds import state as state_lib
from resist_jax.rounds.state import State
from resist_jax.run.checkpoint import Restored
from resist_jax.run.phase import Phase
from resist_jax.run.setup import Setup

PyTree = Any
# A phase, the state before its next round, and the deals after that.
Entry = tuple[Phase, State, Iterator[dict[str, Assignment]]]


def enter(setup: Setup, restored: Restored | None) -> Entry:
  """Begins a run, or goes on with it.

  Args:
    setup: Of the run.
    restored: Its newest checkpoint, or None.

  Returns:
    The phase of the next round, its state, and the deals after that round.
  """
  if restored is None:
    image_shape = setup.dataset.train.images.shape[1:]
    params = initial_params(setup.network, image_shape, setup.config.seed)
    return begin(setup, 0, params, None)
  done = restored.progress['round']
  phase = setup.phase(done)
  deals = setup.deals(phase, done)
  slots = next(deals)
  factors = _scale_changes(setup, restored)
  if not factors and _fits(restored, phase, slots):
    S = phase.protocol.num_workers
    # The shared part goes to all; the rest lies with its workers already.
    state = _map_shared(
      restored.state, lambda x: state_lib.replicate(x, S, setup.mesh)
    )._replace(slots=slots)
    phase.run.compile(state, setup.constants, setup.feed.batch_shapes())
    return phase, state, deals
  whole = _map_shared(
    restored.state, lambda x: jax.tree.map(lambda leaf: leaf[None], x)
  )
  params, velocity = state_lib.assemble(whole, restored.num_blocks)
  for leaf in jax.tree.leaves((restored.state.chain, restored.state.velocity)):
    if isinstance(leaf, jax.Array):
      leaf.delete()  # Or the old parts would lie beside the new ones.
  params = rescale_branches(params, factors, setup.network)
  if velocity is not None:  # Larger parameters have smaller gradients.
    shrinking = {chain: 1 / factor for chain, factor in factors.items()}
    velocity = rescale_branches(velocity, shrinking, setup.network)
  return begin(setup, done, params, velocity)


def begin(
  setup: Setup,
  round_index: int,
  params: Mapping[str, PyTree],
  velocity: Mapping[str, PyTree] | None,
) -> Entry:
  """Hands the global model out for the rounds of a phase, and compiles them.

  Args:
    setup: Of the run.
    round_index: Of the phase's first round.
    params: Canonical global parameters.
    velocity: Momentum of the same shape; None for zeros.

  Returns:
    See `enter`.
  """
  phase = setup.phase(round_index)
  deals = setup.deals(phase, round_index)
  if not phase.protocol.carry_velocity:
    velocity = None
  elif velocity is None:
    velocity = jax.tree.map(np.zeros_like, params)
  state = state_lib.distribute(
    params, next(deals), phase.protocol, setup.mesh, velocity
  )
  phase.run.compile(state, setup.constants, setup.feed.batch_shapes())
  return phase, state, deals


def _fits(
  restored: Restored, phase: Phase, slots: Mapping[str, Assignment]
) -> bool:
  """Tells whether the workers can go on with what each of them saved."""
  state, protocol = restored.state, phase.protocol
  tables = {name: deal.slots for name, deal in state.slots.items()}
  return (
    tables.keys() == slots.keys()
    and all(np.array_equal(tables[k], slots[k].slots) for k in slots)
    and (state.velocity is not None) == protocol.carry_velocity
    and _num_workers(state.error)
    == (protocol.num_workers if protocol.keeps_error else None)
  )


def _num_workers(tree: PyTree) -> int | None:
  leaves = jax.tree.leaves(tree)
  return leaves[0].shape[0] if leaves else None


def _map_shared(state: State, function: Callable[[PyTree], PyTree]) -> State:
  """Applies a function to the shared part, of parameters and momentum."""
  velocity = state.velocity and {
    **state.velocity,
    'shared': function(state.velocity['shared']),
  }
  return state._replace(shared=function(state.shared), velocity=velocity)


def _scale_changes(setup: Setup, restored: Restored) -> dict[str, float]:
  """Returns how the global model stays the same where its scale changes.

  Residual branches of another S are tested at another scale: what the scale
  gains, their last layer gives.
  """
  before = restored.progress['residual_scale']
  now = setup.global_scale()
  factors = {
    chain: before.get(chain, 1.0) / now.get(chain, 1.0)
    for chain in before.keys() | now.keys()
  }
  return {chain: factor for chain, factor in factors.items() if factor != 1}
