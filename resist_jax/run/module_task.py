"""A network from a module of somebody else's: `config.model.module` names it.

The module defines two functions, and may define three more:

  network(config)              -> Network
  loss(config)                 -> loss_fn(params, present, batch, key)
  data(config)                 -> data.Tables; without it, `config.data` counts
  optimizer(config, schedule)  -> an optax transformation; without it, the SGD
                                  that `config.optimizer` describes
  rescale(config, params, factors) -> params; see `task.Task.rescale`

`loss_fn` returns `(loss, {'name': number})`, scalars of this batch:

  params    what `Network.init` makes; its chains are `[L, ...]`, or `[K, ...]`
            in the sub-network of a worker
  present   by chain, `float32[K]`: 0 for an empty slot, and the residual scale
            of the block otherwise
  batch     the arrays of `data`, each `[B, ...]`, or images and labels
  key       for what is random; None in a test

`config.model.options` holds the settings that a card gives the module.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import importlib
import pathlib
import types
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from resist_jax import data
from resist_jax.decomposition import Division, join, slots_per_worker, split
from resist_jax.errors import FOREIGN, ConfigError, message, one_line
from resist_jax.rounds import LossFn, State, checks, make_mesh, nodes
from resist_jax.rounds.arrays import to_host
from resist_jax.rounds.optimizer_check import check_optimizer
from resist_jax.run import export, optimizer
from resist_jax.run.config import (
  augmentation,
  check_divisions,
  chosen_depths,
  protocols,
)
from resist_jax.run.mean_loss import MeanLoss
from resist_jax.run.task import Dataset

PyTree = Any
_NEEDED = ('network', 'loss')


class Network(NamedTuple):
  """A network of somebody else's.

  Attributes:
    init: Returns the initial parameters for a seed: a dictionary whose chains
      stack their blocks, `[L, ...]`.
    chains: The names of the chains that ResIST cuts; `decoder/blocks` is the
      chain `blocks` inside the dictionary `decoder`.
  """

  init: Callable[[int], PyTree]
  chains: tuple[str, ...]


def load(name: str) -> types.ModuleType:
  """Imports the module that a config names.

  Args:
    name: Its name, such as `my_project.gpt`.

  Raises:
    ConfigError: If that is impossible, or if it lacks a function.
  """
  spelled = name.removesuffix('.py').strip('./').replace('/', '.')
  if spelled != name:
    raise ConfigError(
      f'model.module is {name!r}: name it as Python imports it, such as '
      f'{spelled or "my_network"}.'
    )
  try:
    module = importlib.import_module(name)
  except FOREIGN as error:  # A module may raise anything.
    remedy = 'mend it'
    if isinstance(error, ModuleNotFoundError) and (
      f'{name}.'.startswith(f'{error.name}.')
    ):
      remedy = 'start in the folder that holds it, or install it'
    raise ConfigError(
      f'model.module is {name!r}, which cannot be imported '
      f'({one_line(error)}): {remedy}.'
    ) from error
  for function in _NEEDED:
    if not callable(getattr(module, function, None)):
      raise ConfigError(
        f'model.module is {name!r}, which defines no function '
        f'{function}(config): add it.'
      )
  return module


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleTask:
  """What a module describes; see `task.Task`.

  Attributes:
    config: The config.
    module: The module.
    network: What it returned.
    dataset: What it returned, or what the config names.
  """

  config: ml_collections.ConfigDict
  module: types.ModuleType
  network: Network
  dataset: Dataset

  @property
  def cuts(self) -> dict[str, int | None]:
    """See `task.Task`."""
    return dict.fromkeys(self.network.chains, self.config.min_depth)

  @functools.cached_property
  def metrics(self) -> tuple[str, ...]:
    """See `task.Task`; they are found by tracing the loss."""
    return self.traced(None)

  def traced(
    self, key: jax.Array | None, held: Mapping[str, int] = MappingProxyType({})
  ) -> tuple[str, ...]:
    """Calls the loss on the shapes of an example; returns names of its metrics.

    Args:
      key: What the loss gets as its key: one in training, None in a test.
      held: By chain, how many blocks a worker holds; empty for all blocks.

    Raises:
      ValueError: If what the loss returns cannot be used.
    """
    batch = self.examples(next(iter(self.dataset.tests)), np.zeros(1, int))
    loss = functools.partial(self.test_loss, key=key)
    shared, chains = split(self.shapes(), held)
    for name, blocks in chains.items():
      size = (held[name],)
      chains[name] = jax.tree.map(
        lambda x, n=size: jax.ShapeDtypeStruct(n + x.shape[1:], x.dtype), blocks
      )
    found = jax.eval_shape(loss, join(shared, chains), batch, {})
    return checks.returned_metrics(found)

  @property
  def has_momenta(self) -> bool:
    """See `task.Task`."""
    return function_of(self.module, 'optimizer') is None

  def init(self, seed: int) -> PyTree:
    """See `task.Task`."""
    return self.network.init(seed)

  @property
  def measures(self) -> tuple[str, ...]:
    """See `task.Task`."""
    return 'loss', 'perplexity', *self.metrics

  def shapes(self) -> PyTree:
    """See `task.Task`."""
    return jax.eval_shape(lambda: self.init(0))

  def make_loss(
    self, scale: Mapping[str, float], axis_name: str | None
  ) -> LossFn:
    """See `task.Task`."""
    loss, chosen = self.module.loss(self.config), None
    if isinstance(self.dataset, data.Dataset):
      chosen = augmentation(self.config, self.dataset)

    def loss_fn(params, present, batch, key, constants=None):
      if constants is not None:
        batch = self._picked(constants, batch)
      scaled = self._scaled(params, present, scale)
      if chosen:  # With one key, the loss would draw as the changes do.
        images_key, key = jax.random.split(key)
        images, labels = batch
        images = data.augment(images_key, images, chosen, axis_name)
        batch = self._normalised((images, labels))
      if axis_name is not None:  # Each device has other examples.
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
      return loss(params, scaled, batch, key)

    return loss_fn

  def test_loss(
    self,
    params: PyTree,
    batch: PyTree,
    scales: Mapping[str, Any],
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Calls the module's loss of the whole network.

    Args:
      params: Global parameters.
      batch: Examples as read, see `examples`.
      scales: Residual scale of each chain that ResIST cuts, `float32[L]`; 1
        for any other chain.
      key: Key of the loss; None in tests.

    Returns:
      `(loss, metrics)`.
    """
    scaled = self._scaled(params, {}, scales)
    loss = self.module.loss(self.config)
    return loss(params, scaled, self._normalised(batch), key)

  def _scaled(self, params, present, scale) -> dict[str, jax.Array]:
    """Returns the factor of each slot of each chain; 0 where it is empty."""
    found = {}
    for name, blocks in split(params, self.network.chains)[1].items():
      length = len(jax.tree.leaves(blocks)[0])
      held = present.get(name, jnp.ones(length, jnp.float32))
      found[name] = held * jnp.asarray(scale.get(name, 1.0), jnp.float32)
    return found

  def _picked(self, constants: PyTree, numbers: jax.Array) -> PyTree:
    """Returns a batch from examples that stay on the devices."""
    if isinstance(self.dataset, data.Tables):
      return jax.tree.map(lambda examples: examples[numbers], constants)
    image_shape = self.dataset.train.images.shape[1:]
    mirrors = augmentation(self.config, self.dataset).alternate
    return data.pick(constants, numbers, image_shape, mirrors)

  def _normalised(self, batch: PyTree) -> PyTree:
    if isinstance(self.dataset, data.Tables):
      return batch
    images, labels = batch
    return data.normalise(images, self.dataset.mean, self.dataset.std), labels

  def examples(self, test: str, rows: np.ndarray) -> PyTree:
    """Reads examples of a set to test on, as `test_loss` takes them.

    Args:
      test: Name of the set.
      rows: Which, in an array of any shape.
    """
    split = self.dataset.tests[test]
    if isinstance(split, data.Table):
      return split.take(rows)
    return split.images[rows], split.labels[rows]

  def make_optimizer(
    self, schedule: optax.Schedule
  ) -> optax.GradientTransformation:
    """See `task.Task`."""
    own = function_of(self.module, 'optimizer')
    if own is not None:
      return own(self.config, schedule)
    return optimizer.described(self.config.optimizer, schedule)

  def make_test(
    self,
    scales: Mapping[str, Any],
    mesh: Mesh,
    options: ml_collections.ConfigDict,
  ) -> MeanLoss:
    """See `task.Task`."""
    tests, size = self.dataset.tests.items(), options.batch_size
    rows = {name: np.arange(len(split)) for name, split in tests}
    return MeanLoss(self.test_loss, self.examples, rows, scales, mesh, size)

  def rescale(self, params: PyTree, factors: Mapping[str, float]) -> PyTree:
    """See `task.Task`."""
    own, name = function_of(self.module, 'rescale'), self.config.model.module
    if own is None:
      raise ConfigError(
        f'the residual scale of {", ".join(factors)} changes with num_workers, '
        f'and {name} defines no function rescale(config, params, factors): '
        'keep num_workers, or add it, or begin with residual_scale none.'
      )
    with _told(f'rescale(config, params, factors) of {name}'):
      return own(self.config, params, factors)

  def save(
    self,
    workdir: pathlib.Path,
    state: State,
    params: PyTree,
    scales: Mapping[str, Any],
    test: Any,
  ) -> None:
    """See `task.Task`."""
    del state, test
    form = nodes.described(params)
    record: Any = {'module': self.config.model.module, 'nodes': form}
    if isinstance(self.dataset, data.Dataset):
      record['images'] = export.about_images(self.dataset)
    export.write(workdir, {'params': params, 'scales': dict(scales)}, record)

  def flops(self, lengths: Mapping[str, int]) -> None:
    """See `task.Task`: nobody counts them."""

  def statistics(self, lengths: Mapping[str, int]) -> int:
    """See `task.Task`: a loss of somebody else's averages nothing."""
    del lengths
    return 0


