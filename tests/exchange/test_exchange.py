"""Every exchange on a mesh is `take(aggregate(...), next_slots)`."""

from functools import partial

from covering import checkerboard, rest_is_slow
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import tiny

from resist_jax import decomposition
from resist_jax.decomposition import Assigner, Division
from resist_jax.exchange import collectives, compression
from resist_jax.exchange.hand_over import exchange as hand_over
from resist_jax.exchange.masked_psum import exchange as masked_psum
from resist_jax.rounds import make_mesh

ON_WORKERS = PartitionSpec(collectives.WORKER)
EVERYWHERE = PartitionSpec()


def on_mesh(function, num_devices, in_specs=ON_WORKERS):
  mesh = make_mesh(num_devices)
  program = jax.jit(
    jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=ON_WORKERS)
  )
  # A round waits for its exchange, and so do tests: a queue of twenty exchanges
  # once hung on virtual CPUs until XLA aborted the process.
  return lambda *args: jax.block_until_ready(program(*args))


def random_chain(slots):
  rng = np.random.default_rng(0)
  shapes = {'w': (*slots.shape, 2, 3), 'b': (*slots.shape, 5)}
  return {
    name: jnp.array(rng.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


def assert_dealt(got, chain, slots, next_slots, num_blocks, tolerance=1e-6):
  want = dealt(chain, slots, next_slots, num_blocks)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=tolerance)


@partial(jax.jit, static_argnums=3)
def dealt(chain, slots, next_slots, num_blocks):
  """What workers hold next, by the plain functions."""
  old = jax.tree.map(
    lambda x: jnp.full((num_blocks, *x.shape[2:]), jnp.nan), chain
  )
  whole = decomposition.aggregate(chain, slots, old)
  return jax.vmap(decomposition.take, in_axes=(None, 0))(whole, next_slots)


SIZES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 4), (8, 2)]
# Every size exactly, and some in each encoding.
CASES = [(S, D, depth, 'float32') for S, D in SIZES for depth in (0, 3)] + [
  (S, D, 3, encoding)
  for S, D in ((4, 1), (4, 4), (8, 4))
  for encoding in ('bfloat16', 'int16')
]
QUICK = [
  (1, 1, 0, 'float32'),
  (2, 1, 3, 'float32'),
  (2, 2, 0, 'float32'),
  (4, 2, 3, 'float32'),
  (4, 4, 0, 'float32'),
  (8, 2, 3, 'float32'),
  (4, 4, 3, 'int16'),
  (8, 4, 3, 'bfloat16'),
]


@pytest.mark.parametrize(
  ('S', 'D', 'min_depth', 'encoding'), rest_is_slow(CASES, QUICK)
)
def test_masked_psum_aggregates_and_deals_again(S, D, min_depth, encoding):
  L = 9
  before, after = (tiny.assign(r, L, S, min_depth) for r in (0, 1))
  chain = random_chain(before.slots)
  division = Division(L, S, min_depth)
  got = exchange_on_mesh(masked_psum, division, D, encoding)(
    chain, before, after
  )
  tolerance = {'float32': 1e-6, 'bfloat16': 1e-2, 'int16': 2e-4}[encoding]
  assert_dealt(got, chain, before.slots, after.slots, L, tolerance)


def exchange_on_mesh(exchange, division, num_devices, encoding):
  return on_mesh(
    partial(exchange, division, encoding=encoding),
    num_devices,
    in_specs=(ON_WORKERS, EVERYWHERE, EVERYWHERE),
  )


def hand_over_on_mesh(assigner, num_devices, encoding):
  return exchange_on_mesh(hand_over, assigner.division, num_devices, encoding)


@pytest.mark.parametrize('encoding', ['float32', 'bfloat16', 'int16'])
@pytest.mark.parametrize('exchange', [masked_psum, hand_over])
def test_numbers_of_16_bits_are_added_up_in_32(exchange, encoding):
  """An exchange may be called with them, though rounds widen them first."""
  division = Division(9, 4, 3)
  before, after = tiny.in_turn(Assigner(*division), [3], 2)
  chain = random_chain(before.slots)
  short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), chain)
  got = exchange_on_mesh(exchange, division, 2, encoding)(short, before, after)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype('bfloat16')}
  assert_dealt(got, short, before.slots, after.slots, 9, tolerance=2e-2)


