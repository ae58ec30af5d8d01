"""An average over rounds follows the network, wherever its blocks are."""

from covering import rest_is_slow
import jax
import numpy as np
import optax
import pytest
from test_outer import FORMS, OUTER
from test_trainer import (
  CHAIN,
  OPTIMISERS,
  RATE,
  assert_close,
  batches,
  make,
  network,
  predicted_and_read,
)

import resist_jax as resist

DECAY = 0.7


@pytest.fixture(autouse=True)
def _promotion():
  """Adam in optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def weighted(networks):
  """The weighted mean of all rounds, of which the last counts most."""
  weights = DECAY ** np.arange(len(networks))[::-1]
  weights /= weights.sum()
  return jax.tree.map(
    lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *networks
  )


def run(trainer, rounds):
  """The state after so many rounds, and the network after each."""
  state, networks = trainer.init(network()), []
  for r in range(rounds):
    state, _ = trainer.round(state, batches(r, trainer.num_workers))
    networks.append(trainer.params(state))
  return state, networks


CASES = {
  'hand_over': {},
  'replicas': {'min_depth': 2},
  'psum': {'exchange': resist.exchange.masked_psum(), 'min_depth': 2},
  'outer': {'outer': OUTER['diloco'], 'min_depth': 2},
  'nothing is cut': {'chains': ()},
  'in one program': {'devices': 1, 'on_device': True},
}


@pytest.mark.parametrize('case', rest_is_slow(list(CASES), ['replicas']))
def test_it_is_the_weighted_mean_of_the_rounds(case):
  trainer = make(average=DECAY, **CASES[case])
  state, networks = run(trainer, 4)
  assert_close(trainer.averaged(state), weighted(networks))
  plain, _ = run(make(**CASES[case]), 4)
  want = trainer.params(plain._replace(average=None))
  jax.tree.map(np.testing.assert_array_equal, networks[-1], want)


def test_small_steps_last_in_an_average_of_small_numbers():
  small = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), network())
  trainer = make(optax.sgd(RATE), average=DECAY)
  state = trainer.init(small)
  for r in range(2):
    state, _ = trainer.round(state, batches(r, 4))
  found = [np.asarray(x) for x in jax.tree.leaves(state.average.moments)]
  assert {x.dtype.name for x in found} == {'float32'}
  # A mean of two networks lies between the numbers that these may hold.
  rounded = [np.float32(x.astype(jax.numpy.bfloat16)) for x in found]
  assert any((x != y).any() for x, y in zip(found, rounded, strict=True))
  assert trainer.averaged(state)['out'].dtype == jax.numpy.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize('carry', [False, True])
def test_a_restored_training_repeats_to_the_bit(carry, tmp_path):
  fields = {'average': DECAY, 'min_depth': 2, 'carry': carry}
  want = make(OPTIMISERS['adam'](0), **fields)
  want = want.averaged(run(want, 4)[0])
  trainer = make(OPTIMISERS['adam'](0), **fields)
  state = trainer.init(network())
  for r in range(4):
    trainer.save(tmp_path, state)
    state = make(OPTIMISERS['adam'](0), **fields).restore(tmp_path)
    state, _ = trainer.round(state, batches(r, 4))
  got = trainer.averaged(state)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_other_workers_continue_with_the_same_average(tmp_path):
  trainer = make(average=DECAY, min_depth=2)
  state, networks = run(trainer, 2)
  trainer.save(tmp_path, state)
  psum = {'exchange': resist.exchange.masked_psum()}
  other = make(S=2, devices=1, average=DECAY, **psum)
  state = other.restore(tmp_path)
  assert_close(other.averaged(state), weighted(networks))
  state, _ = other.round(state, batches(2, 2))
  networks.append(other.params(state))
  assert_close(other.averaged(state), weighted(networks))
  without = make(min_depth=2).restore(tmp_path)
  assert without.average is None


AVERAGED = {
  **FORMS,
  'outer psum': ({**FORMS['psum'][0], 'outer': OUTER['adam']}, 4),
  'outer replicas': ({'min_depth': 2, 'outer': OUTER['diloco']}, 4),
  'nobody is excluded': ({**FORMS['psum'][0], 'exclude_faulty': False}, 2),
}


@pytest.mark.parametrize(
  'form', rest_is_slow(list(AVERAGED), ['outer replicas'])
)
def test_bytes_are_those_of_the_compiled_program(form):
  fields, devices = AVERAGED[form]
  trainer = make(devices=devices, **{'average': DECAY, **fields})
  predicted, read = predicted_and_read(trainer, trainer.init(network()))
  assert predicted == read > 0


def test_a_mean_of_whole_networks_moves_nothing():
  fields = {'chains': (), 'devices': 4}
  sent = []
  for trainer in (make(**fields), make(average=DECAY, **fields)):
    sent.append(trainer.bytes_per_round(trainer.init(network())))
  assert sent[0] == sent[1] > 0


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'average': 1.0}, 'average is 1.0; it must be at least 0 and less than 1'),
    ({'average': 'x'}, "average is 'x'; it must be a number"),
    (
      {'average': 0.9, 'exchange': resist.exchange.hand_over('int8')},
      'use wire_format float32',
    ),
  ],
)
def test_a_mistake_is_one_line(fields, says):
  with pytest.raises(ValueError, match=says) as caught:
    make(chains=(CHAIN,), **fields)
  assert '\n' not in str(caught.value)


def test_a_state_without_an_average_is_refused():
  state = make().init(network())
  with pytest.raises(ValueError, match='a trainer with average=False'):
    make(average=DECAY).round(state, batches(0, 4))
  with pytest.raises(ValueError, match='use a Trainer with average'):
    make().averaged(state)
