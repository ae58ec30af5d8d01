"""A loss that gets the sub-network as the round began, as it was agreed on."""

import dataclasses
from functools import partial

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_at_once import joined
from test_trainer import (
  RATE,
  assert_close,
  cut,
  hands_of,
  make,
  merge,
  network,
  predicted_and_read,
  run,
  train_locally,
)
from test_trainer import loss_fn as task_loss

import resist_jax as resist
from resist_jax.rounds.state import assignments_on_host

NEAR = 0.7


def distance(params, agreed):
  """Half the squared distance."""
  squares = jax.tree.map(lambda x, y: jnp.square(x - y).sum(), params, agreed)
  return sum(jax.tree.leaves(squares)) / 2


def near_loss(params, present, batch, key, *, agreed):
  loss, metrics = task_loss(params, present, batch, key)
  away = distance(params, agreed)
  return loss + NEAR * away, {**metrics, 'away': away}


def make_near(loss_fn=near_loss, group=1, **fields):
  if group > 1:
    fields['mesh'] = resist.make_mesh(4, devices_per_worker=group)
  trainer = make(optax.sgd(RATE, momentum=0.9), **fields)
  return dataclasses.replace(trainer, loss_fn=loss_fn, give_agreed=True)


@jax.jit
def near_gradient(agreed, sub, batch):
  ones = jnp.ones(len(sub['inner']['blocks']['b']))

  def loss(sub):
    value, _ = task_loss(sub, {'inner/blocks': ones}, batch, None)
    return value + NEAR * distance(sub, agreed)

  return jax.grad(loss)(sub)


def plain_loop(held, S, counts):
  """Algorithm 1: each worker stays near what it was handed."""
  params, first, optimizer = network(), 0, optax.sgd(RATE, momentum=0.9)
  for assignments, count in zip(held, counts, strict=True):
    hands, data, parts = hands_of(assignments, S), joined(first, count, S), []
    for s, mine in enumerate(hands):
      handed = cut(params, mine)
      near = partial(near_gradient, handed)
      parts.append(train_locally(optimizer, handed, data, s, near))
    params, first = merge(parts, hands), first + count
  return params


CASES = {
  'replicas': {'min_depth': 2},
  'psum': {'exchange': resist.exchange.masked_psum()},
  'in one program': {'devices': 1, 'on_device': True},
  'groups': {'group': 2},
  'unequal': {'depths': (2, 1, 1, 1), 'devices': 4},
  'nobody is excluded': {'exclude_faulty': False},
  'local SGD': {'chains': ()},
}


@pytest.mark.parametrize(
  'case', rest_is_slow(list(CASES), ['in one program', 'unequal'])
)
def test_rounds_equal_a_plain_loop(case):
  """The second of two rounds is as long as two."""
  trainer, counts = make_near(**CASES[case]), (1, 2)
  state, held = trainer.init(network()), []
  for count in counts:
    held.append(assignments_on_host(state))
    data = joined(int(state.round), count, 4)
    state, metrics = trainer.at_once(count).round(state, data)
  assert_close(trainer.params(state), plain_loop(held, 4, counts))
  assert (np.asarray(metrics['away']) > 0).all()


@pytest.mark.slow
def test_the_shared_part_stays_near_what_it_was_when_the_round_began():
  """Also after it has been exchanged in between."""
  trainer = make_near(shared_every=1)
  state = trainer.init(network())
  start = trainer.params(state)['out']

  def only_distance(params, present, batch, key, agreed):
    loss, _ = task_loss(params, present, batch, key)
    return loss, {'same': (agreed['out'] == start).all().astype(jnp.float32)}

  trainer = dataclasses.replace(trainer, loss_fn=only_distance)
  _, metrics = trainer.round(state, joined(0, 1, 4))
  np.testing.assert_allclose(metrics['same'], 1, rtol=1e-6)


def test_a_loss_that_ignores_it_trains_to_the_same_bits():
  """And nothing more is sent."""

  def ignores(params, present, batch, key, **agreed):
    assert agreed.keys() == {'agreed'}
    return task_loss(params, present, batch, key)

  trainer = make_near(ignores, min_depth=2)
  got, *_ = run(trainer, rounds=2)
  want, _, state, _ = run(make(min_depth=2), rounds=2)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert trainer.bytes_per_round(state) == (
    make(min_depth=2).bytes_per_round(state)
  )
  predicted, read = predicted_and_read(trainer, trainer.init(network()))
  assert predicted == read > 0


def test_mistakes_are_told_in_a_line():
  trainer = make_near(task_loss)
  with pytest.raises(ValueError, match=r'cannot be called .*agreed=\), '):
    trainer.round(trainer.init(network()), joined(0, 1, 4))
  with pytest.raises(ValueError, match='all workers agree at every step'):
    make_near(chains=(), average_gradients=True)
