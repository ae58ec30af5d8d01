"""SGD as in the paper's code, and a rate that spans the run."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import least_config

from resist_jax.errors import ConfigError
from resist_jax.rounds.moments import take_apart
from resist_jax.run import checks, optimizer, train
from resist_jax.run import config as config_lib


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


def test_nesterov_by_hand():
  """PyTorch: the step is along gradient + momentum * (new momentum)."""
  sgd = optimizer.make_optimizer(lambda _: 0.3, 0.9, 0.1, nesterov=True)
  params, by_hand = jnp.array([2.0, -1.0]), np.array([2.0, -1.0])
  state, momentum = sgd.init(params), np.zeros(2)
  for step in range(4):
    grads = np.array([0.5, 1.0]) * (step + 1)
    updates, state = sgd.update(jnp.array(grads, jnp.float32), state, params)
    params = optax.apply_updates(params, updates)
    decayed = grads + 0.1 * by_hand
    momentum = 0.9 * momentum + decayed
    by_hand = by_hand - 0.3 * (decayed + 0.9 * momentum)
    np.testing.assert_allclose(params, by_hand, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'want'),
  [
    ('step', [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ('cosine', [1, 0.993, 0.5, 0.492, 0.146, 0]),
    ('linear', [1, 0.945, 0.5, 0.495, 0.25, 0]),
    ('one_cycle', [0.04, 0.118, 0.812, 0.804, 0.283, 0]),
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


@pytest.mark.parametrize('name', optimizer.SCHEDULES)
def test_each_name_is_a_schedule_of_a_single_step(name):
  rate = optimizer.make_schedule(name, 1.0, 1)
  assert 0 < float(rate(jnp.int32(0))) <= 1.0


def test_one_cycle_is_that_of_optax():
  ours = optimizer.make_schedule('one_cycle', 0.3, 100)
  theirs = optax.cosine_onecycle_schedule(100, 0.3)
  with jax.numpy_dtype_promotion('standard'):
    want = [float(theirs(step)) for step in range(101)]
  got = [float(ours(step)) for step in range(101)]
  np.testing.assert_allclose(got, want, atol=1e-5)


# Schedules that a config names.

CARD = """
import jax.numpy as jnp
import optax


def falling(config, num_steps):
  return optax.linear_schedule(config.lr, config.lr / 2, num_steps)


def by_hand(config, num_steps):
  return lambda step: config.lr * jnp.sqrt(1 - step / num_steps)


def impatient(config, num_steps):
  return lambda step: config.lr if step < 3 else 0  # Of a step that is traced.


def endless(config, num_steps):
  return lambda step: config.lr / (step - step)


def nothing(config, num_steps):
  return None


def alone(config):
  return optax.constant_schedule(config.lr)
"""


@pytest.fixture
def card(tmp_path):
  path = tmp_path / 'own card.py'
  path.write_text(CARD)
  return str(path)


def configured(schedule, **fields):
  config = config_lib.get_config()
  config.num_rounds, config.local_steps, config.lr = 10, 10, 0.4
  config.optimizer.schedule = schedule
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def test_a_function_of_a_card_is_a_schedule(card):
  config = configured(f'{card}:falling')
  checks.validate(config)
  rate = optimizer.schedule(config)
  got = [float(jax.jit(rate)(step)) for step in (0, 50, 100)]
  np.testing.assert_allclose(got, [0.4, 0.3, 0.2], rtol=1e-6)
  assert rate(jnp.int32(3)).dtype == jnp.float32


def test_a_schedule_of_a_card_may_be_warmed_up(card):
  config = configured(f'{card}:by_hand', **{'optimizer.warmup_rounds': 1})
  rate = optimizer.schedule(config)
  got = [float(rate(step)) for step in (0, 4, 51)]
  want = [0.04, 0.2 * 0.96**0.5, 0.4 * 0.49**0.5]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_schedule_that_changes_between_two_starts_is_told(
  tmp_path, card, caplog
):
  config = least_config(num_rounds=1)
  config.optimizer.schedule = f'{card}:falling'
  train.train(config, tmp_path / 'run')
  (tmp_path / 'moved').mkdir()
  card = shutil.move(card, tmp_path / 'moved')  # It holds the same there.
  config.optimizer.schedule, config.num_rounds = f'{card}:falling', 2
  train.train(config, tmp_path / 'run')
  assert 'has changed' not in caplog.text
  path = pathlib.Path(card)
  path.write_text(f'{path.read_text()}# Another one.\n')
  for rounds in (3, 4):  # It is told once.
    config.num_rounds = rounds
    train.train(config, tmp_path / 'run')
    assert caplog.text.count('the code of optimizer.schedule') == 1


def test_a_schedule_may_lie_in_a_module():
  config = configured('test_optimizer:of_this_module')
  checks.validate(config)
  assert float(optimizer.schedule(config)(7)) == np.float32(0.1)


def of_this_module(config, num_steps):
  assert num_steps == 100
  return optax.constant_schedule(config.lr / 4)


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('impatient', r'cannot be used \(TracerBoolConversionError'),
    ('endless', 'gives the rates .*must be finite'),
    ('nothing', r'cannot be used \(TypeError'),
    ('alone', r'cannot be used \(TypeError: alone\(\) takes 1'),
  ],
)
def test_a_function_that_is_no_schedule_gets_one_line(name, says, card):
  with pytest.raises(ConfigError, match=says) as caught:
    optimizer.schedule(configured(f'{card}:{name}'))
  assert '\n' not in str(caught.value)


def test_two_drops_at_one_share_count_twice():
  rate = optimizer.make_schedule('step', 1.0, 100, drops=(0.5, 0.5))
  found = [float(rate(step)) for step in (49, 51)]
  np.testing.assert_allclose(found, [1, 0.01], rtol=1e-6)
