"""A training by ResIST, local SGD or data parallel, of anybody's network.

`Trainer` is a frozen value around the pure functions of `rounds` and
`exchange`; all that changes in training is in a `State`, a pytree.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from functools import cached_property, lru_cache, partial
import os
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import optax

from resist_jax import accounting
from resist_jax.decomposition import Assignment, join
from resist_jax.errors import is_whole
from resist_jax.exchange import Exchange, hand_over
from resist_jax.rounds import (
  LossFn,
  MinDepth,
  Protocol,
  Round,
  State,
  Whole,
  assemble,
  checks,
  distribute,
  make_mesh,
  make_round,
  mesh_sizes,
  storage,
)
from resist_jax.rounds import state as states
from resist_jax.rounds.arrays import place
from resist_jax.rounds.mesh import REPLICATED, most_devices
from resist_jax.rounds.moments import first_halves, fits, reformed
from resist_jax.rounds.optimizer_check import check_optimizer
from resist_jax.rounds.protocol import hold_the_same
from resist_jax.rounds.state import assignments_on_host
from resist_jax.trainer import batching, files, mistakes

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
  """Trains a network whose chains of blocks are cut among workers.

  ResIST (Algorithm 1 of the paper) cuts the named chains. With
  `chains=()` every worker holds the whole network, which is local SGD;
  `average_gradients` and `carry` together make it data parallel.

  Attributes:
    loss_fn: `loss_fn(params, present, batch, key) -> (loss, metrics)`. `params`
      is a sub-network: its chains are `[K, ...]`, everything else is whole.
      `present[chain]` is `float32[K]`: 1 where a slot holds a block, 0 where it
      is empty, and then the block must change nothing. `batch` is what one
      worker gets in one step. `metrics` is a dictionary of scalars. Constants,
      where there are any, come as a fifth argument.
    optimizer: A complete optax transformation, learning rate included. Its
      moments restart in every round, or are carried; its schedules count the
      steps of the whole training.
    chains: Names of the chains to cut, keys of `params`; `decoder/blocks` names
      a chain in the dictionary `decoder`. Every leaf of a chain stacks its L
      blocks on the leading axis.
    num_workers: S, a multiple of the devices (or groups) of the mesh.
    local_steps: T, steps between synchronisations; the paper's l.
    exchange: How blocks travel: `exchange.hand_over()` or
      `exchange.masked_psum()`, each with a wire format.
    mesh: Where the workers live, see `make_mesh`; None for as many devices as
      divide the workers evenly.
    seed: Seed of the assignments and of the keys that the loss gets.
    constants: Pytree that all steps get, such as data that live on the devices;
      None for none.
    min_depth: Blocks of each chain that a worker runs at least.
    depths: Blocks of each worker, where workers are unequal; empty for an even
      division.
    average_gradients: Average gradients at every step (data parallel); for
      `chains=()` only.
    carry: Carry the optimiser's moments from round to round, exchanged as the
      parameters are; otherwise they restart (the paper).
    exclude_faulty: Exclude workers whose update is not finite from the round's
      aggregate. Costs the memory of a second sub-network, the one with which
      the round began.
    loss_factor: Also exclude workers whose loss exceeds this many times the
      median; 0 for none.
    update_factor: Also exclude workers whose update norm exceeds this many
      times the usual one: the larger of this round's median and that of the
      last 8 rounds, times the usual ratio of the largest norm to the median; 0
      for none.
    outer: An optax optimiser that takes the negative mean change of a round as
      its gradient, such as `optax.sgd(0.7, momentum=0.9, nesterov=True)`; its
      state stays with the block and is carried. None takes the mean itself (the
      paper).
    average: Decay of an average of the network over rounds, such as 0.9, see
      `averaged`; 0 for none.
    rounds_at_once: How many rounds are trained as one, without the exchanges
      between them; see `at_once`.
    shared_every: Local steps between exchanges of all that is not cut, a
      divisor of T; its moments stay with the workers meanwhile. 0 for one
      exchange a round, with the blocks.
    give_agreed: Also call `loss_fn` with `agreed=`, the sub-network as the
      round began: what all holders of its parts agreed on, for losses that hold
      training near it, such as distillation. Costs the memory of another
      sub-network, and no bytes.
    on_device: See `rounds.make_round`.
    programs: Set by `compile`; a copy with other fields compiles its own.

  Raises:
    ValueError: On the first field that does not fit; nothing is compiled.

  >>> import jax, jax.numpy as jnp, optax
  >>> from resist_jax import Trainer
  >>> params = {'blocks': {'w': 0.1 * jnp.ones((4, 3, 3))}, 'out': jnp.ones(3)}
  >>> def loss_fn(params, present, batch, key):
  ...   x = batch
  ...   for w, p in zip(params['blocks']['w'], present['blocks']):
  ...     x = x + p * jnp.tanh(x @ w)
  ...   return ((x @ params['out']) ** 2).mean(), {}
  >>> trainer = Trainer(
  ...   loss_fn, optax.sgd(0.1), chains=('blocks',), num_workers=2,
  ...   local_steps=3)
  >>> state = trainer.init(params)
  >>> state, metrics = trainer.round(state, jnp.ones((2, 3, 8, 3)))
  >>> trainer.params(state)['blocks']['w'].shape
  (4, 3, 3)
  """

  loss_fn: LossFn
  optimizer: optax.GradientTransformation
  _: dataclasses.KW_ONLY
  num_workers: int
  local_steps: int
  chains: Sequence[str] = ()
  exchange: Exchange = dataclasses.field(default_factory=hand_over)
  mesh: Mesh | None = None
  seed: int = 0
  constants: PyTree = None
  min_depth: MinDepth = 0
  depths: Sequence[int] = ()
  average_gradients: bool = False
  carry: bool = False
  exclude_faulty: bool = True
  loss_factor: float = 0.0
  update_factor: float = 10.0
  outer: optax.GradientTransformation | None = None
  average: float = 0.0
  rounds_at_once: int = 1
  shared_every: int = 0
  give_agreed: bool = False
  on_device: bool | None = None
  programs: Round | None = dataclasses.field(
    default=None, init=False, repr=False
  )

  def __post_init__(self):
    mistakes.check_fields(self)
    for name in ('chains', 'depths'):  # Any sequence, but a value is hashable.
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if self.mesh is None:
      count = None
      if jax.process_count() == 1:
        devices = jax.devices()
        count = most_devices(
          self.num_workers, 1, len(devices), devices[0].platform
        )
      object.__setattr__(self, 'mesh', make_mesh(count))
    D, _ = mesh_sizes(self.devices)
    if self.num_workers % D:
      raise ValueError(
        f'num_workers is {self.num_workers}, not a multiple of the {D} devices '
        'of the mesh: change one, or pass mesh=make_mesh(num_devices).'
      )

  @property
  def devices(self) -> Mesh:
    """The mesh; never None."""
    assert self.mesh is not None
    return self.mesh

  @property
  def steps(self) -> int:
    """Steps of a round: `local_steps * rounds_at_once`."""
    return self.local_steps * self.rounds_at_once

  def protocol(self, params: Mapping[str, PyTree]) -> Protocol:
    """Returns who holds what of a network.

    Args:
      params: Global parameters, or their shapes.

    Returns:
      The protocol.

    Raises:
      ValueError: If a chain is not in the parameters or is not one, or if the
        exchange cannot serve its length.
    """
    lengths = checks.chain_lengths(params, self.chains)
    mistakes.check_width(params, self.exchange)
    return self._protocol(lengths)

  def _protocol(self, num_blocks: Mapping[str, int]) -> Protocol:
    checks.check_min_depth(self.min_depth, self.chains)
    # All of its fields but the lengths of the chains are fields of this one.
    ours = {field.name for field in dataclasses.fields(Protocol)}
    fields = {name: getattr(self, name) for name in ours - {'num_blocks'}}
    lengths = {name: int(length) for name, length in num_blocks.items()}
    protocol = Protocol(num_blocks=lengths, **fields)
    protocol.check()
    return protocol

  def init(self, params: Mapping[str, PyTree]) -> State:
    """Hands a network out to the workers, before round 0.

    Args:
      params: Global parameters: a dictionary whose named chains are stacked,
        `[L, ...]`.

    Returns:
      The state.

    Raises:
      ValueError: See `protocol`.
    """
    if not isinstance(params, Mapping):
      raise ValueError(
        f'params are of the type {type(params).__name__}; they must be a '
        'dictionary that holds the chains.'
      )
    return self.distribute(Whole(dict(params)))

  def distribute(self, whole: Whole, round_index: int = 0) -> State:
    """Hands a network out to the workers, before any round.

    Args:
      whole: The global network, with the optimiser's state where it is carried.
      round_index: How many rounds are done.

    Returns:
      The state.

    Raises:
      ValueError: See `protocol`.
    """
    mistakes.check_given(whole.params)
    protocol = self.protocol(whole.params)
    whole = states.with_carried(whole, self.optimizer, protocol)
    assignments = protocol.assign(self.seed, round_index)
    return distribute(whole, protocol, self.devices, assignments, round_index)

  def round(
    self,
    state: State,
    batches: PyTree | Iterator[PyTree],
    assignments: Mapping[str, Assignment] | None = None,
  ) -> tuple[State, dict[str, Any]]:
    """Trains every worker for T steps, and exchanges.

    Args:
      state: The state before the round. Its arrays are donated: do not use it
        again.
      batches: A pytree of arrays `[S, T, ...]`, or an iterator of T pytrees
        `[S, ...]`; in several processes, an iterator gives the rows of this
        process's workers.
      assignments: The next assignment of each chain; None lets the exchange
        assign the blocks. Under `hand_over`, `restore` does not know an
        assignment of somebody's own, and assigns the blocks anew.

    Returns:
      `(state, metrics)`. Metrics are `float32[S]` for `loss` and each metric of
      the loss, means over the T steps; `bool[S]` for `finite`, whether a
      worker's update is free of NaN and infinity, and for `healthy`, whether
      the aggregate includes it; with `update_factor`, `float32[S]` for
      `update_norm`. Where the host dispatches the steps, `seconds_local` is the
      time of local training in this process, in seconds.

    Raises:
      ValueError: If the state is another trainer's, if batches have other
        sizes, or if the loss function does not return `(loss, metrics)`.
    """
    first, batches = batching.begun(self, batches)
    streamed = isinstance(batches, Iterator)
    _check_state(self, state)
    batching.check(self, first, streamed)
    if self.programs and self.programs.streamed != streamed:
      kinds = 'arrays [S, T, ...]', 'an iterator of T pytrees [S, ...]'
      raise ValueError(
        f'batches are {kinds[streamed]}, but the programs were compiled for '
        f'{kinds[not streamed]}: give those, or compile for the others.'
      )
    checks.check_assignments(assignments, self.chains)
    if self.programs:
      mistakes.check_compiled(self.programs, first)
      mistakes.check_slots(self.programs, state.assignments)
      mistakes.check_slots(self.programs, assignments or {})
    run = self.programs or self._round(state, first, streamed)
    return run(state, self._placed, batches, assignments)

  def compile(self, state: State, batches: PyTree) -> 'Trainer':
    """Compiles the round ahead of the first one.

    Args:
      state: As for `round`; only shapes are used.
      batches: As for `round`, or a list of T pytrees of shapes in place of an
        iterator.

    Returns:
      A trainer that runs these programs.

    Raises:
      ValueError: If the state is another trainer's, or batches have other
        sizes.
    """
    streamed = isinstance(batches, list)
    if streamed and len(batches) != self.steps:
      raise ValueError(
        f'batches is a list of {len(batches)} pytrees; it must hold one for '
        f'each of {self.steps} steps.'
      )
    first = batches[0] if streamed else batches
    _check_state(self, state)
    batching.check(self, first, streamed)
    for name, wanted in self._division(_lengths(self, state))[1].items():
      found, ours = state.assignments[name].slots.shape, wanted.slots.shape
      if found != ours:  # A person has chosen other slots for this round.
        raise ValueError(
          f'the slots of {name} have the shape {found}, but the exchange '
          f'assigns {ours}: run one round before you compile.'
        )
    run = self._round(state, first, streamed)
    run = run.compile(state, self._placed, batches)
    return _with_programs(self, run)

  def _has_chosen_slots(self, state: State) -> bool:
    """Returns whether the caller gave the assignments of the next round.

    No field says so, but these hold slots alone, and other slots than those
    that the protocol assigns.
    """
    found = assignments_on_host(state)
    slots_alone = all(a.owned is None for a in found.values())
    if not slots_alone or found.keys() != set(self.chains):
      return False
    protocol = self._protocol(dict(_lengths(self, state)))
    return not hold_the_same(found, protocol.assign(self.seed, int(state.draw)))

  def _round(self, state: State, batch: PyTree, streamed: bool) -> Round:
    mistakes.check_context(self.devices)  # JAX compiles for a context.
    held = (state.shared, state.chain)
    leaves, structure = jax.tree.flatten((held, batch))
    shapes = tuple((x.shape, x.dtype) for x in leaves)
    lengths = _lengths(self, state)
    return self._rounds(structure, shapes, lengths, streamed)

  def _reformed(self, state: State) -> State:
    """Returns a state from files with the nodes of the optimiser's state."""
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
      (state.shared, state.chain),
    )

    def in_nodes_of(optimizer, parts):
      if parts is None:
        return None
      return reformed(first_halves(optimizer, params).moments, parts)

    return state._replace(
      carried=in_nodes_of(self.optimizer, state.carried),
      outer=in_nodes_of(self.outer, state.outer),
    )

  # What is made once. It ends with this value, as do arrays on the devices.

  @cached_property
  def _placed(self) -> PyTree:
    """The constants on the devices."""
    if self.constants is None:
      return None
    return place(self.constants, NamedSharding(self.devices, REPLICATED))

  @cached_property
  def _rounds(self):
    return lru_cache(maxsize=8)(partial(_make_round, self))

  @cached_property
  def _longer(self):
    return lru_cache(maxsize=8)(partial(_at_once, self))

  @cached_property
  def _division(self):
    return lru_cache(maxsize=8)(partial(_first_division, self))

  @cached_property
  def _fitting(self):
    return lru_cache(maxsize=8)(partial(_fits, self))

  def at_once(self, count: int) -> 'Trainer':
    """Returns a trainer that runs several rounds as one.

    Its `round` takes the batches of all of them, `[S, count * T, ...]`, and
    leaves out the exchanges between them. `State.round` grows by `count`, so
    schedules advance as if the rounds had been separate. Each trainer can
    continue from a state of the other.

    Args:
      count: How many rounds.

    Returns:
      The trainer. Where the host dispatches steps, it shares the programs that
      `compile` made for this one.
    """
    return self._longer(count)

  def whole(self, state: State) -> Whole:
    """Returns the global network, and the optimiser's state if carried.

    Args:
      state: A state between two rounds.

    Returns:
      Both, on the host.

    Raises:
      ValueError: If it is no state, or if a round has consumed it.
    """
    mistakes.check_usable(state)
    return assemble(state)

  def params(self, state: State) -> dict[str, PyTree]:
    """Returns the global network.

    Args:
      state: A state between two rounds.

    Returns:
      Global parameters, NumPy arrays, shaped as `init` took them, in plain
      dictionaries down to the chains.

    Raises:
      ValueError: See `whole`.
    """
    mistakes.check_is_state(state)
    # A round that failed may have consumed the rest and left these.
    alone = state._replace(
      carried=None, error=None, norms=None, outer=None, average=None
    )
    return self.whole(alone).params

  def averaged(self, state: State) -> dict[str, PyTree]:
    """Returns the average of the global network over rounds.

    Args:
      state: A state of a trainer with `average`.

    Returns:
      As `params`. Each round counts `average` times as much as the one after
      it.

    Raises:
      ValueError: If the state holds no average; see also `whole`.
    """
    mistakes.check_usable(state)
    if state.average is None:
      raise ValueError(
        'the state holds no average over rounds: use a Trainer with average, '
        'such as average=0.9.'
      )
    return assemble(states.averaged(state)).params

  def bytes_per_round(
    self, state: State, num_devices: int | None = None
  ) -> int:
    """Predicts the bytes that all devices together send in a round.

    Args:
      state: A state of this trainer; only shapes are used.
      num_devices: D, a divisor of `num_workers`; None for the devices, or
        groups of them, that this trainer has.

    Returns:
      Wire bytes, the mean over all assignments. Numbers of 64 bits are counted
      as if they had 32.

    Raises:
      ValueError: If it is no state, or the devices do not divide the workers.
    """
    mistakes.check_is_state(state)
    sizes = accounting.measure_state(state)
    moments = accounting.measure_moments(state.carried, state)
    outer = accounting.measure_moments(state.outer, state)
    D, G = mesh_sizes(self.devices)
    if num_devices is not None:
      S, D = self.num_workers, num_devices
      if not is_whole(D) or D < 1 or S % D:
        raise ValueError(
          f'num_devices is {D!r}; it must be a divisor of num_workers, {S}.'
        )
    protocol = self._protocol(state.num_blocks)
    return round(
      accounting.wire_bytes(sizes, protocol, D, None, G, moments, outer)
    )

  def save(self, folder: str | os.PathLike[str], state: State) -> None:
    """Saves a state atomically.

    If the process is killed, the folder holds the earlier state or this one.

    Args:
      folder: Any folder, whose name may hold `~` and `$NAME`; it may hold an
        earlier state. In several processes, all of them see it.
      state: A state between two rounds.

    Raises:
      ValueError: If the folder cannot be one, or cannot be written to; see
        also `whole`.
    """
    mistakes.check_usable(state)
    record = {
      'chosen': self._has_chosen_slots(state),
      'local_steps': int(self.local_steps),
    }
    files.write(folder, state, record)

  def restore(
    self,
    folder: str | os.PathLike[str],
    params: Mapping[str, PyTree] | None = None,
  ) -> State:
    """Reads the state that `save` wrote.

    Another number of workers or devices, another exchange or wire format may
    continue from it: then the blocks are assigned anew.

    Args:
      folder: As for `save`.
      params: Parameters, or their shapes, as `init` took them. They say which
        nodes the pytree has, and may be left out if these are dictionaries,
        lists and tuples.

    Returns:
      The state. With the settings it was saved with, training repeats to the
      bit.

    Raises:
      ValueError: If there is no state, or if it is damaged, or if it is that of
        other parameters than `params`.
    """
    return self.resume(files.read(folder, self.devices, params))

  def resume(self, stored: storage.Stored) -> State:
    """Continues from what the files of a state hold.

    Args:
      stored: See `storage.read`.

    Returns:
      The state.

    Raises:
      ValueError: If it is the state of another optimiser, or if schedules
        counted other local steps; see also `protocol`.
    """
    mistakes.check_steps(self, stored)
    done, draw = int(stored.state.round), int(stored.state.draw)
    if set(stored.state.num_blocks) == set(self.chains):
      protocol = self._protocol(dict(_lengths(self, stored.state)))
      assignments = protocol.assign(self.seed, draw)
      if stored.record.get('chosen') and _can_go_on(protocol, stored.state):
        assignments = stored.state.assignments
      state = storage.as_state(stored, protocol, self.devices, assignments)
      if state is not None:
        state = self._reformed(state)
        _check_state(self, state)
        return state
    state = self.distribute(storage.as_whole(stored), done)
    _check_state(self, state)
    return state


