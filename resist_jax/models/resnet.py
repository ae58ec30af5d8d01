"""Residual networks whose stages are a head and a chain of identical blocks.

The parameters of a network are a plain dictionary: `stem`, then for each stage
`stageN_head` (its first block, where stride and channels change) and
`stageN_chain` (the blocks after it, stacked on a leading axis by `nn.scan`),
then `classifier`. To decompose a network is to slice that leading axis; a
sub-network is the same module with a shorter chain (`with_chain_lengths`).

With `cut_heads`, a head is split in two. Its residual branch becomes
`stageN_branch`, a chain of one block, which can be partitioned. Its projection
shortcut stays in `stageN_head`, because every sub-network needs it. A head
whose shortcut is the identity has no `stageN_head`.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.models.blocks import (
  Block,
  Branch,
  Classifier,
  Shortcut,
  Stem,
  output_of,
)
from resist_jax.models.layers import (
  BatchNorm,
  Conv,
  GroupNorm16,
  he_normal,
  torch_bias,
  torch_uniform,
)

PyTree = Any

STEMS = ('small', 'strided', 'whitened', 'imagenet')
INITIAL = ('he', 'torch')


class ResNet(nn.Module):
  """A residual network; `FAMILY` lists the members with names.

  Attributes:
    num_classes: Number of classes, the width of the classifier.
    stage_sizes: Number of blocks in each stage, including the head.
    widths: Channels of each stage; bottleneck blocks end in 4 times as many.
    bottleneck: Whether blocks have 1x1, 3x3 and 1x1 convolutions instead of two
      3x3 convolutions.
    pre_activation: Whether norm and ReLU come before each convolution (He et
      al. 2016) instead of after it (He et al. 2015).
    norm: `batch` (without running statistics) or `group`.
    stem: `small` (3x3, for images of 32 pixels), `strided` (3x3, stride 2, for
      images of 64 pixels or a quarter of the work), `whitened` (the same behind
      a 2x2 convolution that is not trained) or `imagenet` (7x7, stride 2, then
      max pooling).
    initial: What draws the initial values: `he` (normal, by fan-out; He et al.
      2015) or `torch` (PyTorch's default, as in the paper's scripts: uniform,
      of variance 1 / (3 fan-in), and a bias of the classifier that is drawn).
    dtype: Compute dtype; parameters and statistics are float32.
    platform: What trains: `cpu`, `gpu` or `tpu`; None is what JAX uses here. It
      chooses the form of layers; the result is the same up to rounding.
    cut_heads: Whether to separate the residual branches of heads, so that they
      can be partitioned too (first column of the paper's ablation).
    norm_axis: The mesh axis that splits batches, for batch norm; None if none
      does.
    gate: Initial value of a learnable factor on the residual branch of each
      block; None for none.
  """

  num_classes: int
  stage_sizes: tuple[int, ...]
  widths: tuple[int, ...] = (64, 128, 256, 512)
  bottleneck: bool = False
  pre_activation: bool = True
  norm: str = 'batch'
  stem: str = 'small'
  initial: str = 'he'
  dtype: Any = jnp.float32
  platform: str | None = None
  cut_heads: bool = False
  norm_axis: str | None = None
  gate: float | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    residual_scale: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array:
    """Classifies images.

    Args:
      x: Normalised images, `float32[B, H, W, C]`.
      residual_scale: For each chain by name, `float32[L]`, the factors that
        multiply the residual branches of its blocks; 1 for chains that are not
        named. The paper tests with 1/S on the partitioned chain (section 3).
        The branch of a head is a chain with L = 1.

    Returns:
      Logits, `float32[B, num_classes]`.
    """
    scales = dict(residual_scale or {})
    # Stack the parameters and statistics of a chain's blocks on axis 0.
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
        # Unrolled: XLA's CPU backend runs convolutions inside a loop 10 to 40
        # times slower, and a GPU copies what the loop keeps for the gradient.
        # Nothing is broadcast, so Flax need not trace a block twice.
        chain = partial(
          nn.scan,
          length=size - 1,
          unroll=size - 1,
          check_constancy_invariants=False,
          **stacked,
        )
        ones = jnp.ones((size - 1,), jnp.float32)
        x, _ = self.make_piece(name, chain)(x, scales.get(name, ones))
    return self.make_piece('classifier')(x)

  @property
  def saves_traffic(self) -> bool:
    """Whether to train by the layers of `accelerated`, made for GPUs."""
    return (self.platform or jax.default_backend()) == 'gpu'

  @nn.nowrap
  def pieces(self) -> list[tuple[str, int | None]]:
    """Lists the pieces of the network in the order in which they are applied.

    Returns:
      For each piece, the name of its parameters and, if it is a block of a
      chain, its index in that chain, else None.
    """
    pieces: list[tuple[str, int | None]] = [('stem', None)]
    for stage, size in enumerate(self.stage_sizes, start=1):
      if not self.cut_heads or self.has_projection(stage):
        pieces.append((head_name(stage), None))
      if self.cut_heads:
        pieces.append((branch_name(stage), 0))
      pieces += [(chain_name(stage), i) for i in range(size - 1)]
    return [*pieces, ('classifier', None)]

  @nn.nowrap
  def has_projection(self, stage: int) -> bool:
    """Returns whether a stage's first block changes stride or channels.

    Args:
      stage: The stage, from 1.

    Returns:
      True if its shortcut is a convolution.
    """
    return stage > 1 or self.bottleneck

  # `nowrap`: a piece made inside `__call__` becomes a submodule of the network,
  # and one made outside stands alone and is applied with its own parameters.
  @nn.nowrap
  def make_piece(
    self, name: str, stack: Callable[[Any], Any] = lambda block: block
  ) -> Any:
    """Makes the module of one piece, which can also be applied alone.

    Args:
      name: Name of its parameters; see `pieces`.
      stack: Transforms the class of a block into that of a whole chain, as
        `nn.scan` does; by default the piece is a single block.

    Returns:
      A `Stem`, `Classifier` or `Block`; for a head that is cut, a `Shortcut` or
      `Branch`.

    Raises:
      ValueError: If the fields `norm`, `stem` or `initial` have unknown values.
    """
    self._check()
    conv: dict[str, Any] = {
      'dtype': self.dtype,
      'kernel_init': he_normal if self.initial == 'he' else torch_uniform,
    }
    norm = partial(GroupNorm16, dtype=self.dtype)
    if self.norm == 'batch':
      norm = partial(
        BatchNorm,
        dtype=self.dtype,
        axis_name=self.norm_axis,
        saves_traffic=self.saves_traffic,
      )
    if name == 'stem':
      return self._stem(name, conv, norm)
    if name == 'classifier':
      return self._classifier(name)
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
      gate=self.gate,
      name=name,
    )

  @nn.nowrap
  def _check(self) -> None:
    """Raises a ValueError if a field has an unknown value."""
    if self.norm not in ('batch', 'group'):
      raise ValueError(f'unknown norm {self.norm!r}: use batch or group.')
    if self.stem not in STEMS:
      raise ValueError(
        f'unknown stem {self.stem!r}: use one of {", ".join(STEMS)}.'
      )
    if self.initial not in INITIAL:
      raise ValueError(
        f'unknown initial values {self.initial!r}: use one of '
        f'{", ".join(INITIAL)}.'
      )

  @nn.nowrap
  def _stem(self, name: str, conv: Mapping[str, Any], norm: Any) -> Stem:
    large = self.stem == 'imagenet'
    return Stem(
      self.widths[0],
      size=7 if large else 3,
      stride=1 if self.stem == 'small' else 2,
      whitens=self.stem == 'whitened',
      norm=None if self.pre_activation else norm,
      pool=large,
      name=name,
      **conv,
    )

  @nn.nowrap
  def _classifier(self, name: str) -> Classifier:
    # Otherwise flax's defaults, with a bias of zero.
    drawn: dict[str, Any] = {}
    if self.initial != 'he':
      features = (4 if self.bottleneck else 1) * self.widths[-1]
      drawn = {'kernel_init': torch_uniform, 'bias_init': torch_bias(features)}
    return Classifier(self.num_classes, name=name, **drawn)

  def with_chain_lengths(self, lengths: Mapping[str, int]) -> 'ResNet':
    """Returns the same network with chains of other lengths.

    Args:
      lengths: For some chains by name, the number of blocks, such as K for a
        worker's sub-network. Branches of heads keep their length of 1.

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
  """Multiplies the residual branches of chains by constant factors.

  The last layer of a branch is linear in its parameters, so only these are
  scaled.

  Args:
    params: Global parameters by name.
    factors: The factor of each chain to scale, by name.
    network: The network to which the parameters belong.

  Returns:
    New parameters, with which the branches of the named chains compute `factor`
    times their previous output.
  """
  last, params = _last_layer(network), dict(params)
  for chain, factor in factors.items():
    scaled = jax.tree.map(lambda x, f=factor: x * f, params[chain][last])
    params[chain] = {**params[chain], last: scaled}
  return params


def _last_layer(network: ResNet) -> str:
  """Returns the name of the last layer of a residual branch."""
  kind = 'conv' if network.pre_activation else 'norm'
  return f'{kind}{3 if network.bottleneck else 2}'


def without_gates(params: Mapping[str, Any], network: ResNet) -> dict[str, Any]:
  """Multiplies each gate into the last layer of its residual branch.

  Args:
    params: Global parameters by name.
    network: The network to which the parameters belong.

  Returns:
    Parameters of the same network without gates, which computes the same.
  """
  last, found = _last_layer(network), {}
  for name, piece in params.items():
    piece = dict(piece)
    gate = piece.pop('gate', None)
    if gate is not None:
      piece[last] = jax.tree.map(
        lambda x, g=gate: x * g.reshape(g.shape + (1,) * (x.ndim - g.ndim)),
        piece[last],
      )
    found[name] = piece
  return found


def initial_params(
  network: ResNet, image_shape: tuple[int, ...], seed: int
) -> dict[str, PyTree]:
  """Initialises the global parameters one piece at a time.

  No device ever holds the whole network, each kind of block compiles once, and
  the parameters of a piece depend only on the seed and its position.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    seed: Seed of the run.

  Returns:
    Global parameters by name, chains stacked to `[L, ...]`, on the host.
  """
  x: Any = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  by_name: dict[str, list[PyTree]] = {}
  stacked = set()
  hashable: Any = network.clone(  # Also where somebody gives lists.
    stage_sizes=tuple(network.stage_sizes), widths=tuple(network.widths)
  )
  modules = _modules(hashable)
  # This program runs once: on CPU, compile it fast rather than well.
  on_cpu = jax.default_backend() == 'cpu'
  options = {'xla_backend_optimization_level': 0} if on_cpu else None
  init = jax.jit(_init, static_argnums=0, compiler_options=options)
  for position, (name, block) in enumerate(network.pieces()):
    module = modules[name]
    key = jax.random.fold_in(jax.random.key(seed), position)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    variables = init(module, key, zeros)
    if not block:  # The other blocks of a chain keep the shape.
      x = jax.eval_shape(partial(module.apply, method=output_of), variables, x)
    by_name.setdefault(name, []).append(jax.device_get(variables['params']))
    if block is not None:
      stacked.add(name)
  return {
    name: (
      jax.tree.map(lambda *blocks: np.stack(blocks), *blocks)
      if name in stacked
      else blocks[0]
    )
    for name, blocks in by_name.items()
  }


@lru_cache(maxsize=8)
def _modules(network: ResNet) -> dict[str, Any]:
  """Makes a module for each name, once: JAX compiles for each object anew."""
  return {name: network.make_piece(name) for name, _ in network.pieces()}


def _init(module, key, x):
  return module.init(key, x, method=output_of)


def head_name(stage: int) -> str:
  """Returns the name of the parameters of a head.

  Args:
    stage: Its stage, from 1.

  Returns:
    A key of the parameters, such as `stage3_head`.
  """
  return f'stage{stage}_head'


def branch_name(stage: int) -> str:
  """Returns the name of the parameters of the branch of a cut head.

  Args:
    stage: Its stage, from 1.

  Returns:
    A key of the parameters, such as `stage3_branch`.
  """
  return f'stage{stage}_branch'


def is_branch(chain: str) -> bool:
  """Returns whether the chain of this name is the branch of a head."""
  return chain.endswith('_branch')


def chain_name(stage: int) -> str:
  """Returns the name of the parameters of a chain.

  Args:
    stage: Its stage, from 1.

  Returns:
    A key of the parameters, such as `stage3_chain`.
  """
  return f'stage{stage}_chain'


def stage_of(chain: str) -> int:
  """Returns the stage of a chain: the inverse of `chain_name`.

  Args:
    chain: A name such as `stage3_chain`.

  Returns:
    The stage, from 1.
  """
  return int(chain.removeprefix('stage').removesuffix('_chain'))


# The paper's family has pre-activation basic blocks throughout. Its "ResNet101"
# has the stage sizes of He et al.'s ResNet-101, but no bottlenecks.
PreActResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2))
PreActResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3))
PreActResNet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3))
PreActResNet152 = partial(ResNet, stage_sizes=(3, 4, 36, 3))
PreActResNet200 = partial(ResNet, stage_sizes=(3, 4, 50, 3))

# Bottleneck blocks and the depths usual in the literature.
PreActBottleneckResNet50 = partial(PreActResNet34, bottleneck=True)
PreActBottleneckResNet101 = partial(PreActResNet101, bottleneck=True)
PreActBottleneckResNet152 = partial(
  ResNet, stage_sizes=(3, 8, 36, 3), bottleneck=True
)

# A narrow network with a long chain, for 8x8 digits and quick tests.
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
