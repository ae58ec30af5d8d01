"""Convolution and batch norm in the forms that a residual block uses."""

from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

# He et al. (2015), forward variance kept by the outputs of a convolution.
he_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Conv(nn.Module):
  """A convolution without bias, padded by `(size - 1) // 2` on every side.

  Attributes:
    features: Output channels.
    size: Height and width of the kernel.
    stride: Step in both directions.
    dtype: Compute dtype; the kernel is stored in float32.
  """

  features: int
  size: int = 3
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, features]`."""
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', he_normal, shape, jnp.float32)
    pad = (self.size - 1) // 2
    return lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding=((pad, pad), (pad, pad)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


class BatchNorm(nn.Module):
  """Batch norm without running statistics (the paper's).

  What the caller passes in the collection `batch_stats` decides:

  - nothing: normalise with the statistics of this batch (training);
  - nothing, but mutable: the same, and return this batch's mean and mean
    square in that collection, to be averaged over batches;
  - `mean` and `mean_square`: normalise with these (a deployed model).

  Attributes:
    epsilon: Added to the variance.
    dtype: Dtype of the output; statistics are computed in float32.
  """

  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., C]` to the same shape."""
    channels = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, channels, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, channels, jnp.float32)
    x = x.astype(jnp.float32)
    if self.has_variable('batch_stats', 'mean'):
      mean = self.get_variable('batch_stats', 'mean')
      mean_square = self.get_variable('batch_stats', 'mean_square')
    else:
      axes = tuple(range(x.ndim - 1))
      mean = x.mean(axes)
      mean_square = jnp.square(x).mean(axes)
      if self.is_mutable_collection('batch_stats') and (
        not self.is_initializing()
      ):
        self.put_variable('batch_stats', 'mean', mean)
        self.put_variable('batch_stats', 'mean_square', mean_square)
    variance = jnp.maximum(mean_square - jnp.square(mean), 0.0)
    factor = scale * lax.rsqrt(variance + self.epsilon)
    shape = (1,) * (x.ndim - 1) + channels
    y = x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)
    return y.astype(self.dtype)