@pytest.mark.parametrize(
  ('S', 'D', 'min_depth', 'encoding'),
  rest_is_slow([*CASES, (4, 2, 7, 'float32')], QUICK),
)
def test_a_hand_over_aggregates_and_deals_again(S, D, min_depth, encoding):
  """Over several rounds, so that columns, replicas and shifts vary."""
  L = 9
  assigner = Assigner(L, S, min_depth)
  run = hand_over_on_mesh(assigner, D, encoding)
  tolerance = {'float32': 1e-6, 'bfloat16': 1e-2, 'int16': 2e-4}[encoding]
  before, *others = tiny.in_turn(assigner, [3], 4)
  for after in others:
    chain = random_chain(before.slots)
    got = run(chain, before, after)
    assert_dealt(got, chain, before.slots, after.slots, L, tolerance)
    before = after


@pytest.mark.parametrize(
  ('depths', 'D'), checkerboard([(4, 3, 1, 1), (7, 3, 1, 4)], [1, 2, 4])
)
def test_a_hand_over_between_unequal_workers(depths, D):
  """Without replicas and with them; some columns belong to one worker alone."""
  assigner = Assigner(9, 4, depths=depths)
  run = hand_over_on_mesh(assigner, D, 'float32')
  before, *others = tiny.in_turn(assigner, [3], 5)
  for after in others:
    chain = random_chain(before.slots)
    got = run(chain, before, after)
    assert_dealt(got, chain, before.slots, after.slots, 9)
    before = after


@pytest.mark.parametrize(
  'encoding', rest_is_slow(['bfloat16', 'int16'], ['int16'])
)
def test_blocks_are_rounded_alike_however_many_devices(encoding):
  """Workers that share a device round as others do."""
  L, S = 9, 4
  assigner = Assigner(L, S, 3)
  before, after = tiny.in_turn(assigner, [3], 2)
  chain = random_chain(before.slots)
  one, *others = (
    hand_over_on_mesh(assigner, D, encoding)(chain, before, after)
    for D in (1, 2, 4)
  )
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(('S', 'D'), [(1, 1), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize('encoding', ['float32', 'bfloat16'])
def test_the_mean_over_workers_reaches_all_of_them(S, D, encoding):
  x = np.random.default_rng(0).normal(size=(S, 5)).astype(np.float32)
  run = on_mesh(
    partial(collectives.mean_over_workers, num_workers=S, encoding=encoding), D
  )
  got = np.asarray(run(jnp.array(x)))
  tolerance = 1e-6 if encoding == 'float32' else 1e-2
  want = np.tile(x.mean(0), (S, 1))
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
  assert (got == got[0]).all()


def changes(num_devices, encoding, feedback, num_rounds=20, S=4, n=1500):
  """Exchanges the same small changes again and again."""
  rng = np.random.default_rng(0)
  steps = rng.normal(size=(S, n)).astype(np.float32) / 500
  steps[:, 0] = 1.0  # One large change sets the scale of its neighbours.
  run = on_mesh(
    partial(collectives.add_mean_change, num_workers=S, encoding=encoding),
    num_devices,
  )
  tree = {'w': jnp.zeros((S, n))}
  error = None
  if feedback:
    shapes = collectives.error_shapes(n, S)
    error = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  for _ in range(num_rounds):
    after = {'w': tree['w'] + jnp.array(steps)}
    tree, error = run(tree, after, error)
  return np.asarray(tree['w']), num_rounds * steps.mean(axis=0)


def test_error_feedback_sends_what_rounding_left_out():
  got, want = changes(4, 'int8', feedback=True)
  assert (got == got[0]).all()
  # What is not sent yet is at most a step of the sender's and of the mean's.
  assert np.abs(got[0] - want).max() < 2 / 127
  forgetful, _ = changes(4, 'int8', feedback=False)
  # Without, small changes are lost for ever beside a large one.
  assert np.abs(forgetful[0] - want).max() > 2 / 127


@pytest.mark.parametrize('encoding', ['int8', 'bfloat16'])
def test_changes_add_up_alike_however_many_devices(encoding):
  one, *others = (
    changes(D, encoding, encoding == 'int8')[0] for D in (1, 2, 4)
  )
  for other in others:
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('encoding', ['float32', 'bfloat16', 'int16', 'int8'])
@pytest.mark.parametrize('count', [1, 1024, 1500])
def test_a_message_is_as_long_as_promised_and_reads_back(encoding, count):
  rng = np.random.default_rng(count)
  x = jnp.array(rng.normal(size=count), jnp.float32)
  message = compression.encode(x, encoding)
  assert message.nbytes == compression.message_bytes(count, encoding)
  error = np.abs(compression.decode(message, count, encoding) - x).max()
  largest = np.abs(x).max()
  steps = {'float32': 0, 'bfloat16': 2**-8, 'int16': 2**-16, 'int8': 2**-8}
  assert error <= 1.01 * steps[encoding] * largest
  assert (
    compression.decode(compression.encode(0 * x, encoding), count, encoding)
    == 0
  ).all()
