"""The parts of a residual network: stem, residual blocks and classifier.

K. He, X. Zhang, S. Ren, J. Sun. Identity Mappings in Deep Residual Networks.
ECCV 2016.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.models.accelerated import widen
from resist_jax.models.layers import Conv, convolve

Layer = Callable[..., Any]

_ONE = np.float32(1)


class _Residual(nn.Module):
  """The layers that `Block`, `Shortcut` and `Branch` have in common.

  Attributes:
    features: Width of the stage, in channels.
    conv: Makes a convolution from features, size and stride.
    norm: Makes a normalisation layer.
    stride: Stride of the block's spatial convolution.
    bottleneck: Whether the branch has 1x1, 3x3 and 1x1 convolutions, of which
      the last is 4 times as wide, instead of two 3x3 convolutions.
    pre_activation: Whether norm and ReLU come before each convolution (He et
      al. 2016) instead of after it (He et al. 2015).
    gate: Initial value of a learnable factor on the branch; None for none.
  """

  features: int
  conv: Layer
  norm: Layer
  stride: int = 1
  bottleneck: bool = False
  pre_activation: bool = True
  gate: float | None = None

  def _enter(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the input of the branch, and the output of the shortcut."""
    width = self._layers()[-1][0]
    branch = x
    if self.pre_activation:
      branch = self.norm(name='norm1')(x, relu=True)
    if self.stride == 1 and x.shape[-1] == width:
      return branch, x
    shortcut = self.conv(width, 1, self.stride, name='shortcut')(branch)
    if not self.pre_activation:
      shortcut = self.norm(name='norm_shortcut')(shortcut)
    return branch, shortcut

  def _add_branch(
    self, branch: jax.Array, shortcut: jax.Array, residual_scale: jax.Array
  ) -> jax.Array:
    """Runs the branch and returns `shortcut + residual_scale * branch`."""
    layers = self._layers()
    for i, (features, size, stride) in enumerate(layers, start=1):
      branch = self.conv(features, size, stride, name=f'conv{i}')(branch)
      last = i == len(layers)
      if self.pre_activation and not last:
        branch = self.norm(name=f'norm{i + 1}')(branch, relu=True)
      elif not self.pre_activation:
        branch = self.norm(name=f'norm{i}')(branch, relu=not last)
    if self.gate is not None:
      start = nn.initializers.constant(self.gate)
      gate = self.param('gate', start, (), jnp.float32)
      residual_scale = residual_scale * gate
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
  """A residual block."""

  @nn.compact
  def __call__(
    self, x: jax.Array, residual_scale: jax.Array
  ) -> tuple[jax.Array, None]:
    """Applies the block.

    Args:
      x: `[B, H, W, C]`.
      residual_scale: Scalar that multiplies the residual branch.

    Returns:
      `[B, H', W', C']`, and None, as `nn.scan` expects a pair of a carry and an
      output to stack.
    """
    return self._add_branch(*self._enter(x), residual_scale), None


class Shortcut(_Residual):
  """The part of a partitioned head that every worker keeps.

  This is its projection shortcut, and its first norm and ReLU with
  pre-activation. `Branch` is the other part.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the input of the branch, and the shortcut.

    Args:
      x: `[B, H, W, C]`, in any floating-point dtype.

    Returns:
      The pair of arrays that `Branch` takes, in the dtype of the computation.
    """
    return self._enter(x)


class Branch(_Residual):
  """The residual branch of a partitioned head, a chain of one block."""

  @nn.compact
  def __call__(
    self, x: tuple[jax.Array, jax.Array], residual_scale: jax.Array
  ) -> tuple[jax.Array, None]:
    """Runs the branch and adds it to the shortcut.

    Args:
      x: The pair that `Shortcut` returns.
      residual_scale: Scalar that multiplies the residual branch.

    Returns:
      What `Block` returns.
    """
    return self._add_branch(*x, residual_scale), None


class Stem(Conv):
  """The layers before the first stage: a convolution, norm and pooling.

  Attributes:
    whitens: Whether a 2x2 convolution that is not trained comes first, and a
      ReLU. Its parameter `whitening` is meant to decorrelate the numbers of a
      patch; see `models.whitening`.
    norm: Makes the norm after the convolution; None if the first block begins
      with one (the paper).
    pool: Whether to halve height and width by max pooling at the end.
  """

  whitens: bool = False
  norm: Layer | None = None
  pool: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the stem.

    Args:
      x: Images, normalised, `[B, H, W, C]`.

    Returns:
      `[B, H', W', features]`, in the dtype of the computation.
    """
    if self.whitens:
      shape = (2, 2, x.shape[-1], 8 * x.shape[-1])
      kernel = self.param('whitening', _both_signs, shape, jnp.float32)
      kernel = jax.lax.stop_gradient(kernel)
      x = nn.relu(convolve(x, kernel, self.dtype, padding=(0, 1)))
    x = super().__call__(x)
    if self.norm is not None:
      x = self.norm(name='norm')(x, relu=True)
    if self.pool:
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    return x


def _both_signs(key, shape, dtype):
  """Draws orthogonal filters, each followed by its negative."""
  half = nn.initializers.orthogonal()(key, (*shape[:3], shape[3] // 2), dtype)
  return jnp.concatenate([half, -half], axis=-1)


class Classifier(nn.Dense):
  """Global average pooling, then a linear layer."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Averages over the pixels, and classifies.

    Args:
      x: `[B, H, W, C]`.

    Returns:
      Logits, `float32[B, num_classes]`; float64 for images of float64.
    """
    return super().__call__(widen(x).mean(axis=(1, 2)))


def output_of(piece: nn.Module, x: Any, scale: Any = _ONE) -> Any:
  """Applies a piece that stands alone; only blocks take a scale.

  Args:
    piece: The module, bound to its parameters: give this function as the
      `method` of its `init` or `apply`.
    x: What the piece takes.
    scale: Scale of the residual branch, for a `Block` or `Branch`.

  Returns:
    What the piece returns, without the None of blocks.
  """
  return piece(x, scale)[0] if isinstance(piece, Block | Branch) else piece(x)
