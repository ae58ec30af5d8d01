"""What residual networks are built of: stem, blocks and classifier.

K. He, X. Zhang, S. Ren, J. Sun. Identity Mappings in Deep Residual Networks.
ECCV 2016.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from resist_jax.layers import Conv, widen

Layer = Callable[..., Any]


class _Residual(nn.Module):
  """The layers of a residual block.

  Attributes:
    features: Width of the stage.
    conv: Makes a convolution from features, size and stride.
    norm: Makes a normalisation layer.
    stride: Stride of the block's spatial convolution.
    bottleneck: 1x1, 3x3, 1x1 convolutions with 4 times the width at the end,
      instead of two 3x3 convolutions.
    pre_activation: Norm and ReLU before each convolution (He et al. 2016)
      instead of after it (He et al. 2015).
  """

  features: int
  conv: Layer
  norm: Layer
  stride: int = 1
  bottleneck: bool = False
  pre_activation: bool = True

  def _enter(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what the branch begins from, and the shortcut."""
    width = self._layers()[-1][0]
    entered = nn.relu(self.norm(name='norm1')(x)) if self.pre_activation else x
    if self.stride == 1 and x.shape[-1] == width:
      return entered, x
    shortcut = self.conv(width, 1, self.stride, name='shortcut')(entered)
    if not self.pre_activation:
      shortcut = self.norm(name='norm_shortcut')(shortcut)
    return entered, shortcut

  def _add_branch(
    self, branch: jax.Array, shortcut: jax.Array, residual_scale: jax.Array
  ) -> jax.Array:
    """Returns the sum of the shortcut and the scaled branch."""
    layers = self._layers()
    for i, (features, size, stride) in enumerate(layers, start=1):
      branch = self.conv(features, size, stride, name=f'conv{i}')(branch)
      last = i == len(layers)
      if self.pre_activation and not last:
        branch = nn.relu(self.norm(name=f'norm{i + 1}')(branch))
      elif not self.pre_activation:
        branch = self.norm(name=f'norm{i}')(branch)
        branch = branch if last else nn.relu(branch)
    out = shortcut + branch * residual_scale.astype(branch.dtype)
    return out if self.pre_activation else nn.relu(out)

  def _layers(self) -> list[tuple[int, int, int]]:
    """Returns features, size and stride of each convolution in the branch."""
    if self.bottleneck:
      return [
        (self.features, 1, 1),
        (self.features, 3, self.stride),
        (4 * self.features, 1, 1),
      ]
    return [(self.features, 3, self.stride), (self.features, 3, 1)]


class Block(_Residual):
  """One residual block; `residual_scale` multiplies its residual branch."""

  @nn.compact
  def __call__(
    self, x: jax.Array, residual_scale: jax.Array
  ) -> tuple[jax.Array, None]:
    """Maps `[B, H, W, C]` and a scalar to `([B, H', W', C'], None)`.

    The second value is what `nn.scan` would stack per block: nothing.
    """
    return self._add_branch(*self._enter(x), residual_scale), None


class Shortcut(_Residual):
  """What stays of a block in every network where its branch is dealt."""

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps `[B, H, W, C]` to what `Branch` takes."""
    return self._enter(x)


class Branch(_Residual):
  """The rest of the block that a `Shortcut` begins."""

  @nn.compact
  def __call__(
    self, x: tuple[jax.Array, jax.Array], residual_scale: jax.Array
  ) -> tuple[jax.Array, None]:
    """Maps what `Shortcut` returns and a scalar to what `Block` returns."""
    return self._add_branch(*x, residual_scale), None


class Stem(Conv):
  """The first convolution of a network, and what comes before its blocks.

  Attributes:
    norm: Makes the norm that follows; None if the first block begins with one
      (the paper).
    pool: Halve the image by max pooling at the end.
  """

  norm: Layer | None = None
  pool: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to `[B, H', W', features]`."""
    x = super().__call__(x)
    if self.norm is not None:
      x = nn.relu(self.norm(name='norm')(x))
    if self.pool:
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    return x


class Classifier(nn.Dense):
  """The mean over pixels, and a linear map of it."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to logits in float32, or float64."""
    return super().__call__(widen(x).mean(axis=(1, 2)))


class GroupNorm16(nn.Module):
  """Group norm over groups of up to 16 channels, for any width.

  Attributes:
    dtype: Dtype of the output; statistics are computed in float32.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `[..., C]` to the same shape."""
    size = math.gcd(16, x.shape[-1])
    norm = nn.GroupNorm(num_groups=None, group_size=size, dtype=self.dtype)
    return norm(x)