def _at_once(trainer: Trainer, count: int) -> Trainer:
  """Makes one trainer for each number, so that its rounds compile once."""
  programs = trainer.programs and trainer.programs.at_once(count)
  return _with_programs(trainer, programs, rounds_at_once=count)


def _with_programs(
  trainer: Trainer, programs: Round | None, **fields: Any
) -> Trainer:
  """Returns a copy that runs programs, and whose constants are placed."""
  new = dataclasses.replace(trainer, constants=trainer._placed, **fields)
  object.__setattr__(new, 'programs', programs)  # The value is frozen.
  return new


def _make_round(trainer, structure, shapes, lengths, streamed) -> Round:
  """Makes the programs of a round for a state and batches of these shapes."""
  leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  (shared, chain), batch = structure.unflatten(leaves)

  def one_worker(tree, axes=1):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), tree
    )

  worker = one_worker(shared), one_worker(chain)
  check_optimizer(
    trainer.optimizer,
    join(*worker),
    trainer.carry,
    trainer.devices,
    averaged=trainer.average_gradients or trainer.num_workers == 1,
  )
  names = checks.metric_names(
    trainer.loss_fn,
    *worker,
    one_worker(batch, 1 if streamed else 2),
    trainer.constants,
    trainer.devices,
    trainer.give_agreed,
  )
  return make_round(
    trainer.loss_fn,
    trainer.optimizer,
    trainer._protocol(dict(lengths)),
    trainer.devices,
    seed=trainer.seed,
    metrics=names,
    on_device=trainer.on_device,
    streamed=streamed,
  )


