"""Rounds that are trained as one are longer rounds, with fewer exchanges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_outer import OUTER
from test_trainer import (
  CHAIN,
  OPTIMISERS,
  T,
  assert_close,
  batches,
  cut,
  hands_of,
  local_steps,
  make,
  merge,
  network,
)

import resist_jax as resist
from resist_jax.rounds.state import assignments_on_host

COUNTS = (1, 2, 1)  # Four rounds in three.


@pytest.fixture(autouse=True)
def _promotion():
  """Adam in optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def joined(first, count, S):
  rounds = [batches(r, S) for r in range(first, first + count)]
  return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *rounds)


def run(trainer, counts=COUNTS, state=None, between=lambda state: state):
  """Returns the state, and for each exchange who held what before it."""
  state = state or trainer.init(network())
  held, losses = [], []
  for count in counts:
    state = between(state)
    held.append(assignments_on_host(state))
    longer = trainer.at_once(count)
    data = joined(int(state.round), count, trainer.num_workers)
    state, metrics = longer.round(state, data)
    losses.append(np.asarray(metrics['loss']))
  return state, held, losses


def plain_loop(optimizer_at, held, S, counts=COUNTS, carry=False):
  """Where it is carried, momentum is cut and averaged as parameters are."""
  params, first = network(), 0
  velocity = jax.tree.map(np.zeros_like, params)
  for assignments, count in zip(held, counts, strict=True):
    hands, ends = hands_of(assignments, S), []
    data = joined(first, count, S)
    for s, mine in enumerate(hands):
      optimizer, sub = optimizer_at(first * T), cut(params, mine)
      state = optimizer.init(sub)
      if carry:
        state = optax.tree.set(state, trace=cut(velocity, mine))
      ends.append(local_steps(optimizer, sub, state, data, s))
    params, first = merge([sub for sub, _ in ends], hands), first + count
    momenta = [optax.tree.get(state, 'trace') for _, state in ends]
    velocity = merge(momenta, hands)
  return params


CASES = {
  'replicas': {'min_depth': 2},
  'psum': {'exchange': resist.exchange.masked_psum()},
  'nothing is cut': {'chains': ()},
  'in one program': {'devices': 1, 'on_device': True},
  'carried': {'min_depth': 2, 'carry': True},
}


@pytest.mark.slow
@pytest.mark.parametrize('case', list(CASES))
def test_they_equal_a_plain_loop_and_the_rate_goes_on(case):
  optimizer = OPTIMISERS['sgd']
  trainer = make(optimizer(0), **CASES[case])
  state, held, _ = run(trainer)
  want = plain_loop(optimizer, held, 4, carry=trainer.carry)
  assert_close(trainer.params(state), want)


def test_metrics_are_means_over_all_steps():
  trainer = make(OPTIMISERS['sgd'](0), chains=())
  _, _, (loss,) = run(trainer, (2,))
  params, data, optimizer = network(), joined(0, 2, 4), OPTIMISERS['sgd'](0)
  losses, sub, state = [], params, optimizer.init(params)
  ones = {CHAIN: jnp.ones(5)}
  gradient = jax.jit(jax.value_and_grad(trainer.loss_fn, has_aux=True))
  for t in range(2 * T):
    batch = jax.tree.map(lambda x, t=t: x[0, t], data)
    (value, _), grads = gradient(sub, ones, batch, None)
    losses.append(float(value))
    updates, state = optimizer.update(grads, state, sub)
    sub = jax.tree.map(jnp.add, sub, updates)
  np.testing.assert_allclose(loss[0], np.mean(losses), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['hand_over', 'masked_psum'])
def test_a_restored_training_repeats_to_the_bit(exchange, tmp_path):
  fields = {'min_depth': 2, 'outer': OUTER['diloco'], 'average': 0.5}
  fields['exchange'] = getattr(resist.exchange, exchange)()
  trainer = make(OPTIMISERS['adam'](0), **fields)
  state, held, _ = run(trainer)
  want = trainer.params(state), trainer.averaged(state)

  def saved(state):
    trainer.save(tmp_path, state)
    return make(OPTIMISERS['adam'](0), **fields).restore(tmp_path)

  state, again, _ = run(trainer, between=saved)
  for x, y in zip(held, again, strict=True):
    np.testing.assert_array_equal(x[CHAIN].slots, y[CHAIN].slots)
  got = trainer.params(state), trainer.averaged(state)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('case', ['replicas', 'in one program'])
def test_an_average_counts_all_rounds(case):
  trainer = make(OPTIMISERS['sgd'](0), average=0.5, **CASES[case])
  state, networks = trainer.init(network()), []
  for count in (1, 2, 4):
    data = joined(int(state.round), count, 4)
    state, _ = trainer.at_once(count).round(state, data)
    networks += count * [trainer.params(state)]
  weights = 0.5 ** np.arange(len(networks))[::-1]
  want = jax.tree.map(
    lambda *x: np.tensordot(weights / weights.sum(), np.stack(x), 1), *networks
  )
  assert_close(trainer.averaged(state), want)


@pytest.mark.parametrize('case', ['replicas', 'in one program'])
def test_a_schedule_of_the_outer_optimiser_counts_all_rounds(case):
  ends = optax.sgd(lambda round: jnp.where(round < 2, 1.0, 0.0), momentum=0.5)
  trainer = make(OPTIMISERS['sgd'](0), outer=ends, **CASES[case])
  params = [
    trainer.params(run(trainer, counts)[0]) for counts in ((2,), (2, 1))
  ]
  jax.tree.map(np.testing.assert_array_equal, *params)


def test_compiled_programs_serve_all_lengths():
  """Where the host dispatches steps, nothing is compiled again."""
  trainer = make(OPTIMISERS['sgd'](0), min_depth=2)
  state = trainer.init(network())
  compiled = trainer.compile(state, batches(0, 4))
  assert compiled.at_once(4).programs.programs is compiled.programs.programs
  state, held, _ = run(compiled, state=state)
  assert (int(state.round), int(state.draw)) == (4, 3)
  want = plain_loop(OPTIMISERS['sgd'], held, 4)
  assert_close(compiled.params(state), want)
  assert trainer.at_once(2) is trainer.at_once(2)
  whole = make(OPTIMISERS['sgd'](0), devices=1, on_device=True)
  compiled = whole.compile(whole.init(network()), batches(0, 4))
  assert compiled.at_once(4).programs is None


def test_data_parallel_exchanges_at_every_step_of_them():
  fields = {'chains': (), 'average_gradients': True, 'carry': True}
  trainer = make(devices=4, **fields)
  state = trainer.init(network())
  once, twice = (trainer.at_once(n).bytes_per_round(state) for n in (1, 2))
  programs = trainer.compile(state, batches(0, 4)).programs
  read = [
    resist.accounting.compiled_wire_bytes(programs.at_once(n), {})
    for n in (1, 2)
  ]
  assert [once, twice] == read
  assert once < twice <= 2 * once


def test_batches_of_another_number_of_rounds_are_refused():
  trainer = make().at_once(2)
  with pytest.raises(ValueError, match=r'must be \[S=4, T=6, ...\]'):
    trainer.round(trainer.init(network()), batches(0, 4))
  with pytest.raises(ValueError, match='rounds_at_once is 0; it must be an'):
    make().at_once(0)
