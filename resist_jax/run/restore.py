"""How a run gets its state: anew, from a checkpoint, or between phases."""

import dataclasses

from resist_jax.rounds import State, Whole, storage
from resist_jax.rounds.moments import Parts
from resist_jax.run import phases
from resist_jax.run.checkpoint import Restored
from resist_jax.run.phases import Phase
from resist_jax.run.setup import Setup


def start(
  setup: Setup, restored: Restored | None, ended: bool = False
) -> tuple[Phase, State]:
  """Begins a run, or continues it.

  Args:
    setup: Setup of the run.
    restored: Its newest checkpoint, or None.
    ended: Whether no round follows that checkpoint.

  Returns:
    The phase of the next round, or of the last one where none follows,
    compiled, and the state before it.
  """
  if restored is None:
    params = setup.task.init(setup.config.seed)
    return begin_phase(setup, 0, Whole(params))
  done = restored.progress['round']
  name = phases.name_at(setup.config, done - 1 if ended else done)
  phase = phases.make_phase(setup, name)
  factors = _scale_changes(setup, restored)
  if not factors:
    assignments = phase.protocol.assign(setup.config.seed, done)
    state = storage.as_state(
      restored.stored, phase.protocol, setup.mesh, assignments
    )
    if state is not None:
      return _compiled(setup, phase, state), state
  whole = storage.as_whole(restored.stored)
  return _hand_out(setup, name, done, _rescaled(setup, whole, factors))


def begin_phase(
  setup: Setup, round_index: int, whole: Whole
) -> tuple[Phase, State]:
  """Hands the global network out for the rounds of a phase.

  Args:
    setup: Setup of the run.
    round_index: The first round of the phase.
    whole: The global network; the optimiser's state restarts where the phase
      does not carry it, or where there is none.

  Returns:
    See `start`.
  """
  name = phases.name_at(setup.config, round_index)
  return _hand_out(setup, name, round_index, whole)


def _hand_out(
  setup: Setup, name: str, round_index: int, whole: Whole
) -> tuple[Phase, State]:
  """Hands the global network out for rounds of a protocol."""
  phase = phases.make_phase(setup, name)
  state = phase.trainer.distribute(whole, round_index)
  return _compiled(setup, phase, state), state


def _compiled(setup: Setup, phase: Phase, state: State) -> Phase:
  shapes = setup.pipeline.batch_shapes()
  return dataclasses.replace(
    phase, trainer=phase.trainer.compile(state, shapes)
  )


def _rescaled(setup: Setup, whole: Whole, factors: dict[str, float]) -> Whole:
  """Keeps the global network the same where its residual scale changes."""
  params = setup.task.rescale(whole.params, factors)
  if whole.carried is None:
    return Whole(params)
  # Larger parameters have smaller gradients.
  shrinking = {chain: 1 / factor for chain, factor in factors.items()}
  moments = [
    setup.task.rescale(moment, shrinking) for moment in whole.carried.moments
  ]
  return Whole(params, Parts(moments, whole.carried.rest))


def _scale_changes(setup: Setup, restored: Restored) -> dict[str, float]:
  """Returns factors that make up for another residual scale.

  Residual branches of another S are tested at another scale; the last layer of
  each branch makes up for it.
  """
  before = restored.progress['residual_scale']
  now = phases.global_scale(setup)
  factors = {
    chain: before.get(chain, 1.0) / now.get(chain, 1.0)
    for chain in before.keys() | now.keys()
  }
  return {chain: factor for chain, factor in factors.items() if factor != 1}
