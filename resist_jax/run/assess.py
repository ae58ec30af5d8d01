"""How good a trained ResNet is: in which classes, and at which depth."""

from collections.abc import Sequence
import dataclasses
from functools import partial
import sys
from typing import Any

import jax
import numpy as np

from resist_jax import data
from resist_jax.errors import ConfigError
from resist_jax.run import depth, resnet_task, same_data, setup
from resist_jax.run.config import cut_chains
from resist_jax.run.evaluate import Batches, Evaluator, Results, count
from resist_jax.run.export import Predictor
from resist_jax.run.trained import Asked, Trained

PyTree = Any


@partial(jax.jit, static_argnums=0)
def _apply(network, params, statistics, pixels, scales):
  return network.apply(
    {'params': params, 'batch_stats': statistics},
    pixels,
    scales,
    mutable=[] if statistics else ['batch_stats'],
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
  """Applies an exported network; see `evaluate.Forward`.

  Attributes:
    model: The network.
  """

  model: Predictor

  def gather(self, state: Any) -> tuple[None, int]:
    """Returns nothing: the network is here."""
    del state
    return None, 0

  def logits(self, images: np.ndarray, statistics: PyTree) -> tuple[Any, Any]:
    """Classifies a batch.

    Args:
      images: `uint8[B, H, W, C]`.
      statistics: The collection `batch_stats`; empty to use those of the batch.

    Returns:
      Logits, and the statistics of the batch if they were used.
    """
    model = self.model
    pixels = data.normalise(jax.numpy.asarray(images), model.mean, model.std)
    params = model.variables['params']
    found, own = _apply(model.network, params, statistics, pixels, model.scales)
    return found, own.get('batch_stats', {})

  def apply(
    self, batches: Sequence[Batches], gathered: Any, statistics: PyTree
  ) -> Results:
    """Applies the network to batches; see `evaluate.Forward`."""
    del gathered
    counts, measured = [], []
    for batch in batches:
      used = statistics if batch.fixed else {}
      found, own = self.logits(batch.images()[0], used)
      counts.append(count(found, batch.labels()[0])[None])
      measured.append(jax.tree.map(lambda x: np.asarray(x)[None], own))
    return Results(counts, measured, 0)


def confusion(
  model: Predictor, split: data.Split, batch_size: int
) -> np.ndarray:
  """Counts which classes are taken for which, with fixed statistics.

  Args:
    model: The network.
    split: The images to classify.
    batch_size: Images at once.

  Returns:
    `int[n, n]`: a row for each class, a column for what it was taken for.
  """
  n = len(model.class_names)
  found = np.zeros((n, n), int)
  forward, statistics = Exported(model), model.variables['batch_stats']
  for start in range(0, len(split), batch_size):
    rows = np.arange(start, start + batch_size)
    rows[rows >= len(split)] = -1  # Filled up, so that one program is enough.
    logits, _ = forward.logits(split.images[rows], statistics)
    real = rows >= 0
    taken = np.asarray(logits.argmax(axis=-1))[real]
    np.add.at(found, (split.labels[rows[real]], taken), 1)
  return found


def assess(run: Trained, asked: Asked) -> dict[str, Any]:
  """Measures how good a run of a ResNet is.

  Args:
    run: The run.
    asked: What to measure.

  Returns:
    `class_names`, `names` of what is measured, `measures`, `examples` by test,
    `confusion` by test, and `depth`: a row for each shallower network. JSON
    values.

  Raises:
    ConfigError: If the data are not there, or an option does not fit.
  """
  model: Any = run.model
  lengths = _lengths(run, model)
  depths = depth.asked(asked.depths, max(lengths.values(), default=0))
  dataset, whole = _dataset(run, model, asked)
  size = run.config.evaluation.batch_size
  test = Evaluator(
    Exported(model),
    dataset,
    num_devices=1,
    batch_size=size,
    statistics_images=run.config.evaluation.statistics_images,
    fixed=None if whole else model.variables['batch_stats'],
  )
  found = {
    'class_names': list(model.class_names),
    'names': list(resnet_task.MEASURES),
    'measures': test(None).measures,
    'examples': {name: len(split) for name, split in dataset.tests.items()},
    'confusion': {
      name: confusion(model, split, size).tolist()
      for name, split in dataset.tests.items()
    },
    'depth': [],
  }
  if whole and depths:
    some = {
      name: split.take(data.sample(len(split), asked.depth_examples))
      for name, split in dataset.tests.items()
    }
    dataset = dataclasses.replace(dataset, tests=some)
    test = dataclasses.replace(test, dataset=dataset)
    trained = depth.trained_scales(run.config, lengths, cut_chains(run.config))
    # Norm statistics are measured anew for each network.
    found['depth'] = [
      network.row(_at(test, model, network))
      for network in depth.networks(
        lengths, model.scales, depths, asked.draws, trained
      )
    ]
  return found


def _at(
  test: Evaluator, model: Predictor, network: depth.Shallower
) -> dict[str, float]:
  """Tests a shallower network inside the trained one."""
  forward = Exported(dataclasses.replace(model, scales=network.scales))
  return dataclasses.replace(test, forward=forward)(None).measures


def _lengths(run: Trained, model: Predictor) -> dict[str, int]:
  """Returns L of each chain of blocks that the run's config cuts."""
  params = model.variables['params']
  return {
    name: len(jax.tree.leaves(params[name])[0])
    for name in sorted(cut_chains(run.config))
    if name in params and not name.endswith('_branch')
  }


def _dataset(
  run: Trained, model: Predictor, asked: Asked
) -> tuple[data.Dataset, bool]:
  """Returns the sets to test on, and whether the training images are there."""
  config = asked.reading(run.config)
  tests = {}
  # The set of the run itself has images to train on, which are no test.
  if asked.data and not data.same_set(asked.data, config.data.name):
    test = data.load_test(
      asked.data,
      model.class_names,
      model.image_shape,
      model.resized,
      config.data.dir,
    )
    if same_data.is_training_set(run, asked.data):  # It lies elsewhere now.
      config.data.name, config.data.extra_tests = asked.data, ()
    else:
      tests[data.test_key(asked.data)] = test
  try:
    dataset = setup.load_data(config, copies=2)
    _check_same(run, model, dataset)
  except ConfigError as error:
    if not tests:
      raise ConfigError(
        f'the data of the run cannot be read ({error}) Name a set to test on '
        'with --data, or the folder of TFDS sets with --data_dir.'
      ) from error
    print(
      f'only the whole network is tested, with the statistics that it has: the '
      f'training images cannot be read ({error})',
      file=sys.stderr,
    )
    split = next(iter(tests.values()))
    names = model.class_names
    return data.Dataset('', split, tests, names, model.mean, model.std), False
  return dataclasses.replace(dataset, tests=tests or dataset.tests), True


def _check_same(run: Trained, model: Predictor, dataset: data.Dataset) -> None:
  """Refuses data of other classes, and warns of other examples."""
  known = tuple(model.class_names), tuple(model.image_shape)
  there = tuple(dataset.class_names), dataset.train.images.shape[1:]
  differ = same_data.changes(run, dataset)
  if known != there:
    how = same_data.told(differ) or 'other classes, or images of another size'
    raise ConfigError(
      f'the data set {run.config.data.name!r} is not what the run was trained '
      f'on ({how}): bring that back.'
    )
  if differ:
    print(same_data.warning(differ), file=sys.stderr)
