"""How good a trained network of somebody else's is, by its own loss."""

import contextlib
import sys
from typing import Any

import ml_collections
import numpy as np

from resist_jax import accounting, data
from resist_jax.errors import ConfigError
from resist_jax.rounds import make_mesh, nodes
from resist_jax.run import depth, export, module_task, same_data, setup
from resist_jax.run.export import Parameters
from resist_jax.run.mean_loss import MeanLoss
from resist_jax.run.module_task import ModuleTask
from resist_jax.run.trained import Asked, Trained


def assess(run: Trained, asked: Asked) -> dict[str, Any]:
  """Measures how good a run of a module's network is.

  Args:
    run: The run.
    asked: What to measure.

  Returns:
    `names` of what is measured, `measures`, `examples` by test, `broken` (how
    many of them have a loss that is not finite), and `depth`: a row for each
    shallower network. JSON values.

  Raises:
    ConfigError: If the module, or what it returns, is not that of the run.
  """
  model: Any = run.model
  task = _task(run, asked)
  _check_fits(task, model)
  params = nodes.with_nodes_of(task.shapes(), model.params)
  tests = task.dataset.tests
  chains = task.network.chains
  lengths = accounting.measure(task.shapes(), chains).num_blocks
  depths = depth.asked(asked.depths, max(lengths.values(), default=0))
  measured = _test(task, model, None)(params, chains, model.scales)
  found = {
    'names': list(task.measures),
    'measures': measured.measures,
    'examples': {name: len(split) for name, split in tests.items()},
    'broken': measured.broken,
    'depth': [],
  }
  if not asked.data and isinstance(task.dataset, data.Tables):
    found['data'] = task.dataset.name
  if depths:
    test = _test(task, model, asked.depth_examples)  # One program for all.
    trained = depth.trained_scales(task.config, lengths, task.cuts)
    found['depth'] = [
      network.row(test(params, chains, network.scales).measures)
      for network in depth.networks(
        lengths, model.scales, depths, asked.draws, trained
      )
    ]
  return found


def _test(task: ModuleTask, model: Parameters, most: int | None) -> Any:
  """Returns what tests parameters, on so many examples of each set."""
  rows = {
    name: np.arange(len(split))
    if most is None
    else data.sample(len(split), most)
    for name, split in task.dataset.tests.items()
  }
  size = task.config.evaluation.batch_size
  mesh = make_mesh(1)
  return MeanLoss(
    task.test_loss, task.examples, rows, model.scales, mesh, size
  ).of_params


def _task(run: Trained, asked: Asked) -> ModuleTask:
  """Returns what the run learned, with the sets to test on."""
  config = asked.reading(run.config)
  module = module_task.load(config.model.module)
  own = module_task.function_of(module, 'data') is not None
  if not asked.data:
    if config.data.name.startswith(data.GIVEN):
      _read(config)  # Raises what a program has to do.
    return _made_as_trained(run, config)
  if own:
    return _on_own_data(config, asked.data)
  return _on_images(run, config, asked.data)


def _check_same(run: Trained, task: ModuleTask) -> None:
  """Refuses data of other classes, and warns of other examples."""
  differ = same_data.changes(run, task.dataset)
  if 'classes' in differ:
    raise ConfigError(
      f'the data set {run.config.data.name!r} is not what the run was trained '
      f'on ({same_data.told(differ)}): bring that back.'
    )
  if differ:
    print(same_data.warning(differ), file=sys.stderr)


def _made(config: ml_collections.ConfigDict) -> ModuleTask:
  return module_task.make(config, None, lambda: _read(config), trains=False)


def _made_as_trained(
  run: Trained, config: ml_collections.ConfigDict
) -> ModuleTask:
  """Makes the task on the data of the training; see `_check_same`."""
  task = _made(config)
  _check_same(run, task)
  return task


def _read(config: ml_collections.ConfigDict) -> data.Dataset:
  return setup.load_data(config, copies=1)


def _on_own_data(config: ml_collections.ConfigDict, name: str) -> ModuleTask:
  """Lets the module make its data again, by another name."""
  before = None
  if not config.data.name.startswith(data.GIVEN):
    with contextlib.suppress(ConfigError):  # They may be gone.
      before = _made(config)
  config = config.copy_and_resolve_references()
  config.data.name = name
  task = _made(config)
  if before and _digests(before) == _digests(task):
    raise ConfigError(
      f'data(config) of {config.model.module} returns the same examples for '
      f'data.name {name!r}: let it read config.data.name, or leave --data out.'
    )
  return task


def _on_images(
  run: Trained, config: ml_collections.ConfigDict, name: str
) -> ModuleTask:
  """Puts another set of images in the place of the tests."""
  if data.same_set(name, config.data.name):  # It has images to train on.
    return _made_as_trained(run, config)
  model: Any = run.model
  about = model.images
  if about is None:
    dataset: Any = _made_as_trained(run, config).dataset
    about = export.about_images(dataset)
  shape, classes = tuple(about['image_shape']), tuple(about['class_names'])
  test = data.load_test(name, classes, shape, about['resized'], config.data.dir)
  if same_data.is_training_set(run, name):  # It lies elsewhere now.
    config.data.name, config.data.extra_tests = name, ()
    return _made_as_trained(run, config)
  moments = (np.array(about[key], np.float32) for key in ('mean', 'std'))
  tests = {data.test_key(name): test}
  other = data.Dataset('', test, tests, classes, *moments)
  return module_task.make(config, other, lambda: other, trains=False)


def _digests(task: ModuleTask) -> list[Any]:
  """Returns what the examples are, without the name of their set."""
  return list(setup.describe_data(task.dataset).values())


def _check_fits(task: ModuleTask, model: Parameters) -> None:
  """Raises a ConfigError if the module makes another network than it did."""
  differ = nodes.first_difference(
    nodes.shapes_by_name(model.params), nodes.shapes_by_name(task.shapes())
  )
  if differ:
    name, ours, theirs = differ
    raise ConfigError(
      f'the parameter {name} of the run has the shape {ours}, but '
      f'network(config) of {task.config.model.module} makes {theirs}: use the '
      'module with which it was trained.'
    )
