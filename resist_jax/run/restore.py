"""How a run gets its state: anew, from a checkpoint, or between phases."""

import dataclasses

from absl import logging

from resist_jax import data
from resist_jax.errors import ConfigError, message
from resist_jax.rounds import State, Whole, storage
from resist_jax.rounds.moments import Parts, counts_by_itself
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

  Raises:
    ConfigError: If the checkpoint is that of another network.
  """
  if restored is None:
    params = setup.task.init(setup.config.seed)
    return begin_phase(setup, 0, Whole(params))
  stored = storage.in_form_of(setup.task.shapes(), restored.stored)
  _check_network(setup, stored.state)
  done = restored.progress['round']
  name = phases.name_at(setup.config, done)
  if ended:  # Fewer rounds may have ended it before the last phase.
    by_config = phases.name_at(setup.config, done - 1)
    name = restored.progress['last'].get('protocol', by_config)
    if name != by_config:
      logging.warning(
        'the last round was one of %s; by num_rounds and phases it would be '
        'one of %s', name, by_config,
      )  # fmt: skip
  factors = _scale_changes(setup, restored)
  # Another protocol begins with a state that is handed out, also in a run that
  # was not stopped between both.
  if not factors and restored.progress['last'].get('protocol', name) == name:
    phase = phases.make_phase(setup, name)
    try:
      state = phase.trainer.resume(stored)
    except ValueError as error:  # Such as the state of another optimiser.
      raise ConfigError(message(error)) from error
    return _compiled(setup, phase, state), state
  whole = storage.as_whole(stored)
  return _hand_out(setup, name, done, _rescaled(setup, whole, factors))


def _check_network(setup: Setup, state: State) -> None:
  """Refuses a checkpoint of other parameters, as of an edited module."""
  differ = storage.difference(setup.task.shapes(), state)
  if differ:
    name, wanted, found = ('missing' if x is None else x for x in differ)
    raise ConfigError(
      f'the parameters {name!r} are {found} in the checkpoint, but {wanted} in '
      'the network: bring the network back as it was, or choose another '
      'workdir.'
    )


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
  try:
    state = phase.trainer.distribute(whole, round_index)
  except ValueError as error:  # Such as of an optimiser that cannot be carried.
    raise ConfigError(message(error)) from error
  return _compiled(setup, phase, state), state


def at_once(
  setup: Setup, phase: Phase, state: State, counts: set[int]
) -> dict[int, Phase]:
  """Prepares rounds that are trained as one.

  Args:
    setup: Setup of the run.
    phase: A phase, compiled.
    state: A state of it; only shapes are used.
    counts: How many rounds may be trained as one.

  Returns:
    The phase with so many rounds as one, compiled, by their number.
  """
  found = {1: phase}
  for count in counts - {1}:
    longer = phase.at_once(count)
    if longer.trainer.programs is None:
      longer = _compiled(setup, longer, state, count)
    found[count] = longer
  return found


def _compiled(
  setup: Setup, phase: Phase, state: State, count: int = 1
) -> Phase:
  shapes = data.shapes_of_rounds(setup.pipeline, count)
  return dataclasses.replace(
    phase, trainer=phase.trainer.compile(state, shapes)
  )


def _rescaled(setup: Setup, whole: Whole, factors: dict[str, float]) -> Whole:
  """Keeps the global network the same where its residual scale changes."""
  # Larger parameters have smaller gradients, and change less.
  shrinking = {chain: 1 / factor for chain, factor in factors.items()}
  carried = whole.carried
  if carried is not None and not setup.task.has_momenta:
    made = setup.task.make_optimizer(setup.schedule)
    if counts_by_itself(made, setup.task.shapes()):
      raise ConfigError(
        'the optimiser counts its updates, and would begin anew where the '
        'residual scale changes: keep num_workers, or begin with '
        'residual_scale none.'
      )
    carried = None  # Squares, weights and masked moments begin anew.

  def rescaled(parts: Parts | None, factors: dict[str, float]) -> Parts | None:
    if parts is None:
      return None
    moments = [setup.task.rescale(moment, factors) for moment in parts.moments]
    return Parts(moments, parts.rest)

  return Whole(
    setup.task.rescale(whole.params, factors),
    rescaled(carried, shrinking),
    rescaled(whole.outer, shrinking),
    rescaled(whole.average, factors),
  )


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
