"""Residual networks whose stages are a head and a chain of identical blocks.

The parameters of a network are a plain dictionary: `stem`, then for every
stage `stageN_head` (its first block, where stride and channels change) and
`stageN_chain` (the blocks after it, stacked on a leading axis by `nn.scan`),
then `classifier`. Slicing that leading axis is the whole of decomposition, and
a sub-network is the same module with a shorter chain (`with_chain_lengths`).

With `cut_heads`, the residual branch of a head is apart: `stageN_branch`, a
chain of one, for what no sub-network can do without stays in `stageN_head`. A
head whose shortcut is the identity has nothing of that kind.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from resist_jax.blocks import (
  Block,
  Branch,
  Classifier,
  GroupNorm16,
  Shortcut,
  Stem,
)
from resist_jax.layers import BatchNorm, Conv

STEMS = ('small', 'strided', 'imagenet')


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
    for_cpu: Use `layers.convolve_with_wide_kernel_gradient`. The result is the
      same.
    cut_heads: Keep the residual branches of heads apart, so that they can be
      partitioned, too (the first column of the paper's ablation).
    norm_axis: The mesh axis that batches are spread over, for batch norm.
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
  cut_heads: bool = False
  norm_axis: str | None = None

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
        paper tests with 1/S on the partitioned chain (section 3). A branch of
        a head is a chain with L = 1.

    Returns:
      Logits, `float32[B, num_classes]`.
    """
    scales = dict(residual_scale or {})
    # Parameters and statistics of the blocks of a chain are stacked.
    stacked: dict[str, Any] = {
      'variable_axes': {'params': 0, 'batch_stats': 0},
      'split_rngs': {'params': True},
    }
    branch = partial(nn.vmap, in_axes=(None, 0), axis_size=1, **stacked)
    one: Any = jnp.ones((), jnp.float32)
    x = self.make_piece('stem')(x)
    for stage, size in enumerate(self.stage_sizes, start=1):
      if not self.cut_heads:
        x, _ = self.make_piece(head_name(stage))(x, one)
      else:
        if self.has_projection(stage):
          x = self.make_piece(head_name(stage))(x)
        name = branch_name(stage)
        x, _ = self.make_piece(name, branch)(x, scales.get(name, one[None]))
        x = x[0]
      if size > 1:
        name = chain_name(stage)
        # Laid out: XLA's CPU backend runs convolutions in loops some 10 to 40
        # times slower, and a GPU copies what a loop keeps for the way back.
        chain = partial(nn.scan, length=size - 1, unroll=size - 1, **stacked)
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
      if not self.cut_heads or self.has_projection(stage):
        passed.append((head_name(stage), None))
      if self.cut_heads:
        passed.append((branch_name(stage), 0))
      passed += [(chain_name(stage), i) for i in range(size - 1)]
    return [*passed, ('classifier', None)]

  @nn.nowrap
  def has_projection(self, stage: int) -> bool:
    """Returns whether a stage's first block changes stride or channels."""
    return stage > 1 or self.bottleneck

  # Unwrapped, so that a piece belongs to the network inside its `__call__`, and
  # to nobody outside: there it is applied alone, with its own parameters.
  @nn.nowrap
  def make_piece(
    self, name: str, stack: Callable[[Any], Any] = lambda block: block
  ) -> Any:
    """Makes a part of the network that can run alone.

    Args:
      name: Of its parameters; see `pieces`.
      stack: What makes the module of a chain from that of one of its blocks;
        without, the piece is one block.

    Returns:
      `Stem`, `Classifier`, or of a stage, `Block`; where a head is cut,
      `Shortcut` or `Branch`.
    """
    if self.norm not in ('batch', 'group'):
      raise ValueError(f'unknown norm {self.norm!r}: use batch or group.')
    if self.stem not in STEMS:
      raise ValueError(
        f'unknown stem {self.stem!r}: use one of {", ".join(STEMS)}.'
      )
    conv = {'dtype': self.dtype, 'wide_kernel_gradient': self.for_cpu}
    norm = partial(GroupNorm16, dtype=self.dtype)
    if self.norm == 'batch':
      norm = partial(BatchNorm, dtype=self.dtype, axis_name=self.norm_axis)
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
    block: Any = Block
    if self.cut_heads and kind != 'chain' and self.has_projection(int(stage)):
      block = Shortcut if kind == 'head' else Branch
    return stack(block)(
      features=self.widths[int(stage) - 1],
      conv=partial(Conv, **conv),
      norm=norm,
      stride=1 if kind == 'chain' else min(int(stage), 2),
      bottleneck=self.bottleneck,
      pre_activation=self.pre_activation,
      name=name,
    )

  def with_chain_lengths(self, lengths: Mapping[str, int]) -> 'ResNet':
    """Returns the network whose named chains have other lengths.

    Args:
      lengths: Blocks in each named chain, e.g. K for a worker's sub-network;
        1 in that of a branch.

    Returns:
      A module that takes the parameters of the sub-network.
    """
    sizes = list(self.stage_sizes)
    for name, length in lengths.items():
      if not is_branch(name):
        sizes[stage_of(name) - 1] = 1 + length
    return self.clone(stage_sizes=tuple(sizes))


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


def head_name(stage: int) -> str:
  """Returns the parameters' name of a stage's head; stages count from 1."""
  return f'stage{stage}_head'


def branch_name(stage: int) -> str:
  """Returns the parameters' name of the branch of a head that is cut."""
  return f'stage{stage}_branch'


def is_branch(chain: str) -> bool:
  """Returns whether a chain is the branch of a head."""
  return chain.endswith('_branch')


def chain_name(stage: int) -> str:
  """Returns the parameters' name of a stage's chain."""
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
