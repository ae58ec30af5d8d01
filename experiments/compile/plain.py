"""A training step as Flax users write it, to compare ours with.

The same residual network from Flax's own layers, and one jitted function; no
worker, no chain, no shape that says what is shared.
"""

from functools import partial
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from resist_jax.models import ResNet

PyTree = Any


class Block(nn.Module):
  """A pre-activation residual block.

  Attributes:
    features: Width.
    stride: Stride of its first convolution.
    dtype: Compute dtype.
  """

  features: int
  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, features]`."""
    conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, padding=1)
    norm = partial(nn.BatchNorm, use_running_average=False, dtype=self.dtype)
    step = (self.stride, self.stride)
    y = nn.relu(norm()(x))
    if step != (1, 1) or x.shape[-1] != self.features:
      x = conv(self.features, (1, 1), step, padding=0)(y)
    y = conv(self.features, (3, 3), step)(y)
    y = conv(self.features, (3, 3))(nn.relu(norm()(y)))
    return x + y


class Network(nn.Module):
  """The paper's residual network.

  Attributes:
    like: Gives the numbers and widths of blocks, classes and dtype.
  """

  like: ResNet

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images `float32[B, H, W, C]` to logits."""
    like = self.like
    x = nn.Conv(
      like.widths[0], (3, 3), use_bias=False, dtype=like.dtype, padding=1
    )(x)
    stages = zip(like.stage_sizes, like.widths, strict=True)
    for stage, (blocks, features) in enumerate(stages):
      for block in range(blocks):
        stride = 2 if stage and not block else 1
        x = Block(features, stride, like.dtype)(x)
    x = x.astype(jnp.float32).mean(axis=(1, 2))
    return nn.Dense(like.num_classes)(x)


def step(like: ResNet, optimizer: optax.GradientTransformation):
  """Makes a jitted training step, and what makes its state.

  Args:
    like: See `Network`.
    optimizer: A complete optax transformation.

  Returns:
    `(init, update)`: `init(images)` returns the state; `update(state, images,
    labels)` returns the next one and the loss, and takes the state over.
  """
  network = Network(like)

  def init(images: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    variables = network.init(jax.random.key(0), images)
    params = variables['params']
    return params, variables['batch_stats'], optimizer.init(params)

  @partial(jax.jit, donate_argnums=0)
  def update(state, images, labels):
    params, statistics, opt_state = state
    images = images.astype(jnp.float32) / 127.5 - 1.0

    def loss_fn(params):
      logits, changed = network.apply(
        {'params': params, 'batch_stats': statistics},
        images,
        mutable=['batch_stats'],
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), changed['batch_stats']

    grads = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, statistics), grads = grads(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, statistics, opt_state), loss

  return init, update
