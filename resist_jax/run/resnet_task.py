"""Image classification by a ResNet."""

from collections.abc import Mapping
import dataclasses
from functools import partial
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from resist_jax import data, models
from resist_jax.rounds import LossFn, State
from resist_jax.run import classification, export, optimizer
from resist_jax.run.block_walk import BlockWalk
from resist_jax.run.config import augmentation, build_model, cut_chains
from resist_jax.run.evaluate import Evaluator, WholeNetwork

PyTree = Any

WHITENING_PIXELS = 5000 * 32 * 32  # From the first images, to measure on.
MEASURES = ('accuracy', 'accuracy_paper')  # For each set that is tested.


@dataclasses.dataclass(frozen=True)
class ResNetTask:
  """Image classification by a ResNet; see `task.Task`.

  Attributes:
    network: The global network.
    dataset: The images.
    config: The config of the run.
  """

  network: models.ResNet
  dataset: data.Dataset
  config: ml_collections.ConfigDict

  @property
  def cuts(self) -> Mapping[str, int | None]:
    """See `task.Task`."""
    return cut_chains(self.config)

  @property
  def metrics(self) -> tuple[str, ...]:
    """See `task.Task`."""
    return classification.METRICS

  @property
  def has_momenta(self) -> bool:
    """See `task.Task`."""
    return True  # It is SGD.

  @property
  def measures(self) -> tuple[str, ...]:
    """See `task.Task`."""
    return MEASURES

  @property
  def image_shape(self) -> tuple[int, ...]:
    """`(H, W, C)` of a training image."""
    return self.dataset.train.images.shape[1:]

  @property
  def augmentation(self) -> data.Augmentation:
    """What happens to training images."""
    return augmentation(self.config, self.dataset)

  def init(self, seed: int) -> PyTree:
    """See `task.Task`."""
    params = models.initial_params(self.network, self.image_shape, seed)
    if self.network.stem == 'whitened':
      dataset, images = self.dataset, self.dataset.train.images
      height, width, _ = self.image_shape
      count = max(1, WHITENING_PIXELS // (height * width))
      # Sets may be sorted by class.
      some = jnp.asarray(images[data.sample(len(images), count)])
      pixels = data.normalise(some, dataset.mean, dataset.std)
      kernel = models.whitening(np.asarray(pixels))
      params['stem'] = {**params['stem'], 'whitening': kernel}
    return params

  def shapes(self) -> PyTree:
    """See `task.Task`."""
    image = jnp.zeros((1, *self.image_shape), jnp.float32)
    return jax.eval_shape(self.network.init, jax.random.key(0), image)['params']

  def make_loss(
    self, scale: Mapping[str, float], axis_name: str | None
  ) -> LossFn:
    """See `task.Task`."""
    return classification.make_loss(
      self.network,
      self.dataset,
      scale,
      self.augmentation,
      classification.Objective(
        self.config.label_smoothing,
        self.config.distillation.weight,
        self.config.distillation.temperature,
      ),
      axis_name,
    )

  def make_optimizer(
    self, schedule: optax.Schedule
  ) -> optax.GradientTransformation:
    """See `task.Task`."""
    return optimizer.described(self.config.optimizer, schedule)

  def make_test(
    self,
    scales: Mapping[str, Any],
    mesh: Mesh,
    options: ml_collections.ConfigDict,
  ) -> Evaluator:
    """See `task.Task`."""
    make = WholeNetwork
    if options.stream_blocks:
      make = partial(BlockWalk, batches_at_once=options.batches_at_once)
    return Evaluator(
      make(self.network, self.dataset, scales, mesh),
      self.dataset,
      mesh.size,
      options.batch_size,
      options.statistics_images,
    )

  def rescale(self, params: PyTree, factors: Mapping[str, float]) -> PyTree:
    """See `task.Task`."""
    return models.rescale_branches(params, factors, self.network)

  def save(
    self,
    workdir: pathlib.Path,
    state: State,
    params: PyTree,
    scales: Mapping[str, Any],
    test: Any,
  ) -> None:
    """See `task.Task`."""
    variables = {'params': params, 'batch_stats': test.statistics(state)}
    export.save(workdir, self.predictor(variables, scales))

  def predictor(
    self, variables: dict[str, PyTree], scales: Mapping[str, Any]
  ) -> export.Predictor:
    """Returns the network to deploy.

    Args:
      variables: The collections `params` and `batch_stats`.
      scales: See `task.Task.make_test`.
    """
    dataset = self.dataset
    return export.Predictor(
      self.network,
      variables,
      dict(scales),
      dataset.mean,
      dataset.std,
      dataset.class_names,
      self.image_shape,
      dataset.resized,
    )

  def flops(self, lengths: Mapping[str, int]) -> float:
    """See `task.Task`."""
    return models.predicted_flops(
      self.network, self.image_shape, lengths, self.passes
    )

  @property
  def passes(self) -> int:
    """Forward passes in a step: with distillation, one more."""
    return 2 if self.config.distillation.weight else 1

  def statistics(self, lengths: Mapping[str, int]) -> int:
    """See `task.Task`: what batch norm measures, and gradients of it."""
    measured = models.num_statistics(self.network, self.image_shape, lengths)
    return (self.passes + 1) * measured


def make(
  config: ml_collections.ConfigDict, dataset: data.Dataset, platform: str
) -> ResNetTask:
  """Returns the task that a config describes.

  Args:
    config: A valid one.
    dataset: The images.
    platform: Platform of the devices; see `models.ResNet`.
  """
  network = build_model(config, dataset.num_classes, platform)
  return ResNetTask(network, dataset, config)
