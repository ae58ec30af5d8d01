"""Slots hold every block fairly; cutting and joining networks lose nothing."""

import itertools
from statistics import NormalDist

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from resist_jax import decomposition

SIZES = [
  (22, 4, 0), (22, 4, 6), (22, 8, 4), (22, 2, 11), (22, 3, 0), (5, 5, 0),
  (5, 2, 0), (5, 2, 3), (5, 8, 1), (5, 8, 2), (5, 4, 5), (1, 1, 0), (1, 4, 1),
  (7, 1, 0),
]  # fmt: skip
QUICK = [(22, 4, 6), (22, 3, 0), (5, 2, 3), (5, 8, 1), (1, 4, 1)]


def draw(L, S, min_depth=0, count=64, seed=0):
  keys = jax.random.split(jax.random.key(seed), count)
  sample = jax.vmap(lambda k: decomposition.sample_slots(k, L, S, min_depth))
  return np.asarray(jax.jit(sample)(keys))


@pytest.mark.parametrize(('L', 'S', 'min_depth'), rest_is_slow(SIZES, QUICK))
def test_sampled_slots_hold_every_block_and_are_ascending(L, S, min_depth):
  K = decomposition.slots_per_worker(L, S, min_depth)
  for slots in draw(L, S, min_depth):
    assert slots.shape == (S, K)
    assert slots.dtype == np.int32
    hands = [row[row < L] for row in slots]
    assert set(np.concatenate(hands)) == set(range(L))  # All blocks are held.
    counts = [len(hand) for hand in hands]
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= max(min_depth, L // S)
    assert sum(counts) == decomposition.num_copies(L, S, min_depth)
    for row, hand in zip(slots, hands, strict=True):
      assert (np.diff(hand) > 0).all()  # Ascending, and none twice.
      assert (row[len(hand) :] == L).all()  # Empty slots are last.


def test_the_papers_counts():
  counts = (draw(22, 4) < 22).sum(axis=2)
  np.testing.assert_array_equal(counts, np.tile([6, 6, 5, 5], (64, 1)))


@pytest.mark.parametrize('min_depth', [0, 6])
def test_blocks_meet_workers_and_each_other_uniformly(min_depth):
  """Each frequency has a bound, and all bounds hold with 99.99 %."""
  L, S, count = 12, 3, 4000
  slots = draw(L, S, min_depth, count)
  held = np.asarray(jax.vmap(lambda s: decomposition.presence(s, L))(slots))
  copies = decomposition.num_copies(L, S, min_depth) // S

  def check(frequency, expected):
    # Bonferroni over all frequencies checked, two-sided.
    z = NormalDist().inv_cdf(1 - 1e-4 / 2 / frequency.size)
    bound = z * np.sqrt(expected * (1 - expected) / count)
    assert np.abs(frequency - expected).max() < bound

  check(held.mean(axis=0), copies / L)
  pairs = np.array(
    [
      held[:, s, a] & held[:, s, b]
      for s in range(S)
      for a, b in itertools.combinations(range(L), 2)
    ]
  )
  check(pairs.mean(axis=1), copies * (copies - 1) / (L * (L - 1)))


def test_draws_follow_the_key():
  first, again, other = draw(9, 3), draw(9, 3), draw(9, 3, seed=1)
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


UNEQUAL = [
  (22, (8, 6, 4, 4)), (22, (16, 10, 5, 4)), (5, (1, 1, 1, 5)), (5, (5, 5)),
  (5, (1, 2, 1, 1, 1, 3)), (1, (1, 1)), (12, (5, 2, 9)),
]  # fmt: skip


@pytest.mark.parametrize(('L', 'depths'), UNEQUAL)
def test_unequal_workers_get_their_depths(L, depths):
  S = len(depths)
  owned = decomposition.blocks_owned(L, S, depths)
  assert sum(owned) == L
  assert all(own <= depth for own, depth in zip(owned, depths, strict=True))
  assert S > L or min(owned) >= 1
  sizes = {'num_blocks': L, 'num_workers': S, 'depths': depths}
  assert decomposition.slots_per_worker(**sizes) == max(depths)
  assert decomposition.num_copies(**sizes) == sum(depths)
  keys = jax.random.split(jax.random.key(0), 64)
  sample = jax.vmap(lambda k: decomposition.sample_slots(k, **sizes))
  for slots in np.asarray(jax.jit(sample)(keys)):
    assert slots.shape == (S, max(depths))
    hands = [row[row < L] for row in slots]
    assert set(np.concatenate(hands)) == set(range(L))
    assert tuple(map(len, hands)) == depths
    for row, hand in zip(slots, hands, strict=True):
      assert (np.diff(hand) > 0).all()
      assert (row[len(hand) :] == L).all()


def test_blocks_visit_unequal_workers_in_proportion():
  """Each frequency has a bound, and all bounds hold with 99.99 %."""
  L, depths, count = 12, (5, 2, 9), 4000
  keys = jax.random.split(jax.random.key(0), count)
  slots = jax.jit(
    jax.vmap(lambda k: decomposition.sample_slots(k, L, 3, depths=depths))
  )(keys)
  held = np.asarray(jax.vmap(lambda s: decomposition.presence(s, L))(slots))
  frequency, expected = held.mean(axis=0), np.array(depths)[:, None] / L
  z = NormalDist().inv_cdf(1 - 1e-4 / 2 / frequency.size)
  bound = z * np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(frequency - expected) < bound).all()


