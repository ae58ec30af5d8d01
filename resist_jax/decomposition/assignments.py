"""Assignments in which few blocks move from one round to the next.

Each block is owned by one worker, which keeps its blocks in *columns*. From one
round to the next a worker shuffles its blocks among its columns; then each
column moves round the ring of the workers that have it, by a random number of
places. Blocks visit workers, and pairs of blocks meet, as often as with a fresh
round-robin assignment (`slots.sample_slots`), and every host derives the same
moves from the seed. Where workers are unequal, some have more columns than
others, and blocks visit a worker in proportion to its depth.

Blocks may also be *spread*: then a column is a part of the chain, such as its
first S blocks, and a worker owns a block of each part. Each block visits all
workers equally often in this case, too, but blocks of the same part do not
meet.

A worker below its depth gets *replicas* for one round: copies of blocks that
others own. All of this is arithmetic on the host, on block indices.
"""

import dataclasses
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from resist_jax.decomposition.slots import (
  Division,
  blocks_owned,
  blocks_per_worker,
  round_robin,
  slots_per_worker,
)

# How blocks travel: who sends to whom, each worker at most once.
Route = tuple[tuple[int, int], ...]


class Assignment(NamedTuple):
  """Who runs which blocks in a round.

  Arrays are NumPy's on the host and JAX's in a state.

  Attributes:
    slots: `int32[S, K]`, ascending; L in an empty slot.
    owned: `int32[S, C]`, the block that a worker owns in each column, L where
      it owns none. This and the other fields are None for slots that no
      `Assigner` made.
    place: `int32[S, C + R]`, the slot of each owned block, then of each
      replica; K where there is none.
    order: `int32[S, C]`, the column of the assignment before whose block a
      worker sent away in each column.
    shifts: `int32[C]`, how many places round its ring each column moved.
    offsets: `int32[R]`, how many places round the ring of all workers a block
      travels from its owner to the worker that gets a replica.
  """

  slots: Any
  owned: Any = None
  place: Any = None
  order: Any = None
  shifts: Any = None
  offsets: Any = None

  def staying(self) -> 'Assignment':
    """Returns the same assignment, as one that follows it without moves."""
    if self.order is None:
      return self
    S, C = self.order.shape
    order = np.tile(np.arange(C, dtype=np.int32), (S, 1))
    return self._replace(order=order, shifts=np.zeros(C, np.int32))


