"""From a config to the objects of a run; nothing here writes anything.

With `train.py`, the last place that reads a ConfigDict.
"""

from collections.abc import Mapping
import dataclasses
from functools import cached_property
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import ml_collections
import numpy as np

from resist_jax import (
  accounting,
  classification,
  data,
  decomposition,
  optimizer,
  rounds,
)
from resist_jax import state as state_lib
from resist_jax.config import ConfigError, build_model
from resist_jax.evaluate import Evaluator
from resist_jax.model import ResNet, chain_name

PyTree = Any

DEALING = 2**31 - 1  # No round has this number.


@dataclasses.dataclass(frozen=True)
class Phase:
  """Rounds of one protocol: a resist run may begin and end with local SGD.

  Attributes:
    name: The protocol.
    protocol: What it means for rounds.
    run: The compiled round.
    bytes_per_round: By the paper's count.
  """

  name: str
  protocol: state_lib.Protocol
  run: rounds.Round
  bytes_per_round: int


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything a run needs.

  Attributes:
    config: As it was given.
    dataset: What is learned.
    network: The global network.
    chains: L of each chain that ResIST cuts, by name; empty for baselines.
    sizes: Parameter counts, as the protocol cuts the network.
    mesh: D devices.
  """

  config: ml_collections.ConfigDict
  dataset: data.Dataset
  network: ResNet
  chains: dict[str, int]
  sizes: accounting.Sizes
  mesh: Mesh

  def initial_params(self) -> dict[str, PyTree]:
    """Returns the global parameters before the first round."""
    image = jnp.zeros((1, *self.dataset.train.images.shape[1:]), jnp.float32)
    key = jax.random.key(self.config.seed)
    # It runs once: on CPU, compile it fast rather than well.
    options = {'xla_backend_optimization_level': 0} if self.on_cpu else None
    init = jax.jit(self.network.init, compiler_options=options)
    return init(key, image)['params']

  @property
  def on_cpu(self) -> bool:
    """Whether the devices are CPUs, virtual ones included."""
    return self.mesh.devices.flat[0].platform == 'cpu'

  @cached_property
  def schedule(self) -> optimizer.Schedule:
    """Learning rate at a step of the whole run."""
    config = self.config
    return optimizer.make_schedule(
      config.optimizer.schedule,
      config.lr,
      config.num_rounds * config.local_steps,
      config.optimizer.warmup_rounds * config.local_steps,
    )

  @cached_property
  def constants(self) -> tuple[jax.Array, jax.Array]:
    """All training images and labels, on every device."""
    train = self.dataset.train
    everywhere = NamedSharding(self.mesh, state_lib.REPLICATED)
    return jax.device_put((train.images, train.labels), everywhere)

  def phase_name(self, round_index: int) -> str:
    """Returns the protocol of a round."""
    config = self.config
    before = round_index < config.phases.full_before
    after = round_index >= config.num_rounds - config.phases.full_after
    if config.protocol == 'resist' and (before or after):
      return 'local_sgd'
    return config.protocol

  def phase(self, round_index: int) -> Phase:
    """Builds the phase that a round belongs to."""
    config, name = self.config, self.phase_name(round_index)
    chains = self.chains if name == 'resist' else {}
    protocol = state_lib.Protocol(
      num_workers=config.num_workers,
      local_steps=config.local_steps,
      num_blocks=chains,
      average_gradients=name == 'data_parallel',
      carry_velocity=(
        config.optimizer.carry_momentum or name == 'data_parallel'
      ),
    )
    pad, flip = _augmentation(config.data, self.dataset)
    loss_fn = classification.make_loss(
      self.network, self.dataset, self.training_scale(name), pad, flip
    )
    run = rounds.make_round(
      loss_fn,
      optimizer.make_optimizer(
        config.optimizer.momentum, config.optimizer.weight_decay
      ),
      self.schedule,
      protocol,
      self.mesh,
      config.seed,
      on_device=not self.on_cpu,
      metrics=('accuracy',),
    )
    return Phase(name, protocol, run, self._bytes_per_round(protocol))

  def _bytes_per_round(self, protocol: state_lib.Protocol) -> int:
    decomposed = bool(protocol.num_blocks)
    sent = accounting.round_trip_bytes(
      self.sizes if decomposed else self.full_sizes(),
      protocol.num_workers,
      self.config.min_depth if decomposed else 0,
    )
    if protocol.average_gradients:  # Those travel, at every step.
      return sent * protocol.local_steps
    return sent * 2 if protocol.carry_velocity else sent

  def full_sizes(self) -> accounting.Sizes:
    """Returns the sizes of the network with no chain cut."""
    return accounting.Sizes(self.sizes.total, self.sizes.total, {}, {})

  def slots(self, phase: Phase, round_index: int) -> dict[str, jax.Array]:
    """Deals the blocks of a round; a pure function of (seed, round)."""
    config = self.config
    # Apart from the stream of training, which folds in the round first.
    key = jax.random.fold_in(jax.random.key(config.seed), DEALING)
    key = jax.random.fold_in(key, round_index)
    return {
      name: decomposition.sample_slots(
        jax.random.fold_in(key, i), length, config.num_workers, config.min_depth
      )
      for i, (name, length) in enumerate(phase.protocol.num_blocks.items())
    }

  def batches(self, round_index: int) -> np.ndarray:
    """Returns the examples of a round, `int32[S, T, B]`."""
    config = self.config
    return data.batch_indices(
      len(self.dataset.train),
      config.batch_size,
      config.seed,
      round_index,
      config.local_steps,
      config.num_workers,
      config.data.sharded,
    )

  @cached_property
  def evaluator(self) -> Evaluator:
    """What measures the global model, at its residual scale."""
    scales = {
      name: jnp.full(self.chains[name], scale, jnp.float32)
      for name, scale in self.global_scale().items()
    }
    return Evaluator(
      self.network,
      self.dataset,
      scales,
      self.config.evaluation.batch_size,
      self.config.evaluation.statistics_images,
    )

  def global_scale(self) -> dict[str, float]:
    """Returns the residual scale of the global model's cut chains."""
    scaled = self.config.residual_scale == 'evaluation'
    return {
      chain: self._share(chain) if scaled else 1.0 for chain in self.chains
    }

  def _share(self, chain: str) -> float:
    return accounting.expected_share(
      self.chains[chain], self.config.num_workers, self.config.min_depth
    )

  def training_scale(self, phase_name: str) -> dict[str, float]:
    """Returns the factor on residual branches of cut chains in training.

    The global network must mean the same in all phases. Scaled at evaluation,
    sub-networks train at 1 and full models at the share (as the paper's warm-up
    does); scaled in training, sub-networks train at 1 / share.
    """
    where = self.config.residual_scale
    decomposed = phase_name == 'resist'
    scale = {}
    for chain in self.chains:
      share = self._share(chain)
      if where == 'evaluation' and not decomposed:
        scale[chain] = share
      elif where == 'training' and decomposed:
        scale[chain] = 1 / share
      else:
        scale[chain] = 1.0
    return scale


