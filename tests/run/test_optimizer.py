"""SGD as in the paper's code, and a rate that spans the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resist_jax.rounds.moments import take_apart
from resist_jax.run import optimizer


def test_sgd_with_momentum_and_weight_decay_by_hand():
  def rate(step):
    return 0.3 / (1 + jnp.float32(step))

  sgd = optimizer.make_optimizer(rate, momentum=0.9, weight_decay=0.1)
  params, momentum = jnp.array([2.0, -1.0]), np.zeros(2)
  state = sgd.init(params)
  by_hand = np.array([2.0, -1.0])
  for step in range(4):
    grads = jnp.array([0.5, 1.0]) * (step + 1)
    updates, state = sgd.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    momentum = 0.9 * momentum + np.asarray(grads) + 0.1 * by_hand
    by_hand = by_hand - 0.3 / (1 + step) * momentum
    np.testing.assert_allclose(params, by_hand, rtol=1e-5)
  # What is carried from round to round: the momentum, and the step's number.
  (carried,), (count,) = take_apart(sgd, state)
  np.testing.assert_allclose(carried, momentum, rtol=1e-5)
  assert count == 4


@pytest.mark.parametrize(
  ('name', 'want'),
  [
    ('step', [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ('cosine', [1, 0.993, 0.5, 0.492, 0.146, 0]),
    ('constant', [1] * 6),
  ],
)
def test_schedules(name, want):
  rate = optimizer.make_schedule(name, 1.0, 200)
  steps = [0, 11, 100, 101, 150, 200]
  got = [float(jax.jit(rate)(jnp.int32(step))) for step in steps]
  np.testing.assert_allclose(got, want, atol=2e-3)


def test_a_warm_up_rises_to_the_rate():
  rate = optimizer.make_schedule('step', 0.4, 100, warmup_steps=4)
  got = [float(rate(jnp.int32(step))) for step in (0, 1, 3, 4, 60)]
  np.testing.assert_allclose(got, [0.1, 0.2, 0.4, 0.4, 0.04], rtol=1e-5)


@pytest.mark.parametrize('steps', [1, 2, 3])
def test_very_short_runs_have_a_rate(steps):
  rate = optimizer.make_schedule('step', 1.0, steps)
  assert float(rate(jnp.int32(0))) == 1.0
