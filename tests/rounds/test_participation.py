"""A worker that cannot be trusted is left out of a round, and nothing else."""

import dataclasses
import functools
import itertools

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rounds import assert_close, full, hand_over, problem, resist
import tiny

import resist_jax
from resist_jax import decomposition, exchange
from resist_jax.exchange import compression, participation
from resist_jax.rounds.state import assignments_on_host

NO_EXAMPLE = -1  # On this the loss is not a number.


@functools.cache
def poisoned(value=np.nan):
  """A loss that some batches make useless, and parameters."""
  loss_fn, params = problem()

  def loss(params, present, batch, key, constants):
    value_here = jnp.where((batch == NO_EXAMPLE).any(), value, 1.0)
    result, metrics = loss_fn(params, present, batch, key, constants)
    return result * value_here, metrics

  return loss, params


def spoilt(protocol, left_out, step=0):
  """The batches of each round, those of some workers of no use."""
  rounds = []
  for r, workers in enumerate(left_out):
    batches = tiny.batches(r, protocol.num_workers, protocol.local_steps)
    batches[list(workers), step, 2] = NO_EXAMPLE
    rounds.append(batches)
  return rounds


def guarded(protocol, **fields):
  return dataclasses.replace(protocol, exclude_faulty=True, **fields)


def assert_everyone_holds(state, want, tolerance=3e-5):
  """Every copy on every worker, not just the first holders'."""
  assigned = assignments_on_host(state)
  shared, chains = decomposition.split(want, assigned)
  S = len(jax.tree.leaves(state.shared)[0])
  for s in range(S):
    got = jax.tree.map(lambda x, s=s: x[s], state.shared)
    assert_close(got, shared, tolerance)
  for name, assignment in assigned.items():
    for s, row in enumerate(assignment.slots):
      got = jax.tree.map(lambda x, s=s: x[s], state.chain[name])
      mine = decomposition.take(chains[name], jnp.array(row))
      assert_close(got, mine, tolerance)


# In each of three rounds, who is left out. At four workers and a minimum depth
# of three, some blocks of five have no good holder, some one, some several.
LEFT_OUT = ((1,), (0, 2, 3), ())


@functools.cache
def oracle(protocol_index, num_rounds=3):
  protocol = PROTOCOLS[protocol_index]
  loss_fn, params = problem()
  return tiny.algorithm_1(loss_fn, params, protocol, num_rounds, LEFT_OUT)


PROTOCOLS = [
  guarded(full(4)),
  guarded(resist(4)),
  guarded(resist(4, min_depth=3)),
  guarded(hand_over(4)),
  guarded(hand_over(4, min_depth=3)),
  guarded(resist(4, min_depth=2, carry=True)),
  guarded(hand_over(4, min_depth=3, carry=True)),
]


@pytest.mark.parametrize(
  ('index', 'D'),
  rest_is_slow(
    [(i, D) for i in (2, 4) for D in (1, 2, 4)]
    + [(0, 4), (1, 4), (3, 4), (5, 2), (6, 2)],
    quick=[(4, 4)],
  ),
)
def test_a_round_is_algorithm_1_without_the_bad_workers(index, D):
  protocol = PROTOCOLS[index]
  loss_fn, params = poisoned()
  state, measured = tiny.run_rounds(
    loss_fn, params, protocol, D, spoilt(protocol, LEFT_OUT)
  )
  assert_everyone_holds(state, oracle(index))
  for metrics, workers in zip(measured, LEFT_OUT, strict=True):
    want = [s not in workers for s in range(4)]
    assert np.asarray(metrics['finite']).tolist() == want
    assert np.asarray(metrics['healthy']).tolist() == want


@pytest.mark.slow
@pytest.mark.parametrize('index', [2, 6])
def test_so_is_the_loop_on_the_device(index):
  protocol = PROTOCOLS[index]
  loss_fn, params = poisoned()
  state, _ = tiny.run_rounds(
    loss_fn, params, protocol, 2, spoilt(protocol, LEFT_OUT), on_device=True
  )
  assert_everyone_holds(state, oracle(index))