@dataclasses.dataclass(frozen=True)
class Assigner:
  """Assigns the blocks of one chain, round after round.

  Attributes:
    num_blocks: L, at least S: every worker owns a block.
    num_workers: S.
    min_depth: The least number of blocks that a worker runs.
    depths: See `slots.slots_per_worker`.
    spread: Whether each worker's blocks are spread over the chain. Where S does
      not divide L, the extra block that some workers own may be in any part.

  Raises:
    ValueError: If some worker would own no block, or would need more replicas
      than owners can lend, or if blocks are to be spread over unequal workers.
  """

  num_blocks: int
  num_workers: int
  min_depth: int | None = 0
  depths: tuple[int, ...] = ()
  spread: bool = False

  def __post_init__(self):
    L, S = self.num_blocks, self.num_workers
    if self.spread and len(set(self.depths)) > 1:
      raise ValueError(
        f'depths is {self.depths}, but blocks are spread over equal workers '
        'only: let depths be empty, or deal blocks at random.'
      )
    if self.min_depth is None:
      raise ValueError(
        'hand_over gives each worker a block of its own, but here a worker may '
        'run none: use exchange=masked_psum.'
      )
    blocks_per_worker(*self.division)
    if S > L:
      raise ValueError(
        f'hand_over gives each of {S} workers a block of its own, but the '
        f'chain has {L}: use at most {L} workers, or exchange=masked_psum '
        'with min_depth >= 1.'
      )
    if self.min_depth > L // S * S:
      raise ValueError(
        f'under hand_over a worker can run at most {L // S * S} of {L} blocks, '
        f'but min_depth is {self.min_depth}: lower it, or use '
        'exchange=masked_psum.'
      )
    # All workers have the columns that are lent, each to every other worker.
    most = (S - 1) * min(self.owned)
    if len(self.replica_workers) > most:
      raise ValueError(
        f'with depths {self.depths} a worker needs {len(self.replica_workers)} '
        f'replicas, but under hand_over it can have at most {most}: lower the '
        'largest depth, raise the smallest, or use exchange=masked_psum.'
      )

  @property
  def division(self) -> Division:
    """The fields, as the functions of `slots` take them."""
    return Division(
      self.num_blocks, self.num_workers, self.min_depth, self.depths
    )

  @cached_property
  def num_slots(self) -> int:
    """K."""
    return slots_per_worker(*self.division)

  @cached_property
  def owned(self) -> tuple[int, ...]:
    """How many blocks each worker owns."""
    return blocks_owned(self.num_blocks, self.num_workers, self.depths)

  @cached_property
  def num_columns(self) -> int:
    """C, the largest number of blocks that a worker owns."""
    return max(self.owned)

  @cached_property
  def replica_workers(self) -> tuple[tuple[int, ...], ...]:
    """For each replica r of R, the workers that have so many."""
    counts = blocks_per_worker(*self.division)
    missing = [n - own for n, own in zip(counts, self.owned, strict=True)]
    return tuple(
      tuple(w for w, n in enumerate(missing) if n > r)
      for r in range(max(missing))
    )

  @property
  def num_replicas(self) -> int:
    """R, the largest number of replicas that a worker has."""
    return len(self.replica_workers)

  def source_column(self, replica: int) -> int:
    """Returns the column of its owner that a replica is a copy of.

    Args:
      replica: See `replica_routes`.

    Returns:
      See `ring`.
    """
    return replica // (self.num_workers - 1)

  @property
  def source_columns(self) -> tuple[int, ...]:
    """The columns that replicas are copies of, each once."""
    columns = map(self.source_column, range(self.num_replicas))
    return tuple(dict.fromkeys(columns))

  def ring(self, column: int) -> tuple[int, ...]:
    """Returns the workers that have a column.

    Args:
      column: Number of a slot of the owners, from 0.

    Returns:
      Numbers of the workers.
    """
    return tuple(w for w, count in enumerate(self.owned) if count > column)

  def column_routes(self, column: int) -> list[Route]:
    """Returns the routes that a column can take.

    Args:
      column: See `ring`.

    Returns:
      For each shift along the ring, pairs of a source and a target.
    """
    ring = self.ring(column)
    return [
      tuple(zip(ring, ring[t:] + ring[:t], strict=True))
      for t in range(len(ring))
    ]

  def replica_routes(self, replica: int) -> list[Route]:
    """Returns the routes from owners to a replica's workers.

    Args:
      replica: Number of the replica of a worker, from 0.

    Returns:
      For each offset, pairs of an owner and the worker that it lends to.
    """
    S = self.num_workers
    return [
      tuple(((w - t) % S, w) for w in self.replica_workers[replica])
      for t in range(S)
    ]

  def first(self, seed: list[int]) -> Assignment:
    """Returns the assignment of round 0.

    Args:
      seed: Entropy that decides all assignments of this chain.

    Returns:
      The assignment.
    """
    C, S = self.num_columns, self.num_workers
    rng = np.random.default_rng([*seed, 0])
    pack = self._parts(rng) if self.spread else rng.permutation(self.num_blocks)
    pack = np.append(pack, self.num_blocks)
    owned = pack[np.array(round_robin(self.owned))]
    unmoved = np.tile(np.arange(C), (S, 1)), np.zeros(C, int)
    return self._complete(owned, *unmoved, rng)

  def following(
    self, owned: np.ndarray, seed: list[int], round_index: int
  ) -> Assignment:
    """Returns the assignment of a round.

    Args:
      owned: `int32[S, C]`, of the assignment before.
      seed: As given to `first`.
      round_index: The round that is assigned; at least 1.

    Returns:
      The assignment.
    """
    rng = np.random.default_rng([*seed, round_index])
    if self.spread:
      order = self._order_by_part(owned, rng)
    else:
      # Shuffle each worker's blocks; empty places stay in the last column.
      rank = np.where(owned < self.num_blocks, rng.random(owned.shape), 2.0)
      order = rank.argsort(axis=1)
    rings = [len(self.ring(j)) for j in range(self.num_columns)]
    shifts = rng.integers(rings)
    return self._complete(self._move(owned, order, shifts), order, shifts, rng)

  def _parts(self, rng) -> np.ndarray:
    """Returns the blocks part by part, those of a part shuffled."""
    L, S = self.num_blocks, self.num_workers
    # The last part is short. Any block may be in it.
    short = (rng.integers(L) + np.arange(L % S)) % L
    others = np.delete(np.arange(L), short).reshape(-1, S)
    parts = rng.permuted(others, axis=1)
    return np.append(rng.permutation(parts), rng.permutation(short))

  def _order_by_part(self, owned: np.ndarray, rng) -> np.ndarray:
    """Returns the columns from which blocks leave: by depth in the chain.

    A worker that owns one block more sends one in the last column, which is
    that of the same rank for all of them.
    """
    full = self.num_blocks // self.num_workers
    order = np.asarray(owned).argsort(axis=1)
    if full < self.num_columns:
      extra, more = rng.integers(full + 1), owned[:, -1] < self.num_blocks
      last = np.append(np.delete(np.arange(full + 1), extra), extra)
      order[more] = order[more][:, last]
    # Replicas are copies from the first columns: let these be any parts.
    order[:, :full] = order[:, rng.permutation(full)]
    return order

  def at(self, seed: list[int], round_index: int) -> Assignment:
    """Returns the assignment of a round, computed from round 0.

    Args:
      seed: As given to `first`.
      round_index: At least 0. Each round before it takes some 100 us.

    Returns:
      The assignment.
    """
    assignment = self.first(seed)
    for earlier in range(1, round_index + 1):
      assignment = self.following(assignment.owned, seed, earlier)
    return assignment

  def _move(self, owned, order, shifts) -> np.ndarray:
    leaving = np.take_along_axis(owned, order, axis=1)
    arriving = np.full_like(owned, self.num_blocks)
    for j, shift in enumerate(shifts):
      ring = list(self.ring(j))
      arriving[ring, j] = np.roll(leaving[ring, j], shift)
    return arriving

  def _complete(self, owned, order, shifts, rng) -> Assignment:
    """Chooses replicas, and sorts them and the owned blocks into slots."""
    L, S, K = self.num_blocks, self.num_workers, self.num_slots
    R = self.num_replicas
    # One column lends once along each offset, so nobody gets a block twice.
    drawn = [1 + rng.permutation(S - 1) for _ in self.source_columns]
    offsets = np.concatenate([*drawn, np.zeros(0, int)])[:R]
    blocks = self._held(owned, offsets)
    # The slot of a block is its rank among the worker's blocks.
    place = np.where(
      blocks < L, (blocks[:, None, :] < blocks[:, :, None]).sum(axis=2), K
    )
    arrays = (self._slots(blocks), owned, place, order, shifts, offsets)
    return Assignment(*(x.astype(np.int32) for x in arrays))

  def _held(self, owned, offsets) -> np.ndarray:
    """Returns the blocks that each worker owns, then its replicas."""
    S = self.num_workers
    held = [owned]
    for r, workers in enumerate(self.replica_workers):
      replica = np.full((S, 1), self.num_blocks)
      w = np.array(workers)
      replica[w, 0] = owned[(w - offsets[r]) % S, self.source_column(r)]
      held.append(replica)
    return np.concatenate(held, axis=1)

  def _slots(self, held: np.ndarray) -> np.ndarray:
    return np.sort(held, axis=1)[:, : self.num_slots]

  def follows(self, before: Assignment, after: Assignment) -> bool:
    """Returns whether an assignment can follow another one.

    Args:
      before: Assignment of a round.
      after: Assignment that is meant for the next round.

    Returns:
      Whether the moves of `after` turn the owners of `before` into its own,
      and its slots are those of its owners and replicas.
    """
    S, C, R = self.num_workers, self.num_columns, self.num_replicas
    shapes = [(S, self.num_slots), (S, C), (S, C + R), (S, C), (C,), (R,)]
    if np.shape(before.owned) != (S, C) or list(map(np.shape, after)) != shapes:
      return False  # Of another depth, or slots alone.
    moved = self._move(before.owned, after.order, after.shifts)
    held = self._held(after.owned, after.offsets)
    return np.array_equal(moved, after.owned) and np.array_equal(
      after.slots, self._slots(held)
    )