@pytest.mark.parametrize(
  ('depths', 'says'),
  [
    ((3, 3, 3), 'not one number for each of 2'),
    ((6, 1), 'allows 1 to 5'),
    ((5, 0), 'allows 1 to 5'),
    ((2, 2), '4 blocks in all'),
  ],
)
def test_impossible_depths_say_why(depths, says):
  with pytest.raises(ValueError, match=says) as raised:
    decomposition.sample_slots(jax.random.key(0), 5, 2, depths=depths)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  ('L', 'S', 'min_depth', 'says'),
  [
    (5, 0, 0, 'at least 1'),
    (5, 6, 0, 'cannot share'),
    (5, 2, 6, 'allows 0 to 5'),
    (5, 2, -1, 'allows 0 to 5'),
    (0, 2, 0, 'cannot share'),
    (-3, 2, 0, 'num_blocks is -3; it must be at least 0'),
    (6.0, 2, 0, 'num_blocks is 6.0; it must be a whole number'),
    (6, True, 0, 'num_workers is True; it must be a whole number'),
    (6, 2, '3', "min_depth is '3'; it must be a whole number"),
  ],
)
def test_sizes_that_are_impossible_are_refused_with_the_reason(
  L, S, min_depth, says
):
  with pytest.raises(ValueError, match=says):
    decomposition.sample_slots(jax.random.key(0), L, S, min_depth)


def test_a_chain_of_no_blocks_deals_none():
  slots = decomposition.sample_slots(jax.random.key(0), 0, 2, min_depth=None)
  assert (slots.shape, slots.dtype) == ((2, 0), jnp.int32)


@pytest.mark.parametrize('key', [3, None, np.int32(0), np.array([0, 1])])
def test_what_is_no_key_is_refused(key):
  with pytest.raises(ValueError, match='it must be a PRNG key'):
    decomposition.sample_slots(key, 6, 2)


def random_chain(L, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'a': jnp.array(rng.normal(size=(L, 2, 3)), jnp.float32),
    'b': [jnp.array(rng.normal(size=L), jnp.float32)],
  }


def test_take_is_a_slice_with_zeros_in_empty_slots():
  chain = random_chain(4)
  sub = decomposition.take(chain, jnp.array([1, 3, 4], jnp.int32))
  np.testing.assert_array_equal(sub['a'][:2], chain['a'][np.array([1, 3])])
  np.testing.assert_array_equal(sub['a'][2], 0)
  np.testing.assert_array_equal(sub['b'][0][2], 0)


@pytest.mark.parametrize(
  ('L', 'S', 'min_depth'), [(7, 3, 0), (7, 3, 5), (4, 2, 0)]
)
def test_aggregate_is_the_mean_over_holders(L, S, min_depth):
  slots = jnp.array(tiny.assign(0, L, S, min_depth).slots)
  chain, rng = random_chain(L), np.random.default_rng(1)
  chains = jax.tree.map(
    lambda x: jnp.array(
      rng.normal(size=(S, slots.shape[1], *x.shape[1:])), jnp.float32
    ),
    chain,
  )
  got = jax.jit(decomposition.aggregate)(chains, slots, chain)
  for block in range(L):
    where = np.argwhere(np.asarray(slots) == block)
    for new, old in zip(
      jax.tree.leaves(got), jax.tree.leaves(chains), strict=True
    ):
      mean = np.mean([np.asarray(old)[s, k] for s, k in where], axis=0)
      np.testing.assert_allclose(new[block], mean, rtol=1e-6, atol=1e-6)


