"""Mistakes in the fields of a `Trainer`, and in what it is given to train.

Each gets one line, before anything runs: fields that do not fit, states of
another trainer, and batches or slots that its compiled programs do not take.
`rounds.checks` finds the mistakes in parameters, losses and sizes of batches.
"""

from collections.abc import Mapping, Sequence
import itertools
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
import numpy as np

from resist_jax.decomposition import Assignment, join
from resist_jax.errors import is_whole
from resist_jax.exchange import DATA, WORKER, Exchange
from resist_jax.rounds import Protocol, Round, State, average, outer, storage
from resist_jax.rounds.compiled import form_of_step
from resist_jax.rounds.moments import has_schedule
from resist_jax.rounds.state import assignments_on_host

if TYPE_CHECKING:
  from resist_jax.trainer.trainer import Trainer

PyTree = Any

_NUMBERS = 'loss_factor', 'update_factor', 'average'
_COUNTS = 'num_workers', 'local_steps', 'rounds_at_once'
_FLAGS = 'average_gradients', 'carry', 'exclude_faulty', 'give_agreed'


def check_fields(trainer: 'Trainer') -> None:
  """Finds mistakes that need no parameters.

  Args:
    trainer: Its fields are as a person gave them.

  Raises:
    ValueError: On the first mistake.
  """
  _check_mesh(trainer.mesh)
  _check_chains(trainer.chains)
  _check_depths(trainer)
  _check_values(trainer)
  _check_functions(trainer)
  _check_faults(trainer)
  _check_small_changes(trainer)
  _check_average_gradients(trainer)
  if trainer.shared_every:
    _check_shared_every(trainer)


def _check_mesh(mesh: Any) -> None:
  if mesh is None:
    return
  if not isinstance(mesh, Mesh):
    raise ValueError(
      f'mesh is {mesh!r}; it must be a value such as make_mesh(num_devices), '
      'or None.'
    )
  if WORKER not in mesh.axis_names or not {WORKER, DATA} >= {*mesh.axis_names}:
    raise ValueError(
      f'mesh has the axes {mesh.axis_names}; make it by '
      'make_mesh(num_devices), which names them as rounds do.'
    )


def _check_chains(chains: Any) -> None:
  if isinstance(chains, str):
    raise ValueError(
      f'chains is the string {chains!r}; it must hold names: '
      f'chains=({chains!r},).'
    )
  if not _holds(chains, str):
    raise ValueError(f'chains is {chains!r}; it must hold names of chains.')
  if len(set(chains)) < len(chains):
    raise ValueError(f'chains is {chains}; name each chain once.')
  for inner, outside in itertools.permutations(chains, 2):
    if inner.startswith(f'{outside}/'):
      raise ValueError(
        f'chains names {inner!r}, which lies in the chain {outside!r}: name '
        'one of them.'
      )


def _check_depths(trainer: 'Trainer') -> None:
  if not _holds(trainer.depths, int | np.integer):
    raise ValueError(
      f'depths is {trainer.depths!r}; it must hold a whole number for each '
      'worker, or nothing.'
    )
  least = trainer.min_depth
  least = list(least.values()) if isinstance(least, Mapping) else [least]
  if not _holds(least, int | np.integer | None):
    raise ValueError(
      f'min_depth is {trainer.min_depth!r}; it must be a whole number, or one '
      'for each chain.'
    )
  if len(trainer.depths) and not len(trainer.chains):
    raise ValueError(
      f'depths is {tuple(trainer.depths)}, but chains is empty: name the chain '
      'that is cut, or leave depths empty.'
    )


def _holds(values: Any, kind: Any) -> bool:
  return isinstance(values, Sequence | np.ndarray) and all(
    isinstance(value, kind) for value in values
  )


