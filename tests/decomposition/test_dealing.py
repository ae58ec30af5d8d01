"""Deals are fair, move little, and depend on the seed and the round alone."""

import itertools

import numpy as np
import pytest
from scipy import stats

from resist_jax import decomposition
from resist_jax.decomposition.assignments import Assigner

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


def take(dealer, count, seed=(1,), start=0):
  return list(itertools.islice(dealer.deals([*seed], start), count))


@pytest.mark.parametrize(('L', 'S', 'min_depth'), SIZES)
def test_a_deal_holds_every_block_and_no_worker_holds_one_twice(
  L, S, min_depth
):
  dealer = Assigner(L, S, min_depth)
  K = decomposition.slots_per_worker(L, S, min_depth)
  copies = decomposition.num_copies(L, S, min_depth)
  for deal in take(dealer, 30):
    assert deal.slots.shape == (S, K)
    assert sorted(deal.own[deal.own < L]) == list(range(L))
    assert (deal.slots < L).sum() == copies
    for worker, row in enumerate(deal.slots):
      held = row[row < L]
      assert (np.diff(held) > 0).all()
      assert len(held) >= max(min_depth, L // S)
      own = deal.own[worker]
      assert set(own[own < L]) <= set(held)
      for block, slot in zip(own, deal.place[worker], strict=False):
        assert slot == K or row[slot] == block


@pytest.mark.parametrize(('L', 'S', 'min_depth'), SIZES)
def test_a_deal_follows_from_seed_and_round(L, S, min_depth):
  dealer = Assigner(L, S, min_depth)
  deals = take(dealer, 8)
  for start, deal in enumerate(deals):
    (again,) = take(dealer, 1, start=start)
    for a, b in zip(deal, again, strict=True):
      np.testing.assert_array_equal(a, b)
  for before, after in itertools.pairwise(deals):
    assert dealer.follows(before, after)
  if L > S > 1:
    assert not dealer.follows(deals[0], deals[2])
    other = take(dealer, 1, seed=(2,))[0]
    assert not dealer.follows(other, deals[1])


def owners(deal, L):
  found = np.full(L, -1)
  for worker, own in enumerate(deal.own):
    found[own[own < L]] = worker
  return found


@pytest.mark.parametrize(('L', 'S'), [(22, 4), (22, 8), (9, 3)])
def test_workers_and_pairs_of_blocks_meet_uniformly(L, S):
  """Chi-squared over fresh runs: at 1 in 10,000, they are not uniform.

  Deals of one run depend on each other, so each sample is the fourth deal of a
  seed of its own.
  """
  dealer, samples = Assigner(L, S), 3000
  owned = np.array(
    [owners(take(dealer, 1, (s,), start=4)[0], L) for s in range(samples)]
  )
  for worker in range(S):
    count = (owned == worker).sum(axis=0)
    # A worker always owns the same number, so cells vary by less than Poisson.
    share = L // S + (worker < L % S)
    expected = samples * share / L
    statistic = ((count - expected) ** 2).sum() / (expected * (1 - share / L))
    statistic *= (L - 1) / L
    assert stats.chi2.sf(statistic, L - 1) > 1e-4
  together = owned[:, :, None] == owned[:, None, :]
  pairs = together[:, *np.triu_indices(L, 1)].sum(axis=0)
  sizes = [L // S + (w < L % S) for w in range(S)]
  chance = sum(n * (n - 1) for n in sizes) / (L * (L - 1))  # Of a fresh deal.
  deviation = (pairs - samples * chance) / np.sqrt(
    samples * chance * (1 - chance)
  )
  # The largest of many normal deviations, Bonferroni.
  assert 2 * stats.norm.sf(np.abs(deviation).max()) * len(pairs) > 1e-4
  assert abs(pairs.mean() / samples - chance) < 1e-12


def test_one_long_run_is_fair_as_well():
  """Over 4,000 rounds of one run no block, worker or guest is favoured."""
  L, S, min_depth, count = 22, 4, 7, 4000
  held, together = np.zeros((S, L)), np.zeros((L, L))
  for deal in take(Assigner(L, S, min_depth), count):
    has = decomposition.presence(deal.slots, L)
    held += np.asarray(has)
    owner = owners(deal, L)
    together += owner[:, None] == owner[None, :]
  # A round's deal is correlated with the next one; 5 % covers it.
  np.testing.assert_allclose(held / count, min_depth / L, rtol=0.08)
  pairs = together[np.triu_indices(L, 1)] / count
  chance = (2 * 6 * 5 + 2 * 5 * 4) / (22 * 21)
  np.testing.assert_allclose(pairs, chance, rtol=0.16)


@pytest.mark.parametrize(('L', 'S', 'min_depth'), SIZES)
def test_routes_carry_what_changes_its_worker_and_nothing_else(L, S, min_depth):
  dealer = Assigner(L, S, min_depth)
  for before, after in itertools.pairwise(take(dealer, 20)):
    sent = sum(
      source != target
      for j in range(dealer.num_columns)
      for source, target in dealer.moves(j)[after.shifts[j]]
    )
    assert sent == (owners(before, L) != owners(after, L)).sum()
    lent = sum(
      source != target
      for g, loan in enumerate(after.loans)
      for source, target in dealer.lendings(g)[loan]
    )
    assert lent == decomposition.num_copies(L, S, min_depth) - L


UNEQUAL = [
  # L, depths: with guests and without, nearly equal and far from it.
  (22, (8, 6, 4, 4)),
  (22, (16, 10, 5, 4)),
  (22, (19, 1, 1, 1)),
  (9, (9, 2)),
  (12, (3, 7, 5)),
]


@pytest.mark.parametrize(('L', 'depths'), UNEQUAL)
def test_a_deal_to_unequal_workers_keeps_the_promises(L, depths):
  S = len(depths)
  dealer = Assigner(L, S, depths=depths)
  deals = take(dealer, 30)
  for start, deal in enumerate(deals):
    assert deal.slots.shape == (S, max(depths))
    assert sorted(deal.own[deal.own < L]) == list(range(L))
    for worker, row in enumerate(deal.slots):
      held = row[row < L]
      assert len(held) == depths[worker]
      assert (np.diff(held) > 0).all()
      own = deal.own[worker]
      assert (own < L).sum() == dealer.owned[worker] >= 1
      assert set(own[own < L]) <= set(held)
    (again,) = take(dealer, 1, start=start)
    for a, b in zip(deal, again, strict=True):
      np.testing.assert_array_equal(a, b)
  for before, after in itertools.pairwise(deals):
    assert dealer.follows(before, after)
    sent = sum(
      source != target
      for j in range(dealer.num_columns)
      for source, target in dealer.moves(j)[after.shifts[j]]
    )
    assert sent == (owners(before, L) != owners(after, L)).sum()


@pytest.mark.parametrize(('L', 'depths'), UNEQUAL)
def test_blocks_visit_unequal_workers_in_proportion(L, depths):
  """Chi-squared over fresh runs, and pairs of blocks, as for equal workers."""
  S, samples = len(depths), 3000
  dealer = Assigner(L, S, depths=depths)
  deals = [take(dealer, 1, (s,), start=4)[0] for s in range(samples)]
  owned = np.array([owners(deal, L) for deal in deals])
  held = sum(
    (deal.slots[:, :, None] == np.arange(L)).any(axis=1).astype(int)
    for deal in deals
  )
  for worker in range(S):
    for count, size in (
      ((owned == worker).sum(axis=0), dealer.owned[worker]),
      (held[worker], depths[worker]),  # With guests.
    ):
      share = size / L
      if share == 1:
        assert (count == samples).all()
        continue
      expected = samples * share
      statistic = ((count - expected) ** 2).sum() / (expected * (1 - share))
      assert stats.chi2.sf(statistic * (L - 1) / L, L - 1) > 1e-4
  together = owned[:, :, None] == owned[:, None, :]
  pairs = together[:, *np.triu_indices(L, 1)].sum(axis=0)
  chance = sum(n * (n - 1) for n in dealer.owned) / (L * (L - 1))
  deviation = (pairs - samples * chance) / np.sqrt(
    samples * chance * (1 - chance)
  )
  assert 2 * stats.norm.sf(np.abs(deviation).max()) * len(pairs) > 1e-4


def test_a_long_run_is_fair_to_unequal_workers():
  L, depths, count = 22, (9, 6, 5, 4), 4000
  held = np.zeros((4, L))
  for deal in take(Assigner(L, 4, depths=depths), count):
    held += np.asarray(decomposition.presence(deal.slots, L))
  expected = np.tile(np.array(depths)[:, None] / L, (1, L))
  np.testing.assert_allclose(held / count, expected, rtol=0.13)


def test_equal_depths_are_an_even_deal():
  even, named = Assigner(22, 4, 6), Assigner(22, 4, depths=(6, 6, 6, 6))
  for a, b in zip(take(even, 5), take(named, 5), strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_depths_that_need_other_lenders_are_told_in_a_line():
  with pytest.raises(ValueError, match=r'borrows 12 .* at most 3') as raised:
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
def test_what_cannot_be_handed_over_is_told_in_a_line(L, S, min_depth, says):
  with pytest.raises(ValueError, match=says) as raised:
    Assigner(L, S, min_depth)
  assert '\n' not in str(raised.value)
