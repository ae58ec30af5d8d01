"""Who holds what, and when and how workers communicate."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import optax

from resist_jax.decomposition import Assignment, Division, slots_per_worker
from resist_jax.exchange import Exchange, hand_over

PyTree = Any
# The same for all partitioned chains, or by name; see `slots_per_worker`.
MinDepth = int | None | Mapping[str, int | None]

# In a seed, it tells assignments from rounds, none of which has this number.
ASSIGNING = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Who holds what, and when and how workers communicate.

  ResIST, local SGD and data parallel are values of this class. Local SGD
  partitions no chain, so every worker holds every block; data parallel is local
  SGD that averages its gradients at every step.

  Attributes:
    num_workers: S.
    local_steps: T, steps of each worker in a round.
    num_blocks: L of each partitioned chain, by name; empty for full models.
    exchange: How blocks travel, and in which format.
    min_depth: Blocks of each partitioned chain that a worker runs at least.
    depths: See `decomposition.slots_per_worker`; for every partitioned chain.
    average_gradients: Average gradients over the workers at each step.
    carry: Exchange the optimiser's moments with the parameters and keep them;
      otherwise they restart in every round (the paper).
    exclude_faulty: Exclude workers whose update is not finite from aggregates,
      see `exchange.participation`.
    loss_factor: See `Trainer`.
    update_factor: See `Trainer`.
    outer: Optimiser whose gradient is the negative mean change; None for the
      mean itself (the paper).
    average: Decay of an average of the network over rounds, see `average`; 0
      for none.
    rounds_at_once: How many rounds are trained as one, without the exchanges
      between them.
    shared_every: Local steps between exchanges of the shared part; 0 for only
      one, with the blocks.
    give_agreed: Whether the loss also gets the parameters as the round began.
  """

  num_workers: int
  local_steps: int
  num_blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)
  exchange: Exchange = dataclasses.field(default_factory=hand_over)
  min_depth: MinDepth = 0
  depths: tuple[int, ...] = ()
  average_gradients: bool = False
  carry: bool = False
  exclude_faulty: bool = False
  loss_factor: float = 0.0
  update_factor: float = 0.0
  outer: optax.GradientTransformation | None = None
  average: float = 0.0
  rounds_at_once: int = 1
  shared_every: int = 0
  give_agreed: bool = False

  @property
  def steps(self) -> int:
    """How many local steps there are from exchange to exchange."""
    return self.local_steps * self.rounds_at_once

  @property
  def num_shared(self) -> int:
    """How often the shared part is exchanged before the blocks are."""
    return self.steps // self.shared_every - 1 if self.shared_every else 0

  def lasting(self, count: int) -> 'Protocol':
    """Returns the protocol of several rounds that are trained as one.

    Args:
      count: How many.

    Returns:
      The protocol.
    """
    return dataclasses.replace(self, rounds_at_once=count)

  def shares_after(self, t: int) -> bool:
    """Returns whether the shared part is exchanged after a step, alone.

    Args:
      t: The step, from 0.

    Returns:
      False after the last step, whose exchange includes the blocks.
    """
    done = t + 1
    between = self.shared_every and done < self.steps
    return bool(between) and done % self.shared_every == 0

  @property
  def sends_changes(self) -> bool:
    """Whether workers send changes of the shared part, not its values."""
    exact = self.exchange.format.changes == 'float32'
    return not (exact or self.average_gradients)

  @property
  def keeps_shared(self) -> bool:
    """Whether the shared part before local training is needed after it."""
    may_be_lost = self.exclude_faulty and not self.average_gradients
    return (
      self.sends_changes
      or self.judges_updates
      or bool(self.outer)
      or may_be_lost  # Where nobody is healthy.
    )

  @property
  def keeps_blocks(self) -> bool:
    """Whether the blocks before local training are needed after it.

    A block without a healthy holder returns to them, and `outer` reads them.
    """
    return bool(self.num_blocks) and (self.exclude_faulty or bool(self.outer))

  @property
  def judges_updates(self) -> bool:
    """Whether workers are judged by how far they move their parameters."""
    return self.exclude_faulty and self.update_factor > 0

  @property
  def keeps_error(self) -> bool:
    """Whether senders keep what rounding removes from changes."""
    return self.sends_changes and self.exchange.format.feedback

  def kept(
    self, shared: PyTree, chain: PyTree
  ) -> tuple[PyTree | None, PyTree | None]:
    """Returns what the exchange needs of the parameters before training.

    Args:
      shared: Pytree of arrays `[W, ...]`.
      chain: The same of the blocks, `[W, K, ...]`.

    Returns:
      Each of them, or None in the place of one that is not needed.
    """
    return (
      shared if self.keeps_shared else None,
      chain if self.keeps_blocks or not chain else None,
    )

  def division(self, chain: str) -> Division:
    """Returns how a chain is divided among the workers.

    Args:
      chain: Its name.

    Returns:
      Its length, the number of workers, the minimum depth, and the depths.
    """
    min_depth = self.min_depth
    if isinstance(min_depth, Mapping):
      min_depth = min_depth[chain]
    length = self.num_blocks[chain]
    return Division(length, self.num_workers, min_depth, tuple(self.depths))

  @property
  def divisions(self) -> dict[str, Division]:
    """How each partitioned chain is divided among the workers."""
    return {name: self.division(name) for name in self.num_blocks}

  def slots_per_worker(self, chain: str) -> int:
    """Returns K, the number of slots of a worker.

    Args:
      chain: Name of the chain.

    Returns:
      K.
    """
    return slots_per_worker(*self.division(chain))

  def assign(
    self,
    seed: int,
    draw: int,
    before: Mapping[str, Assignment] | None = None,
  ) -> dict[str, Assignment]:
    """Assigns the blocks of a round; a pure function of seed and draw.

    Args:
      seed: Seed of the run.
      draw: The number of the assignment, see `State.draw`.
      before: The assignment of each chain before, on the host. It saves
        computing the draws from 0.

    Returns:
      The assignment of each partitioned chain, on the host.

    Raises:
      ValueError: If the exchange assigns what it refuses itself.
    """
    found = {}
    for i, name in enumerate(self.num_blocks):
      division, old = self.division(name), before[name] if before else None
      found[name] = self.exchange.assign(
        division, [seed, ASSIGNING, i], draw, old
      )
      # In somebody's own exchange, a block without a holder would be lost.
      self.exchange.check(division, found[name], found[name].staying())
    return found

  def check(self) -> None:
    """Raises a ValueError if the exchange cannot serve a chain."""
    for division in self.divisions.values():
      self.exchange.check(division)

  def check_moves(
    self,
    before: Mapping[str, Assignment],
    after: Mapping[str, Assignment],
  ) -> None:
    """Checks assignments that somebody else made.

    Args:
      before: The assignment of each chain in a round, on the host.
      after: The assignment meant for the next round.

    Raises:
      ValueError: If the exchange cannot get from one to the other, or if a
        worker has another number of blocks than its depth.
    """
    for name, division in self.divisions.items():
      self.exchange.check(division, before[name], after[name])
      for assignment in (before[name], after[name]) if self.depths else ():
        _check_depths(name, division, assignment)


def _check_depths(
  name: str, division: Division, assignment: Assignment
) -> None:
  held = assignment.slots < division.num_blocks
  counts = tuple(held.sum(axis=1).tolist())
  if counts != division.depths:
    raise ValueError(
      f'the slots of {name} hold {counts} blocks, but depths is '
      f'{division.depths}: assign them with these depths.'
    )


def hold_the_same(
  ours: Mapping[str, Assignment], theirs: Mapping[str, Assignment]
) -> bool:
  """Returns whether two assignments have the same slots in every chain."""

  def tables(assignments: Mapping[str, Assignment]) -> dict[str, list]:
    return {name: a.slots.tolist() for name, a in assignments.items()}

  return tables(ours) == tables(theirs)
