"""An outer optimiser takes the mean change of a round, block by block."""

import itertools
import types

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_trainer import (
  CHAIN,
  OPTIMISERS,
  RATE,
  assert_close,
  batches,
  cut,
  hands_of,
  make,
  merge,
  network,
  predicted_and_read,
  run,
  train_locally,
)

import resist_jax as resist
from resist_jax.rounds.state import assignments_on_host

OUTER = {
  'diloco': optax.sgd(0.7, momentum=0.9, nesterov=True),
  'adam': optax.adam(0.02),
  'schedule': optax.sgd(lambda count: 1 / (1 + count), momentum=0.5),
}


@pytest.fixture(autouse=True)
def _promotion():
  """Adam in optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def plain_loop(outer, held, S, left_out=()):
  """Algorithm 1, whose means an optimiser of the whole network takes."""
  params, sgd = network(), optax.sgd(RATE, momentum=0.9)
  state = outer.init(params)
  for r, assignments in enumerate(held):
    hands, data = hands_of(assignments, S), batches(r, S)
    ends, counted = [], []
    for s, mine in enumerate(hands):
      sub = train_locally(sgd, cut(params, mine), data, s)
      if (r, s) not in left_out:
        ends.append(sub)
        counted.append(mine)
    # A block that only an excluded worker held has not changed.
    lost = set(range(5)) - {block for mine in counted for block in mine}
    if lost:
      mean = merge_where(ends, counted, params, lost)
    else:
      mean = merge(ends, counted)
    params, state = plain_outer_step(outer, state, params, mean)
  return params


def plain_outer_step(outer, state, params, mean):
  change = jax.tree.map(jnp.subtract, params, mean)
  updates, state = outer.update(change, state, params)
  return optax.apply_updates(params, updates), state


def merge_where(ends, counted, params, lost):
  """Adds a holder that kept the lost blocks as they were."""
  kept = sorted(lost)
  mean = merge([*ends, cut(params, kept)], [*counted, kept])
  return {**mean, 'out': sum(end['out'] for end in ends) / len(ends)}


@pytest.mark.parametrize(
  ('exchange', 'name'),
  rest_is_slow(
    list(itertools.product(['hand_over', 'masked_psum'], OUTER)),
    quick=[('hand_over', 'diloco'), ('masked_psum', 'adam')],
  ),
)
def test_rounds_equal_a_plain_loop(exchange, name):
  exchange = getattr(resist.exchange, exchange)()
  fields = {'exchange': exchange, 'min_depth': 2, 'outer': OUTER[name]}
  got, held, *_ = run(make(**fields), rounds=4)
  assert_close(got, plain_loop(OUTER[name], held, 4))


@pytest.mark.slow
def test_without_replicas_and_on_other_devices_too():
  outer = OUTER['diloco']
  got, held, *_ = run(make(outer=outer, devices=4), rounds=4)
  assert_close(got, plain_loop(outer, held, 4))
  one, *_ = run(make(outer=outer, devices=1, on_device=True), rounds=4)
  assert_close(one, got)


def test_local_sgd_with_it_is_diloco_and_data_parallel_takes_it_too():
  outer = OUTER['diloco']
  got, held, *_ = run(make(outer=outer, chains=()), rounds=4)
  assert_close(got, plain_loop(outer, held, 4))
  fields = {'chains': (), 'average_gradients': True, 'carry': True}
  want, *_ = run(make(**fields), rounds=1)
  got, *_ = run(make(outer=optax.sgd(0.5), **fields), rounds=1)
  half = jax.tree.map(lambda x, y: (x + y) / 2, network(), want)
  assert_close(got, half)


@pytest.mark.slow
def test_a_rate_of_one_is_the_mean_itself():
  want, *_ = run(make(min_depth=2))
  got, *_ = run(make(min_depth=2, outer=optax.sgd(1.0)))
  assert_close(got, want, 1e-6)


@pytest.mark.parametrize('exchange', ['hand_over', 'masked_psum'])
def test_a_faulty_worker_is_left_out_of_the_change(exchange):
  outer, exchange = OUTER['diloco'], getattr(resist.exchange, exchange)()
  trainer = make(outer=outer, exchange=exchange)
  state, held = trainer.init(network()), []
  for r in range(3):
    held.append(assignments_on_host(state))
    data = batches(r, 4)
    if r == 1:
      data['y'][2] = np.nan
    state, metrics = trainer.round(state, data)
    assert np.asarray(metrics['healthy']).tolist() == [True, True, r != 1, True]
  want = plain_loop(outer, held, 4, left_out={(1, 2)})
  assert_close(trainer.params(state), want)


@pytest.mark.parametrize('carry', rest_is_slow([False, True], [True]))
def test_a_restored_training_repeats_to_the_bit(carry, tmp_path):
  fields = {'outer': OUTER['adam'], 'min_depth': 2, 'carry': carry}
  trainer = make(OPTIMISERS['adam'](0), **fields)
  want, *_ = run(trainer, rounds=3)
  state = trainer.init(network())
  for r in range(3):
    trainer.save(tmp_path, state)
    state = make(OPTIMISERS['adam'](0), **fields).restore(tmp_path)
    state, _ = trainer.round(state, batches(r, 4))
  jax.tree.map(np.testing.assert_array_equal, trainer.params(state), want)


def test_other_workers_continue_with_the_same_state(tmp_path):
  trainer = make(outer=OUTER['diloco'], min_depth=2)
  *_, state, _ = run(trainer, rounds=2)
  trainer.save(tmp_path, state)
  other = make(
    S=2, devices=1, outer=OUTER['diloco'],
    exchange=resist.exchange.masked_psum(),
  )  # fmt: skip
  again = other.whole(other.restore(tmp_path)).outer
  want = trainer.whole(state).outer
  jax.tree.map(np.testing.assert_array_equal, again.moments, want.moments)
  assert max(np.abs(x).max() for x in jax.tree.leaves(again.moments)) > 0
  without = make(min_depth=2).restore(tmp_path)
  assert without.outer is None


PSUM = {'exchange': resist.exchange.masked_psum()}
FORMS = {
  'psum': (PSUM, 4),
  'carried psum': ({**PSUM, 'carry': True}, 2),
  'psum of all': ({**PSUM, 'exclude_faulty': False}, 4),
  'carried psum of all': ({**PSUM, 'exclude_faulty': False, 'carry': True}, 2),
  'averaged psum of all': (
    {**PSUM, 'exclude_faulty': False, 'average': 0.5},
    2,
  ),
  'replicas': ({'min_depth': 2}, 4),
  'replicas of all': ({'min_depth': 2, 'exclude_faulty': False}, 4),
  'unequal depths': ({'depths': (2, 1, 1, 1)}, 4),
  'carried replicas': ({'carry': True, 'min_depth': 2}, 2),
  'nothing is cut': ({'chains': ()}, 2),
}


@pytest.mark.parametrize(
  ('form', 'outer'),
  rest_is_slow(
    list(itertools.product(FORMS, ['diloco', 'adam'])),
    quick=[('carried psum', 'adam')],
  ),
)
def test_bytes_are_those_of_the_compiled_program(form, outer):
  fields, devices = FORMS[form]
  trainer = make(devices=devices, outer=OUTER[outer], **fields)
  state = trainer.init(network())
  predicted, read = predicted_and_read(
    trainer,
    state,
    moments=moment_sizes(state, 'carried'),
    outer=moment_sizes(state, 'outer'),
  )
  assert predicted == read > 0


def moment_sizes(state, field):
  parts = getattr(state, field)
  if parts is None:
    return None
  sizes = resist.accounting.measure(network(), list(state.num_blocks))
  return [sizes] * len(parts.moments)


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'outer': 0.7}, 'outer is 0.7; it must be an optax optimiser'),
    (
      {'outer': optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.7))},
      'outer treats the parameters together',
    ),
    (
      {'outer': optax.lamb(0.1)},
      'outer treats the parameters together',
    ),
    (
      {'outer': optax.chain(optax.clip_by_global_norm(1e4), optax.sgd(0.7))},
      'outer treats the parameters together',
    ),
    (
      {
        'outer': optax.chain(
          optax.clip_by_global_norm(1.0),
          optax.sgd(optax.linear_schedule(0.0, 0.7, 10), 0.9, nesterov=True),
        )
      },
      'outer treats the parameters together',
    ),
    (
      {'outer': optax.contrib.prodigy(0.1)},
      'outer treats the parameters together',
    ),
    ({'outer': optax.lars(0.1)}, 'outer treats the parameters together'),
    (
      {'outer': optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.7))},
      'outer treats the parameters together',
    ),
    ({'outer': optax.polyak_sgd()}, r'outer cannot be used \(TypeError'),
    (
      {'outer': optax.multi_transform({'a': optax.sgd(1.0)}, {'blocks': 'a'})},
      'outer cannot be used .*of any structure',
    ),
    ({'outer': types.SimpleNamespace(update=print)}, 'must be an optax optim'),
    (
      {
        'outer': OUTER['diloco'],
        'exchange': resist.exchange.hand_over('bfloat16'),
      },
      'use wire_format float32',
    ),
  ],
)
def test_a_mistake_is_one_line(fields, says):
  with pytest.raises(ValueError, match=says) as caught:
    make(chains=(CHAIN,), **fields)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'outer',
  [
    optax.adagrad(0.1),
    optax.rmsprop(0.1, momentum=0.9),
    optax.chain(optax.clip(0.1), optax.adamw(0.1)),
    optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.7, 10, 1000), 0.9),
    optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.0, 0.7, 10)),
    optax.MultiSteps(optax.sgd(0.7), 2).gradient_transformation(),
    optax.contrib.schedule_free_sgd(0.5),
    optax.sgd(lambda count: 0.7 * (1 - count / 200) ** 0.9),  # NaN at last.
  ],
)
def test_an_optimiser_that_treats_each_number_alone_is_taken(outer):
  make(outer=outer)


def test_a_state_of_another_trainer_is_refused():
  state = make().init(network())
  with pytest.raises(ValueError, match='a trainer with outer=False'):
    make(outer=OUTER['diloco']).round(state, batches(0, 4))


def test_numbers_that_an_outer_optimiser_keeps_stay_as_narrow():
  """It steps in float32; programs are compiled for what `init` made."""
  outer = optax.inject_hyperparams(optax.sgd)(0.7, momentum=0.9)
  trainer = make(outer=outer)
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network())
  state = trainer.init(narrow)
  trainer = trainer.compile(state, batches(0, 4))
  for r in range(2):
    before = jax.tree.map(lambda x: x.dtype, state.outer)
    state, _ = trainer.round(state, batches(r, 4))
    assert jax.tree.map(lambda x: x.dtype, state.outer) == before