def function_of(module: Any, name: str) -> Callable[..., Any] | None:
  """Returns a function of a module.

  Args:
    module: What a person wrote.
    name: Its name.

  Returns:
    None if there is none; a package of that name which it imports is no
    function, such as `from resist_jax import data`.
  """
  found = getattr(module, name, None)
  return None if isinstance(found, types.ModuleType) else found


def make(
  config: ml_collections.ConfigDict,
  dataset: Dataset | None,
  read: Callable[[], Dataset],
  trains: bool = True,
) -> ModuleTask:
  """Returns the task that a config and its module describe.

  Args:
    config: A valid one.
    dataset: The examples; None for those of the module.
    read: Reads the data set that the config names, if the module has none.
    trains: Whether it is to be trained, which needs its optimiser.

  Raises:
    ConfigError: If the module returns something else.
  """
  config, name = _with_tuples(config), config.model.module
  module = load(name)
  network = _called(name, 'network', module.network, config)
  if not isinstance(network, Network):
    raise ConfigError(
      f'network(config) of {name} returned {type(network).__name__}: let it '
      'return resist_jax.run.module_task.Network(init, chains).'
    )
  own = function_of(module, 'data')
  if dataset is None:
    dataset = read() if own is None else _called(name, 'data', own, config)
  if not isinstance(dataset, Dataset):
    raise ConfigError(
      f'data(config) of {name} returned {type(dataset).__name__}: let it '
      'return what resist_jax.data.from_tables makes.'
    )
  task = ModuleTask(config, module, network, dataset)
  _check(task)
  if trains:
    _check_optimizer(task)
  return task