def test_aggregate_keeps_blocks_that_nobody_held():
  chain = random_chain(4)
  slots = jnp.array([[0, 1], [1, 4]], jnp.int32)
  chains = jax.tree.map(lambda x: jnp.full((2, 2, *x.shape[1:]), 9.0), chain)
  got = decomposition.aggregate(chains, slots, chain)
  np.testing.assert_array_equal(got['a'][2:], chain['a'][2:])
  np.testing.assert_array_equal(got['a'][:2], 9.0)


def test_a_block_that_a_worker_holds_twice_counts_twice():
  chain, chains = {'w': jnp.zeros(2)}, {'w': jnp.array([[5.0, 9.0, 1.0]])}
  got = decomposition.aggregate(chains, jnp.array([[0, 0, -1]]), chain)
  np.testing.assert_array_equal(got['w'], [7.0, 1.0])


@pytest.mark.parametrize('dtype', ['int8', 'int32', 'uint32', 'float16'])
def test_equal_copies_of_large_numbers_stay_what_they_are(dtype):
  """Such as raw random keys, which float32 would round."""
  kind = jnp.finfo if dtype == 'float16' else jnp.iinfo
  large = np.array([3, kind(dtype).max], dtype)
  slots = jnp.array([[0, 1], [1, 2]], jnp.int32)
  copies = {'k': large[np.minimum(slots, 1)]}
  got = decomposition.aggregate(copies, slots, {'k': np.zeros_like(large)})
  assert got['k'].dtype == dtype
  np.testing.assert_array_equal(got['k'], large)


@pytest.mark.parametrize(('L', 'S', 'min_depth'), rest_is_slow(SIZES, QUICK))
def test_aggregating_equal_copies_is_the_identity(L, S, min_depth):
  slots = jnp.array(tiny.assign(0, L, S, min_depth).slots)
  chain = random_chain(L)
  zeros = jax.tree.map(np.zeros_like, chain)

  @jax.jit
  def there_and_back(slots):
    chains = jax.vmap(decomposition.take, in_axes=(None, 0))(chain, slots)
    return decomposition.aggregate(chains, slots, zeros)

  got = there_and_back(slots)
  exact = min_depth == 0  # A mean of one copy is that copy, bit for bit.
  for new, old in zip(
    jax.tree.leaves(got), jax.tree.leaves(chain), strict=True
  ):
    np.testing.assert_allclose(new, old, rtol=0 if exact else 5e-7)


@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_an_absent_block_gets_exactly_zero_gradient(norm):
  """Through the slice, and in the empty slot of a worker with fewer blocks."""
  L = 5
  net = tiny.network(L, norm=norm)
  params, loss_fn = tiny.init(net), tiny.make_loss(net)
  slots = jnp.array([1, 4, L], jnp.int32)  # The third slot is empty.
  present = {tiny.CHAIN: (slots < L).astype(jnp.float32)}

  def loss(params):
    shared, chain = decomposition.split(params, [tiny.CHAIN])
    sub = {tiny.CHAIN: decomposition.take(chain[tiny.CHAIN], slots)}
    network = decomposition.join(shared, sub)
    return loss_fn(network, present, np.arange(12), None, tiny.examples())[0]

  grads = jax.jit(jax.grad(loss))(params)[tiny.CHAIN]
  for leaf in jax.tree.leaves(grads):
    assert (np.asarray(leaf)[[0, 2, 3]] == 0).all()
  norms = jax.tree.map(
    lambda g: np.abs(np.asarray(g)).reshape(L, -1).max(1), grads
  )
  assert (np.max(jax.tree.leaves(norms), axis=0)[[1, 4]] > 0).all()

  def loss_of_slots(sub):
    shared, _ = decomposition.split(params, [tiny.CHAIN])
    network = decomposition.join(shared, {tiny.CHAIN: sub})
    return loss_fn(network, present, np.arange(12), None, tiny.examples())[0]

  sub = decomposition.take(params[tiny.CHAIN], slots)
  in_slots = jax.jit(jax.grad(loss_of_slots))(sub)
  for leaf in jax.tree.leaves(in_slots):
    assert (np.asarray(leaf)[2] == 0).all()


