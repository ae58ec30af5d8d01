"""A network of one's own, as a user would write it: words that repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resist_jax.data import from_tables
from resist_jax.run import module_task

LETTERS = 5


def network(config):
  width, length = config.model.options.width, config.model.options.blocks

  def init(seed):
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    normal = jax.random.normal
    return {
      'embedding': normal(first, (LETTERS, width)),
      'blocks': {
        'in': normal(second, (length, width, width)) / width**0.5,
        'out': normal(third, (length, width, width)) / width**0.5,
      },
    }

  return module_task.Network(init, ('blocks',))


def loss(config):
  del config

  def loss_fn(params, present, batch, key):
    del key
    x = params['embedding'][batch['seen']]
    for k, held in enumerate(present['blocks']):
      inner = params['blocks']['in'][k]
      x = x + held * (jnp.maximum(x @ inner, 0) @ params['blocks']['out'][k])
    logits = x @ params['embedding'].T
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['next']
    )
    hits = (logits.argmax(axis=-1) == batch['next']).mean(dtype=jnp.float32)
    return losses.mean(), {'accuracy': hits}

  return loss_fn


def examples(rng, count):
  seen = rng.integers(LETTERS, size=count)
  return {'seen': seen, 'next': (seen + 1) % LETTERS}


def data(config):
  # Another name of the data is another text.
  rng = np.random.default_rng(
    [config.model.options.text, len(config.data.name)]
  )
  return from_tables(
    examples(rng, 200), {'test': examples(rng, 37), 'other': examples(rng, 11)}
  )
