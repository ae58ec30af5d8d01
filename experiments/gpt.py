"""A GPT on bytes whose blocks are a chain: pre-norm, causal, tied embedding."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from experiments import transformer
from experiments.transformer import Shape

PyTree = Any
BYTES = 256


def init(shape: Shape, seed: int) -> dict[str, PyTree]:
  """Draws initial parameters.

  Args:
    shape: Sizes.
    seed: Seed of the draw.

  Returns:
    The parameters; those of the blocks are stacked, `[L, ...]`.
  """
  embed, rest = jax.random.split(jax.random.key(seed))
  table = 0.02 * jax.random.normal(embed, (BYTES, shape.width))
  return {'embedding': table, **transformer.init(shape, rest)}


def logits(
  params: Mapping[str, PyTree], scales: jax.Array, text: jax.Array, heads: int
) -> jax.Array:
  """Predicts the byte after each.

  Args:
    params: A network or sub-network, with K blocks.
    scales: `float32[K]`, the factor on the branches of each block.
    text: `int32[B, N]`.
    heads: Number of attention heads.

  Returns:
    `float32[B, N, 256]`.
  """
  embedding = params['embedding']
  x = transformer.apply(params, scales, embedding[text], heads, causal=True)
  return x @ embedding.T


def make_loss(shape: Shape, scale: float = 1.0):
  """Returns the loss function of a `resist_jax.Trainer`.

  Args:
    shape: Sizes.
    scale: Factor on the branches in training.

  Returns:
    `loss_fn(params, present, batch, key)`, nats a byte; a batch is
    `int32[B, length + 1]`.
  """

  def loss_fn(params, present, batch, key):
    del key
    scales = transformer.scales(params, present, scale)
    found = logits(params, scales, batch[:, :-1], shape.heads)
    loss = optax.softmax_cross_entropy_with_integer_labels(found, batch[:, 1:])
    return loss.mean(), {}

  return loss_fn
