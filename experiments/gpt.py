"""A GPT on bytes whose blocks are a chain: pre-norm, causal, tied embedding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

PyTree = Any
BYTES = 256
BLOCKS = 'blocks'  # The name of the chain.


class Shape(NamedTuple):
  """Sizes of a network.

  Attributes:
    layers: L.
    width: Of the residual stream.
    heads: Of attention.
    length: Bytes that it sees at most.
  """

  layers: int
  width: int
  heads: int
  length: int


class Block(nn.Module):
  """Attention and a perceptron, each a residual branch behind a norm."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Applies the block.

    Args:
      x: `float32[B, N, width]`.
      scale: `float32[]`, factor on both branches; 0 leaves x as it is.

    Returns:
      `float32[B, N, width]`.
    """
    width = x.shape[-1]
    mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
    y = nn.LayerNorm()(x)
    attend: Any = nn.MultiHeadDotProductAttention(self.heads)
    y = attend(y, mask=mask)
    x = x + scale * y
    y = nn.Dense(4 * width)(nn.LayerNorm()(x))
    return x + scale * nn.Dense(width)(nn.gelu(y))


def init(shape: Shape, seed: int) -> dict[str, PyTree]:
  """Draws initial parameters.

  Args:
    shape: Sizes.
    seed: Of the draw.

  Returns:
    The parameters; those of the blocks are stacked, `[L, ...]`.
  """
  keys = jax.random.split(jax.random.key(seed), shape.layers + 2)
  x = jnp.zeros((1, shape.length, shape.width))

  def one_block(key):
    return Block(shape.heads).init(key, x, jnp.float32(1))['params']

  blocks = jax.vmap(one_block)(keys[2:])
  # The branches add up: each begins smaller where there are many.
  small = (2 * shape.layers) ** -0.5
  blocks['Dense_1']['kernel'] *= small
  blocks['MultiHeadDotProductAttention_0']['out']['kernel'] *= small
  return {
    'embedding': 0.02 * jax.random.normal(keys[0], (BYTES, shape.width)),
    'position': 0.02 * jax.random.normal(keys[1], (shape.length, shape.width)),
    BLOCKS: blocks,
    'norm': {'scale': jnp.ones(shape.width), 'bias': jnp.zeros(shape.width)},
  }


def logits(
  params: Mapping[str, PyTree], scales: jax.Array, text: jax.Array, heads: int
) -> jax.Array:
  """Predicts the byte after each.

  Args:
    params: A network or sub-network, with K blocks.
    scales: `float32[K]`, the factor on the branches of each block.
    text: `int32[B, N]`.
    heads: Of attention.

  Returns:
    `float32[B, N, 256]`.
  """
  x = params['embedding'][text] + params['position'][: text.shape[1]][None]
  block = jax.checkpoint(
    lambda p, x, s: Block(heads).apply({'params': p}, x, s)
  )
  for k in range(len(scales)):
    mine = jax.tree.map(lambda leaf, k=k: leaf[k], params[BLOCKS])
    x = block(mine, x, scales[k])
  x = nn.LayerNorm().apply({'params': params['norm']}, x)
  return x @ params['embedding'].T


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
    length = len(jax.tree.leaves(params[BLOCKS])[0])
    scales = scale * present.get(BLOCKS, jnp.ones(length))
    found = logits(params, scales, batch[:, :-1], shape.heads)
    loss = optax.softmax_cross_entropy_with_integer_labels(found, batch[:, 1:])
    return loss.mean(), {}

  return loss_fn
