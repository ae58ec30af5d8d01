"""What any optimiser of optax keeps goes from round to round as it should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_trainer import (
  CHAIN,
  RATE,
  T,
  assert_close,
  batches,
  decays,
  falling,
  loss_fn,
  make,
  network,
  run,
)

from resist_jax.exchange import hand_over, masked_psum
from resist_jax.rounds.state import assignments_on_host

EXCHANGES = pytest.mark.parametrize('exchange', [hand_over, masked_psum])


@pytest.fixture(autouse=True)
def _promotion():
  """optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@EXCHANGES
def test_small_second_moments_do_not_round_to_zero(exchange):
  """Adam divides by their root, and a first moment beside it survives."""
  data = batches(0, 2)
  data['x'][..., 0] *= 1e-4
  found = []
  for wire_format in ('int8', 'float32'):
    fields = {'S': 2, 'carry': True, 'seed': 2}  # The small ones move.
    trainer = make(optax.adam(RATE), exchange=exchange(wire_format), **fields)
    state, _ = trainer.round(trainer.init(network()), data)
    _, nu = trainer.whole(state).carried.moments
    found.append(nu)
  blocks = found[1]['inner']['blocks']['w']
  assert 0 < blocks.min() < 1e-6 * blocks.max()
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0.02, atol=1e-30), *found
  )


@EXCHANGES
def test_moments_without_a_healthy_holder_begin_anew(exchange):
  """As the optimiser begins them: Adagrad with 0.1."""
  trainer = make(optax.adagrad(RATE), carry=True, exchange=exchange())
  state = trainer.init(network())
  (row,) = assignments_on_host(state)[CHAIN].slots[2:3]
  lost = row[row < 5]
  data = batches(0, 4)
  data['y'][2] = np.nan
  state, metrics = trainer.round(state, data)
  assert np.asarray(metrics['healthy']).tolist() == [True, True, False, True]
  (sums,) = trainer.whole(state).carried.moments
  begun = sums['inner']['blocks']['w'] == np.float32(0.1)
  kept = np.delete(np.arange(5), lost)
  assert begun[lost].all()
  assert not begun[kept].any()
  assert not (sums['out'] == np.float32(0.1)).any()
  data['y'][:] = np.nan
  state, _ = trainer.round(state, data)
  (sums,) = trainer.whole(state).carried.moments
  for leaf in jax.tree.leaves(sums):
    np.testing.assert_array_equal(leaf, np.float32(0.1))


@pytest.mark.parametrize(
  'optimizer',
  [
    optax.conditionally_mask(optax.sgd(RATE), lambda step: step >= T),
    optax.chain(
      optax.conditionally_transform(optax.set_to_zero(), lambda step: step < T),
      optax.sgd(RATE),
    ),
  ],
  ids=['mask', 'transform'],
)
def test_a_condition_counts_the_steps_of_the_whole_training(optimizer):
  trainer = make(optimizer)
  state, _ = trainer.round(trainer.init(network()), batches(0, 4))
  assert_close(trainer.params(state), network(), 1e-6)
  state, _ = trainer.round(state, batches(1, 4))
  assert abs(trainer.params(state)['out'] - network()['out']).max() > 1e-3


PERIODIC = {
  'apply_every': optax.chain(optax.sgd(RATE), optax.apply_every(2)),
  'sam': optax.contrib.sam(optax.sgd(RATE), optax.sgd(0.01)),
}


@pytest.mark.parametrize('name', PERIODIC)
def test_an_optimiser_with_a_period_needs_its_state(name):
  trainer = make(PERIODIC[name])
  says = rf'optimizer counts steps .*optax.*{name}.* set carry=True'
  with pytest.raises(ValueError, match=says):
    trainer.round(trainer.init(network()), batches(0, 4))
  run(make(PERIODIC[name], carry=True), rounds=1)


def test_estimates_from_all_gradients_are_not_carried_apart():
  """Where gradients are averaged, all workers make the same estimate."""
  prodigy = optax.contrib.prodigy(1.0)
  trainer = make(prodigy, carry=True)
  says = 'carry is set, but optimizer keeps a number that depends on all grad'
  with pytest.raises(ValueError, match=says):
    trainer.round(trainer.init(network()), batches(0, 4))
  run(make(prodigy), rounds=1)
  parallel = {'chains': (), 'average_gradients': True}
  run(make(prodigy, carry=True, **parallel), rounds=1)
  rate = optax.inject_hyperparams(optax.sgd)(falling(0), momentum=0.9)
  run(make(rate, carry=True), rounds=1)