def _check_values(trainer: 'Trainer') -> None:
  for name in _NUMBERS:
    value = getattr(trainer, name)
    if not isinstance(value, int | float | np.number):
      raise ValueError(f'{name} is {value!r}; it must be a number.')
  for name in (*_FLAGS, 'on_device'):
    value = getattr(trainer, name)
    if not isinstance(value, bool) and (name in _FLAGS or value is not None):
      raise ValueError(
        f'{name} is {value!r}; it must be True or False'
        f'{"" if name in _FLAGS else ", or None"}.'
      )
  for name in _COUNTS:
    value = getattr(trainer, name)
    if not is_whole(value) or value < 1:
      raise ValueError(
        f'{name} is {value!r}; it must be an integer of 1 or more.'
      )
  seed = trainer.seed
  if not is_whole(seed) or not 0 <= seed < 2**32:
    raise ValueError(
      f'seed is {seed!r}; it must be an integer of 0 or more, less than 2**32.'
    )
  if not 0 <= trainer.average <= average.LARGEST_DECAY:
    raise ValueError(
      f'average is {trainer.average}; it must be at least 0 and less than 1, '
      f'such as 0.9, and at most {average.LARGEST_DECAY}.'
    )


def _check_functions(trainer: 'Trainer') -> None:
  if not callable(trainer.loss_fn):
    raise ValueError('loss_fn must be a function, see Trainer.')
  for method in ('init', 'update'):
    if not callable(getattr(trainer.optimizer, method, None)):
      raise ValueError(
        f'optimizer is {trainer.optimizer!r}; it must be an optax optimiser, '
        'such as optax.sgd(0.1).'
      )
  if not isinstance(trainer.exchange, Exchange):
    raise ValueError(
      f'exchange is {trainer.exchange!r}; it must be a value such as '
      'exchange.hand_over() or exchange.masked_psum(wire_format="int8").'
    )
  form = trainer.exchange.format
  if trainer.carry and form.moments and trainer.exchange.moments is None:
    raise ValueError(
      f'carry is set, and the format of exchange sends moments as '
      f'{form.moments}, but exchange.moments is None: set it to the exchange '
      'in that format.'
    )
  if trainer.outer is not None:
    outer.check(trainer.outer)


def _check_faults(trainer: 'Trainer') -> None:
  for name in ('loss_factor', 'update_factor'):
    factor = getattr(trainer, name)
    if not (factor == 0 or factor > 1):
      raise ValueError(f'{name} is {factor}; it must be greater than 1, or 0.')
  if trainer.loss_factor and not trainer.exclude_faulty:
    raise ValueError(
      'loss_factor excludes workers, but exclude_faulty is off: turn it on, or '
      'set loss_factor to 0.'
    )


def _check_small_changes(trainer: 'Trainer') -> None:
  if trainer.exchange.format.exact:
    return
  if trainer.outer is not None:
    raise ValueError(
      'outer takes small changes of the parameters, which a wire format with '
      'fewer bits would round away: use wire_format float32.'
    )
  if trainer.average and trainer.chains:
    raise ValueError(
      'average takes small steps in blocks that move, which a wire format with '
      'fewer bits would round away: use wire_format float32.'
    )


def _check_average_gradients(trainer: 'Trainer') -> None:
  if not trainer.average_gradients:
    return
  if trainer.chains:
    raise ValueError(
      'average_gradients averages whole networks, but chains cuts '
      f'{tuple(trainer.chains)}: use chains=().'
    )
  if trainer.loss_factor:
    raise ValueError(
      'loss_factor compares losses at the end of a round, and '
      'average_gradients has averaged by then: set it to 0.'
    )
  if trainer.give_agreed:
    raise ValueError(
      'give_agreed gives the network as last agreed, but with '
      'average_gradients all workers agree at every step: leave one out.'
    )
  if trainer.exchange.format.feedback:
    raise ValueError(
      'wire_format int8 sends changes between rounds, and average_gradients '
      'has none: use bfloat16 or float32.'
    )


