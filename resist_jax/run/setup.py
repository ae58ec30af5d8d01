"""From a config to the objects of a run; nothing here writes anything.

Nothing below this reads a ConfigDict.
"""

from collections.abc import Iterator
import dataclasses
from functools import cached_property, partial
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import ml_collections
import numpy as np

from resist_jax import accounting, data, rounds
from resist_jax.data import augmentation, pipeline
from resist_jax.data.streaming import StreamedImages
from resist_jax.decomposition.assignments import Assignment
from resist_jax.errors import ConfigError
from resist_jax.exchange.collectives import DATA
from resist_jax.models.resnet import ResNet
from resist_jax.rounds import state as state_lib
from resist_jax.rounds.arrays import place, place_parts
from resist_jax.run import classification, optimizer
from resist_jax.run.config import build_model, chosen_depths, cut_chains
from resist_jax.run.evaluate import Evaluator
from resist_jax.run.phase import Phase

PyTree = Any

DEALING = 2**31 - 1  # No round has this number.


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything a run needs.

  Attributes:
    config: As it was given.
    dataset: What is learned.
    network: The global network.
    chains: L of each chain that ResIST cuts, by name; empty for baselines.
    sizes: Parameter counts, as the protocol cuts the network.
    mesh: D devices, or groups of them.
    depths: Of unequal workers; empty for an even deal.
  """

  config: ml_collections.ConfigDict
  dataset: data.Dataset
  network: ResNet
  chains: dict[str, int]
  sizes: accounting.Sizes
  mesh: Mesh
  depths: tuple[int, ...] = ()

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
      config.optimizer.drops,
    )

  @cached_property
  def augmentation(self) -> augmentation.Augmentation:
    """What happens to training images."""
    return augmentation.choose(self.config.data.augment, self.dataset)

  @cached_property
  def feed(self) -> pipeline.Resident | pipeline.Stream:
    """Where rounds have their examples from."""
    config, train = self.config, self.dataset.train
    indices = partial(
      data.batch_indices,
      len(train),
      config.batch_size,
      config.seed,
      local_steps=config.local_steps,
      num_workers=config.num_workers,
      sharded=config.data.sharded,
    )
    if isinstance(train.images, StreamedImages):
      crops = self.augmentation.resized_crop
      rounds, seed = config.num_rounds, config.seed
      mine = state_lib.workers_here(self.mesh, config.num_workers)
      return pipeline.Stream(train.images, indices, rounds, seed, crops, mine)
    return pipeline.Resident(train.images, train.labels, indices)

  @cached_property
  def constants(self) -> PyTree:
    """What all rounds share, see `feed`; it lies on the devices."""
    everywhere = NamedSharding(self.mesh, state_lib.REPLICATED)
    return place(self.feed.constants, everywhere)

  def batches(self, round_index: int) -> PyTree:
    """Returns what the steps of a round get, see `feed`."""
    return self.feed.batches(round_index)

  def tell_all(self, number: float) -> jax.Array:
    """Returns `float32[S]`, in whose rows each process says a number."""
    S = self.config.num_workers
    here = len(state_lib.workers_here(self.mesh, S))
    mine = np.full(here, number, np.float32)
    by_worker = NamedSharding(self.mesh, state_lib.SHARDED)
    return place_parts(mine, by_worker, S)

  def phase_name(self, round_index: int) -> str:
    """Returns the protocol of a round."""
    config = self.config
    round_index = min(round_index, config.num_rounds - 1)
    before = round_index < config.phases.full_before
    after = round_index >= config.num_rounds - config.phases.full_after
    if config.protocol == 'resist' and (before or after):
      return 'local_sgd'
    return config.protocol

  def protocol(self, name: str) -> state_lib.Protocol:
    """Returns what a protocol means for rounds of this run."""
    config = self.config
    return state_lib.Protocol(
      num_workers=config.num_workers,
      local_steps=config.local_steps,
      num_blocks=self.chains if name == 'resist' else {},
      min_depth=cut_chains(config),
      depths=self.depths if name == 'resist' else (),
      average_gradients=name == 'data_parallel',
      carry_velocity=(
        config.optimizer.carry_momentum or name == 'data_parallel'
      ),
      exchange=config.exchange,
      wire_format=config.wire_format,
      leave_out=config.faults.leave_out,
      loss_factor=config.faults.loss_factor,
    )

  def phase(self, round_index: int) -> Phase:
    """Builds the phase that a round belongs to."""
    config, name = self.config, self.phase_name(round_index)
    protocol = self.protocol(name)
    pad, flip, _ = self.augmentation
    D, G = state_lib.mesh_sizes(self.mesh)
    scale, axis = self.training_scale(name), DATA if G > 1 else None
    loss_fn = classification.make_loss(
      self.network, self.dataset, scale, pad, flip, axis
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
      metrics=classification.METRICS,
      streamed=self.dataset.streamed,
    )
    sizes = self.sizes_for(protocol)
    return Phase(name, protocol, run, sizes, D, G)

  def sizes_for(self, protocol: state_lib.Protocol) -> accounting.Sizes:
    """Returns parameter counts, as a protocol cuts the network."""
    return self.sizes if protocol.num_blocks else self.full_sizes()

  def full_sizes(self) -> accounting.Sizes:
    """Returns the sizes of the network with no chain cut."""
    return accounting.Sizes(self.sizes.total, self.sizes.total, {}, {})

  def deals(self, phase: Phase, start: int) -> Iterator[dict[str, Assignment]]:
    """Deals the blocks of a round, and of each one after it.

    Args:
      phase: Whose chains to deal.
      start: The first round wanted.

    Yields:
      The deal of each chain; a pure function of (seed, round).
    """
    seed, protocol = self.config.seed, phase.protocol
    if protocol.exchange == 'hand_over':
      streams = {
        name: protocol.dealer(name).deals([seed, DEALING, i], start)
        for i, name in enumerate(protocol.num_blocks)
      }
      while True:
        yield {name: next(stream) for name, stream in streams.items()}
    for round_index in itertools.count(start):
      # Apart from the stream of training, which folds in the round first.
      key = jax.random.fold_in(jax.random.key(seed), DEALING)
      key = jax.random.fold_in(key, round_index)
      yield {
        name: Assignment(
          np.asarray(protocol.sample_slots(jax.random.fold_in(key, i), name))
        )
        for i, name in enumerate(protocol.num_blocks)
      }

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
      self.mesh,
      self.config.evaluation.batches_at_once,
    )

  def global_scale(self) -> dict[str, float]:
    """Returns the residual scale of the global model's cut chains."""
    scaled = self.config.residual_scale == 'evaluation'
    return {
      chain: self._share(chain) if scaled else 1.0 for chain in self.chains
    }

  def _share(self, chain: str) -> float:
    return accounting.expected_share(
      self.chains[chain],
      self.config.num_workers,
      cut_chains(self.config)[chain],
      self.depths,
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
  G = config.devices_per_worker
  mesh = state_lib.make_mesh(_num_devices(config), G)
  dataset = data.load(
    config.data.name,
    config.data.dir,
    config.data.validation,
    streaming=config.data.streaming,
    image_size=config.data.image_size,
    resize=config.data.augment.startswith('resized'),
    extra_tests=config.data.extra_tests,
  )
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
  names = list(cut_chains(config)) if config.protocol == 'resist' else []
  image = jnp.zeros((1, *dataset.train.images.shape[1:]), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)['params']
  sizes = accounting.measure(shapes, names)
  depths = chosen_depths(config)
  return Setup(config, dataset, network, sizes.num_blocks, sizes, mesh, depths)


def _num_devices(config) -> int:
  """Chooses D * G; every process has whole groups, and equally many."""
  processes, G = jax.process_count(), config.devices_per_worker
  here = len(jax.local_devices())
  if config.num_workers % processes:
    raise ConfigError(
      f'num_workers is {config.num_workers}, but there are {processes} '
      'processes: use a multiple of them.'
    )
  if config.num_devices % (processes * G):
    raise ConfigError(
      f'num_devices is {config.num_devices}, but there are {processes} '
      f'processes, and {G} devices for each worker: use a multiple of '
      f'{processes * G}, or leave it at 0.'
    )
  if here < G:
    raise ConfigError(
      f'devices_per_worker is {G}, but there are {here} here: lower it, or '
      'leave it at 1.'
    )
  if config.num_devices > processes * here:
    raise ConfigError(
      f'num_devices is {config.num_devices}, but there are {processes * here} '
      'here: lower it, or leave it at 0.'
    )
  if config.num_devices:
    return config.num_devices
  possible = range(processes, processes * (here // G) + 1, processes)
  return G * max(d for d in possible if config.num_workers % d == 0)