def _can_go_on(protocol: Protocol, state: State) -> bool:
  """Returns whether workers can go on with the slots of files."""
  try:
    protocol.check_moves(state.assignments, state.assignments)
  except ValueError:
    return False
  return True


def _lengths(trainer: Trainer, state: State) -> tuple[tuple[str, int], ...]:
  """Returns L of each chain, in the trainer's order: `jax.tree.map` sorts."""
  return tuple((name, int(state.num_blocks[name])) for name in trainer.chains)


def _check_state(trainer: Trainer, state: State) -> None:
  """Refuses the state of another trainer."""
  mistakes.check_is_state(state)
  mistakes.check_settings(trainer, state)
  mistakes.check_width(join(state.shared, state.chain), trainer.exchange)
  protocol, wanted = trainer._division(_lengths(trainer, state))
  mistakes.check_division(protocol, wanted, state)
  for field, parts in (('optimizer', state.carried), ('outer', state.outer)):
    if parts is None:
      continue
    leaves, structure = jax.tree.flatten((state.shared, state.chain, parts))
    shapes = tuple((x.shape[1:], x.dtype) for x in leaves)
    if not trainer._fitting(field, structure, shapes):
      raise ValueError(
        f'the state is of a trainer with another {field}, whose state differs: '
        f'use that {field}, or begin with the parameters alone, '
        'trainer.init(params).'
      )
  mistakes.check_usable(state)


def _first_division(trainer: Trainer, lengths: tuple[tuple[str, int], ...]):
  """Returns the protocol, and the assignment of each chain in round 0."""
  protocol = trainer._protocol(dict(lengths))
  return protocol, protocol.assign(trainer.seed, 0)


def _fits(trainer: Trainer, field: str, structure, shapes) -> bool:
  """Returns whether an optimiser could keep what a state has of it."""
  leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  shared, chain, parts = structure.unflatten(leaves)
  return fits(getattr(trainer, field), (shared, chain), parts)