def test_a_subnetwork_is_the_network_with_the_other_branches_off():
  L, slots = 5, np.array([0, 3])
  net = tiny.network(L)
  params = tiny.init(net)
  images, _ = tiny.examples()
  on = jnp.zeros(L).at[slots].set(1.0)
  whole = net.apply({'params': params}, images, {tiny.CHAIN: on})
  sub = {**params, tiny.CHAIN: decomposition.take(params[tiny.CHAIN], slots)}
  cut = net.with_chain_lengths({tiny.CHAIN: 2}).apply({'params': sub}, images)
  np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-6)


def test_a_worker_may_hold_no_block():
  assert decomposition.take(CHAIN, [])['w'].shape == (0, 3)


CHAIN = {'w': np.ones((6, 3), np.float32), 'b': np.ones(6, np.float32)}
SLOTS = np.array([[0, 1, 2], [3, 4, 5]])
SUBS = {'w': np.ones((2, 3, 3)), 'b': np.ones((2, 3))}
PIECES = {
  'a number for a key': (
    lambda: decomposition.sample_slots(0, 6, 2), 'key is 0; it must be a PRNG',
  ),
  'half a depth': (
    lambda: decomposition.slots_per_worker(6, 2, depths=(3.0, 3.0)),
    'each of depths is 3.0; it must be a whole number',
  ),
  'a short leaf': (
    lambda: decomposition.take({**CHAIN, 'b': np.ones(5)}, SLOTS[0]),
    'leading sizes 5, 6; each must stack',
  ),
  'a scalar': (
    lambda: decomposition.take({'w': np.float32(1)}, SLOTS[0]),
    'leading sizes none; each must stack',
  ),
  'other leaves': (
    lambda: decomposition.aggregate({'w': SUBS['w']}, SLOTS, CHAIN),
    'both must be the same pytree',
  ),
  'other slots': (
    lambda: decomposition.aggregate(SUBS, SLOTS[:, :2], CHAIN),
    r'has a leaf \(2, 3.*and slots is \(2, 2\); they must be',
  ),
  'slots of one worker': (
    lambda: decomposition.aggregate(SUBS, SLOTS[0], CHAIN),
    r'slots is \(3,\); they must be',
  ),
  'a name for names': (
    lambda: decomposition.split({'chain': 1}, 'chain'), r"names: \['chain'\]",
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', PIECES)
def test_pieces_that_do_not_fit_are_refused_in_a_line(case):
  call, says = PIECES[case]
  with pytest.raises(ValueError, match=says) as caught:
    call()
  assert '\n' not in str(caught.value)


def test_nothing_to_take_is_taken():
  """An optimiser may keep nothing of a chain."""
  assert decomposition.take({}, SLOTS[0]) == {}


def test_aggregate_reads_negative_slots_as_take_does():
  chain = {'w': jnp.array([1.0, 2.0, 3.0])}
  chains, slots = {'w': jnp.array([[4.0, 5.0], [6.0, 9.0]])}, [[0, 2], [1, 2]]
  want = decomposition.aggregate(chains, jnp.array(slots), chain)
  got = decomposition.aggregate(chains, jnp.array([[0, -1], [-2, -1]]), chain)
  np.testing.assert_array_equal(got['w'], want['w'])
  np.testing.assert_array_equal(want['w'], [4.0, 6.0, 7.0])


def test_aggregate_of_nothing_is_nothing():
  assert decomposition.aggregate({}, jnp.array([[0, 1]]), {}) == {}


def test_slots_are_numbers_of_blocks():
  chain = {'w': jnp.arange(3.0)}
  mask = jnp.array([True, False, True])
  with pytest.raises(ValueError, match=r'slots_s is bool\[3\].*flatnonzero'):
    decomposition.take(chain, mask)
  found = decomposition.take(chain, jnp.flatnonzero(mask))
  assert found['w'].tolist() == [0, 2]
  with pytest.raises(ValueError, match=r'slots is float32\[1, 1\]'):
    decomposition.aggregate({'w': jnp.ones((1, 1))}, jnp.ones((1, 1)), chain)
  found = decomposition.aggregate({'w': jnp.ones((1, 1))}, [[2]], chain)
  assert found['w'].tolist() == [0, 1, 1]


def test_impossible_owners_are_refused():
  for args in ((22, 4, (16, 10)), (3, 0)):
    with pytest.raises(ValueError, match=r'depths|num_workers'):
      decomposition.blocks_owned(*args)
  assert decomposition.blocks_owned(2, 3) == (1, 1, 0)