@pytest.mark.parametrize(
  'optimizer',
  [
    optax.apply_if_finite(optax.adam(RATE), 5),
    optax.MultiSteps(
      optax.sgd(RATE), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
  ],
)
def test_counts_of_skipped_steps_are_not_carried_apart(optimizer):
  """A worker that skips a step would be behind the others for good."""
  trainer = make(optimizer, carry=True)
  with pytest.raises(ValueError, match='or a count of skipped steps'):
    trainer.round(trainer.init(network()), batches(0, 4))
  parallel = {'chains': (), 'average_gradients': True}
  run(make(optimizer, carry=True, **parallel), rounds=1)


def test_numbers_that_change_nothing_may_be_carried():
  """Nor may anything differ where there is one worker."""

  def note_norm(updates, state, params=None):
    return updates, optax.tree.norm(updates)

  noting = optax.GradientTransformation(lambda params: jnp.zeros(()), note_norm)
  run(make(optax.chain(noting, optax.sgd(RATE)), carry=True), rounds=1)
  alone = {'S': 1, 'devices': 1, 'carry': True}
  run(make(optax.contrib.prodigy(1.0), **alone), rounds=1)


def test_a_schedule_inside_of_sam_counts_its_updates():
  """As in a plain loop of one worker that has the whole network."""
  sam = optax.contrib.sam(optax.sgd(falling(0)), optax.sgd(0.01))
  alone = {'S': 1, 'devices': 1, 'chains': (), 'carry': True}
  found, *_ = run(make(sam, **alone), rounds=3)
  params = jax.tree.map(jnp.asarray, network())
  state = sam.init(params)
  present = {CHAIN: jnp.ones(5)}
  for r in range(3):
    for t in range(T):
      batch = jax.tree.map(lambda x, t=t: x[0, t], batches(r, 1))
      grads = jax.grad(loss_fn, has_aux=True)(params, present, batch, None)[0]
      updates, state = sam.update(grads, state, params)
      params = optax.apply_updates(params, updates)
  assert_close(found, params, 1e-5)


@pytest.mark.parametrize('fields', [{}, {'on_device': True}, {'carry': True}])
def test_a_chain_with_names_is_a_chain(fields):
  """Its state is an ordered dictionary."""
  parts = {
    'decay': optax.add_decayed_weights(0.1, decays),
    'momentum': optax.trace(0.9),
    'rate': optax.scale_by_learning_rate(falling(0)),
  }
  found = []
  for optimizer in (
    optax.chain(*parts.values()), optax.named_chain(*parts.items())
  ):  # fmt: skip
    trainer = make(optimizer, **fields)
    state = trainer.init(network())
    trainer = trainer.compile(state, batches(0, 4))
    for r in range(2):
      state, _ = trainer.round(state, batches(r, 4))
    found.append(trainer.params(state))
  jax.tree.map(np.testing.assert_array_equal, *found)


def of_state(after):
  """An optimiser whose first update returns another form of state."""
  return optax.GradientTransformation(
    lambda params: {'n': jnp.zeros(2), 'm': jnp.zeros(2)},
    lambda updates, state, params: (updates, after(state)),
  )


FORMS = {
  'dtype': lambda s: {**s, 'n': s['n'].astype(jnp.bfloat16)},
  'shape': lambda s: {**s, 'n': s['n'][:1]},
  'missing': lambda s: {'m': s['m']},
}


@pytest.mark.parametrize('form', FORMS)
def test_a_state_that_changes_its_form_is_refused(form):
  trainer = make(of_state(FORMS[form]))
  with pytest.raises(ValueError, match=r"optimizer .* leaf \['n'\] is float32"):
    trainer.round(trainer.init(network()), batches(0, 4))


def test_a_state_that_changes_its_nodes_is_refused():
  trainer = make(of_state(lambda s: {**s, 'nothing': ()}))
  with pytest.raises(ValueError, match='other nodes after update'):
    trainer.round(trainer.init(network()), batches(0, 4))


def test_an_optimiser_that_cannot_begin_is_refused_where_it_is_carried():
  broken = optax.GradientTransformation(lambda p: p['x'], None)
  broken = broken._replace(update=lambda *args: args[:2])
  with pytest.raises(ValueError, match=r'optimizer cannot be used \(KeyErr'):
    make(broken, carry=True).init(network())
