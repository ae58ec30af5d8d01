"""The layers of a residual block: convolution, batch norm and group norm."""

from collections.abc import Callable
from functools import partial
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from resist_jax.models.accelerated import (
  affine,
  norm_relu,
  over_parts,
  widen,
)

NHWC = ('NHWC', 'HWIO', 'NHWC')
_EPSILON = 1e-5  # Batch norm adds it to the variance.

Initializer = Callable[..., jax.Array]

# He et al. (2015), in the variant that preserves the variance of gradients.
he_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# PyTorch's default for convolutions and linear layers.
torch_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def torch_bias(fan_in: int) -> Initializer:
  """Returns PyTorch's default for the bias of a layer with so many inputs."""
  limit = fan_in**-0.5
  return partial(_uniform, limit)


def _uniform(limit, key, shape, dtype=jnp.float32):
  return jax.random.uniform(key, shape, dtype, -limit, limit)


class Conv(nn.Module):
  """A convolution without bias, padded by `(size - 1) // 2` on every side.

  Attributes:
    features: Output channels.
    size: Height and width of the kernel.
    stride: Stride in both directions.
    dtype: Compute dtype; the kernel is stored in float32.
    kernel_init: Draws the kernel.
  """

  features: int
  size: int = 3
  stride: int = 1
  dtype: Any = jnp.float32
  kernel_init: Initializer = he_normal

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, features]`."""
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    pad = (self.size - 1) // 2
    return convolve(x, kernel, self.dtype, self.stride, (pad, pad))


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  dtype: Any,
  stride: int = 1,
  padding: tuple[int, int] = (0, 0),
) -> jax.Array:
  """Convolves images.

  Args:
    x: `[B, H, W, C]`.
    kernel: `[size, size, C, features]`.
    dtype: To compute in.
    stride: In both directions.
    padding: Zeros before and after each row, and each column.

  Returns:
    `[B, H', W', features]`.
  """
  return lax.conv_general_dilated(
    x.astype(dtype),
    kernel.astype(dtype),
    window_strides=(stride, stride),
    padding=(padding, padding),
    dimension_numbers=NHWC,
  )


class BatchNorm(nn.Module):
  """Batch norm without running statistics, as in the paper.

  The collection `batch_stats` that the caller passes selects one of three
  modes:

  - absent: normalise with the statistics of this batch (training);
  - absent and mutable: the same, and also return the batch's mean and mean
    square in this collection, so that the caller can average them over batches;
  - with `mean` and `mean_square`: normalise with these (a deployed model).

  Attributes:
    dtype: Dtype of the output; statistics are computed in float32,
      or in float64 for such images.
    axis_name: The mesh axis that splits the batch into equal parts, if any;
      statistics are taken over all parts.
    saves_traffic: Whether to train by `accelerated.norm_relu`, where a ReLU
      follows.
  """

  dtype: Any = jnp.float32
  axis_name: str | None = None
  saves_traffic: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, relu: bool = False) -> jax.Array:
    """Normalises each channel over all other axes.

    Args:
      x: `[..., C]`.
      relu: Whether to apply a ReLU afterwards.

    Returns:
      The same shape, of `dtype`.
    """
    channels = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, channels, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, channels, jnp.float32)
    measured = self.has_variable('batch_stats', 'mean')
    measures = self.is_mutable_collection('batch_stats')
    if relu and self.saves_traffic and not (measured or measures):
      return norm_relu(x, scale, bias, _EPSILON, self.dtype, self.axis_name)
    x = widen(x)
    if measured:
      mean = self.get_variable('batch_stats', 'mean')
      mean_square = self.get_variable('batch_stats', 'mean_square')
    else:
      axes = tuple(range(x.ndim - 1))
      mean, mean_square = over_parts(
        (x.mean(axes), jnp.square(x).mean(axes)), self.axis_name
      )
      if measures and not self.is_initializing():
        self.put_variable('batch_stats', 'mean', mean)
        self.put_variable('batch_stats', 'mean_square', mean_square)
    variance = jnp.maximum(mean_square - jnp.square(mean), 0.0)
    factor = scale * lax.rsqrt(variance + _EPSILON)
    y = affine(x, factor, bias - mean * factor).astype(self.dtype)
    return nn.relu(y) if relu else y


class GroupNorm16(nn.Module):
  """Group norm with groups of 16 channels, or fewer for narrow layers.

  Attributes:
    dtype: Dtype of the output; statistics are computed in float32.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, relu: bool = False) -> jax.Array:
    """Normalises each group of channels of an image.

    Args:
      x: `[..., C]`.
      relu: Whether to apply a ReLU afterwards.

    Returns:
      The same shape, of `dtype`.
    """
    size = math.gcd(16, x.shape[-1])
    norm = nn.GroupNorm(num_groups=None, group_size=size, dtype=self.dtype)
    return nn.relu(norm(x)) if relu else norm(x)
