"""Deals blocks to workers so that the next deal moves as few as possible.

Every block is owned by one worker. A worker keeps its own blocks in *columns*;
from one deal to the next it shuffles them among its columns, and then every
column moves round the circle of the workers that have it, by a random number of
places. So a block goes to workers, and pairs of blocks meet, as often
as in fresh round-robin dealing (`decomposition.sample_slots`), and where
a block goes is known to everyone who knows the seed. Where workers are unequal,
some have more columns than others, and blocks visit a worker in proportion.

Below its depth, a worker borrows *guests* for one round: copies of blocks
that others own. All of this is arithmetic on the host, on numbers of blocks.
"""

from collections.abc import Iterator
import dataclasses
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from resist_jax.decomposition import slots as decomposition

# One way for blocks to travel: who sends to whom, each worker at most once.
Route = tuple[tuple[int, int], ...]


class Assignment(NamedTuple):
  """Who runs which blocks in a round.

  Attributes:
    slots: `int32[S, K]`, ascending; L in an empty slot.
    own: `int32[S, C]`, the block that a worker owns in each column, L where it
      has none. This and the rest is None for slots that no `Assigner` dealt.
    place: `int32[S, C + G]`, the slot of each own block, then of each guest; K
      where there is none.
    order: `int32[S, C]`, the column of the deal before whose block a worker
      sent away in each column.
    shifts: `int32[C]`, how many places round its circle each column moved.
    loans: `int32[G]`, how many places round the circle of all workers the
      blocks that become guests are lent.
  """

  # On the host, arrays of NumPy; on the mesh, of JAX.
  slots: Any
  own: Any = None
  place: Any = None
  order: Any = None
  shifts: Any = None
  loans: Any = None


