"""From a config to what a run is made of; nothing here writes anything."""

from collections import Counter
import dataclasses
from functools import cached_property, partial
import hashlib
import json
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import ml_collections
import numpy as np
import optax

from resist_jax import accounting, data
from resist_jax.errors import ConfigError
from resist_jax.rounds import avoid_loads, make_mesh, storage
from resist_jax.rounds.arrays import place
from resist_jax.rounds.mesh import REPLICATED, most_devices, workers_here
from resist_jax.run import module_task, optimizer, resnet_task, same_data
from resist_jax.run.config import augmentation, chosen_depths, get_config
from resist_jax.run.task import Dataset, Task

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run is made of.

  Attributes:
    config: The config as it was given.
    task: What is learned.
    chains: L of each chain that ResIST cuts, by name; empty for baselines.
    sizes: Parameter counts, with these chains cut.
    mesh: D devices, or groups of them.
    depths: Blocks of each worker, where workers are unequal.
  """

  config: ml_collections.ConfigDict
  task: Task
  chains: dict[str, int]
  sizes: accounting.Sizes
  mesh: Mesh
  depths: tuple[int, ...] = ()

  @property
  def on_cpu(self) -> bool:
    """Whether the devices are CPUs, virtual ones included."""
    return self.mesh.devices.flat[0].platform == 'cpu'

  @property
  def dataset(self) -> Dataset:
    """The examples."""
    return self.task.dataset

  @cached_property
  def described(self) -> dict[str, Any]:
    """What the examples are, read once; see `same_data.describe`."""
    return same_data.describe(self.dataset, self.config.data.name)

  @cached_property
  def schedule(self) -> optax.Schedule:
    """The learning rate at a step of the whole run, read once."""
    return optimizer.schedule(self.config)

  @cached_property
  def pipeline(self) -> data.Resident | data.Stream:
    """Where rounds get their examples from."""
    config, dataset = self.config, self.dataset
    train, crops, mirrors = dataset.train, False, False
    if isinstance(dataset, data.Dataset):
      chosen = augmentation(config, dataset)
      crops, mirrors = chosen.resized_crop, chosen.alternate
    indices = partial(
      data.batch_indices,
      len(train),
      config.batch_size,
      config.seed,
      local_steps=config.local_steps,
      num_workers=config.num_workers,
      sharded=config.data.sharded,
      mirrors=mirrors,
    )
    if isinstance(dataset, data.Tables):
      return data.Resident(dataset.train.arrays, indices)
    train = dataset.train
    if isinstance(train.images, data.StreamedImages):
      rounds, seed = config.num_rounds, config.seed
      mine = workers_here(self.mesh, config.num_workers)
      return data.Stream(train.images, indices, rounds, seed, crops, mine)
    rows = data.as_rows(train.images)
    return data.Resident((rows, train.labels), indices)

  @cached_property
  def constants(self) -> PyTree:
    """What all rounds share, see `pipeline`; it lies on the devices."""
    if self.pipeline.constants is None:
      return None
    everywhere = NamedSharding(self.mesh, REPLICATED)
    return place(self.pipeline.constants, everywhere)


def naming(
  config: ml_collections.ConfigDict, dataset: Dataset | None
) -> ml_collections.ConfigDict:
  """Returns a config that names the data set which a program gives.

  Args:
    config: A valid one.
    dataset: The data set; the config stays as it is if None.

  Returns:
    A config whose `data.name` is `given:NAME:DIGEST`, so that a run goes on
    with the same data only. Other fields of `data` that say where data are and
    how they are read have their defaults.

  Raises:
    ConfigError: If it asks for what the data set does not have.
  """
  if dataset is None:
    return config
  named = config.copy_and_resolve_references()
  defaults = get_config().data
  for field in ('validation', 'extra_tests', 'train_split', 'test_split'):
    if config.data[field] != defaults[field]:
      raise ConfigError(
        f'data.{field} is {config.data[field]!r}, but the program gives a data '
        f'set whose splits are fixed: leave data.{field} at its default.'
      )
  if isinstance(dataset, data.Dataset):
    _check_crops(config, dataset)
  for field in ('dir', 'streaming', 'image_size'):
    named.data[field] = defaults[field]
  described = json.dumps(describe_data(dataset), sort_keys=True)
  digest = hashlib.sha256(described.encode()).hexdigest()[:12]
  named.data.name = f'{data.GIVEN}{dataset.name}:{digest}'
  return named


def _check_crops(config, dataset: data.Dataset) -> None:
  if config.data.augment.startswith('resized') and not dataset.resized:
    raise ConfigError(
      f'data.augment is {config.data.augment!r}, but the images of the data '
      'set that the program gives are not resized while they are read: give '
      'from_source an image_size, or choose another augmentation.'
    )


def prepare(
  config: ml_collections.ConfigDict, dataset: Dataset | None = None
) -> Setup:
  """Builds what a run needs, and finds the mistakes that need data or devices.

  Args:
    config: A valid one.
    dataset: What to train on; None for the one that the config names.

  Returns:
    The setup.

  Raises:
    ConfigError: If the data or the devices do not fit the config.
  """
  count = _num_devices(config)
  try:
    mesh = make_mesh(count, config.devices_per_worker)
  except ValueError as error:  # Such as chips that form no rectangle.
    raise ConfigError(str(error)) from error
  avoid_loads(mesh)
  task = _make_task(config, mesh, dataset)
  visible = len(task.dataset.train)
  if config.data.sharded:
    visible //= config.num_workers
  if config.batch_size > visible:
    raise ConfigError(
      f'batch_size is {config.batch_size}, but a worker sees only {visible} '
      f'training examples of {task.dataset.name}: lower batch_size.'
    )
  names = list(task.cuts) if config.protocol == 'resist' else []
  sizes = accounting.measure(task.shapes(), names)
  depths = chosen_depths(config)
  return Setup(config, task, sizes.num_blocks, sizes, mesh, depths)


def _make_task(
  config: ml_collections.ConfigDict, mesh: Mesh, dataset: Dataset | None
) -> Task:
  """Returns what a run learns; see `prepare`."""

  def read() -> data.Dataset:
    return load_data(config, _copies(mesh))

  if config.model.module:
    task = module_task.make(config, dataset, read)
    module_task.check_tests(config, task.dataset)
    return task
  images = dataset or read()
  if not isinstance(images, data.Dataset):
    raise ConfigError(
      'the data set that the program gives holds no images: name a network '
      'for it in model.module, or make it by from_arrays or from_source.'
    )
  return resnet_task.make(config, images, mesh.devices.flat[0].platform)


def load_data(config: ml_collections.ConfigDict, copies: int) -> data.Dataset:
  """Loads the data set that a config names.

  Args:
    config: A valid one.
    copies: Copies of images in memory that this host keeps; see `data.load`.

  Returns:
    The data set.

  Raises:
    ConfigError: See `data.load`.
  """
  return data.load(
    config.data.name,
    config.data.dir,
    config.data.validation,
    train_split=config.data.train_split,
    test_split=config.data.test_split,
    streaming=config.data.streaming,
    image_size=config.data.image_size,
    resize=config.data.augment.startswith('resized'),
    extra_tests=config.data.extra_tests,
    copies=copies,
  )


def _copies(mesh: Mesh) -> int:
  """Returns how many copies of resident images this host keeps in memory."""
  here = mesh.local_devices
  # Virtual devices of a CPU share the memory of the host, which keeps its own.
  return 1 + sum(device.platform == 'cpu' for device in here)


def describe_data(dataset: Dataset) -> dict[str, Any]:
  """Describes a data set, so that processes can compare theirs.

  Args:
    dataset: Any data set.

  Returns:
    JSON values: sizes, moments, and a digest of all images in memory, or of the
    first few that are streamed.
  """
  splits = {'train': dataset.train, **dataset.tests}
  described = {
    name: {'images': len(split), 'digest': _digest(split)}
    for name, split in splits.items()
  }
  if isinstance(dataset, data.Dataset):
    described |= {
      'classes': dataset.num_classes,
      'mean': dataset.mean.tolist(),
      'deviation': dataset.std.tolist(),
    }
  return {f'data set {dataset.name}': described}


def _digest(split: data.Split | data.Table) -> str:
  if isinstance(split, data.Table):
    return storage.digest_of_arrays(jax.tree.leaves(split.arrays))[:12]
  if isinstance(split.images, data.StreamedImages):
    split = split.take(np.arange(min(len(split), 10))).in_memory()
  return storage.digest_of_arrays([split.images, split.labels])[:12]


def _num_devices(config) -> int:
  """Chooses D * G, so that each process has equally many whole groups."""
  processes, G = jax.process_count(), config.devices_per_worker
  counts = Counter(d.process_index for d in jax.devices())
  here = min(counts.values())
  if here != max(counts.values()):  # JAX's broadcast of a value cannot.
    raise ConfigError(
      f'the processes have {[counts[i] for i in range(processes)]} devices: '
      'give each equally many, such as by JAX_LOCAL_DEVICE_IDS=0,1.'
    )
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
      f'devices_per_worker is {G}, but there are {here} on a host: lower it, '
      'or leave it at 1.'
    )
  if config.num_devices > processes * here:
    raise ConfigError(
      f'num_devices is {config.num_devices}, but there are {processes * here} '
      'here, as many on each host: lower it, or leave it at 0.'
    )
  if config.num_devices:
    return config.num_devices
  platform = jax.devices()[0].platform
  return G * most_devices(config.num_workers, processes, here // G, platform)