def check_tests(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
  """Refuses a config with tests that a module's own data do not have.

  Args:
    config: Config of the run.
    dataset: Its data.

  Raises:
    ConfigError: If a test is missing.
  """
  wanted = {data.test_key(name): name for name in config.data.extra_tests}
  field = dict.fromkeys(wanted, 'extra_tests')
  if config.data.validation:
    wanted['validation'] = config.data.validation
    field['validation'] = 'validation'
  for test, value in wanted.items():
    if test not in dataset.tests:
      raise ConfigError(
        f'data.{field[test]} names {value!r}, but data(config) of '
        f'{config.model.module} makes no test {test!r}: let it make one, or '
        f'leave data.{field[test]} at its default.'
      )


def _with_tuples(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Returns a config whose options have tuples for lists.

  Files have lists for both, so a module sees the same in a training and in an
  evaluation.
  """

  def tuples(value: Any) -> Any:
    if isinstance(value, dict):
      return {name: tuples(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
      return tuple(map(tuples, value))
    return value

  config = config.copy_and_resolve_references()
  with config.unlocked():
    options = tuples(config.model.options.to_dict())
    config.model.options = ml_collections.ConfigDict(options)
  return config


def _check(task: ModuleTask) -> None:
  """Raises a ConfigError if what the module returned does not fit."""
  config, name = task.config, task.config.model.module
  with _told(f'network(config) of {name}'):
    shapes = task.shapes()
    lengths = checks.chain_lengths(shapes, task.network.chains)
  with _told(f'loss(config) of {name}, in a test, where its key is None'):
    if 'perplexity' in task.metrics:
      raise ValueError(
        "it returns a metric 'perplexity', a name that tests use: rename it."
      )
  with _told(f'loss(config) of {name}'):
    task.traced(jax.random.key(0))
  if config.protocol == 'resist':
    _check_chains(config, name, lengths)
    held = {
      chain: slots_per_worker(
        L, config.num_workers, config.min_depth, chosen_depths(config)
      )
      for chain, L in lengths.items()
    }
    what = f'loss(config) of {name}, on a worker that holds {held}'
    with _told(what), checks.blocks_in_bounds():
      task.traced(jax.random.key(0), held)


def _check_optimizer(task: ModuleTask) -> None:
  config, shapes = task.config, task.shapes()
  with _told(f'optimizer(config, schedule) of {config.model.module}'):
    rate = optax.constant_schedule(config.lr)
    made: Any = task.make_optimizer(rate)
    if not isinstance(made, optax.GradientTransformation):
      raise ValueError(
        f'it returned {type(made).__name__}: return one of optax.'
      )
    field = 'optimizer.carry_momentum'
    for protocol in sorted(protocols(config)):
      parallel = protocol == 'data_parallel'
      carries = config.optimizer.carry_momentum or parallel
      averaged = parallel or config.num_workers == 1
      check_optimizer(made, shapes, carries, make_mesh(1), field, averaged)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
  """Turns what somebody else's code raises into a line about it."""
  try:
    yield
  except ConfigError:
    raise
  except FOREIGN as error:
    # A check of ours raises a line that says what to do.
    said = message(error) if type(error) is ValueError else one_line(error)
    raise ConfigError(
      f'{what}: {said} (help(resist_jax.run.module_task) says what the '
      'functions return.)'
    ) from error


def _check_chains(config, name: str, lengths: Mapping[str, int]) -> None:
  """Raises a ConfigError if ResIST cannot cut the chains."""
  if not lengths:
    raise ConfigError(
      f'network(config) of {name} names no chain that ResIST could cut: name '
      'one, or use protocol local_sgd.'
    )
  depths = chosen_depths(config)
  if config.depths and len(lengths) > 1:
    raise ConfigError(
      f'depths is {config.depths}, of one chain, but {name} has several.'
    )
  divisions = {
    f'chain {chain}': Division(
      length, config.num_workers, config.min_depth, depths
    )
    for chain, length in lengths.items()
  }
  check_divisions(config, divisions)


def _called(name: str, what: str, function: Callable, config) -> Any:
  try:
    return function(config)
  except ConfigError:
    raise
  except FOREIGN as error:
    raise ConfigError(
      f'{what}(config) of {name} failed '
      f'({one_line(error)}): mend it, or the section model.options of the card.'
    ) from error


def rescaled_blocks(
  params: Mapping[str, PyTree],
  factors: Mapping[str, float],
  ends: Callable[[str], bool],
) -> PyTree:
  """Multiplies the last layer of each residual branch by a factor.

  Args:
    params: Global parameters.
    factors: The factor of each chain, by name.
    ends: Says of a path, such as `Dense_1/kernel`, whether it belongs to the
      last layer of a branch.

  Returns:
    The parameters, for a function `rescale` of a module.
  """
  shared, found = split(params, list(factors))
  for chain, factor in factors.items():

    def scaled(path, leaf, factor=factor):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      return leaf * factor if ends(name) else leaf

    found[chain] = jax.tree_util.tree_map_with_path(scaled, found[chain])
  return to_host(join(shared, found))