@pytest.mark.parametrize(
  ('index', 'wire_format'),
  rest_is_slow(
    [(0, 'int8'), (2, 'int8'), (4, 'bfloat16'), (6, 'int8')],
    quick=[(0, 'int8')],
  ),
)
def test_and_the_round_in_fewer_bits(index, wire_format):
  exact = PROTOCOLS[index]
  make = exchange.hand_over if tiny.hands_over(exact) else exchange.masked_psum
  protocol = dataclasses.replace(exact, exchange=make(wire_format))
  loss_fn, params = poisoned()
  state, _ = tiny.run_rounds(
    loss_fn, params, protocol, 2, spoilt(protocol, LEFT_OUT[:2])
  )
  assert_everyone_holds(state, oracle(index, 2), 1e-2)
  for leaf in jax.tree.leaves(state.error):
    assert np.isfinite(leaf).all()


def data_parallel(S, T=2, **kwargs):
  return full(S, T, average_gradients=True, carry=True, **kwargs)


@functools.partial(jax.jit, static_argnums=1)
def mean_as_sent(trees, encoding):
  """The mean of what workers send, rounded where it goes over the wire."""

  def one(*leaves):
    parts = [x.ravel() / len(leaves) for x in leaves]
    total = sum(compression.rounded(x, encoding) for x in parts)
    return compression.rounded(total, encoding).reshape(leaves[0].shape)

  return jax.tree.map(one, *trees)


@pytest.mark.parametrize(
  ('D', 'on_device', 'wire_format'),
  rest_is_slow(
    [(D, D == 2, form) for D in (4, 2) for form in ('float32', 'bfloat16')],
    quick=[(2, True, 'bfloat16')],
  ),
)
def test_a_step_of_data_parallel_goes_without_a_bad_gradient(
  D, on_device, wire_format
):
  """In that step alone: the worker has not left the others."""
  loss_fn, params = poisoned()
  protocol = guarded(data_parallel(4, wire_format=wire_format))
  bad, bad_step = ((1, 3), ()), 1
  state, measured = tiny.run_rounds(
    loss_fn, params, protocol, D, spoilt(protocol, bad, bad_step), on_device
  )
  params = jax.tree.map(np.asarray, params)
  velocity = jax.tree.map(np.zeros_like, params)
  for r in range(2):
    batches = tiny.batches(r, 4, 2)
    for t in range(2):
      lost = bad[r] if t == bad_step else ()
      grads = mean_as_sent(
        [
          tiny.gradient(problem()[0], params, {}, batches[s, t])
          for s in range(4)
          if s not in lost
        ],
        wire_format,
      )
      grads = jax.tree.map(np.asarray, grads)
      velocity = jax.tree.map(
        lambda v, g, p: tiny.MOMENTUM * v + g + tiny.WEIGHT_DECAY * p,
        velocity, grads, params,
      )  # fmt: skip
      rate = tiny.RATE / (1 + r * 2 + t)
      params = jax.tree.map(lambda p, v, a=rate: p - a * v, params, velocity)
  # A number between two of bfloat16 may be rounded up here and down there.
  tolerance = 3e-5 if wire_format == 'float32' else 2e-3
  assert_everyone_holds(state, params, tolerance)
  good = [np.asarray(metrics['healthy']).tolist() for metrics in measured]
  assert good == [[True, False, True, False], [True] * 4]


def test_a_gradient_alone_can_be_bad():
  """The root of 0 is 0, and its slope is infinite."""
  loss_fn, params = problem()

  def steep(params, present, batch, key, constants):
    loss, metrics = loss_fn(params, present, batch, key, constants)
    bad = (batch == NO_EXAMPLE).any()
    zero = 0 * params['classifier']['bias'].sum()
    root = jnp.sqrt(jnp.where(bad, zero, 1.0))
    return loss + jnp.where(bad, root, 0.0), metrics

  protocol = guarded(data_parallel(4))
  state, (metrics,) = tiny.run_rounds(
    steep, params, protocol, 4, spoilt(protocol, [(2,)], step=1)
  )
  assert np.asarray(metrics['healthy']).tolist() == [True, True, False, True]
  for leaf in jax.tree.leaves(state.shared):
    assert np.isfinite(leaf).all()
  # And its loss is told apart from those of workers that are fine.
  assert np.isnan(metrics['loss']).tolist() == [False, False, True, False]


GUARDED = [
  full(3),
  full(4, wire_format='int8'),
  full(3, wire_format='int8'),
  data_parallel(3),
  resist(3, min_depth=3, carry=True),
  resist(4, min_depth=3, wire_format='bfloat16'),
  hand_over(3),
  hand_over(4, min_depth=3, carry=True),
  hand_over(4, min_depth=3, wire_format='int8'),
]


