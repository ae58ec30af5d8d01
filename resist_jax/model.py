"""Residual networks whose stages are a head and a chain of identical blocks.

The parameters of a network are a plain dictionary: `stem`, then for every
stage `stageN_head` (its first block, where stride and channels change) and
`stageN_chain` (the blocks after it, stacked on a leading axis by `nn.scan`),
then `classifier`. Slicing that leading axis is the whole of decomposition, and
a sub-network is the same module with a shorter chain (`with_chain_lengths`).

K. He, X. Zhang, S. Ren, J. Sun. Identity Mappings in Deep Residual Networks.
ECCV 2016.
"""

from collections.abc import Callable, Mapping
from functools import partial
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from resist_jax.layers import BatchNorm, Conv

Layer = Callable[..., Any]

STEMS = ('small', 'strided', 'imagenet')


class Block(nn.Module):
  """One residual block; `residual_scale` multiplies its residual branch.

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

  @nn.compact
  def __call__(
    self, x: jax.Array, residual_scale: jax.Array
  ) -> tuple[jax.Array, None]:
    """Maps `[B, H, W, C]` and a scalar to `([B, H', W', C'], None)`.

    The second value is what `nn.scan` would stack per block: nothing.
    """
    layers = self._layers()
    width = layers[-1][0]
    changes = self.stride != 1 or x.shape[-1] != width
    shortcut = x
    branch = nn.relu(self.norm(name='norm1')(x)) if self.pre_activation else x
    if changes:
      project = self.conv(width, 1, self.stride, name='shortcut')
      shortcut = project(branch)
      if not self.pre_activation:
        shortcut = self.norm(name='norm_shortcut')(shortcut)
    for i, (features, size, stride) in enumerate(layers, start=1):
      branch = self.conv(features, size, stride, name=f'conv{i}')(branch)
      last = i == len(layers)
      if self.pre_activation and not last:
        branch = nn.relu(self.norm(name=f'norm{i + 1}')(branch))
      elif not self.pre_activation:
        branch = self.norm(name=f'norm{i}')(branch)
        branch = branch if last else nn.relu(branch)
    out = shortcut + branch * residual_scale.astype(branch.dtype)
    return (out if self.pre_activation else nn.relu(out)), None

  def _layers(self) -> list[tuple[int, int, int]]:
    """Returns features, size and stride of each convolution in the branch."""
    if self.bottleneck:
      return [
        (self.features, 1, 1),
        (self.features, 3, self.stride),
        (4 * self.features, 1, 1),
      ]
    return [(self.features, 3, self.stride), (self.features, 3, 1)]


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
    """Maps `[B, H, W, C]` to logits, `float32[B, features]`."""
    return super().__call__(x.astype(jnp.float32).mean(axis=(1, 2)))


class ResNet(nn.Module):
  """A residual network; the families below are this module with data.

  Attributes:
    num_classes: Width of the classifier.
    stage_sizes: Blocks in each stage, the head included.
    widths: Channels of each stage (a bottleneck ends in four times as many).
    bottleneck: See `Block`.
    pre_activation: See `Block`.
    norm: `batch` (statistics of the batch, none kept) or `group`.
    stem: `small` (3x3, for images of 32 pixels), `strided` (3x3, stride 2, for
      64 pixels, or a quarter of the work) or `imagenet` (7x7, stride 2, then
      max pooling).
    dtype: Compute dtype; parameters and statistics are float32.
    for_cpu: Lay the blocks of a chain out one after another instead of looping
      over them (XLA's CPU backend runs convolutions in loops some 10 to 40
      times slower; elsewhere a loop compiles faster and costs nothing), and
      use `layers.convolve_with_wide_kernel_gradient`. The result is the same.
  """

  num_classes: int
  stage_sizes: tuple[int, ...]
  widths: tuple[int, ...] = (64, 128, 256, 512)
  bottleneck: bool = False
  pre_activation: bool = True
  norm: str = 'batch'
  stem: str = 'small'
  dtype: Any = jnp.float32
  for_cpu: bool = True

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    residual_scale: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array:
    """Classifies images.

    Args:
      x: `float32[B, H, W, C]`, normalised.
      residual_scale: For chains by name, `float32[L]`: what multiplies each
        block's residual branch; 1 for every block of a chain not named. The
        paper tests with 1/S on the partitioned chain (section 3).

    Returns:
      Logits, `float32[B, num_classes]`.
    """
    scales = dict(residual_scale or {})
    x = self.make_piece('stem')(x)
    for stage, size in enumerate(self.stage_sizes, start=1):
      one = jnp.ones((), jnp.float32)
      x, _ = self.make_piece(f'stage{stage}_head')(x, one)
      if size > 1:
        name = chain_name(stage)
        chain = nn.scan(
          Block,
          variable_axes={'params': 0, 'batch_stats': 0},
          split_rngs={'params': True},
          length=size - 1,
          unroll=size - 1 if self.for_cpu else 1,
        )
        ones = jnp.ones((size - 1,), jnp.float32)
        x, _ = self.make_piece(name, chain)(x, scales.get(name, ones))
    return self.make_piece('classifier')(x)

  @nn.nowrap
  def pieces(self) -> list[tuple[str, int | None]]:
    """Returns what an image passes, in order.

    Returns:
      For every piece, the name of its parameters, and for a block of a chain
      its number in that chain.
    """
    passed: list[tuple[str, int | None]] = [('stem', None)]
    for stage, size in enumerate(self.stage_sizes, start=1):
      passed.append((f'stage{stage}_head', None))
      passed += [(chain_name(stage), i) for i in range(size - 1)]
    return [*passed, ('classifier', None)]

  # Unwrapped, so that a piece belongs to the network inside its `__call__`, and
  # to nobody outside: there it is applied alone, with its own parameters.
  @nn.nowrap
  def make_piece(self, name: str, block: Layer = Block) -> Any:
    """Makes a part of the network that can run alone.

    Args:
      name: Of its parameters; see `pieces`.
      block: What to make of a stage: the module of one block, or of a chain.

    Returns:
      `Stem`, `Classifier`, or `block` for a head or a chain.
    """
    if self.norm not in ('batch', 'group'):
      raise ValueError(f'unknown norm {self.norm!r}: use batch or group.')
    if self.stem not in STEMS:
      raise ValueError(
        f'unknown stem {self.stem!r}: use one of {", ".join(STEMS)}.'
      )
    conv = {'dtype': self.dtype, 'wide_kernel_gradient': self.for_cpu}
    norm = partial(
      BatchNorm if self.norm == 'batch' else GroupNorm16, dtype=self.dtype
    )
    if name == 'stem':
      large = self.stem == 'imagenet'
      return Stem(
        self.widths[0],
        size=7 if large else 3,
        stride=1 if self.stem == 'small' else 2,
        norm=None if self.pre_activation else norm,
        pool=large,
        name=name,
        **conv,
      )
    if name == 'classifier':
      return Classifier(self.num_classes, name=name)
    stage, kind = name.removeprefix('stage').split('_')
    return block(
      features=self.widths[int(stage) - 1],
      conv=partial(Conv, **conv),
      norm=norm,
      stride=min(int(stage), 2) if kind == 'head' else 1,
      bottleneck=self.bottleneck,
      pre_activation=self.pre_activation,
      name=name,
    )

  def with_chain_lengths(self, lengths: Mapping[str, int]) -> 'ResNet':
    """Returns the network whose named chains have other lengths.

    Args:
      lengths: Blocks in each named chain, e.g. K for a worker's sub-network.

    Returns:
      A module that takes the parameters of the sub-network.
    """
    sizes = list(self.stage_sizes)
    for name, length in lengths.items():
      sizes[stage_of(name) - 1] = 1 + length
    return self.clone(stage_sizes=tuple(sizes))


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


def rescale_branches(
  params: Mapping[str, Any], factors: Mapping[str, float], network: ResNet
) -> dict[str, Any]:
  """Multiplies the residual branches of chains by factors.

  Args:
    params: Global parameters by name.
    factors: For some chains by name.
    network: Whose parameters they are.

  Returns:
    Parameters whose named branches give `factor` times what they gave, since
    the last layer of a branch is linear in its parameters.
  """
  kind = 'conv' if network.pre_activation else 'norm'
  last = f'{kind}{3 if network.bottleneck else 2}'
  params = dict(params)
  for chain, factor in factors.items():
    scaled = jax.tree.map(lambda x, f=factor: x * f, params[chain][last])
    params[chain] = {**params[chain], last: scaled}
  return params


def chain_name(stage: int) -> str:
  """Returns the parameters' name of a stage's chain; stages count from 1."""
  return f'stage{stage}_chain'


def stage_of(chain: str) -> int:
  """Undoes `chain_name`."""
  return int(chain.removeprefix('stage').removesuffix('_chain'))


# The paper's family: pre-activation, basic blocks throughout. Its "ResNet101"
# has the stage sizes of He et al.'s 101 without their bottlenecks.
PreActResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2))
PreActResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3))
PreActResNet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3))
PreActResNet152 = partial(ResNet, stage_sizes=(3, 4, 36, 3))
PreActResNet200 = partial(ResNet, stage_sizes=(3, 4, 50, 3))

# The same depths as in the literature, with bottleneck blocks.
PreActBottleneckResNet50 = partial(PreActResNet34, bottleneck=True)
PreActBottleneckResNet101 = partial(PreActResNet101, bottleneck=True)
PreActBottleneckResNet152 = partial(
  ResNet, stage_sizes=(3, 8, 36, 3), bottleneck=True
)

# Small and deep, for 8x8 digits and quick tests of other small images.
PreActResNetTiny = partial(
  ResNet, stage_sizes=(1, 1, 13, 1), widths=(16, 16, 32, 32)
)

FAMILY: dict[str, Callable[..., ResNet]] = {
  'PreActResNet18': PreActResNet18,
  'PreActResNet34': PreActResNet34,
  'PreActResNet101': PreActResNet101,
  'PreActResNet152': PreActResNet152,
  'PreActResNet200': PreActResNet200,
  'PreActBottleneckResNet50': PreActBottleneckResNet50,
  'PreActBottleneckResNet101': PreActBottleneckResNet101,
  'PreActBottleneckResNet152': PreActBottleneckResNet152,
  'PreActResNetTiny': PreActResNetTiny,
}