def _check_shared_every(trainer: 'Trainer') -> None:
  every, steps = trainer.shared_every, trainer.local_steps
  if not is_whole(every) or every < 1 or steps % every:
    raise ValueError(
      f'shared_every is {every!r}; it must be a divisor of local_steps, '
      f'{steps}, or 0.'
    )
  if not trainer.chains:
    raise ValueError(
      f'shared_every is {every}, but chains cuts nothing, so everything is '
      'shared: set it to 0, and lower local_steps instead.'
    )
  if not trainer.exchange.format.exact:
    raise ValueError(
      f'shared_every is {every}, which sends values, and a wire format with '
      'fewer bits sends changes: use wire_format float32, or set it to 0.'
    )


def check_width(params: PyTree, exchange: Exchange) -> None:
  """Refuses numbers of 64 bits where a wire format has fewer than 32.

  Args:
    params: Arrays, or their shapes.
    exchange: How blocks travel.

  Raises:
    ValueError: If JAX computes with such numbers and the format is not exact.
  """
  wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
  if exchange.format.exact or not wide:
    return
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if leaf.dtype == np.float64:
      raise ValueError(
        f'params{jax.tree_util.keystr(path)} is float64, which a wire format '
        'with fewer bits cannot encode: use wire_format float32, or parameters '
        'of float32.'
      )


def check_usable(state: Any) -> None:
  """Refuses what is no state, or was given to a round before.

  Args:
    state: What a person gave.

  Raises:
    ValueError: If it is no `State`, or if a round has consumed its arrays.
  """
  check_is_state(state)
  for leaf in jax.tree.leaves(state):
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
      raise ValueError(
        'the state was given to round before, which consumed it: use the state '
        'that round returned.'
      )