@dataclasses.dataclass(frozen=True)
class Assigner:
  """Deals one chain, round after round.

  Attributes:
    num_blocks: L, at least S: every worker owns a block.
    num_workers: S.
    min_depth: The least number of blocks that a worker runs.
    depths: See `decomposition.slots_per_worker`.
  """

  num_blocks: int
  num_workers: int
  min_depth: int = 0
  depths: tuple[int, ...] = ()

  def __post_init__(self):
    L, S = self.num_blocks, self.num_workers
    decomposition.blocks_per_worker(L, S, self.min_depth, self.depths)
    if S > L:
      raise ValueError(
        f'hand_over gives each of {S} workers a block of its own, but the '
        f'chain has {L}: use at most {L} workers, or exchange=masked_psum '
        'with min_depth >= 1.'
      )
    # Everyone owns the columns that lend, and lends to all others in turn.
    most = (S - 1) * min(self.owned)
    if self.min_depth > L // S * S:
      raise ValueError(
        f'under hand_over a worker can run at most {L // S * S} of {L} blocks, '
        f'but min_depth is {self.min_depth}: lower it, or use '
        'exchange=masked_psum.'
      )
    if len(self.borrowers) > most:
      raise ValueError(
        f'with depths {self.depths} a worker borrows {len(self.borrowers)} '
        f'blocks, but under hand_over it can borrow at most {most}: lower the '
        'largest, raise the smallest, or use exchange=masked_psum.'
      )

  @cached_property
  def num_slots(self) -> int:
    """K."""
    return decomposition.slots_per_worker(
      self.num_blocks, self.num_workers, self.min_depth, self.depths
    )

  @cached_property
  def owned(self) -> tuple[int, ...]:
    """How many blocks each worker owns."""
    return decomposition.blocks_owned(
      self.num_blocks, self.num_workers, self.depths
    )

  @cached_property
  def num_columns(self) -> int:
    """C, the most blocks that a worker owns."""
    return max(self.owned)

  def circle(self, column: int) -> tuple[int, ...]:
    """Returns the workers that have a column."""
    return tuple(w for w, count in enumerate(self.owned) if count > column)

  @cached_property
  def borrowers(self) -> tuple[tuple[int, ...], ...]:
    """For each guest g of G, the workers that borrow so many."""
    counts = decomposition.blocks_per_worker(
      self.num_blocks, self.num_workers, self.min_depth, self.depths
    )
    missing = [n - own for n, own in zip(counts, self.owned, strict=True)]
    return tuple(
      tuple(w for w, n in enumerate(missing) if n > g)
      for g in range(max(missing))
    )

  def lent_column(self, guest: int) -> int:
    """Returns the column that lends: its lenders lap the circle once."""
    return guest // (self.num_workers - 1)

  def moves(self, column: int) -> list[Route]:
    """Returns the routes of a column, by shift."""
    circle = self.circle(column)
    return [
      tuple(zip(circle, circle[t:] + circle[:t], strict=True))
      for t in range(len(circle))
    ]

  def lendings(self, guest: int) -> list[Route]:
    """Returns the routes from lenders to borrowers, by loan."""
    S = self.num_workers
    return [
      tuple(((w - t) % S, w) for w in self.borrowers[guest]) for t in range(S)
    ]

  def deals(self, seed: list[int], start: int = 0) -> Iterator[Assignment]:
    """Deals without end; a deal depends on the seed and its round alone.

    Args:
      seed: Of all deals of this chain.
      start: The first round wanted. Earlier ones are dealt and dropped, which
        takes some 100 microseconds each.

    Yields:
      The deal of each round.
    """
    C, S = self.num_columns, self.num_workers
    rng = np.random.default_rng([*seed, 0])
    pack = np.append(rng.permutation(self.num_blocks), self.num_blocks)
    own = pack[np.array(decomposition.round_robin(self.owned))]
    stay = np.tile(np.arange(C), (S, 1)), np.zeros(C, int)
    round_index = 0
    deal = self._complete(own, *stay, rng)
    while True:
      if round_index >= start:
        yield deal
      round_index += 1
      assert deal.own is not None
      deal = self._next(deal.own, np.random.default_rng([*seed, round_index]))

  def _next(self, own: np.ndarray, rng: np.random.Generator) -> Assignment:
    # Shuffle blocks; what is no block stays in the last column.
    rank = np.where(own < self.num_blocks, rng.random(own.shape), 2.0)
    order = rank.argsort(axis=1)
    circles = [len(self.circle(j)) for j in range(self.num_columns)]
    shifts = rng.integers(circles)
    return self._complete(self._move(own, order, shifts), order, shifts, rng)

  def _move(self, own, order, shifts) -> np.ndarray:
    leaving = np.take_along_axis(own, order, axis=1)
    arriving = np.full_like(own, self.num_blocks)
    for j, shift in enumerate(shifts):
      circle = list(self.circle(j))
      arriving[circle, j] = np.roll(leaving[circle, j], shift)
    return arriving

  def _complete(self, own, order, shifts, rng) -> Assignment:
    """Chooses guests, and sorts own blocks and guests into slots."""
    L, S, K = self.num_blocks, self.num_workers, self.num_slots
    laps = range(-(-len(self.borrowers) // max(S - 1, 1)))
    circles = [1 + rng.permutation(S - 1) for _ in laps]
    loans = np.concatenate([*circles, np.zeros(0, int)])[: len(self.borrowers)]
    held = [own]
    for g, borrowers in enumerate(self.borrowers):
      guest = np.full((S, 1), L)
      w = np.array(borrowers)
      guest[w, 0] = own[(w - loans[g]) % S, self.lent_column(g)]
      held.append(guest)
    blocks = np.concatenate(held, axis=1)
    slots = np.sort(blocks, axis=1)[:, :K]
    # The slot of a block is its rank among the worker's blocks.
    place = np.where(
      blocks < L, (blocks[:, None, :] < blocks[:, :, None]).sum(axis=2), K
    )
    return Assignment(
      *(x.astype(np.int32) for x in (slots, own, place, order, shifts, loans))
    )

  def follows(self, before: Assignment, after: Assignment) -> bool:
    """Tells whether this dealer dealt one deal right after another.

    Args:
      before: Of a round.
      after: Of the next round, as one hopes.

    Returns:
      Whether moving the blocks of one gives the blocks of the other.
    """
    shape = (self.num_workers, self.num_columns)
    if any(d.own is None or d.own.shape != shape for d in (before, after)):
      return False
    moved = self._move(before.own, after.order, after.shifts)
    return bool((moved == after.own).all())