@pytest.mark.parametrize(
  ('protocol', 'on_device'),
  rest_is_slow(
    list(itertools.product(GUARDED, [False, True])),
    quick=[
      (GUARDED[6], False),
    ],
  ),
  ids=lambda p: (
    f'{tiny.hands_over(p)}-{p.num_workers}-{p.exchange.format}'
    if hasattr(p, 'exchange')
    else None
  ),
)
def test_with_all_workers_good_every_bit_is_as_without_the_guard(
  protocol, on_device
):
  loss_fn, params = problem()
  D = 1 if on_device else protocol.num_workers
  off, on = (
    tiny.train_compiled(loss_fn, params, p, D, 2, on_device)[0]
    for p in (protocol, guarded(protocol))
  )
  jax.tree.map(np.testing.assert_array_equal, off, on)


@pytest.mark.slow
def test_a_guard_that_is_off_leaves_nobody_out():
  loss_fn, params = poisoned()
  state, (metrics,) = tiny.run_rounds(
    loss_fn, params, resist(4), 4, spoilt(resist(4), [(1,)])
  )
  assert np.asarray(metrics['healthy']).tolist() == [True, False, True, True]
  assert np.isnan(state.shared['stem']['kernel']).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', rest_is_slow(['masked_psum', 'hand_over'], ['hand_over'])
)
def test_a_worker_far_from_the_others_is_left_out(name):
  """Its loss is a hundred times theirs, and finite: a factor finds it."""
  loss_fn, params = poisoned(value=100.0)
  protocol = guarded(resist(4, min_depth=3, exchange=name))
  batches = spoilt(protocol, LEFT_OUT[:1])
  wanted = tiny.algorithm_1(problem()[0], params, protocol, 1, LEFT_OUT[:1])
  found = dataclasses.replace(protocol, loss_factor=10.0)
  state, (metrics,) = tiny.run_rounds(loss_fn, params, found, 4, batches)
  assert_everyone_holds(state, wanted)
  assert np.asarray(metrics['finite']).all()
  assert np.asarray(metrics['healthy']).tolist() == [True, False, True, True]
  state, (metrics,) = tiny.run_rounds(loss_fn, params, protocol, 4, batches)
  assert np.asarray(metrics['healthy']).all()
  difference = state.shared['stem']['kernel'][0] - wanted['stem']['kernel']
  assert np.abs(difference).max() > 1e-3


@pytest.mark.parametrize(
  ('losses', 'factor', 'good'),
  [
    ([1, 2, 3, 100], 0.0, [1, 1, 1, 1]),
    ([1, 2, 3, 100], 5.0, [1, 1, 1, 0]),
    ([1, 2, 3, 12.5], 5.0, [1, 1, 1, 1]),  # Five times 2.5, and not over it.
    ([np.nan, 2, 3, 100], 5.0, [0, 1, 1, 0]),  # Of the finite, 3.
    ([np.inf, 2, 3, 100], 0.0, [0, 1, 1, 1]),
    ([1, 10], 2.0, [1, 1]),  # Of two, nobody is twice their mean.
    ([0, 0, 0], 2.0, [1, 1, 1]),
    ([np.nan, np.nan], 2.0, [0, 0]),
  ],
)
def test_the_rule_of_the_median(losses, factor, good):
  losses = jnp.array(losses, jnp.float32)
  # Only a finite loss is told; see `agree`.
  losses = jnp.where(jnp.isfinite(losses), losses, jnp.nan)
  assert participation.healthy_losses(losses, factor).tolist() == [
    bool(x) for x in good
  ]


@pytest.mark.parametrize(
  ('protocol', 'value'),
  [
    # The sum of squares overflows.
    pytest.param(full(4), 1e30, marks=pytest.mark.slow),
    pytest.param(full(4, wire_format='int8'), 1e4, marks=pytest.mark.slow),
    pytest.param(
      hand_over(4, min_depth=3, carry=True), 1e15, marks=pytest.mark.slow
    ),
    (hand_over(2, min_depth=3), 1e4),  # The smaller one of two is right.
    pytest.param(resist(4, min_depth=3), 1e4, marks=pytest.mark.slow),
  ],
  ids=['overflow', 'int8', 'carried', 'two', 'masked_psum'],
)
def test_a_finite_update_of_no_use_is_left_out(protocol, value):
  """Algorithm 1 without that worker, in the first round and later ones."""
  S = protocol.num_workers
  left_out = ((1,), (), (0,))
  judging = guarded(protocol, update_factor=10.0)
  loss_fn, params = poisoned(value)
  state, measured = tiny.run_rounds(
    loss_fn, params, judging, S, spoilt(protocol, left_out)
  )
  tolerance = 3e-5 if protocol.exchange.format.exact else 1e-2
  wanted = tiny.algorithm_1(problem()[0], params, protocol, 3, left_out)
  assert_everyone_holds(state, wanted, tolerance)
  for metrics, workers in zip(measured, left_out, strict=True):
    want = [s not in workers for s in range(S)]
    assert np.asarray(metrics['healthy']).tolist() == want
  known = np.asarray(state.norms.median)
  assert (known > 0).tolist() == [True] * 3 + [False] * 5
  assert known.max() < 10


