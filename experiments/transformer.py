"""Pre-norm transformer blocks, stacked as a chain; a GPT and a ViT use them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

PyTree = Any
BLOCKS = 'blocks'  # The name of the chain in the parameters.


class Shape(NamedTuple):
  """Sizes of a network.

  Attributes:
    layers: L.
    width: Width of the residual stream.
    heads: Number of attention heads.
    length: Length of the sequence: bytes that a GPT sees at most, patches of a
      ViT.
  """

  layers: int
  width: int
  heads: int
  length: int


class Block(nn.Module):
  """Attention and a perceptron, each a residual branch behind a norm.

  Attributes:
    heads: Number of attention heads.
    causal: Whether a position sees only itself and those before it.
  """

  heads: int
  causal: bool

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
    mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
    y = nn.LayerNorm()(x)
    attend: Any = nn.MultiHeadDotProductAttention(self.heads)
    y = attend(y, mask=mask)
    x = x + scale * y
    y = nn.Dense(4 * width)(nn.LayerNorm()(x))
    return x + scale * nn.Dense(width)(nn.gelu(y))


def init(shape: Shape, key: jax.Array) -> dict[str, PyTree]:
  """Draws blocks, positions, and the scale and bias of the last norm.

  Args:
    shape: Sizes.
    key: Key of the draw.

  Returns:
    Parameters by name; those of the blocks are stacked, `[L, ...]`.
  """
  first, *keys = jax.random.split(key, shape.layers + 1)
  x = jnp.zeros((1, shape.length, shape.width))

  def one_block(key):
    return Block(shape.heads, False).init(key, x, jnp.float32(1))['params']

  blocks = jax.vmap(one_block)(jnp.stack(keys))
  # The branches add up: each begins smaller where there are many.
  small = (2 * shape.layers) ** -0.5
  blocks['Dense_1']['kernel'] *= small
  blocks['MultiHeadDotProductAttention_0']['out']['kernel'] *= small
  return {
    'position': 0.02 * jax.random.normal(first, (shape.length, shape.width)),
    BLOCKS: blocks,
    'norm': {'scale': jnp.ones(shape.width), 'bias': jnp.zeros(shape.width)},
  }


def apply(
  params: Mapping[str, PyTree],
  scales: jax.Array,
  x: jax.Array,
  heads: int,
  causal: bool,
) -> jax.Array:
  """Adds positions, applies the blocks, and then the last norm.

  Args:
    params: What `init` drew, or a sub-network of it with K blocks.
    scales: `float32[K]`, the factor on the branches of each block.
    x: `float32[B, N, width]`.
    heads: Number of attention heads.
    causal: See `Block`.

  Returns:
    `float32[B, N, width]`.
  """
  block: Any = Block(heads, causal)
  norm: Any = nn.LayerNorm()
  x = x + params['position'][: x.shape[1]][None]
  # Not a scan: XLA's CPU backend is slow inside loops.
  for k in range(len(scales)):
    mine = jax.tree.map(lambda leaf, k=k: leaf[k], params[BLOCKS])
    x = block.apply({'params': mine}, x, scales[k])
  return norm.apply({'params': params['norm']}, x)


def scales(
  params: Mapping[str, PyTree], present: Mapping[str, jax.Array], scale: float
) -> jax.Array:
  """Returns the factor of each block in training.

  Args:
    params: A network or sub-network.
    present: As the trainer passes it; without the chain, all are present.
    scale: Factor of a block that is present.

  Returns:
    `float32[K]`.
  """
  length = len(jax.tree.leaves(params[BLOCKS])[0])
  return scale * present.get(BLOCKS, jnp.ones(length))