def prepare(config: ml_collections.ConfigDict) -> Setup:
  """Builds what a run needs, and finds the mistakes that need data or devices.

  Args:
    config: A valid one.

  Returns:
    The setup.

  Raises:
    ConfigError: If the data or the devices do not fit the config.
  """
  mesh = state_lib.make_mesh(_num_devices(config))
  dataset = data.load(config.data.name, config.data.dir, config.data.validation)
  visible = len(dataset.train)
  if config.data.sharded:
    visible //= config.num_workers
  if config.batch_size > visible:
    raise ConfigError(
      f'batch_size is {config.batch_size}, but a worker sees only {visible} '
      f'training images of {config.data.name}: lower batch_size.'
    )
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  network = build_model(config, dataset.num_classes, for_cpu=on_cpu)
  resist = config.protocol == 'resist'
  names = [chain_name(s) for s in config.partition] if resist else []
  image = jnp.zeros((1, *dataset.train.images.shape[1:]), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)['params']
  sizes = accounting.measure(shapes, names)
  return Setup(config, dataset, network, sizes.num_blocks, sizes, mesh)


def _num_devices(config) -> int:
  at_hand = len(jax.devices())
  if config.num_devices > at_hand:
    raise ConfigError(
      f'num_devices is {config.num_devices}, but there are {at_hand} here: '
      'lower it, or leave it at 0.'
    )
  if config.num_devices:
    return config.num_devices
  return max(d for d in range(1, at_hand + 1) if config.num_workers % d == 0)


def _augmentation(
  config: Mapping[str, Any], dataset: data.Dataset
) -> tuple[int, bool]:
  """Returns the pixels to pad before a crop, and whether to flip."""
  height = dataset.train.images.shape[1]
  kind = config['augment']
  if kind == 'auto':
    # TFDS names may go on with a config and a version: emnist/letters:3.1.0.
    characters = re.split('[/:]', dataset.name)[0] in data.CHARACTERS
    kind = 'crop' if characters else 'crop_flip'
    if height < 24:  # A shift by one pixel of eight is a lot.
      kind = 'none' if characters else 'flip'
  pad = height // 8 if 'crop' in kind else 0  # CIFAR: 4 pixels of 32.
  return pad, 'flip' in kind