def check_given(params: Any) -> None:
  """Refuses parameters without numbers.

  Args:
    params: What a person gave.

  Raises:
    ValueError: If a leaf is only a shape, or if its numbers are gone.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = jax.tree_util.keystr(path)
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise ValueError(
        f'params{where} is only a shape, as jax.eval_shape returns it: give '
        'arrays.'
      )
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
      raise ValueError(
        f'params{where} was donated to a function, which consumed it: give '
        'what it returned, or a copy made before.'
      )


def check_context(mesh: jax.sharding.Mesh) -> None:
  """Refuses to compute under the mesh of somebody else.

  Args:
    mesh: That of the workers.

  Raises:
    ValueError: If `jax.set_mesh` has set another one.
  """
  here = jax.sharding.get_abstract_mesh()
  if not here.empty and here != mesh.abstract_mesh:
    raise ValueError(
      f'jax.set_mesh has set the mesh {_told(here)}, and the workers have '
      f'{_told(mesh)}: leave that context, or give that mesh to the Trainer.'
    )


def _told(mesh: Any) -> str:
  kinds = ', '.join(f'{kind}' for kind in mesh.axis_types)
  return f'{dict(mesh.shape)} ({kinds})'


def check_is_state(state: Any) -> None:
  """Refuses what is no state.

  Args:
    state: What a person gave.

  Raises:
    ValueError: If it is no `State`.
  """
  if not isinstance(state, State):
    raise ValueError(
      f'state is a {type(state).__name__}; it must come from init, round or '
      'restore of this trainer.'
    )


def check_settings(trainer: 'Trainer', state: State) -> None:
  """Refuses the state of a trainer with other settings.

  Args:
    trainer: The one that shall go on.
    state: The state; only shapes are read.

  Raises:
    ValueError: On the first field that differs.
  """
  workers = {x.shape[0] for x in jax.tree.leaves((state.shared, state.chain))}
  differ = {
    'chains': (sorted(state.num_blocks), sorted(trainer.chains)),
    'num_workers': (max(workers, default=None), trainer.num_workers),
    'carry': (state.carried is not None, trainer.carry),
    'outer': (state.outer is not None, trainer.outer is not None),
    'average': (state.average is not None, bool(trainer.average)),
  }
  for name, (theirs, ours) in differ.items():
    if theirs != ours:
      raise ValueError(
        f'the state is of a trainer with {name}={theirs!r}, but this one has '
        f'{ours!r}: use that trainer, or save and restore the state.'
      )
  ours = set(trainer.devices.devices.flat)
  for x in jax.tree.leaves((state.shared, state.chain)):
    placed = isinstance(x, jax.Array) and x.committed
    if placed and x.sharding.device_set != ours:
      raise ValueError(
        'the state lies on the devices of another mesh: use the trainer of '
        'that mesh, or save the state and restore it with this one.'
      )


def check_steps(trainer: 'Trainer', stored: storage.Stored) -> None:
  """Refuses files by whose local steps a schedule has counted, if they differ.

  Args:
    trainer: The one that shall go on.
    stored: What the files hold; earlier versions did not say.

  Raises:
    ValueError: If the counts of its schedules would jump.
  """
  before = stored.record.get('local_steps', trainer.local_steps)
  if before == trainer.local_steps:
    return
  chain = jax.tree.map(  # Without the axis S.
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stored.state.chain
  )
  params = join(stored.state.shared, chain)
  if has_schedule(trainer.optimizer, params):
    raise ValueError(
      f'local_steps is {trainer.local_steps}, but the state was saved with '
      f'{before}, and the optimizer counts steps, as for a schedule, by rounds '
      'of equal length: keep local_steps, and use at_once for longer rounds.'
    )


def check_division(
  protocol: Protocol, wanted: Mapping[str, Assignment], state: State
) -> None:
  """Refuses a state whose blocks are divided or exchanged in another way.

  Args:
    protocol: The trainer's.
    wanted: An assignment of each chain as the protocol makes them.
    state: The state.

  Raises:
    ValueError: On the first field that differs.
  """
  same = {
    'update_factor': (state.norms is not None) == protocol.judges_updates,
    'wire_format': (state.error is not None) == protocol.keeps_error,
  }
  _refuse_others(same)
  for name, found in state.assignments.items():
    ours = wanted[name]
    there = [field is not None for field in found]
    same['exchange'] = there == [field is not None for field in ours]
    # Slots that a person chose may be more than there have to be.
    both = zip(found[1:], ours[1:], strict=True) if same['exchange'] else ()
    same['min_depth'] = all(x is None or x.shape == y.shape for x, y in both)
    if protocol.depths and not isinstance(found.slots, jax.ShapeDtypeStruct):
      slots = assignments_on_host(state)[name].slots
      counts = (slots < state.num_blocks[name]).sum(axis=1)
      same['depths'] = tuple(counts.tolist()) == tuple(protocol.depths)
    _refuse_others(same)


def _refuse_others(same: Mapping[str, bool]) -> None:
  for field, equal in same.items():
    if not equal:
      raise ValueError(
        f'the state is of a trainer with another {field}: use that trainer, or '
        'save the state and restore it with this one.'
      )


def check_compiled(programs: Round, batch: PyTree) -> None:
  """Refuses batches of another form than those that were compiled for.

  Args:
    programs: What `Trainer.compile` made.
    batch: As `Trainer.round` takes them; of an iterator, what it gives.

  Raises:
    ValueError: If the form differs.
  """
  found = form_of_step(batch, programs.streamed)
  if jax.tree.flatten(found) != jax.tree.flatten(programs.compiled_for):
    raise ValueError(
      f'batches give a worker {found} at a step, but the programs were '
      f'compiled for {programs.compiled_for}: give those, or compile again.'
    )


def check_slots(programs: Round, assignments: Mapping[str, Assignment]) -> None:
  """Refuses another number of slots than the programs were compiled for.

  Args:
    programs: What `Trainer.compile` made.
    assignments: By chain.

  Raises:
    ValueError: On the first chain with another number of slots.
  """
  for name, assignment in assignments.items():
    found, ours = np.shape(assignment.slots), programs.slots[name]
    if found != ours:
      raise ValueError(
        f'the slots of {name} have the shape {found}, but the programs were '
        f'compiled for {ours}: give so many, or compile again.'
      )
