"""Assignments are fair, move little, and follow from seed and round alone."""

import itertools

from covering import rest_is_slow
import numpy as np
import pytest
from scipy import special
import tiny

from resist_jax import decomposition
from resist_jax.decomposition import Assigner, Assignment

SIZES = [
  # L, S, min_depth
  (1, 1, 0),
  (5, 1, 3),
  (22, 2, 11),
  (22, 4, 0),
  (22, 4, 6),
  (22, 8, 4),
  (9, 3, 7),
  (12, 12, 3),
  (50, 8, 0),
]


@pytest.mark.parametrize('spread', [False, True])
@pytest.mark.parametrize(('L', 'S', 'min_depth'), SIZES)
def test_workers_hold_every_block_and_none_holds_one_twice(
  L, S, min_depth, spread
):
  assigner = Assigner(L, S, min_depth, spread=spread)
  K = decomposition.slots_per_worker(L, S, min_depth)
  copies = decomposition.num_copies(L, S, min_depth)
  for assignment in tiny.in_turn(assigner, [1], 30):
    assert assignment.slots.shape == (S, K)
    assert sorted(assignment.owned[assignment.owned < L]) == list(range(L))
    assert (assignment.slots < L).sum() == copies
    for worker, row in enumerate(assignment.slots):
      held = row[row < L]
      assert (np.diff(held) > 0).all()
      assert len(held) >= max(min_depth, L // S)
      owned = assignment.owned[worker]
      assert set(owned[owned < L]) <= set(held)
      places = assignment.place[worker]
      for block, slot in zip(owned, places, strict=False):
        assert slot == K if block == L else row[slot] == block
      # With those of the replicas, each slot that holds a block has one place.
      assert sorted(places[places < K]) == list(range(len(held)))


@pytest.mark.parametrize('spread', [False, True])
@pytest.mark.parametrize(('L', 'S', 'min_depth'), SIZES)
def test_an_assignment_follows_from_seed_and_round(L, S, min_depth, spread):
  assigner = Assigner(L, S, min_depth, spread=spread)
  assignments = tiny.in_turn(assigner, [1], 8)
  for r, assignment in enumerate(assignments):
    again = assigner.at([1], r)
    for a, b in zip(assignment, again, strict=True):
      np.testing.assert_array_equal(a, b)
  for before, after in itertools.pairwise(assignments):
    assert assigner.follows(before, after)
  if L > S > 1:
    assert not assigner.follows(assignments[0], assignments[2])
    other = assigner.first([2])
    assert not assigner.follows(other, assignments[1])
  # Of another depth, or with other slots, blocks would be dropped.
  before = assignments[0]
  deeper = Assigner(L, S, min(assigner.num_slots + 1, L), spread=spread)
  if deeper.num_slots > assigner.num_slots and S > 1:
    after = deeper.following(before.owned, [1], 1)
    assert not assigner.follows(before, after)
  slots = np.roll(assignments[1].slots, 1, axis=0)
  changed = assignments[1]._replace(slots=slots)
  same = np.array_equal(slots, assignments[1].slots)
  assert assigner.follows(before, changed) == same
  assert not assigner.follows(before, Assignment(assignments[1].slots))


def presence(slots, L):
  """Who holds what; by NumPy, for thousands of rounds."""
  return (slots[:, :, None] == np.arange(L)).any(axis=1)


def owners(assignment, L):
  found = np.full(L, -1)
  for worker, owned in enumerate(assignment.owned):
    found[owned[owned < L]] = worker
  return found


@pytest.mark.parametrize(
  ('L', 'S'), rest_is_slow([(22, 4), (22, 8), (9, 3)], [(22, 4)])
)
def test_workers_and_pairs_of_blocks_meet_uniformly(L, S):
  """Chi-squared over fresh runs: at 1 in 10,000, they are not uniform.

  Assignments of one run depend on each other, so each sample is the fourth
  assignment of a seed of its own.
  """
  assigner, samples = Assigner(L, S), 3000
  owned = np.array([owners(assigner.at([s], 3), L) for s in range(samples)])
  for worker in range(S):
    count = (owned == worker).sum(axis=0)
    # A worker always owns the same number, so cells vary by less than Poisson.
    share = L // S + (worker < L % S)
    expected = samples * share / L
    statistic = ((count - expected) ** 2).sum() / (expected * (1 - share / L))
    statistic *= (L - 1) / L
    assert special.chdtrc(L - 1, statistic) > 1e-4
  together = owned[:, :, None] == owned[:, None, :]
  pairs = together[:, *np.triu_indices(L, 1)].sum(axis=0)
  sizes = [L // S + (w < L % S) for w in range(S)]
  chance = sum(n * (n - 1) for n in sizes) / (L * (L - 1))  # When fresh.
  deviation = (pairs - samples * chance) / np.sqrt(
    samples * chance * (1 - chance)
  )
  # The largest of many normal deviations, Bonferroni.
  assert 2 * special.ndtr(-np.abs(deviation).max()) * len(pairs) > 1e-4
  assert abs(pairs.mean() / samples - chance) < 1e-12


def test_one_long_run_is_fair_as_well():
  """Over 4,000 rounds of one run no block, worker or replica is favoured."""
  L, S, min_depth, count = 22, 4, 7, 4000
  held, together = np.zeros((S, L)), np.zeros((L, L))
  for assignment in tiny.in_turn(Assigner(L, S, min_depth), [1], count):
    held += presence(assignment.slots, L)
    owner = owners(assignment, L)
    together += owner[:, None] == owner[None, :]
  # An assignment is correlated with the next one; 8 % covers it.
  np.testing.assert_allclose(held / count, min_depth / L, rtol=0.08)
  pairs = together[np.triu_indices(L, 1)] / count
  chance = (2 * 6 * 5 + 2 * 5 * 4) / (22 * 21)
  np.testing.assert_allclose(pairs, chance, rtol=0.16)


@pytest.mark.parametrize('spread', [False, True])
@pytest.mark.parametrize(('L', 'S', 'min_depth'), SIZES)
def test_routes_carry_what_changes_its_worker_and_nothing_else(
  L, S, min_depth, spread
):
  assigner = Assigner(L, S, min_depth, spread=spread)
  for before, after in itertools.pairwise(tiny.in_turn(assigner, [1], 20)):
    sent = sum(
      source != target
      for j in range(assigner.num_columns)
      for source, target in assigner.column_routes(j)[after.shifts[j]]
    )
    assert sent == (owners(before, L) != owners(after, L)).sum()
    lent = sum(
      source != target
      for r, offset in enumerate(after.offsets)
      for source, target in assigner.replica_routes(r)[offset]
    )
    assert lent == decomposition.num_copies(L, S, min_depth) - L


UNEQUAL = [
  # L, depths: with replicas and without, nearly equal and far from it.
  (22, (8, 6, 4, 4)),
  (22, (16, 10, 5, 4)),
  (22, (19, 1, 1, 1)),
  (9, (9, 2)),
  (12, (3, 7, 5)),
]


@pytest.mark.parametrize(('L', 'depths'), UNEQUAL)
def test_unequal_workers_hold_as_many_blocks_as_their_depths(L, depths):
  S = len(depths)
  assigner = Assigner(L, S, depths=depths)
  assignments = tiny.in_turn(assigner, [1], 30)
  for r, assignment in enumerate(assignments):
    assert assignment.slots.shape == (S, max(depths))
    assert sorted(assignment.owned[assignment.owned < L]) == list(range(L))
    for worker, row in enumerate(assignment.slots):
      held = row[row < L]
      assert len(held) == depths[worker]
      assert (np.diff(held) > 0).all()
      owned = assignment.owned[worker]
      assert (owned < L).sum() == assigner.owned[worker] >= 1
      assert set(owned[owned < L]) <= set(held)
    again = assigner.at([1], r)
    for a, b in zip(assignment, again, strict=True):
      np.testing.assert_array_equal(a, b)
  for before, after in itertools.pairwise(assignments):
    assert assigner.follows(before, after)
    sent = sum(
      source != target
      for j in range(assigner.num_columns)
      for source, target in assigner.column_routes(j)[after.shifts[j]]
    )
    assert sent == (owners(before, L) != owners(after, L)).sum()


@pytest.mark.parametrize(('L', 'depths'), rest_is_slow(UNEQUAL, [UNEQUAL[3]]))
def test_blocks_visit_unequal_workers_in_proportion(L, depths):
  """Chi-squared over fresh runs, and pairs of blocks, as for equal workers."""
  S, samples = len(depths), 3000
  assigner = Assigner(L, S, depths=depths)
  assignments = [assigner.at([s], 3) for s in range(samples)]
  owned = np.array([owners(assignment, L) for assignment in assignments])
  held = sum(presence(a.slots, L).astype(int) for a in assignments)
  for worker in range(S):
    for count, size in (
      ((owned == worker).sum(axis=0), assigner.owned[worker]),
      (held[worker], depths[worker]),  # With replicas.
    ):
      share = size / L
      if share == 1:
        assert (count == samples).all()
        continue
      expected = samples * share
      statistic = ((count - expected) ** 2).sum() / (expected * (1 - share))
      assert special.chdtrc(L - 1, statistic * (L - 1) / L) > 1e-4
  together = owned[:, :, None] == owned[:, None, :]
  pairs = together[:, *np.triu_indices(L, 1)].sum(axis=0)
  chance = sum(n * (n - 1) for n in assigner.owned) / (L * (L - 1))
  deviation = (pairs - samples * chance) / np.sqrt(
    samples * chance * (1 - chance)
  )
  assert 2 * special.ndtr(-np.abs(deviation).max()) * len(pairs) > 1e-4


def test_a_long_run_is_fair_to_unequal_workers():
  L, depths, count = 22, (9, 6, 5, 4), 4000
  held = np.zeros((4, L))
  for assignment in tiny.in_turn(Assigner(L, 4, depths=depths), [1], count):
    held += presence(assignment.slots, L)
  expected = np.tile(np.array(depths)[:, None] / L, (1, L))
  np.testing.assert_allclose(held / count, expected, rtol=0.13)


def test_equal_depths_give_the_assignments_of_a_minimum_depth():
  even, named = Assigner(22, 4, 6), Assigner(22, 4, depths=(6, 6, 6, 6))
  both = (tiny.in_turn(assigner, [1], 5) for assigner in (even, named))
  for a, b in zip(*both, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_depths_that_need_too_many_replicas_are_refused_in_one_line():
  with pytest.raises(
    ValueError, match=r'needs 12 replicas.* at most 3'
  ) as raised:
    Assigner(22, 4, depths=(22, 22, 1, 1))
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  ('L', 'S', 'min_depth', 'says'),
  [
    (5, 8, 2, 'masked_psum'),
    (22, 4, 21, 'min_depth is 21'),
    (5, 2, 6, 'min_depth'),
    (5, 0, 0, 'num_workers'),
  ],
)
def test_sizes_that_cannot_be_handed_over_are_refused_in_one_line(
  L, S, min_depth, says
):
  with pytest.raises(ValueError, match=says) as raised:
    Assigner(L, S, min_depth)
  assert '\n' not in str(raised.value)


def blocks_of(assignment, L):
  return [np.sort(row[row < L]) for row in assignment.owned]


@pytest.mark.parametrize(('L', 'S'), [(12, 4), (8, 2), (9, 3)])
def test_spread_blocks_come_from_all_parts_of_the_chain(L, S):
  """One from each S neighbours, in every round."""
  for assignment in tiny.in_turn(Assigner(L, S, spread=True), [1], 30):
    for mine in blocks_of(assignment, L):
      assert (mine // S).tolist() == list(range(L // S))


def unevenness(assigner):
  """How far blocks are from even places along the chain, mean of squares."""
  L, found = assigner.num_blocks, []
  for assignment in tiny.in_turn(assigner, [1], 300):
    for mine in blocks_of(assignment, L):
      even = (np.arange(len(mine)) + 0.5) * L / len(mine) - 0.5
      found += ((mine - even) ** 2).tolist()
  return np.mean(found)


def test_they_are_nearly_spread_where_workers_cannot_share_equally():
  random, spread = (
    unevenness(Assigner(22, 4, spread=spread)) for spread in (False, True)
  )
  assert spread < random / 2


@pytest.mark.parametrize(
  ('L', 'S', 'min_depth', 'samples'),
  rest_is_slow(
    [(12, 4, 0, 3000), (22, 4, 7, 3000), (22, 8, 4, 3000), (22, 4, 7, 500)],
    [(22, 4, 7, 500)],
  ),
)
def test_each_spread_block_visits_all_workers_alike(L, S, min_depth, samples):
  """Chi-squared over fresh runs, of owners and of those who borrow."""
  assigner = Assigner(L, S, min_depth, spread=True)
  found = [assigner.at([s], 6) for s in range(samples)]
  owned = np.array([owners(assignment, L) for assignment in found])
  held = sum(presence(a.slots, L).astype(int) for a in found)
  borrowed = held - sum(
    (owned == w).sum(axis=0)[None] * (np.arange(S) == w)[:, None]
    for w in range(S)
  )
  for worker in range(S):
    for count, size in (
      ((owned == worker).sum(axis=0), assigner.owned[worker]),
      (borrowed[worker], max(min_depth - assigner.owned[worker], 0)),
    ):
      share = size / L
      expected = samples * share
      if expected:
        statistic = ((count - expected) ** 2).sum() / (expected * (1 - share))
        assert special.chdtrc(L - 1, statistic * (L - 1) / L) > 1e-4


def test_spread_over_unequal_workers_is_refused_in_one_line():
  with pytest.raises(ValueError, match='over equal workers') as raised:
    Assigner(22, 4, depths=(8, 6, 4, 4), spread=True)
  assert '\n' not in str(raised.value)