NORMS = {
  'first round': ([1, 2, 3, 100], [], [1, 1, 1, 0]),
  'first round of two': ([1e30, 1], [], [0, 1]),
  'not finite': ([1, np.inf, np.nan], [], [1, 0, 0]),
  'alone': ([1e9], [], [1]),
  'alone, after others': ([1e9], [1], [0]),
  'all rise with the rate': ([500, 600], [1], [1, 1]),
  'all rise too far': ([5e4, 6e4], [1], [0, 0]),
  'most are bad': ([5e4, 1, 6e4, 7e4], [1], [0, 1, 0, 0]),
  'one has nothing to learn': ([1e-9, 1], [1], [1, 1]),
  'all stand still': ([0, 0], [], [1, 1]),
  'one stands still at first': ([0, 5], [], [1, 1]),
  'smaller than ever': ([1e-9, 1e-8], [1], [1, 1]),
}


@pytest.mark.parametrize('name', NORMS)
def test_the_rule_of_norms(name):
  norms, medians, healthy = NORMS[name]
  recent = participation.no_norms()
  for x in medians:
    recent = participation.remember(recent, jnp.full(2, x, jnp.float32))
  found = participation.healthy_updates(
    jnp.array(norms, jnp.float32), recent, 10.0
  )
  assert found.tolist() == [bool(x) for x in healthy]


def test_a_usual_spread_is_allowed():
  """Workers of unequal depth have unequal updates, round after round."""
  recent = participation.no_norms()
  for _ in range(3):
    recent = participation.remember(recent, jnp.array([1.0, 1.0, 1.0, 6.0]))
  found = participation.healthy_updates(
    jnp.array([1.0, 1.0, 50.0, 70.0]), recent, 10.0
  )
  assert found.tolist() == [True, True, True, False]


@pytest.mark.slow
def test_norms_come_back_with_the_state(tmp_path):
  """Otherwise a run that goes on might judge otherwise."""
  loss_fn, params = problem()
  trainer = resist_jax.Trainer(
    loss_fn,
    tiny.make_optimizer(),
    chains=(tiny.CHAIN,),
    num_workers=2,
    local_steps=2,
    constants=tiny.examples(),
  )
  state = trainer.init(params)
  for r in range(2):
    state, _ = trainer.round(state, tiny.batches(r, 2, 2))
  trainer.save(tmp_path, state)
  restored = trainer.restore(tmp_path)
  for x, y in zip(state.norms, restored.norms, strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert (np.asarray(x) > 0).sum() == 2


@pytest.mark.parametrize(
  'protocol',
  rest_is_slow(
    [
      PROTOCOLS[0],
      PROTOCOLS[2],
      PROTOCOLS[4],
      guarded(full(4), update_factor=10.0),
      guarded(full(4), exchange=exchange.hand_over('int8')),
      guarded(hand_over(4, min_depth=3), outer=optax.sgd(0.7, momentum=0.9)),
    ],
    quick=[PROTOCOLS[0], PROTOCOLS[2]],
  ),
)
def test_with_nobody_left_the_network_stays(protocol):
  loss_fn, params = poisoned()
  state, (metrics,) = tiny.run_rounds(
    loss_fn, params, protocol, 2, spoilt(protocol, [range(4)])
  )
  assert not np.asarray(metrics['healthy']).any()
  assert_everyone_holds(state, params, tolerance=1e-6)
  if state.outer is not None:  # A change of zero, not the parameters.
    assert not any(np.any(x) for x in jax.tree.leaves(state.outer.moments))


def test_blocks_as_they_were_are_kept_where_they_may_be_needed_only():
  assert PROTOCOLS[1].keeps_blocks
  assert not resist(4).keeps_blocks
  assert not PROTOCOLS[0].keeps_blocks
  assert full(4).kept('shared', 'chain') == (None, None)
