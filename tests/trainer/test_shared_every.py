"""The shared part is exchanged more often than the blocks."""

import dataclasses

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_at_once import joined
from test_outer import OUTER, plain_outer_step
from test_trainer import (
  OPTIMISERS,
  RATE,
  T,
  assert_close,
  batches,
  cut,
  gradient,
  hands_of,
  make,
  merge,
  network,
  predicted_and_read,
)

import resist_jax as resist
from resist_jax.rounds.state import assignments_on_host


@pytest.fixture(autouse=True)
def _promotion():
  """Adam in optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def run(trainer, counts=(1, 1, 1)):
  state, held = trainer.init(network()), []
  for count in counts:
    held.append(assignments_on_host(state))
    data = joined(int(state.round), count, trainer.num_workers)
    state, _ = trainer.at_once(count).round(state, data)
  return trainer.params(state), held


def plain_loop(
  optimizer, held, S, counts=(1, 1, 1), outer=None, broken=None, carry=False
):
  """After each step, all that is no block becomes its mean; momentum stays.

  The worker `broken` counts in no mean. Where momentum is carried, it is cut
  and averaged between two rounds, as the parameters are.
  """
  params, first = network(), 0
  velocity = jax.tree.map(np.zeros_like, params)
  moved = outer and outer.init(params)
  for assignments, count in zip(held, counts, strict=True):
    hands, data = hands_of(assignments, S), joined(first, count, S)
    subs = [cut(params, mine) for mine in hands]
    states = [optimizer.init(sub) for sub in subs]
    if carry:
      momenta = [cut(velocity, mine) for mine in hands]
      pairs = zip(states, momenta, strict=True)
      states = [optax.tree.set(x, trace=momentum) for x, momentum in pairs]
    counted = [s for s in range(S) if s != broken]
    for t in range(count * T):
      for s in counted:
        batch = jax.tree.map(lambda x, s=s, t=t: x[s, t], data)
        grads = gradient(subs[s], batch)
        updates, states[s] = optimizer.update(grads, states[s], subs[s])
        subs[s] = optax.apply_updates(subs[s], updates)
      mean = sum(subs[s]['out'] for s in counted) / len(counted)
      subs = [{**sub, 'out': mean} for sub in subs]
    # A block that only the broken worker holds stays as it was.
    means, first = merge(subs, hands), first + count
    momenta = [optax.tree.get(state, 'trace') for state in states]
    velocity = merge(momenta, hands)
    if outer:
      means, moved = plain_outer_step(outer, moved, params, means)
    params = means
  return params


SGD = optax.sgd(RATE, momentum=0.9)
CASES = {
  'hand_over': ({}, {}),
  'replicas': ({'min_depth': 2}, {'counts': (1, 2)}),
  'psum': ({'exchange': resist.exchange.masked_psum()}, {}),
  'outer': ({'outer': OUTER['diloco']}, {'outer': OUTER['diloco']}),
  'in one program': ({'devices': 1, 'on_device': True}, {'counts': (1, 2)}),
  'unequal': ({'depths': (2, 1, 1, 1), 'devices': 4}, {}),
  'nobody is excluded': ({'exclude_faulty': False}, {}),
  'carried': ({'carry': True, 'min_depth': 2}, {'carry': True}),
}


@pytest.mark.parametrize('case', rest_is_slow(list(CASES), ['replicas']))
def test_rounds_equal_a_plain_loop(case):
  fields, plain = CASES[case]
  counts = {k: v for k, v in plain.items() if k == 'counts'}
  got, held = run(make(SGD, shared_every=1, **fields), **counts)
  assert_close(got, plain_loop(SGD, held, 4, **plain))


def test_a_worker_that_is_not_finite_counts_in_no_mean():
  trainer = make(SGD, shared_every=1)
  state, data = trainer.init(network()), batches(0, 4)
  held = [assignments_on_host(state)]
  data['y'][2, 0] = np.nan
  state, metrics = trainer.round(state, data)
  assert np.asarray(metrics['healthy']).tolist() == [True, True, False, True]
  want = plain_loop(SGD, held, 4, (1,), broken=2)
  assert_close(trainer.params(state), want)


def test_the_end_notices_that_nobody_is_healthy():
  """The first step is absurd, and the shared part alone learns."""

  def loss_fn(params, present, batch, key):
    del present, key
    error = batch['x'] @ params['out'] - batch['y']
    return jnp.square(error).mean(), {}

  trainer = make(SGD, shared_every=1)
  trainer = dataclasses.replace(trainer, loss_fn=loss_fn)
  state, _ = trainer.round(trainer.init(network()), batches(0, 4))
  data = batches(1, 4)
  data['y'][:, 0] *= 1e9
  _, metrics = trainer.round(state, data)
  assert np.asarray(metrics['finite']).all()
  assert not np.asarray(metrics['healthy']).any()


@pytest.mark.slow
def test_a_divisor_that_leaves_one_exchange_changes_nothing():
  got, _ = run(make(SGD, shared_every=T))
  want, _ = run(make(SGD))
  jax.tree.map(np.testing.assert_array_equal, got, want)


FORMS = {
  'hand_over': ({}, 4),
  'carried psum': (
    {'exchange': resist.exchange.masked_psum(), 'carry': True}, 2,
  ),
  'nobody is judged': ({'update_factor': 0.0, 'min_depth': 2}, 4),
  'nobody is excluded': ({'exclude_faulty': False}, 4),
  'unequal': ({'depths': (2, 1, 1, 1)}, 4),
}  # fmt: skip


@pytest.mark.parametrize('form', rest_is_slow(list(FORMS), ['carried psum']))
@pytest.mark.parametrize('on_device', rest_is_slow([False, True], [False]))
def test_bytes_are_those_of_the_compiled_program(form, on_device):
  fields, devices = FORMS[form]
  trainer = make(devices=devices, shared_every=1, on_device=on_device, **fields)
  state = trainer.init(network())
  predicted, read = predicted_and_read(trainer, state)
  assert predicted == read > 0
  protocol = trainer.protocol(network())
  sizes = resist.accounting.measure(network(), list(state.num_blocks))
  once = make(devices=devices, **fields).protocol(network())
  more = resist.accounting.paper_bytes(sizes, protocol)
  less = resist.accounting.paper_bytes(sizes, once)
  assert more - less == (T - 1) * 2 * 4 * 4 * sizes.shared


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    (
      {'shared_every': 2},
      'shared_every is 2; it must be a divisor of local_st',
    ),
    ({'shared_every': -1}, 'shared_every is -1; it must be a divisor'),
    ({'shared_every': 1.0}, 'shared_every is 1.0; it must be a divisor'),
    ({'shared_every': 1, 'chains': ()}, 'cuts nothing, so everything is share'),
    (
      {'shared_every': 1, 'exchange': resist.exchange.hand_over('int8')},
      'use wire_format float32',
    ),
  ],
)
def test_a_mistake_is_one_line(fields, says):
  with pytest.raises(ValueError, match=says) as caught:
    make(OPTIMISERS['sgd'](0), **fields)
  assert '\n' not in str(caught.value)
